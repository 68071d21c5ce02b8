"""Linear least squares in closed form."""

from __future__ import annotations

import torch
from torch import Tensor


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
