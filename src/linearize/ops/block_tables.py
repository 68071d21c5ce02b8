"""Which blocks of 128 tokens see which, for kernels that visit blocks: told by edges, never by pairs of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from linearize.layout import TILE, Layout, tile_spans
from linearize.ops.constant_tables import constant_table
from linearize.ops.regions import Boxes, Region

BLOCK = TILE[0] * TILE[1]
# Lists up to this many entries are not worth cutting.
_SHORTEST = 16


@dataclass(frozen=True)
class BlockTables:
    """The work lists of one layout and region, int32 on the device.

    A unit is the part of a block that a kernel takes at once: `size` of its 128 tokens. Every unit of one side has a
    list of the units of the other side that it meets, first those that need no mask.

    Attributes:
        blocks: [blocks, 9]: first token, top row (-1 for text), left column, height, width, tokens, 1 for an image and
            0 for text, and the height and width of the grid.
        segments: [segments, 5]: unit, first entry of its list, first entry that needs a mask, entry behind the last,
            and the place among partial results, or -1 where it is the whole list. Text's segments come first.
        entries: [entries, 4]: unit, its first token, top (-1 for text) and left.
        num_text_segments: Segments of text.
        num_splits: Segments of every text unit.
        whole: Whether every block has its 128 tokens.
    """

    blocks: Tensor
    segments: Tensor
    entries: Tensor
    num_text_segments: int
    num_splits: int
    whole: bool


@lru_cache(maxsize=64)
@constant_table
def block_tables(
    layout: Layout,
    region: Region,
    device: torch.device,
    *,
    size: int,
    other_size: int,
    transposed: bool = False,
    share: float = 1.0,
) -> BlockTables:
    """Lists for every unit of queries, or of keys, in the order of `layout`, which is in tiles.

    Args:
        layout: Where the tokens are; `layout.tile` is `TILE`.
        region: Which image tokens an image token sees.
        device: Where the tables go.
        size: Tokens of a unit that has a list.
        other_size: Tokens of a unit in a list.
        transposed: Lists of queries for units of keys, in the place of lists of keys for units of queries.
        share: Batches x heads for each processor. A list of text is cut where it would outlast half of all the work.
    """
    blocks = blocks_of(layout)
    rows, columns = units_of(blocks, size), units_of(blocks, other_size)
    queries, keys = (columns, rows) if transposed else (rows, columns)
    touches, covers = sight(region, queries, keys)
    if transposed:
        touches, covers = touches.T, covers.T
    plain = covers & columns.whole & touches
    # A stable sort by class: plain entries, then masked ones, each in the order of the tokens.
    kind = torch.where(plain, 0, torch.where(touches, 1, 2)).to(torch.int8)
    order = kind.argsort(dim=1, stable=True)
    num_plain, num_entries = plain.sum(dim=1), touches.sum(dim=1)
    listed = torch.arange(len(columns.index)) < num_entries[:, None]
    found = order[listed]
    entries = torch.stack([columns.index[found], columns.start[found], *columns.boxes.first[found].T], 1)
    segments, num_text = _segments(rows, num_plain, num_entries, share)
    num_splits = num_text // max(1, int((~rows.image).sum()))
    blocks, segments, entries = (table.to(torch.int32).contiguous().to(device) for table in (blocks, segments, entries))
    whole = bool(rows.whole.all() and columns.whole.all())
    return BlockTables(blocks, segments, entries, num_text, max(1, num_splits), whole)


def blocks_of(layout: Layout) -> Tensor:
    """[blocks, 9], see `BlockTables`; in the order of the tokens, with text first."""
    rows: list[tuple[int, ...]] = []
    text, image = layout.text_slice.start, layout.image_slice.start
    for start, stop in tile_spans(layout.num_text_tokens, BLOCK):
        rows.append((text + start, -1, 0, TILE[0], TILE[1], stop - start, 0, 0, 0))
    for grid in layout.grids:
        for top, bottom in tile_spans(grid.height, TILE[0]):
            for left, right in tile_spans(grid.width, TILE[1]):
                height, width = bottom - top, right - left
                rows.append((image, top, left, height, width, BLOCK, 1, grid.height, grid.width))
                image += height * width
    return torch.tensor(rows).reshape(-1, 9)


@dataclass(frozen=True)
class Units:
    """The non-empty parts of blocks: which rows and columns each holds.

    Attributes:
        index: [units] number of the unit, counted over all blocks, empty parts included.
        start: [units] first token.
        boxes: Where each lies.
        image: [units] bool.
        whole: [units] bool, whether no slot is empty.
    """

    index: Tensor
    start: Tensor
    boxes: Boxes
    image: Tensor
    whole: Tensor

    def __getitem__(self, which: slice | Tensor) -> Units:
        boxes = Boxes(self.boxes.first[which], self.boxes.last[which], self.boxes.grid[which])
        return Units(self.index[which], self.start[which], boxes, self.image[which], self.whole[which])


def units_of(blocks: Tensor, size: int) -> Units:
    """The units of `size` slots of blocks [blocks, 9]."""
    parts = BLOCK // size
    index = torch.arange(len(blocks) * parts)
    start, top, left, height, width, tokens, image, *grid = blocks.repeat_interleave(parts, dim=0).T
    num_rows = size // TILE[1]
    skipped = index % parts * num_rows
    text_filled = -((skipped * TILE[1] - tokens) // TILE[1])
    filled = torch.where(image == 1, height - skipped, text_filled).clamp(max=num_rows)
    first = torch.stack([torch.where(image == 1, top + skipped, top), left], dim=1)
    last = torch.stack([top + skipped + filled - 1, left + width - 1], dim=1)
    whole = (filled == num_rows) & (width == TILE[1]) & (tokens >= (index % parts + 1) * size)
    boxes = Boxes(first, last, torch.stack(grid, dim=1))
    return Units(index, start + skipped * width, boxes, image == 1, whole)[filled > 0]


def sight(region: Region, queries: Units, keys: Units) -> tuple[Tensor, Tensor]:
    """Whether some query sees some key, and every query every key: [query units, key units] bool each."""
    touches, covers = region.box_sight(queries.boxes, keys.boxes)
    text = ~queries.image[:, None] | ~keys.image
    return touches | text, covers | text


def cut_list(begin: int, end: int, num_entries: int, share: float) -> list[tuple[int, int]]:
    """A list of text in equal parts where it would outlast half of the work of `num_entries` in all lists."""
    longest = max(_SHORTEST, int(num_entries * share / 2))
    length = -(-(end - begin) // -(-(end - begin) // longest))
    return [(start, min(start + length, end)) for start in range(begin, end, length)]


def _segments(rows: Units, num_plain: Tensor, num_entries: Tensor, share: float) -> tuple[Tensor, int]:
    """[segments, 5] with text first, and how many are text's."""
    ends = num_entries.cumsum(0)
    begins = ends - num_entries
    text: list[tuple[int, ...]] = []
    for unit, begin, plain, end in torch.stack([rows.index, begins, begins + num_plain, ends], 1)[~rows.image].tolist():
        spans = cut_list(begin, end, int(num_entries.sum()), share)
        for start, stop in spans:
            text.append((unit, start, min(max(plain, start), stop), stop, -1 if len(spans) == 1 else len(text)))
    kept = rows.image
    image = torch.stack([rows.index, begins, begins + num_plain, ends, torch.full_like(ends, -1)], dim=1)[kept]
    return torch.cat([torch.tensor(text, dtype=image.dtype).reshape(-1, 5), image]), len(text)
