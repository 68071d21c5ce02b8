"""Stages of a distillation: what is trained on, and for how many optimizer steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from linearize.distillation.losses import LossTerm
from linearize.errors import LinearizeError

TRAINS = ("all", "mixer")


@dataclass(frozen=True)
class Stage:
    """A stretch of training under one loss.

    Attributes:
        name: "transfer", "distill", or what the user calls it.
        terms: Terms of the loss by name.
        num_steps: Optimizer steps.
        trains: "all", or "mixer": the mixers' own parameters alone, while the projections or their adapters wait.
        lr: Learning rate before the schedule; None takes the optimizer's.
    """

    name: str
    terms: Mapping[str, LossTerm]
    num_steps: int
    trains: str = "all"
    lr: float | None = None

    def __post_init__(self) -> None:
        if self.trains not in TRAINS:
            raise LinearizeError(f"{self.name}_trains={self.trains} is unknown: use {' or '.join(TRAINS)}.")
        if self.lr is not None and (not isinstance(self.lr, int | float) or self.lr <= 0):
            raise LinearizeError(f"{self.name}_lr={self.lr} trains nothing: give a number above 0, or null.")
        if not any(term.weight > 0 for term in self.terms.values()):
            raise LinearizeError(
                f"The loss of stage {self.name} has no term with a weight above 0: give one, or set loss=clear."
            )


def allot_steps(stages: Mapping[str, int | float | None], max_steps: int) -> dict[str, int]:
    """Shares out optimizer steps over stages, in their order; stages without any are left out.

    Args:
        stages: Steps by name, or a share of all steps, between 0 and 1; None takes all that the others leave.
        max_steps: Optimizer steps in all.

    Raises:
        LinearizeError: the stages do not add up to `max_steps`, more than one asks for the rest, or one is no number of
            steps.
    """
    if max_steps < 1:
        raise LinearizeError(f"trainer.max_steps={max_steps} trains nothing: give at least 1.")
    open_stages = [name for name, steps in stages.items() if steps is None]
    fixed = {name: _whole_steps(name, steps, max_steps) for name, steps in stages.items() if steps is not None}
    if len(open_stages) > 1:
        raise LinearizeError(
            f"The stages {' and '.join(open_stages)} both ask for the rest of the steps: set all but one to a number."
        )
    rest = max_steps - sum(fixed.values())
    if rest < 0 or (rest > 0 and not open_stages):
        raise LinearizeError(
            f"The stages take {sum(fixed.values())} steps and trainer.max_steps is {max_steps}: "
            "make them equal, or set one stage to null so that it takes the rest."
        )
    allotted = {name: fixed.get(name, rest) for name in stages}
    return {name: steps for name, steps in allotted.items() if steps > 0}


def _whole_steps(name: str, steps: int | float, max_steps: int) -> int:
    is_share = isinstance(steps, float) and 0 < steps < 1
    if not is_share and (not isinstance(steps, int | float) or steps < 0 or steps != int(steps)):
        raise LinearizeError(
            f"stages.{name}={steps} is no number of steps: give steps, a share between 0 and 1, 0 to skip it, or null "
            "for the rest."
        )
    return round(steps * max_steps) if is_share else int(steps)


def stage_at(stages: Sequence[Stage], step: int) -> tuple[Stage, int]:
    """Returns the stage of an optimizer step and how many of its steps came before; past the end, the last stage."""
    start = 0
    for stage in stages:
        if step < start + stage.num_steps:
            return stage, step - start
        start += stage.num_steps
    return stages[-1], step - start + stages[-1].num_steps
