"""The inverse of small positive definite matrices by Newton's iteration, with its residual checked."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from linearize.errors import LinearizeError

TOLERANCE = 1e-12
LARGEST_RESIDUAL = 1e-4


def num_newton_iterations(least_eigenvalue: float, largest_row_sum: float) -> int:
    """Iterations after which the residual is below the tolerance, whatever the matrix.

    The residual's norm is (1 - step least_eigenvalue^2)^(2^iterations) exactly, for steps as `newton_iterate` takes.
    """
    shrinks = 1.8 * (least_eigenvalue / largest_row_sum) ** 2
    return max(1, math.ceil(math.log2(math.log(1 / TOLERANCE) / shrinks)))


def newton_iterate(matrix: Tensor, num_iterations: int) -> Tensor:
    """V <- 2 V - V A V from V = step A, with a step of each matrix: 1.8 / (largest row sum)^2.

    Args:
        matrix: Symmetric positive definite, [..., size, size].
        num_iterations: How often; each squares the residual I - V A.
    """
    step = 1.8 / matrix.abs().sum(dim=-1).amax(dim=-1)[..., None, None].square()
    inverse = step * matrix
    for _ in range(num_iterations):
        inverse = 2 * inverse - inverse @ matrix @ inverse
    return inverse


def newton_inverse(matrix: Tensor, least_eigenvalue: float) -> Tensor:
    """The inverse of matrices [..., size, size] with entries of at most 1 off the diagonal, as SOFT computes it.

    Computed in float64, where the residual that iterations leave is that of the law and not of rounding; the backward
    pass is -A^-T G A^-T.

    Args:
        matrix: Symmetric, positive definite.
        least_eigenvalue: A lower bound, such as what was added to the diagonal.

    Raises:
        LinearizeError: The residual |I - V A| is large, which only numbers that are not finite bring about. It is read
            on the CPU alone: a GPU would have to be waited for, and numbers that are not finite stay so.
    """
    return _NewtonInverse.apply(matrix, least_eigenvalue)


class _NewtonInverse(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, matrix: Tensor, least_eigenvalue: float) -> Tensor:
        size = matrix.shape[-1]
        wide = matrix.double()
        inverse = newton_iterate(wide, num_newton_iterations(least_eigenvalue, size + least_eigenvalue))
        if wide.device.type == "cpu" and not torch.compiler.is_compiling():
            residual = (torch.eye(size, dtype=wide.dtype, device=wide.device) - inverse @ wide).abs().amax().item()
            if not residual <= LARGEST_RESIDUAL:
                raise LinearizeError(
                    f"Newton's inverse of the landmarks' kernel has a residual of {residual:.2g}; check that query and "
                    "key are finite"
                )
        inverse = inverse.to(matrix.dtype)
        context.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (inverse,) = context.saved_tensors
        return -inverse.transpose(-1, -2) @ gradient @ inverse.transpose(-1, -2), None
