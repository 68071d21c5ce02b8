"""The terms of a distillation loss. Each says what it needs to see, and turns it into one number."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from linearize.errors import LinearizeError


@dataclass
class Observation:
    """What one micro step has seen; only what the terms of the loss asked for is there.

    Attributes:
        target: noise - x_0, [batch, channels, height, width].
        teacher_velocity: The teacher's prediction, same shape.
        student_velocity: The student's prediction, same shape.
        teacher_attention: Attention outputs by site, before the output projection, [batch, tokens, channels], image
            tokens in raster order.
        student_attention: Same, of the student on its own activations.
        transfer: (student, teacher) outputs by site, when the student's layer is given the teacher's inputs;
            [batch, tokens, channels].
    """

    target: Tensor
    teacher_velocity: Tensor | None = None
    student_velocity: Tensor | None = None
    teacher_attention: Mapping[str, Tensor] = field(default_factory=dict)
    student_attention: Mapping[str, Tensor] = field(default_factory=dict)
    transfer: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


class LossTerm:
    """One term. A subclass says what it needs and computes a scalar; means are taken in float32.

    Args:
        weight: Factor of the term in the loss.

    Attributes:
        needs_teacher: The teacher's velocity is used.
        needs_student: The student's velocity is used.
        attention_layers: Globs over sites whose attention outputs are used.
        transfer_layers: Globs over sites that are regressed on the teacher's own inputs.
    """

    needs_teacher = False
    needs_student = False
    attention_layers: Sequence[str] = ()
    transfer_layers: Sequence[str] = ()

    def __init__(self, weight: float = 1.0) -> None:
        if weight < 0:
            raise LinearizeError(
                f"A loss weight of {weight} is negative: give 0 to switch a term off, or a positive number."
            )
        self.weight = weight

    def __call__(self, seen: Observation) -> Tensor:
        """Returns the unweighted term, a scalar."""
        raise NotImplementedError


class FlowMatching(LossTerm):
    """Student velocity against noise - x_0 (rectified flow, arXiv 2209.03003; CLEAR, arXiv 2412.16112, equation 6)."""

    needs_student = True

    def __call__(self, seen: Observation) -> Tensor:
        """Mean squared error over all elements."""
        return mse_loss(_required(seen.student_velocity).float(), seen.target.float())


class Prediction(LossTerm):
    """Student velocity against the teacher's on the same noisy latents (CLEAR, arXiv 2412.16112, section 3.3)."""

    needs_student = True
    needs_teacher = True

    def __call__(self, seen: Observation) -> Tensor:
        """Mean squared error over all elements."""
        return mse_loss(_required(seen.student_velocity).float(), _required(seen.teacher_velocity).float())


class AttentionOutput(LossTerm):
    """Attention outputs before the output projection, averaged over layers (CLEAR, arXiv 2412.16112, section 3.3).

    The student's layers see the student's own activations: errors of earlier layers count.

    Args:
        weight: Factor of the term in the loss.
        layers: Globs over the sites that are compared.
    """

    needs_student = True
    needs_teacher = True

    def __init__(self, weight: float = 1.0, layers: Sequence[str] = ("*",)) -> None:
        super().__init__(weight)
        self.attention_layers = tuple(layers)

    def __call__(self, seen: Observation) -> Tensor:
        """Mean over layers of the mean squared error over text and image tokens."""
        errors = [
            mse_loss(student.float(), seen.teacher_attention[name].float())
            for name, student in seen.student_attention.items()
        ]
        return torch.stack(errors).mean()


class Transfer(LossTerm):
    """Each layer alone, regressed on the teacher's own inputs and outputs (LoLCATs, arXiv 2410.10254, section 3.2).

    Every layer's error is divided by the mean square of the teacher's output, so that no layer outweighs the others.

    Args:
        weight: Factor of the term in the loss.
        layers: Globs over the sites that are regressed.
    """

    def __init__(self, weight: float = 1.0, layers: Sequence[str] = ("*",)) -> None:
        super().__init__(weight)
        self.transfer_layers = tuple(layers)

    def __call__(self, seen: Observation) -> Tensor:
        """Mean over layers of the relative squared error."""
        return torch.stack([_relative_error(student, teacher) for student, teacher in seen.transfer.values()]).mean()


def _relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    teacher = teacher.float()
    return mse_loss(student.float(), teacher) / teacher.square().mean().clamp_min(torch.finfo(torch.float32).tiny)


def _required(value: Tensor | None) -> Tensor:
    if value is None:
        raise ValueError("a loss term computes with a velocity that it did not ask for (needs_teacher, needs_student)")
    return value
