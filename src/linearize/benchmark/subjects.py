"""The transformers that are measured: students, and the baselines that say what a student's speed is made of."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from linearize.backbones import find_backbone
from linearize.errors import LinearizeError
from linearize.layout import Layout
from linearize.mixers import Mixer, MixerContext, check_arguments
from linearize.surgery import linearize, share_student


class RemovedAttention(Mixer):
    """No attention at all, which no mixer can undercut; query and key are made, normed and rotated all the same."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: MixerContext) -> Tensor:
        """See `Mixer.forward`."""
        return _value_alone(*context.rotate_both(query, key), value)

    def flops(self, layout: Layout, batch: int = 1) -> int:
        """None."""
        return 0


# A compiler must not see that query and key are not needed: it would drop their projections.
@torch.library.custom_op("linearize_benchmark::value_alone", mutates_args=())
def _value_alone(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return value.clone()


@_value_alone.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.empty_like(value)


def stock(transformer: nn.Module) -> nn.Module:
    """Diffusers' own transformer: the teacher's class around the teacher's tensors."""
    shared = [*transformer.parameters(), *transformer.buffers()]
    return copy.deepcopy(transformer, memo={id(tensor): tensor for tensor in shared})


def softmax_student(transformer: nn.Module) -> nn.Module:
    """Dense attention within our own blocks."""
    return share_student(transformer, [])


def without_attention(transformer: nn.Module) -> nn.Module:
    """Our own blocks without any attention."""
    student = share_student(transformer, [])
    backbone = find_backbone(student)
    for site in backbone.sites(student).values():
        site.mixer = RemovedAttention(backbone.shape(site))
    return student


BASELINES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "teacher": stock,
    "dense_own_block": softmax_student,
    "attention_removed": without_attention,
}


def student_of(transformer: nn.Module, rule: Mapping[str, Any], *, shared: bool = True) -> nn.Module:
    """A student with one mixer in every layer.

    Args:
        transformer: The teacher.
        rule: "mixer" and its arguments; under "measure" attributes of the mixers that are no arguments: "backend" of
            local attention, "token_order".
        shared: Frozen tensors are the teacher's; otherwise the student is a whole model, which trains in the teacher's
            dtype.

    Raises:
        LinearizeError: A mixer, an argument of it or an attribute does not exist, or a value is refused.
    """
    arguments = dict(rule)
    measure = arguments.pop("measure", {})
    if shared:
        student = share_student(transformer, [{"layers": "*", **arguments}])
    else:
        student = copy.deepcopy(transformer)
        linearize(student, plan=[{"layers": "*", **arguments}])
    for site in find_backbone(student).sites(student).values():
        for name, value in measure.items():
            if not hasattr(site.mixer, name):
                raise LinearizeError(
                    f"measure names {name!r}, which {rule['mixer']} lacks: choose backend, token_order."
                )
            setattr(cast(Mixer, site.mixer), name, value)
    return student


def check_student(setting: str, rule: Any) -> None:
    """Checks the names in a rule of `student_of`, without a teacher.

    Raises:
        LinearizeError: It is no rule, or its mixer or an argument does not exist.
    """
    if not isinstance(rule, Mapping):
        raise LinearizeError(f"{setting}={rule} is no student: set {setting}={{mixer: clear, window: 16}} or the like.")
    arguments = {name: value for name, value in rule.items() if name not in ("mixer", "measure")}
    try:
        check_arguments(rule.get("mixer"), arguments)
    except LinearizeError as error:
        raise LinearizeError(f"{setting}: {error}") from error
