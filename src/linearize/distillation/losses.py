"""The terms of a distillation loss. Each says what it needs to see, and turns it into one number."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import huber_loss, l1_loss, mse_loss

from linearize.errors import LinearizeError


@dataclass
class Observation:
    """What one micro step has seen; only what the terms of the loss asked for is there.

    Attributes:
        target: noise - x_0, [batch, channels, height, width].
        teacher_velocity: The teacher's prediction, same shape.
        student_velocity: The student's prediction, same shape.
        teacher_variance: What the teacher predicts of the variance beside it, same shape; None where it predicts none.
        student_variance: The student's, likewise.
        teacher_attention: Attention outputs by site, before the output projection, [batch, tokens, channels], in the
            order in which tokens travel through teacher and student.
        student_attention: Same, of the student on its own activations.
        transfer: (student, teacher) outputs by site, when the student's layer is given the teacher's inputs;
            [batch, tokens, channels].
        transfer_attention: The same before the output projection.
    """

    target: Tensor
    teacher_velocity: Tensor | None = None
    student_velocity: Tensor | None = None
    teacher_variance: Tensor | None = None
    student_variance: Tensor | None = None
    teacher_attention: Mapping[str, Tensor] = field(default_factory=dict)
    student_attention: Mapping[str, Tensor] = field(default_factory=dict)
    transfer: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    transfer_attention: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


class LossTerm:
    """One term. A subclass says what it needs and computes a scalar; means are taken in float32.

    Args:
        weight: Factor of the term in the loss.

    Attributes:
        needs_teacher: The teacher's velocity is used.
        needs_student: The student's velocity is used.
        attention_layers: Globs over sites whose attention outputs are used.
        transfer_layers: Globs over sites that are regressed on the teacher's own inputs.
        before_projection: Those sites' attention outputs are used, and not what their output projection returns.
    """

    needs_teacher = False
    needs_student = False
    attention_layers: Sequence[str] = ()
    transfer_layers: Sequence[str] = ()
    before_projection = False

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


class Variance(LossTerm):
    """Student variance against the teacher's (LiT, arXiv 2501.12976, hybrid distillation).

    It is 0 for teachers that predict none, such as flow models. What is compared is what the transformers return: in
    DiT the position between the two bounds of the logarithm of the variance, not the variance itself.
    """

    needs_student = True
    needs_teacher = True

    def __call__(self, seen: Observation) -> Tensor:
        """Mean squared error over all elements."""
        if seen.teacher_variance is None:
            return seen.target.new_zeros((), dtype=torch.float32)
        return mse_loss(_required(seen.student_variance).float(), seen.teacher_variance.float())


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
            _SquaredError.apply(student, seen.teacher_attention[name])
            for name, student in seen.student_attention.items()
        ]
        return torch.stack(errors).mean()


class _SquaredError(torch.autograd.Function):
    """Mean squared error, summed in float32, that keeps its two arguments as they are for the backward pass, no more.

    The difference has the arguments' dtype, as the gradient has: float32 copies would take three times as long.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        ctx.save_for_backward(student, teacher)
        error = student - teacher
        norm = torch.linalg.vector_norm(error, dtype=torch.promote_types(error.dtype, torch.float32)).float()
        return norm.square() / error.numel()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        student, teacher = ctx.saved_tensors
        return (student - teacher).mul_(2 * gradient / student.numel()).to(student.dtype), None


def _squared(student: Tensor, teacher: Tensor, scale: Tensor) -> Tensor:
    return _SquaredError.apply(student, teacher) / scale**2


def _absolute(student: Tensor, teacher: Tensor, scale: Tensor) -> Tensor:
    return l1_loss(student.float(), teacher.float()) / scale


def _huber(student: Tensor, teacher: Tensor, scale: Tensor, *, delta: float = 1.0) -> Tensor:
    error = (student.float() - teacher.float()) / scale
    return huber_loss(error, torch.zeros_like(error), delta=delta)


# The mean over elements of e((student - teacher) / scale).
ERRORS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "squared": _squared,
    "absolute": _absolute,
    "huber": _huber,
}


class Transfer(LossTerm):
    """Each layer alone, regressed on the teacher's own inputs and outputs (LoLCATs, arXiv 2410.10254, section 3.2).

    With `normalise` student y and teacher t of a layer are divided by r, the root mean square of t, so that no layer
    outweighs the others: the term is the mean over layers of the mean over elements of e((y - t) / r), where e(x) is
    x^2 ("squared"), |x| ("absolute") or x^2 / 2 up to delta and delta (|x| - delta / 2) beyond ("huber"; with delta 1
    the smooth L1). Without, r = 1: the raw errors of the papers, which differ between layers by orders of magnitude.
    r is that of a micro batch in one process, so several of either differ a little from one large batch.

    Args:
        weight: Factor of the term in the loss.
        layers: Globs over the sites that are regressed.
        error: "squared", "absolute" or "huber" (Grafting, arXiv 2506.05340, regresses with all three).
        normalise: Whether r is the root mean square of the teacher's output, or 1.
        before_projection: Compare what comes before the output projection, the heads' outputs as in LoLCATs.
        delta: Where "huber" turns from a square to a line, in units of r.
    """

    def __init__(
        self,
        weight: float = 1.0,
        layers: Sequence[str] = ("*",),
        error: str = "squared",
        normalise: bool = True,
        before_projection: bool = False,
        delta: float = 1.0,
    ) -> None:
        super().__init__(weight)
        if error not in ERRORS:
            raise LinearizeError(f"A transfer loss with error={error} is unknown: use {', '.join(ERRORS)}.")
        if delta <= 0:
            raise LinearizeError(f"A transfer loss with delta={delta} is no Huber loss: give a number above 0.")
        self.transfer_layers = tuple(layers)
        self.normalise, self.before_projection = normalise, before_projection
        self.error = partial(_huber, delta=delta) if error == "huber" else ERRORS[error]

    def __call__(self, seen: Observation) -> Tensor:
        """Mean over layers of the mean error over text and image tokens."""
        pairs = seen.transfer_attention if self.before_projection else seen.transfer
        errors = [self.error(student, teacher, self._scale(teacher)) for student, teacher in pairs.values()]
        return torch.stack(errors).mean()

    def _scale(self, teacher: Tensor) -> Tensor:
        if not self.normalise:
            return torch.ones((), device=teacher.device)
        return teacher.float().square().mean().clamp_min(torch.finfo(torch.float32).tiny).sqrt()


def _required(value: Tensor | None) -> Tensor:
    if value is None:
        raise ValueError("a loss term computes with a velocity that it did not ask for (needs_teacher, needs_student)")
    return value
