"""Low-rank adapters on the teacher's projections, by peft; merged, they leave an ordinary layer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from linearize.errors import LinearizeError, check_count
from linearize.extras import require

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out")
_ADAPTER = "default"


@dataclass(frozen=True)
class LoraSettings:
    """LoRA (arXiv 2106.09685): a projection W becomes W + alpha / rank B A, of which A and B train.

    Attributes:
        rank: Rows of A [rank, channels in] and columns of B [channels out, rank]; A is random and B zero at the start.
        alpha: Scale of the adapter, over the rank.
        dropout: Share of the adapter's input that is dropped in training.
        targets: The projections of a site that get an adapter, of those that its mixer trains.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = PROJECTIONS

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LoraSettings:
        """Reads and checks a config, whose targets are a list or one name.

        Raises:
            LinearizeError: A value is none of its choices.
        """
        targets = config["targets"]
        return cls(**{**config, "targets": tuple(targets) if isinstance(targets, list) else (targets,)})

    def __post_init__(self) -> None:
        check_count("adapter.rank", self.rank)
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or not self.alpha > 0:
            raise LinearizeError(f"adapter.alpha={self.alpha} is no scale of an adapter: give a number above 0.")
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise LinearizeError(
                f"adapter.dropout={self.dropout} is no share: give a number from 0 up to, not with, 1."
            )
        unknown = [target for target in self.targets if target not in PROJECTIONS]
        if unknown or not self.targets:
            raise LinearizeError(
                f"adapter.targets=[{', '.join(map(str, self.targets))}] has no projections of an attention layer: "
                f"choose from {', '.join(PROJECTIONS)}."
            )

    def __str__(self) -> str:
        return f"lora of rank {self.rank} with alpha {self.alpha:g} on {', '.join(self.targets)}"


def add_lora(student: nn.Module, projections: Iterable[str], settings: LoraSettings) -> None:
    """Puts adapters beside linear layers, in place; the layers keep the parameters that they have.

    Args:
        student: A transformer.
        projections: Names of the linear layers.
        settings: Their size.

    Raises:
        LinearizeError: There is no layer to adapt, or peft is not installed.
    """
    require("peft", purpose="adapter=lora")
    from peft import LoraConfig, inject_adapter_in_model

    names = list(projections)
    if not names:
        raise LinearizeError(
            f"adapter.targets=[{', '.join(settings.targets)}] names no projection that this student's mixers train: "
            f"choose from {', '.join(PROJECTIONS)}, or set adapter=none."
        )
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=cast(int, settings.alpha),
        lora_dropout=settings.dropout,
        target_modules="|".join(re.escape(name) for name in names),
    )
    inject_adapter_in_model(config, student, adapter_name=_ADAPTER)
    for layer in _adapted_layers(student).values():
        # Autocast chooses the dtype; peft would first copy the layer's input to the adapter's float32.
        layer.cast_input_dtype_enabled = False


def is_adapter_parameter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return any(part.startswith("lora_") for part in name.split("."))


def has_adapters(student: nn.Module) -> bool:
    """Whether a transformer has adapters."""
    return any(is_adapter_parameter(name) for name, _ in student.named_parameters())


@torch.no_grad()
def merge_lora(student: nn.Module) -> None:
    """Replaces every adapted layer by one linear layer with the sum of both, in place.

    The sum is taken in float32 and stored in the layer's dtype, in a parameter of its own: the layer's weight may be a
    teacher's, and stays as it is.
    """
    for name, layer in _adapted_layers(student).items():
        owner, _, leaf = name.rpartition(".")
        setattr(student.get_submodule(owner), leaf, _merged(layer))
    if hasattr(student, "peft_config"):
        del student.peft_config


def _adapted_layers(student: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in student.named_modules() if hasattr(module, "get_delta_weight")}


def _merged(layer: Any) -> nn.Linear:
    base = layer.get_base_layer()
    weight = base.weight.float() + layer.get_delta_weight(_ADAPTER).float()
    merged = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
    merged.weight = nn.Parameter(weight.to(base.weight.dtype), requires_grad=False)
    merged.bias = base.bias
    return merged.train(base.training)
