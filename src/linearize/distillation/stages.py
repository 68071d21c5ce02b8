"""Stages of a distillation: what is trained on, and for how many optimizer steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from linearize.distillation.losses import LossTerm
from linearize.errors import LinearizeError


@dataclass(frozen=True)
class Stage:
    """A stretch of training under one loss.

    Attributes:
        name: "transfer", "distill", or what the user calls it.
        terms: Terms of the loss by name.
        num_steps: Optimizer steps.
    """

    name: str
    terms: Mapping[str, LossTerm]
    num_steps: int

    def __post_init__(self) -> None:
        if not any(term.weight > 0 for term in self.terms.values()):
            raise LinearizeError(
                f"The loss of stage {self.name} has no term with a weight above 0: give one, or set loss=clear."
            )


def allot_steps(stages: Mapping[str, int | None], max_steps: int) -> dict[str, int]:
    """Shares out optimizer steps over stages, in their order; stages without any are left out.

    Args:
        stages: Steps by name; None takes all that the others leave.
        max_steps: Optimizer steps in all.

    Raises:
        LinearizeError: the stages do not add up to `max_steps`, or more than one asks for the rest.
    """
    if max_steps < 1:
        raise LinearizeError(f"trainer.max_steps={max_steps} trains nothing: give at least 1.")
    open_stages = [name for name, steps in stages.items() if steps is None]
    fixed = {name: steps for name, steps in stages.items() if steps is not None}
    negative = [name for name, steps in fixed.items() if steps < 0]
    if negative:
        raise LinearizeError(
            f"stages.{negative[0]}={fixed[negative[0]]} is negative: give steps, 0 to skip it, or null for the rest."
        )
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
    allotted = {name: rest if steps is None else steps for name, steps in stages.items()}
    return {name: steps for name, steps in allotted.items() if steps > 0}


def stage_at(stages: Sequence[Stage], step: int) -> tuple[Stage, int]:
    """Returns the stage of an optimizer step and how many of its steps came before; past the end, the last stage."""
    start = 0
    for stage in stages:
        if step < start + stage.num_steps:
            return stage, step - start
        start += stage.num_steps
    return stages[-1], step - start + stages[-1].num_steps
