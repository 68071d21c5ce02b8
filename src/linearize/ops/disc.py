"""CLEAR's disc on token grids: who sees whom, and how many pairs that is."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from linearize.layout import Grid, Layout


def coordinates(layout: Layout) -> Tensor:
    """(row, column) of every image token in the layout's order, [num_image_tokens, 2]; each grid starts at (0, 0)."""
    parts = []
    for grid in layout.grids:
        rows, columns = torch.meshgrid(torch.arange(grid.height), torch.arange(grid.width), indexing="ij")
        parts.append(torch.stack([rows, columns], dim=-1).reshape(-1, 2).repeat(grid.frames, 1))
    return torch.cat(parts)[layout.raster_to_tile()]


def disc_covers(grids: tuple[Grid, ...], window: int) -> bool:
    """Whether the disc around every token holds every token of every grid."""
    farthest_row = max(grid.height for grid in grids) - 1
    farthest_column = max(grid.width for grid in grids) - 1
    return farthest_row**2 + farthest_column**2 < window**2


@lru_cache(maxsize=256)
def exact_pairs(grid: Grid | tuple[Grid, ...], window: int) -> int:
    """Number of (image query, image key) pairs with dy^2 + dx^2 < window^2, cut at the borders.

    Several grids lie on top of one another: a query sees the disc around its own row and column in each of them.
    """
    grids = (grid,) if isinstance(grid, Grid) else grid
    total = 0
    for queries in grids:
        for keys in grids:
            columns = [_offsets(queries.width, keys.width, dx) for dx in range(window)]
            for dy in range(-window + 1, window):
                rows = max(0, min(queries.height, keys.height + dy) - max(0, dy))
                total += rows * sum(count for dx, count in enumerate(columns) if dx * dx + dy * dy < window * window)
    return total


def _offsets(num_queries: int, num_keys: int, distance: int) -> int:
    """Pairs on two lines whose places differ by +distance or -distance."""
    ahead = max(0, min(num_queries, num_keys + distance) - distance)
    behind = max(0, min(num_queries + distance, num_keys) - distance)
    return ahead if distance == 0 else ahead + behind
