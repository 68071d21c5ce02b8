"""Index and mask tables of the halo path: which keys a tile of queries gathers, and which of them each query sees."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from linearize.layout import Grid, Layout, tile_spans
from linearize.ops.constant_tables import constant_table
from linearize.ops.regions import Places, Region

# Gathered keys of one attention call: on a CPU few enough for its cache, elsewhere enough to fill the device.
CPU_KEYS_PER_CALL = 1 << 13
KEYS_PER_CALL = 1 << 16


@dataclass(frozen=True)
class TileBatch:
    """Tiles of queries with the same surroundings, which one batched attention call serves.

    Attributes:
        num_tiles: Tiles in the batch.
        query_index: [num_tiles * queries] places of the queries among all tokens.
        key_index: [num_tiles * keys] places of the keys: text, the halo, pooled keys.
        mask: [queries, keys], 0 where a query sees a key and -inf elsewhere; one for all tiles.
    """

    num_tiles: int
    query_index: Tensor
    key_index: Tensor
    mask: Tensor


@dataclass(frozen=True)
class HaloTables:
    """All batches of a layout.

    Attributes:
        batches: The attention calls, in order.
        output_index: [num_tokens] where each token's output is among text outputs followed by the batches' outputs.
    """

    batches: tuple[TileBatch, ...]
    output_index: Tensor


def query_tile(window: int) -> tuple[int, int]:
    """The tile of queries that the halo path cuts for a window: larger ones gather less and visit more."""
    return (8, 8) if window <= 12 else (8, 16)


@dataclass(frozen=True)
class _Surroundings:
    """What makes tiles alike: grid, size, and per key grid the rows and columns in reach, from the first token.

    One tile of them, at `corner`, stands for all.
    """

    grid: int
    height: int
    width: int
    reach: tuple[tuple[int, int, int, int], ...]
    corner: tuple[int, int] = field(compare=False)

    def queries(self) -> Tensor:
        """(row, column) of the queries from the first one, [queries, 2]."""
        return _rectangle(0, self.height, 0, self.width)

    def sight(self, region: Region, grids: tuple[Grid, ...]) -> tuple[list[Tensor], Tensor]:
        """The keys that some query sees, per grid [keys, 2] from the first query, and who sees whom [queries, keys]."""
        corner = torch.tensor(self.corner, device="cpu")
        queries = Places.of((corner + self.queries())[:, None], grids[self.grid])
        keys, sees = [], []
        for key_grid, reach in zip(grids, self.reach, strict=True):
            places = _rectangle(*reach)
            seen = region.sees(queries, Places.of(places + corner, key_grid))
            used = seen.any(dim=0)
            keys.append(places[used])
            sees.append(seen[:, used])
        return keys, torch.cat(sees, dim=1)


def _rectangle(top: int, bottom: int, left: int, right: int) -> Tensor:
    rows, columns = (torch.arange(a, max(a, b), device="cpu") for a, b in ((top, bottom), (left, right)))
    return torch.cartesian_prod(rows, columns)


def _group_tiles(grids: tuple[Grid, ...], region: Region) -> dict[_Surroundings, Tensor]:
    """First (row, column) of the tiles, [tiles, 2], by their surroundings: one group inside, a few at the borders."""
    groups: dict[_Surroundings, list[tuple[int, int]]] = defaultdict(list)
    height, width = query_tile(region.window)
    for number, grid in enumerate(grids):
        for top, bottom in tile_spans(grid.height, height):
            rows = [_reach(region, top, bottom, 0, keys.height) for keys in grids]
            for left, right in tile_spans(grid.width, width):
                columns = [_reach(region, left, right, 1, keys.width) for keys in grids]
                reach = tuple((*row, *column) for row, column in zip(rows, columns, strict=True))
                group = _Surroundings(number, bottom - top, right - left, reach, corner=(top, left))
                groups[group].append((top, left))
    return {group: torch.tensor(corners, device="cpu") for group, corners in groups.items()}


def _reach(region: Region, start: int, stop: int, axis: int, num_keys: int) -> tuple[int, int]:
    first, end = region.reach(start, stop - 1, axis, num_keys)
    return first - start, end - start


@lru_cache(maxsize=64)
def visited_pairs(grid: Grid | tuple[Grid, ...], region: Region) -> int:
    """Number of (image query, image key) pairs that the halo path computes; `seen_pairs` are those it needs."""
    grids = (grid,) if isinstance(grid, Grid) else grid
    groups = _group_tiles(grids, region)
    return sum(len(corners) * group.sight(region, grids)[1].numel() for group, corners in groups.items())


@lru_cache(maxsize=64)
def seen_pairs(grid: Grid | tuple[Grid, ...], region: Region) -> int:
    """Number of (image query, image key) pairs that see each other."""
    grids = (grid,) if isinstance(grid, Grid) else grid
    groups = _group_tiles(grids, region)
    return sum(len(corners) * int(group.sight(region, grids)[1].sum()) for group, corners in groups.items())


@lru_cache(maxsize=32)
@constant_table
def halo_tables(
    layout: Layout, region: Region, num_pooled: int, dtype: torch.dtype, device: torch.device
) -> HaloTables:
    """The tables of a layout, built once.

    Args:
        layout: Text tokens, grids and order.
        region: Who sees whom.
        num_pooled: Keys that stand behind all tokens and that every image query sees.
        dtype: Of query, key and value.
        device: Where they are.
    """
    limit = CPU_KEYS_PER_CALL if device.type == "cpu" else KEYS_PER_CALL
    batches = [
        batch
        for group, corners in _group_tiles(layout.grids, region).items()
        for batch in _batches_of(layout, region, group, corners, num_pooled, dtype, limit)
    ]
    text = torch.arange(layout.num_tokens)[layout.text_slice]
    output_index = torch.argsort(torch.cat([text, *(batch.query_index for batch in batches)]))
    moved = [
        TileBatch(b.num_tiles, b.query_index.to(device), b.key_index.to(device), b.mask.to(device)) for b in batches
    ]
    return HaloTables(tuple(moved), output_index.to(device))


def _batches_of(
    layout: Layout,
    region: Region,
    group: _Surroundings,
    corners: Tensor,
    num_pooled: int,
    dtype: torch.dtype,
    limit: int,
) -> list[TileBatch]:
    """The batches of one group, each of at most `limit` gathered keys."""
    text = torch.arange(layout.num_tokens)[layout.text_slice]
    always = torch.cat([text, layout.num_tokens + torch.arange(num_pooled)])
    near, sees = group.sight(region, layout.grids)
    mask = torch.zeros(len(sees), len(always) + sees.shape[1], dtype=dtype)
    mask[:, len(always) :].masked_fill_(~sees, float("-inf"))
    queries = _places(layout, corners, group.queries(), group.grid)
    halo = [_places(layout, corners, keys, number) for number, keys in enumerate(near)]
    keys = torch.cat([always.expand(len(corners), -1), *halo], dim=1)
    size = max(1, limit // keys.shape[1])
    parts = zip(queries.split(size), keys.split(size), strict=True)
    return [TileBatch(len(tiles), tiles.flatten(), gathered.flatten(), mask) for tiles, gathered in parts]


def _places(layout: Layout, corners: Tensor, relative: Tensor, number: int) -> Tensor:
    """Places among all tokens, [tiles, tokens], of (row, column) relative to the tiles' corners in one grid."""
    before = sum(grid.num_tokens for grid in layout.grids[:number])
    rows, columns = (corners[:, None] + relative).unbind(-1)
    return layout.tile_to_raster()[before + rows * layout.grids[number].width + columns] + layout.image_slice.start
