"""Which image tokens an image token sees: the disc, the tiles that it touches, the rectangle that is never cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.layout import TILE, Grid


@dataclass(frozen=True)
class Region:
    """A rule of sight on token grids; places are (row, column), counted from each grid's own corner.

    Several grids lie on top of one another: a query looks at its own place in each.

    Attributes:
        window: Radius in tokens, 1 or more.
    """

    window: int

    def reach(self, first: int, last: int, axis: int, num_keys: int) -> tuple[int, int]:
        """The rows (axis 0) or columns (axis 1) of keys, [start, stop), that queries from `first` to `last` may see."""
        raise NotImplementedError

    def sees(self, queries: Tensor, keys: Tensor, grid: Grid, key_grid: Grid) -> Tensor:
        """Who sees whom.

        Args:
            queries: [queries, 2] places in `grid`.
            keys: [keys, 2] places in `key_grid`.
            grid: Where the queries are.
            key_grid: Where the keys are.

        Returns:
            [queries, keys] bool.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Disc(Region):
    """dy^2 + dx^2 < window^2, cut at the borders (CLEAR, arXiv 2412.16112)."""

    def reach(self, first: int, last: int, axis: int, num_keys: int) -> tuple[int, int]:
        """See `Region.reach`."""
        return max(0, first - self.window + 1), min(num_keys, last + self.window)

    def sees(self, queries: Tensor, keys: Tensor, grid: Grid, key_grid: Grid) -> Tensor:
        """See `Region.sees`."""
        return (queries[:, None] - keys).square().sum(dim=-1) < self.window**2


@dataclass(frozen=True)
class TouchedTiles(Region):
    """All tiles of 8 x 16 tokens that the disc of some token of the query's own tile touches.

    The smallest union of whole tiles that holds the disc of every token of the tile (compare STA, arXiv 2502.04507).
    """

    def reach(self, first: int, last: int, axis: int, num_keys: int) -> tuple[int, int]:
        """See `Region.reach`."""
        size = TILE[axis]
        top, bottom = first // size * size, last // size * size + size - 1
        start, stop = max(0, top - self.window + 1), min(num_keys, bottom + self.window)
        return start // size * size, min(num_keys, -(-stop // size) * size)

    def sees(self, queries: Tensor, keys: Tensor, grid: Grid, key_grid: Grid) -> Tensor:
        """See `Region.sees`."""
        query_first, query_last = _tile_bounds(queries, grid)
        key_first, key_last = _tile_bounds(keys, key_grid)
        gap = torch.maximum(key_first - query_last[:, None], query_first[:, None] - key_last).clamp(min=0)
        return gap.square().sum(dim=-1) < self.window**2


@dataclass(frozen=True)
class Neighborhood(Region):
    """A square of 2 window - 1 tokens a side around the query, shifted inward at the borders so that it is never cut.

    NATTEN's neighborhood attention (Hassani et al., 2023, arXiv 2204.07143, section 3.1); as large as the grid allows.
    """

    def reach(self, first: int, last: int, axis: int, num_keys: int) -> tuple[int, int]:
        """See `Region.reach`."""
        size = min(2 * self.window - 1, num_keys)
        start, stop = (min(max(0, place - self.window + 1), num_keys - size) for place in (first, last))
        return start, stop + size

    def sees(self, queries: Tensor, keys: Tensor, grid: Grid, key_grid: Grid) -> Tensor:
        """See `Region.sees`."""
        shape = torch.tensor([key_grid.height, key_grid.width])
        size = shape.clamp(max=2 * self.window - 1)
        start = torch.minimum((queries - self.window + 1).clamp(min=0), shape - size)[:, None]
        return ((keys >= start) & (keys < start + size)).all(dim=-1)


REGIONS: dict[str, Callable[[int], Region]] = {"disc": Disc, "tiles": TouchedTiles, "neighborhood": Neighborhood}


def _tile_bounds(places: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """First and last (row, column) of the tile that each place lies in, [places, 2] each."""
    size = torch.tensor(TILE)
    first = places // size * size
    return first, torch.minimum(first + size, torch.tensor([grid.height, grid.width])) - 1
