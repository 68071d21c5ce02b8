"""How far results are from those of a definition, before a kernel is used or its speed told, and on which grid."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from linearize.layout import TILE, Grid

# Of whole tiles, some with others on all sides: the lists of the Hopper kernel have every kind of step there.
WHOLE_GRID = Grid(3 * TILE[0], 5 * TILE[1])


def largest_error(found: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """The largest |found - expected| / |expected| of pairs of tensors.

    Args:
        found: What is judged, on any device.
        expected: What it should be, in the dtype in which both are compared.

    Returns:
        The error; NaN, which is below no limit, where any number is: `max` would pass over it.
    """
    pairs = zip(found, expected, strict=True)
    return float(torch.stack([relative_error(*pair).cpu() for pair in pairs]).max())


def relative_error(found: Tensor, expected: Tensor) -> Tensor:
    """|found - expected| / |expected|, a number in float64; 0 where both are zeros."""
    tiny = torch.finfo(expected.dtype).tiny
    return ((found.to(expected) - expected).norm() / expected.norm().clamp(min=tiny)).double()
