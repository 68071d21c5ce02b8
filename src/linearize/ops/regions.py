"""Which image tokens an image token sees: the disc, the tiles that it touches, the rectangle that is never cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.layout import TILE, Grid


@dataclass(frozen=True)
class Boxes:
    """Rectangles of tokens, each in some grid.

    Attributes:
        first: [boxes, 2] first row and column.
        last: [boxes, 2] last row and column.
        grid: [boxes, 2] height and width of the grid.
    """

    first: Tensor
    last: Tensor
    grid: Tensor


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

    def box_sight(self, queries: Boxes, keys: Boxes) -> tuple[Tensor, Tensor]:
        """Where some query of a box may see a key of another, and where every query sees every key.

        Returns:
            Two [query boxes, key boxes] bools. The first is never too small and the second never too large, so that
            what lies between needs a mask; for boxes within a tile both are exact.
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

    def box_sight(self, queries: Boxes, keys: Boxes) -> tuple[Tensor, Tensor]:
        """See `Region.box_sight`."""
        ahead, behind = keys.first - queries.last[:, None], queries.first[:, None] - keys.last
        farthest = torch.maximum(keys.last - queries.first[:, None], queries.last[:, None] - keys.first)
        return self._within(torch.maximum(ahead, behind).clamp(min=0)), self._within(farthest)

    def _within(self, distance: Tensor) -> Tensor:
        return distance.square().sum(dim=-1) < self.window**2


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

    def box_sight(self, queries: Boxes, keys: Boxes) -> tuple[Tensor, Tensor]:
        """See `Region.box_sight`."""
        (first, first_end), (last, last_end) = (_bounds(place, queries.grid) for place in (queries.first, queries.last))
        (top, top_end), (bottom, bottom_end) = (_bounds(place, keys.grid) for place in (keys.first, keys.last))
        nearest = torch.maximum(top - last_end[:, None], first[:, None] - bottom_end).clamp(min=0)
        farthest = torch.maximum(bottom - first_end[:, None], last[:, None] - top_end).clamp(min=0)
        return tuple(gap.square().sum(dim=-1) < self.window**2 for gap in (nearest, farthest))


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
        shape = torch.tensor([key_grid.height, key_grid.width], device=keys.device)
        size = shape.clamp(max=2 * self.window - 1)
        start = torch.minimum((queries - self.window + 1).clamp(min=0), shape - size)[:, None]
        return ((keys >= start) & (keys < start + size)).all(dim=-1)

    def box_sight(self, queries: Boxes, keys: Boxes) -> tuple[Tensor, Tensor]:
        """See `Region.box_sight`."""
        size = keys.grid.clamp(max=2 * self.window - 1)
        first, last = (
            torch.minimum((place[:, None] - self.window + 1).clamp(min=0), keys.grid - size)
            for place in (queries.first, queries.last)
        )
        touches = (keys.last >= first) & (keys.first < last + size)
        covers = (keys.first >= last) & (keys.last < first + size)
        return touches.all(dim=-1), covers.all(dim=-1)


REGIONS: dict[str, Callable[[int], Region]] = {"disc": Disc, "tiles": TouchedTiles, "neighborhood": Neighborhood}


def _tile_bounds(places: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """First and last (row, column) of the tile that each place lies in, [places, 2] each."""
    return _bounds(places, torch.tensor([grid.height, grid.width], device=places.device))


def _bounds(places: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """The same with [2] or [places, 2] heights and widths."""
    size = torch.tensor(TILE, device=places.device)
    first = places // size * size
    return first, torch.minimum(first + size, grid) - 1
