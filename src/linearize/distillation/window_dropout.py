"""Training steps without windows, so that the linear branches of hybrid mixers keep learning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from linearize.distillation.noise import seeded_generator
from linearize.errors import LinearizeError


@dataclass(frozen=True)
class WindowDropout:
    """How often a hybrid's window is left out of a training step.

    Where a window explains most of a layer, its linear branch has little left to learn: the quality of Lizard (arXiv
    2507.09025) and LoLCATs (arXiv 2410.10254) falls again when their windows grow from 128 or 64 tokens to 256. Here
    each layer goes without its window in a share of the optimizer steps, as if it had `branches=linear`.

    Attributes:
        probability: Share of the layers without a window at the first step.
        final_probability: At the last step; the share moves on a line between both. None stays at `probability`.
    """

    probability: float = 0.0
    final_probability: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("probability", self.probability), ("final_probability", self.final_probability)):
            if value is None and name == "final_probability":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise LinearizeError(f"window_dropout.{name}={value} is no probability: give a number from 0 to 1.")

    @property
    def is_on(self) -> bool:
        """Whether any window is ever left out."""
        return self.probability > 0 or bool(self.final_probability)

    def at(self, step: int, num_steps: int) -> float:
        """The probability at one of `num_steps` optimizer steps, counted over all stages."""
        final = self.probability if self.final_probability is None else self.final_probability
        return self.probability + (final - self.probability) * min(1.0, step / max(1, num_steps - 1))

    def is_dropped(self, layer: str, *, seed: int, step: int, num_steps: int) -> bool:
        """Whether a layer goes without its window at a step: a function of these arguments alone."""
        generator = seeded_generator("window_dropout", seed, step, layer)
        return torch.rand((), generator=generator).item() < self.at(step, num_steps)


class WindowSwitch:
    """The windows of a student's hybrid mixers, which have `branches` "both".

    Args:
        sites: The student's sites by name.
        dropout: How often windows are left out.

    Raises:
        LinearizeError: They are, and no mixer has a window beside a linear branch.
    """

    def __init__(self, sites: Mapping[str, nn.Module], dropout: WindowDropout) -> None:
        self._dropout = dropout
        mixers: dict[str, Any] = {name: site.mixer for name, site in sites.items()}
        self._mixers = {name: mixer for name, mixer in mixers.items() if getattr(mixer, "branches", None) == "both"}
        if dropout.is_on and not self._mixers:
            raise LinearizeError(
                f"window_dropout.probability={dropout.probability} finds no mixer with a window and a linear branch: "
                "choose one that has branches=both, such as mixer=lolcats, or set it to 0."
            )

    def drop(self, *, seed: int, step: int, num_steps: int) -> int:
        """Leaves windows out until `restore`; returns of how many layers."""
        if not self._dropout.is_on:
            return 0
        dropped = [
            mixer
            for name, mixer in self._mixers.items()
            if self._dropout.is_dropped(name, seed=seed, step=step, num_steps=num_steps)
        ]
        for mixer in dropped:
            mixer.branches = "linear"
        return len(dropped)

    def restore(self) -> None:
        """Puts all windows back."""
        for mixer in self._mixers.values():
            mixer.branches = "both"
