"""Square tiles of image tokens, and which of them a window may reach."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from linearize.layout import Grid, Layout, tile_spans
from linearize.ops.constant_tables import layout_table

# Side of the tiles in tokens. Queries of a tile share what they gather: the tiles that their windows reach.
SIDE = 8
# Row and column of what is no token.
FAR = 1 << 20


@dataclass(frozen=True)
class TileTables:
    """Where tiles have their tokens, and which tiles are near.

    Attributes:
        is_token: [tiles, SIDE^2], False where a cut tile has no token.
        coordinates: [tiles, SIDE^2, 2] row and column of each token, far away where there is none.
        near: [tiles, near tiles] the tiles that a window from the tile may reach; `num_tiles` stands for none.
        index: [num_image_tokens] where each image token is among tiles x SIDE^2.
        sides: Rows and columns of tiles of each grid.
        reach: Tiles that a window reaches to either side.
    """

    is_token: Tensor
    coordinates: Tensor
    near: Tensor
    index: Tensor
    sides: tuple[tuple[int, int], ...]
    reach: int


@layout_table
@lru_cache(maxsize=32)
def tile_tables(layout: Layout, window: int, device: torch.device) -> TileTables:
    """The tables of a layout and a window, a radius in tokens. Not to be written to."""
    is_token, coordinates = [], []
    corners: list[tuple[int, int]] = []
    index = torch.empty(layout.num_image_tokens, dtype=torch.long)
    offset = 0
    for grid in layout.grids:
        for top, bottom in tile_spans(grid.height, SIDE):
            for left, right in tile_spans(grid.width, SIDE):
                places = torch.cartesian_prod(torch.arange(top, bottom), torch.arange(left, right))
                index[offset + places[:, 0] * grid.width + places[:, 1]] = len(corners) * SIDE**2 + torch.arange(
                    len(places)
                )
                is_token.append(torch.arange(SIDE**2) < len(places))
                coordinates.append(torch.cat([places, torch.full((SIDE**2 - len(places), 2), FAR)]))
                corners.append((top // SIDE, left // SIDE))
        offset += grid.num_tokens
    return TileTables(
        torch.stack(is_token).to(device),
        torch.stack(coordinates).to(device),
        _near_tiles(layout.grids, corners, window).to(device),
        index[layout.raster_to_tile()].to(device),
        _sides(layout.grids),
        _reach(window),
    )


def _near_tiles(grids: tuple[Grid, ...], corners: list[tuple[int, int]], window: int) -> Tensor:
    """For each tile those, in all grids, that a window from it may reach, [tiles, near tiles]."""
    reach = _reach(window)
    first, sizes = [0], _sides(grids)
    for rows, columns in sizes[:-1]:
        first.append(first[-1] + rows * columns)
    spread = torch.arange(-reach, reach + 1)
    here = torch.tensor(corners)
    near = []
    for start, (rows, columns) in zip(first, sizes, strict=True):
        row = (here[:, 0, None] + spread)[:, :, None]
        column = (here[:, 1, None] + spread)[:, None]
        exists = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
        near.append(torch.where(exists, start + row * columns + column, len(corners)).flatten(1))
    return torch.cat(near, dim=1).sort(dim=1).values[:, : _most(near, len(corners))]


def _reach(window: int) -> int:
    """Tiles that a window reaches to either side of a tile."""
    return -(-(window - 1) // SIDE)


def _sides(grids: tuple[Grid, ...]) -> tuple[tuple[int, int], ...]:
    """Rows and columns of tiles of each grid."""
    return tuple((-(-grid.height // SIDE), -(-grid.width // SIDE)) for grid in grids)


def _most(near: list[Tensor], num_tiles: int) -> int:
    """The largest number of near tiles that there are."""
    return int((torch.cat(near, dim=1) < num_tiles).sum(dim=1).max())
