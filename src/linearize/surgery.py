"""Surgery: layer globs are matched to sites, sites get mixers, and a report says what was done."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import nn

from linearize.adapters import LoraSettings, add_lora, has_adapters, is_adapter_parameter
from linearize.backbones import Backbone, find_backbone
from linearize.backbones.plan import Plan, planned_sites
from linearize.errors import LinearizeError
from linearize.flops import attention_flops, softmax_flops
from linearize.layout import Layout
from linearize.mixers import Mixer, check_arguments, mixer_defaults


@dataclass(frozen=True)
class SiteReport:
    """One replaced site: its name, its mixer with arguments, how many parameters train there."""

    name: str
    mixer: str
    arguments: dict[str, Any]
    trained_parameters: int


@dataclass(frozen=True)
class SurgeryReport:
    """What surgery did.

    Attributes:
        sites: The replaced sites, in the order of the forward pass.
        num_sites: All attention layers of the transformer.
        trained_parameters: Parameters that distillation trains.
        layout: The tokens at which operations are counted.
        attention_flops_before: Operations of attention in one forward pass of the teacher.
        attention_flops_after: The same for the student.
    """

    sites: list[SiteReport]
    num_sites: int
    trained_parameters: int
    layout: Layout
    attention_flops_before: int
    attention_flops_after: int

    @property
    def attention_flops_ratio(self) -> float:
        """Operations after over before."""
        return self.attention_flops_after / self.attention_flops_before

    def __str__(self) -> str:
        grids = " + ".join(str(grid) for grid in self.layout.grids)
        groups: dict[str, list[str]] = {}
        for site in self.sites:
            arguments = ", ".join(f"{key}={value}" for key, value in site.arguments.items())
            groups.setdefault(f"{site.mixer}({arguments})", []).append(site.name)
        lines = [f"{len(self.sites)} of {self.num_sites} attention layers replaced"]
        for mixer, names in groups.items():
            shown = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"
            lines.append(f"  {mixer} in {len(names)}: {shown}")
        lines.append(f"trained parameters: {self.trained_parameters:,}")
        lines.append(
            f"attention of one forward pass at {grids} image and {self.layout.num_text_tokens} text tokens: "
            f"{self.attention_flops_before / 1e9:,.1f} -> {self.attention_flops_after / 1e9:,.1f} GFLOPs "
            f"({self.attention_flops_ratio:.3f}x)"
        )
        return "\n".join(lines)


def linearize(
    model: Any,
    mixer: str | None = "clear",
    *,
    layers: str | Sequence[str] = ("*",),
    plan: Iterable[Mapping[str, Any]] | None = None,
    layout: Layout | None = None,
    **mixer_arguments: Any,
) -> SurgeryReport:
    """Puts mixers into the attention layers of a transformer, in place.

    Its class becomes the student's, its weights stay the tensors that they are. New parameters get the dtype of the
    weights beside them, as in an exported student: for inference bfloat16 does, as mixers compute in float32 where it
    matters. To train, take `share_student`, whose new parameters are float32: small steps would be lost in bfloat16.

    A transformer that is linearized already gets the new plan instead of the old one; sites that no rule names
    compute softmax as before.

    Args:
        model: A diffusers transformer of a known family, or a pipeline that has one.
        mixer: Name of the mixer, with `mixer_arguments` as its arguments.
        layers: Globs over site names such as "transformer_blocks.0.attn".
        plan: Instead of these three, rules {"layers": globs, "mixer": name, **arguments} for different mixers in
            different layers.
        layout: The tokens at which the report counts operations; by default an ordinary picture of the family.
        **mixer_arguments: `window=8` and the like.

    Returns:
        What was replaced, what trains, and what attention costs.

    Raises:
        LinearizeError: Unknown family, mixer or argument; a glob that matches nothing; two rules for one site.
    """
    transformer = getattr(model, "transformer", model)
    backbone = find_backbone(transformer)
    if plan is None:
        plan = [{"layers": layers, "mixer": mixer, **mixer_arguments}]
    elif mixer_arguments:
        raise LinearizeError(
            f"plan= and {next(iter(mixer_arguments))}= exclude each other; put arguments into the rules"
        )
    resolved = resolve_plan(plan, list(backbone.sites(transformer)))
    backbone.student_class.convert(transformer, resolved)
    return _report(backbone, transformer, resolved, layout or backbone.reference_layout(transformer))


def resolve_plan(rules: Iterable[Mapping[str, Any]], site_names: Sequence[str]) -> Plan:
    """Turns rules with globs into a plan with site names and all arguments, as a saved student keeps it.

    Args:
        rules: {"layers": glob or globs, "mixer": name, **arguments}; a rule of a resolved plan passes as it is.
        site_names: The sites of the transformer.

    Raises:
        LinearizeError: Unknown mixer or argument; a glob that matches nothing; two rules for one site.
    """
    plan: Plan = []
    owners: dict[str, str] = {}
    for rule in rules:
        arguments = {key: value for key, value in rule.items() if key not in ("layers", "mixer", "arguments")}
        arguments |= rule.get("arguments", {})
        name, globs = rule.get("mixer"), rule.get("layers", "*")
        globs = [globs] if isinstance(globs, str) else list(globs)
        check_arguments(name, arguments)
        described = f"{name!r} in {', '.join(globs)}"
        matched = match_layers(globs, site_names)
        for site in matched:
            if site in owners:
                raise LinearizeError(
                    f"two rules claim {site}: {owners[site]} and {described}; make their layers disjoint"
                )
            owners[site] = described
        plan.append({"layers": matched, "mixer": name, "arguments": {**mixer_defaults(name), **arguments}})
    return plan


def match_layers(globs: Sequence[str], site_names: Sequence[str]) -> list[str]:
    """The sites that any of the globs matches, in the order of `site_names`.

    Raises:
        LinearizeError: A glob matches nothing.
    """
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in site_names):
            raise LinearizeError(
                f"layers glob {glob!r} matches none of the {len(site_names)} sites: give globs over names such as "
                f"{site_names[0]} and {site_names[-1]}."
            )
    return [name for name in site_names if any(fnmatchcase(name, glob) for glob in globs)]


def trained_parameters(student: nn.Module) -> dict[str, nn.Parameter]:
    """What distillation trains: in every planned site the mixer's parameters and the projections that it names.

    Where there are adapters, they train in the place of the projections.

    Raises:
        LinearizeError: The transformer is not linearized.
    """
    plan = cast(Mapping[str, Any], getattr(student, "config", {})).get("linearize_plan")
    if plan is None:
        raise LinearizeError(f"{type(student).__name__} is not linearized; call linearize.linearize() on it first")
    sites, adapted = find_backbone(student).sites(student), has_adapters(student)
    return {
        f"{name}.{key}": value
        for name in planned_sites(plan)
        for key, value in _trained_in(sites[name], adapted=adapted).items()
    }


def is_mixer_parameter(name: str) -> bool:
    """Whether one of `trained_parameters` belongs to a mixer, and not to a projection of the teacher's."""
    return ".mixer." in name


def _trained_in(site: nn.Module, *, adapted: bool) -> dict[str, nn.Parameter]:
    projections = cast(Mixer, site.mixer).trained_projections
    return {
        name: value
        for name, value in site.named_parameters()
        if (owner := name.partition(".")[0]) == "mixer"
        or (owner in projections and (not adapted or is_adapter_parameter(name)))
    }


def _projections(student: nn.Module, targets: Sequence[str]) -> list[str]:
    """The linear layers among `targets` that the mixers of a student train, by name."""
    plan = cast(Mapping[str, Any], student.config)["linearize_plan"]
    sites = find_backbone(student).sites(student)
    names = []
    for site in planned_sites(plan):
        owners = set(targets).intersection(cast(Mixer, sites[site].mixer).trained_projections)
        for name, module in sites[site].named_modules():
            if name.partition(".")[0] in owners and isinstance(module, nn.Linear):
                names.append(f"{site}.{name}")
    return names


def share_student(
    teacher: nn.Module, plan: Iterable[Mapping[str, Any]], adapter: LoraSettings | None = None
) -> nn.Module:
    """A student beside its teacher that costs only what trains.

    Frozen parameters and buffers are the teacher's own objects; trained ones are float32 copies that require
    gradients. The teacher is frozen. Run the student under autocast where the teacher is not float32.

    Args:
        teacher: A transformer of a known family.
        plan: Rules as `linearize` takes them.
        adapter: Adapters that train in the place of the projections; the projections are then the teacher's own, too.
    """
    teacher.requires_grad_(False)
    shared = [*teacher.parameters(), *teacher.buffers()]
    student = copy.deepcopy(teacher, memo={id(tensor): tensor for tensor in shared})
    linearize(student, plan=plan)
    if adapter is not None:
        add_lora(student, _projections(student, adapter.targets), adapter)
    student.requires_grad_(False)
    for name, parameter in trained_parameters(student).items():
        owner, _, leaf = name.rpartition(".")
        copied = nn.Parameter(parameter.detach().to(torch.float32, copy=True))
        student.get_submodule(owner).register_parameter(leaf, copied)
    return student


def surgery_report(student: Any, layout: Layout | None = None) -> SurgeryReport:
    """What surgery did to a student; operations are counted at an ordinary picture unless a layout is given."""
    backbone = find_backbone(student)
    return _report(backbone, student, student.config["linearize_plan"], layout or backbone.reference_layout(student))


def _report(backbone: Backbone, transformer: nn.Module, plan: Plan, layout: Layout) -> SurgeryReport:
    sites, adapted = backbone.sites(transformer), has_adapters(transformer)
    reports = [
        SiteReport(
            name,
            rule["mixer"],
            rule["arguments"],
            sum(parameter.numel() for parameter in _trained_in(sites[name], adapted=adapted).values()),
        )
        for rule in plan
        for name in rule["layers"]
    ]
    order = list(sites)
    return SurgeryReport(
        sites=sorted(reports, key=lambda report: order.index(report.name)),
        num_sites=len(sites),
        trained_parameters=sum(report.trained_parameters for report in reports),
        layout=layout,
        attention_flops_before=sum(softmax_flops(backbone.shape(site), layout) for site in sites.values()),
        attention_flops_after=attention_flops(backbone, transformer, layout),
    )
