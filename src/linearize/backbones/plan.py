"""A resolved plan: which site gets which mixer. This is what a saved student's config holds."""

from __future__ import annotations

from typing import Any

from torch import nn

from linearize.errors import LinearizeError
from linearize.mixers import AttentionShape, Mixer, build_mixer, mixer_class

# One rule: {"layers": [site names], "mixer": name, "arguments": {...}}; JSON throughout.
Plan = list[dict[str, Any]]


def check_plan(plan: object, source: str) -> None:
    """Checks that what was read from a file is a plan with mixers of ours alone.

    Raises:
        LinearizeError: It is not.
    """
    kinds = {"layers": list, "mixer": str, "arguments": dict}
    for rule in plan if isinstance(plan, list) else [plan]:
        if not isinstance(rule, dict) or not all(isinstance(rule.get(key), kind) for key, kind in kinds.items()):
            raise LinearizeError(f"{source} has no plan of mixers: export the student again.")
        mixer_class(rule["mixer"])


def mixers_for_plan(plan: Plan, shapes: dict[str, AttentionShape]) -> dict[str, Mixer]:
    """Builds the mixer of every site; sites that no rule names get `softmax`, which is what they had.

    Args:
        plan: Resolved rules.
        shapes: Every site of the transformer with its sizes.

    Raises:
        LinearizeError: A rule names a site that is not there or is already taken, or asks a mixer for what it does
            not have.
    """
    rules: dict[str, dict[str, Any]] = {}
    for rule in plan:
        for name in rule["layers"]:
            if name not in shapes:
                raise LinearizeError(f"the plan names site {name!r}, this transformer has {', '.join(shapes)}")
            if name in rules:
                raise LinearizeError(f"two rules of the plan name site {name!r}; give it one mixer")
            rules[name] = rule
    default = {"mixer": "softmax", "arguments": {}}
    chosen = {name: rules.get(name, default) for name in shapes}
    return {name: build_mixer(rule["mixer"], shapes[name], rule["arguments"]) for name, rule in chosen.items()}


def preferred_order(mixers: list[Mixer]) -> str:
    """The order, "raster" or "tile", in which image tokens travel: the one that most mixers ask for."""
    orders = [mixer.token_order for mixer in mixers]
    wants_tile = orders.count("tile")
    return "tile" if wants_tile and wants_tile >= orders.count("raster") else "raster"


def planned_sites(plan: Plan) -> list[str]:
    """The names of all sites in a plan."""
    return [name for rule in plan for name in rule["layers"]]


def match_dtype_and_device(mixer: Mixer, attention: nn.Module) -> Mixer:
    """Moves a mixer to where the layer's weights are."""
    weight = next(attention.parameters())
    return mixer.to(device=weight.device, dtype=weight.dtype)
