"""Least squares: linear in closed form, and the weight of one of two branches."""

from __future__ import annotations

import torch
from torch import Tensor

# Logarithmic weights that are tried at first; between the neighbours of the best the search goes on.
FIRST, LAST, STEP = -40, 40, 2
REFINEMENTS = 24


def ridge(rows: Tensor, wanted: Tensor, strength: float) -> Tensor:
    """The W that makes |rows W - wanted|^2 + penalty |W|^2 least, in float64.

    Args:
        rows: [rows, features].
        wanted: [rows, channels].
        strength: The penalty as a share of the mean squared length of a feature, which makes it one without a unit.

    Returns:
        [features, channels].
    """
    rows, wanted = rows.double(), wanted.double()
    gram = rows.T @ rows
    # Features that are all zero leave the matrix singular; their weights are then zero.
    penalty = (strength * gram.diagonal().mean()).clamp(min=torch.finfo(gram.dtype).tiny)
    gram.diagonal().add_(penalty)
    return torch.linalg.solve(gram, rows.T @ wanted)


def least_error_weight(log_ratio: Tensor, base: Tensor, other: Tensor, wanted: Tensor) -> Tensor:
    """The c of each head that makes |(1 - s) base + s other - wanted|^2 least, with s = sigmoid(log_ratio + c).

    The error is a sum over tokens of s^2 |other - base|^2 - 2 s (other - base) (wanted - base), so that each c that is
    tried costs two numbers for each token. The search takes even numbers, then thirds of what is left around the best.

    Args:
        log_ratio: [batch, heads, tokens, 1 or channels], logarithm of the mass of `other` over that of `base`.
        base: [batch, heads, tokens, channels].
        other: Same.
        wanted: Same.

    Returns:
        [heads].
    """
    change = other - base
    square, product = change.square(), change * (wanted - base)
    if log_ratio.shape[-1] == 1:
        square, product = (tensor.sum(dim=-1, keepdim=True) for tensor in (square, product))

    def errors(log_weight: Tensor) -> Tensor:
        share = (log_ratio + log_weight[:, None, None]).sigmoid()
        return (share * (share * square - 2 * product)).sum(dim=(0, 2, 3), dtype=torch.float64)

    heads = log_ratio.new_zeros(log_ratio.shape[1])
    tried = torch.stack([errors(heads + number) for number in range(FIRST, LAST + 1, STEP)])
    best = (STEP * tried.argmin(dim=0) + FIRST).to(log_ratio.dtype)
    low, high = best - STEP, best + STEP
    for _ in range(REFINEMENTS):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        is_left = errors(left) < errors(right)
        low, high = torch.where(is_left, low, left), torch.where(is_left, right, high)
    return (low + high) / 2
