"""Index and mask tables of the halo path: which keys a tile of queries gathers, and which of them each query sees."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from linearize.layout import Grid, Layout, tile_spans

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
    """What makes tiles alike: grid, size, and per key grid the rows and columns in reach, from the first token."""

    grid: int
    height: int
    width: int
    window: int
    reach: tuple[tuple[int, int, int, int], ...]

    def queries(self) -> Tensor:
        """(row, column) of the queries, [queries, 2]."""
        return _rectangle(0, self.height, 0, self.width)

    def keys(self) -> list[Tensor]:
        """For every key grid (row, column) of the keys that some query of the tile sees, [keys, 2]."""
        last = torch.tensor([self.height - 1, self.width - 1])
        rectangles = [_rectangle(*reach) for reach in self.reach]
        beyond = [keys - torch.minimum(keys.clamp(min=0), last) for keys in rectangles]
        return [keys[away.square().sum(-1) < self.window**2] for keys, away in zip(rectangles, beyond, strict=True)]

    def sees(self) -> Tensor:
        """[queries, keys], True inside the disc."""
        return (self.queries()[:, None] - torch.cat(self.keys())).square().sum(-1) < self.window**2


def _rectangle(top: int, bottom: int, left: int, right: int) -> Tensor:
    rows, columns = (torch.arange(a, max(a, b), device="cpu") for a, b in ((top, bottom), (left, right)))
    return torch.cartesian_prod(rows, columns)


def _group_tiles(grids: tuple[Grid, ...], window: int) -> dict[_Surroundings, Tensor]:
    """First (row, column) of the tiles, [tiles, 2], by their surroundings: one group inside, a few at the borders."""
    groups: dict[_Surroundings, list[tuple[int, int]]] = defaultdict(list)
    height, width = query_tile(window)
    for number, grid in enumerate(grids):
        for top, bottom in tile_spans(grid.height, height):
            rows = [(max(1 - window, -top), min(bottom + window - 1, keys.height) - top) for keys in grids]
            for left, right in tile_spans(grid.width, width):
                columns = [(max(1 - window, -left), min(right + window - 1, keys.width) - left) for keys in grids]
                reach = tuple((*row, *column) for row, column in zip(rows, columns, strict=True))
                groups[_Surroundings(number, bottom - top, right - left, window, reach)].append((top, left))
    return {group: torch.tensor(corners) for group, corners in groups.items()}


@lru_cache(maxsize=64)
def visited_pairs(grid: Grid | tuple[Grid, ...], window: int) -> int:
    """Number of (image query, image key) pairs that the halo path computes; `exact_pairs` are those it needs."""
    groups = _group_tiles((grid,) if isinstance(grid, Grid) else grid, window)
    return sum(len(corners) * group.sees().numel() for group, corners in groups.items())


@lru_cache(maxsize=32)
def halo_tables(layout: Layout, window: int, num_pooled: int, dtype: torch.dtype, device: torch.device) -> HaloTables:
    """The tables of a layout, built once.

    They are made outside inference mode: what sampling needed first is used for training later.

    Args:
        layout: Text tokens, grids and order.
        window: Radius of the disc in tokens.
        num_pooled: Keys that stand behind all tokens and that every image query sees.
        dtype: Of query, key and value.
        device: Where they are.
    """
    limit = CPU_KEYS_PER_CALL if device.type == "cpu" else KEYS_PER_CALL
    with torch.inference_mode(False):
        batches = [
            batch
            for group, corners in _group_tiles(layout.grids, window).items()
            for batch in _batches_of(layout, group, corners, num_pooled, dtype, limit)
        ]
        text = torch.arange(layout.num_tokens)[layout.text_slice]
        output_index = torch.argsort(torch.cat([text, *(batch.query_index for batch in batches)]))
        moved = [
            TileBatch(b.num_tiles, b.query_index.to(device), b.key_index.to(device), b.mask.to(device)) for b in batches
        ]
        return HaloTables(tuple(moved), output_index.to(device))


def _batches_of(
    layout: Layout, group: _Surroundings, corners: Tensor, num_pooled: int, dtype: torch.dtype, limit: int
) -> list[TileBatch]:
    """The batches of one group, each of at most `limit` gathered keys."""
    text = torch.arange(layout.num_tokens)[layout.text_slice]
    always = torch.cat([text, layout.num_tokens + torch.arange(num_pooled)])
    sees = group.sees()
    mask = torch.zeros(len(sees), len(always) + sees.shape[1], dtype=dtype)
    mask[:, len(always) :].masked_fill_(~sees, float("-inf"))
    queries = _places(layout, corners, group.queries(), group.grid)
    halo = [_places(layout, corners, keys, number) for number, keys in enumerate(group.keys())]
    keys = torch.cat([always.expand(len(corners), -1), *halo], dim=1)
    size = max(1, limit // keys.shape[1])
    parts = zip(queries.split(size), keys.split(size), strict=True)
    return [TileBatch(len(tiles), tiles.flatten(), near.flatten(), mask) for tiles, near in parts]


def _places(layout: Layout, corners: Tensor, relative: Tensor, number: int) -> Tensor:
    """Places among all tokens, [tiles, tokens], of (row, column) relative to the tiles' corners in one grid."""
    before = sum(grid.num_tokens for grid in layout.grids[:number])
    rows, columns = (corners[:, None] + relative).unbind(-1)
    return layout.tile_to_raster()[before + rows * layout.grids[number].width + columns] + layout.image_slice.start
