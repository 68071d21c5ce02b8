"""Which image tokens an image token sees: the disc, the tiles that it touches, the rectangle that is never cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from linearize.layout import TILE, Grid


class Places(NamedTuple):
    """Tokens by row and column, counted from their grid's own corner, and that grid's height and width.

    Four integer tensors that broadcast, with one another and with those of other places.
    """

    row: Tensor
    column: Tensor
    height: Tensor
    width: Tensor

    @staticmethod
    def of(coordinates: Tensor, grid: Grid) -> Places:
        """The places of [tokens, 2] rows and columns in a grid."""
        return Places(*coordinates.unbind(-1), *torch.tensor([grid.height, grid.width], device=coordinates.device))


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

    def sees(self, query: Places, key: Places) -> Tensor:
        """Whether a query sees a key: bool, of the shape to which the places broadcast.

        Plain arithmetic on each pair, which kernels that are generated from Python take over.
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

    def sees(self, query: Places, key: Places) -> Tensor:
        """See `Region.sees`."""
        rows, columns = query.row - key.row, query.column - key.column
        return rows * rows + columns * columns < self.window**2

    def box_sight(self, queries: Boxes, keys: Boxes) -> tuple[Tensor, Tensor]:
        """See `Region.box_sight`."""
        ahead, behind = keys.first - queries.last[:, None], queries.first[:, None] - keys.last
        farthest = torch.maximum(keys.last - queries.first[:, None], queries.last[:, None] - keys.first)
        return self._within(torch.maximum(ahead, behind).clamp(min=0)), self._within(farthest)

    def _within(self, distance: Tensor) -> Tensor:
        return distance.square().sum(dim=-1) < self.window**2


@dataclass(frozen=True)
class TouchedTiles(Region):
    """All tiles of 16 x 8 tokens that the disc of some token of the query's own tile touches.

    The smallest union of whole tiles that holds the disc of every token of the tile (compare STA, arXiv 2502.04507).
    """

    def reach(self, first: int, last: int, axis: int, num_keys: int) -> tuple[int, int]:
        """See `Region.reach`."""
        size = TILE[axis]
        top, bottom = first // size * size, last // size * size + size - 1
        start, stop = max(0, top - self.window + 1), min(num_keys, bottom + self.window)
        return start // size * size, min(num_keys, -(-stop // size) * size)

    def sees(self, query: Places, key: Places) -> Tensor:
        """See `Region.sees`."""
        rows = _tile_gap(query.row, query.height, key.row, key.height, TILE[0])
        columns = _tile_gap(query.column, query.width, key.column, key.width, TILE[1])
        return rows * rows + columns * columns < self.window**2

    def box_sight(self, queries: Boxes, keys: Boxes) -> tuple[Tensor, Tensor]:
        """See `Region.box_sight`."""
        (first, first_end), (last, last_end) = (_bounds(place, queries.grid) for place in (queries.first, queries.last))
        (top, top_end), (bottom, bottom_end) = (_bounds(place, keys.grid) for place in (keys.first, keys.last))
        nearest = torch.maximum(top - last_end[:, None], first[:, None] - bottom_end).clamp(min=0)
        farthest = torch.maximum(bottom - first_end[:, None], last[:, None] - top_end).clamp(min=0)
        touches, covers = (gap.square().sum(dim=-1) < self.window**2 for gap in (nearest, farthest))
        return touches, covers


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

    def sees(self, query: Places, key: Places) -> Tensor:
        """See `Region.sees`."""
        rows = self._near(query.row, key.row, key.height)
        return rows & self._near(query.column, key.column, key.width)

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

    def _near(self, query: Tensor, key: Tensor, length: Tensor) -> Tensor:
        """Along one axis of `length` tokens."""
        size = length.clamp(max=2 * self.window - 1)
        start = torch.minimum((query - self.window + 1).clamp(min=0), length - size)
        return (key >= start) & (key < start + size)


REGIONS: dict[str, Callable[[int], Region]] = {"disc": Disc, "tiles": TouchedTiles, "neighborhood": Neighborhood}


def region_name(region: Region) -> str:
    """The name in `REGIONS`."""
    return next(name for name, made in REGIONS.items() if made is type(region))


def _tile_gap(query: Tensor, query_length: Tensor, key: Tensor, key_length: Tensor, size: int) -> Tensor:
    """Tokens along one axis from the edge of the query's tile to that of the key's; 0 where the tiles overlap."""
    first, key_first = query // size * size, key // size * size
    last, key_last = torch.minimum(first + size, query_length) - 1, torch.minimum(key_first + size, key_length) - 1
    return torch.maximum(key_first - last, first - key_last).clamp(min=0)


def _bounds(places: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """First and last (row, column) of the tiles that [places, 2] lie in, in grids of [places, 2] heights and widths."""
    size = torch.tensor(TILE, device=places.device)
    first = places // size * size
    return first, torch.minimum(first + size, grid) - 1
