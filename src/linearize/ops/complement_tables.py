"""Which blocks of 128 tokens a block of queries meets pair by pair, and which as sums of states: for all but a disc."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from linearize.layout import TILE, Grid, Layout
from linearize.ops.block_tables import BLOCK
from linearize.ops.constant_tables import layout_table
from linearize.ops.disc import coordinates

# Blocks of one row that are added up at once.
STRIP = 64


@dataclass(frozen=True)
class ComplementTables:
    """The work lists of one layout and window, int32 on the device.

    Tokens lie in slots, `BLOCK` for each tile of `TILE`; where a tile is cut, slots are empty. Blocks within reach of a
    block, by rows and by columns of blocks, are near. All others are far, and come in as one sum of states.

    Attributes:
        place: [image tokens] the slot of each token, int64; None where it is the token's own number.
        num_blocks: Blocks of all grids.
        sides: Rows and columns of blocks of each grid.
        reach: Columns of blocks within reach to either side.
        lists: [blocks, 2]: first entry of a block of queries, and the entry behind its last; none is empty.
        entries: [entries, 3]: first slot of a unit of keys that is near and not all inside the discs of the block, or
            is its own, and how many rows and columns of tokens it begins below and right of the block.
        rows: [rows of blocks, 4]: first block, columns, first of its near strips, and the one behind the last.
        strips: [near strips, 3]: first block, its column, and the row's columns; up to `STRIP` blocks side by side.
        far_rows: [rows of blocks, rows of blocks] in float32: 1 where a row is out of reach.
    """

    place: Tensor | None
    num_blocks: int
    sides: tuple[tuple[int, int], ...]
    reach: int
    lists: Tensor
    entries: Tensor
    rows: Tensor
    strips: Tensor
    far_rows: Tensor


@layout_table
@lru_cache(maxsize=32)
def complement_tables(layout: Layout, window: int, size: int, device: torch.device) -> ComplementTables:
    """The tables for units of `size` keys.

    Args:
        layout: Where the image tokens are, in any order. Several grids lie on top of one another.
        window: Radius of the disc in tokens.
        size: Tokens of a unit of keys.
        device: Where the tables go.
    """
    sides = tuple((-(-grid.height // TILE[0]), -(-grid.width // TILE[1])) for grid in layout.grids)
    num_blocks = [rows * columns for rows, columns in sides]
    first = [sum(num_blocks[:number]) for number in range(len(sides))]
    reach = [-(-(window - 1) // length) for length in TILE]
    images = list(zip(layout.grids, sides, first, strict=True))
    met = torch.cat([_met(query, key, reach, window, size) for query in images for key in images])
    met = met[met[:, 0].argsort(stable=True)]
    ends = met[:, 0].bincount(minlength=sum(num_blocks)).cumsum(0)
    lists = torch.stack([torch.cat([ends.new_zeros(1), ends[:-1]]), ends], dim=1)
    rows, strips, far_rows = _rows(sides, first, reach[0])
    lists, entries, rows, strips = (
        table.to(torch.int32).contiguous().to(device) for table in (lists, met[:, 1:], rows, strips)
    )
    return ComplementTables(
        _place(layout, sides, first, device),
        sum(num_blocks),
        sides,
        reach[1],
        lists,
        entries,
        rows,
        strips,
        far_rows.to(device),
    )


def _place(layout: Layout, sides: tuple[tuple[int, int], ...], first: list[int], device: torch.device) -> Tensor | None:
    """See `ComplementTables.place`."""
    tokens = torch.tensor([grid.num_tokens for grid in layout.grids])
    starts, columns = (
        torch.tensor(numbers).repeat_interleave(tokens) for numbers in (first, [columns for _, columns in sides])
    )
    row, column = coordinates(layout).T
    block = starts + row // TILE[0] * columns + column // TILE[1]
    place = block * BLOCK + row % TILE[0] * TILE[1] + column % TILE[1]
    if len(place) == BLOCK * sum(rows * columns for rows, columns in sides) and bool((place.diff() == 1).all()):
        return None
    return place.to(device)


def _met(
    query: tuple[Grid, tuple[int, int], int],
    key: tuple[Grid, tuple[int, int], int],
    reach: list[int],
    window: int,
    size: int,
) -> Tensor:
    """Block of queries and its entries, [entries, 4], for the queries of one grid and the keys of another."""
    (query_grid, (rows, columns), first_query), (key_grid, (_, key_columns), first_key) = query, key
    row, column, down, right, part = torch.meshgrid(
        torch.arange(rows),
        torch.arange(columns),
        torch.arange(-reach[0], reach[0] + 1),
        torch.arange(-reach[1], reach[1] + 1),
        torch.arange(BLOCK // size),
        indexing="ij",
    )
    key_row, key_column, skipped = row + down, column + right, part * (size // TILE[1])
    top, left = key_row * TILE[0] + skipped, key_column * TILE[1]
    exists = (key_row >= 0) & (key_column >= 0) & (key_column < key_columns) & (top < key_grid.height)
    across = _farthest(row * TILE[0], TILE[0], query_grid.height, top, size // TILE[1], key_grid.height)
    along = _farthest(column * TILE[1], TILE[1], query_grid.width, left, TILE[1], key_grid.width)
    block = first_query + row * columns + column
    slot = (first_key + key_row * key_columns + key_column) * BLOCK + part * size
    # A block always meets its own first unit, as no list may be empty.
    kept = exists & ((across.square() + along.square() >= window**2) | (slot == block * BLOCK))
    entries = (block, slot, down * TILE[0] + skipped, right * TILE[1])
    return torch.stack([numbers[kept] for numbers in entries], dim=1)


def _farthest(query: Tensor, query_size: int, query_end: int, key: Tensor, key_size: int, key_end: int) -> Tensor:
    """The largest distance along one axis, between spans that begin at `query` and `key` and are cut at the ends."""
    query_last = (query + query_size).clamp(max=query_end) - 1
    key_last = (key + key_size).clamp(max=key_end) - 1
    return torch.maximum(key_last - query, query_last - key)


def _rows(sides: tuple[tuple[int, int], ...], first: list[int], reach: int) -> tuple[Tensor, Tensor, Tensor]:
    """`rows`, `strips` and `far_rows` of `ComplementTables`."""
    places = [
        (row, start + row * columns, columns)
        for (rows, columns), start in zip(sides, first, strict=True)
        for row in range(rows)
    ]
    strips = [
        (row, block + start, start, columns) for row, block, columns in places for start in range(0, columns, STRIP)
    ]
    number = torch.tensor([row for row, *_ in places])
    near = (number[:, None] - torch.tensor([row for row, *_ in strips])).abs() <= reach
    ends = near.sum(dim=1).cumsum(0)
    begins = ends - near.sum(dim=1)
    rows = torch.cat([torch.tensor(places)[:, 1:], begins[:, None], ends[:, None]], dim=1)
    far_rows = ((number[:, None] - number).abs() > reach).float()
    return rows, torch.tensor(strips)[near.nonzero()[:, 1], 1:], far_rows
