"""FlexAttention's block mask of a region, told from the edges of blocks: no table of pairs of tokens is ever made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from linearize.layout import Layout
from linearize.ops.constant_tables import constant_table
from linearize.ops.disc import coordinates
from linearize.ops.regions import Boxes, Places, Region

# The one size with which every released version of FlexAttention trains by its default kernels.
BLOCK = 128
# Pairs of boxes that are looked at together while a mask is built.
PAIRS_AT_ONCE = 1 << 22
TEXT, IMAGE, POOLED = range(3)


def block_mask(
    layout: Layout, region: Region, num_pooled: int, device: torch.device, key_mask: Tensor | None = None
) -> BlockMask:
    """The mask of a region, of text and of pooled keys behind all tokens, for any grid, order and number of tokens.

    Blocks are 128 consecutive tokens. Those whose queries all see all keys are kept apart, as they need no mask. Tables
    are as wide as there are blocks, which is what all versions since 2.11 read right; those of the backward pass are
    made here too.

    Args:
        layout: Where the tokens are.
        region: Which image tokens an image token sees.
        num_pooled: Keys that stand behind all tokens and that every image query sees.
        device: Where the tables go.
        key_mask: [batch, tokens + num_pooled], True where a key is valid; with it all blocks need a mask.
    """
    tables = _tables(layout, region, num_pooled, device, key_mask is not None)
    return BlockMask(
        seq_lengths=(layout.num_tokens, layout.num_tokens + num_pooled),
        kv_num_blocks=tables[0],
        kv_indices=tables[1],
        full_kv_num_blocks=tables[2],
        full_kv_indices=tables[3],
        q_num_blocks=tables[4],
        q_indices=tables[5],
        full_q_num_blocks=tables[6],
        full_q_indices=tables[7],
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=_mask_mod(region, tables[8], Places(*tables[9:]), key_mask),
    )


@constant_table
@lru_cache(maxsize=16)
def _tables(layout: Layout, region: Region, num_pooled: int, device: torch.device, masked: bool) -> tuple[Tensor, ...]:
    """The eight lists of a `BlockMask`, and behind them kind, row, column, grid height and grid width of all keys."""
    tokens = _Tokens.of(layout, num_pooled)
    touched, full = _block_sight(region, tokens.first(layout.num_tokens), tokens)
    full &= not masked
    partial = touched & ~full
    listed = [table for mask in (partial, full, partial.T, full.T) for table in _listed(mask)]
    return tuple(table.to(device, torch.int32) for table in (*listed, tokens.kind, *tokens.place.T.contiguous()))


@dataclass(frozen=True)
class _Tokens:
    """All tokens and pooled keys in their order.

    Attributes:
        kind: [tokens] TEXT, IMAGE or POOLED.
        place: [tokens, 4] row, column, and the height and width of the grid; of image tokens.
        band: [tokens] number of the row of tiles, or of the row in raster order, counted over all grids.
    """

    kind: Tensor
    place: Tensor
    band: Tensor

    @staticmethod
    def of(layout: Layout, num_pooled: int) -> _Tokens:
        """The tokens of a layout, and behind them pooled keys."""
        size = layout.num_tokens + num_pooled
        kind = torch.full((size,), POOLED)
        kind[layout.text_slice], kind[layout.image_slice] = TEXT, IMAGE
        order = layout.raster_to_tile()
        grids = torch.tensor([[grid.height, grid.width] for grid in layout.grids])
        number = torch.arange(len(grids)).repeat_interleave(grids.prod(dim=1))[order]
        place, band = torch.zeros(size, 4, dtype=torch.int64), torch.zeros(size, dtype=torch.int64)
        place[layout.image_slice] = torch.cat([coordinates(layout), grids[number]], dim=1)
        band_height = 1 if layout.tile is None else layout.tile[0]
        band[layout.image_slice] = place[layout.image_slice, 0] // band_height + number * layout.num_image_tokens
        return _Tokens(kind, place, band)

    def first(self, number: int) -> _Tokens:
        """The first of them."""
        return _Tokens(self.kind[:number], self.place[:number], self.band[:number])


class _Pieces:
    """What lies of a block in one band and is of one kind: a rectangle, or nearly.

    Attributes:
        num_blocks: Blocks of all tokens.
        block: [pieces] the block that each is of.
        kind: [pieces] TEXT, IMAGE or POOLED.
        boxes: Rectangles that hold the pieces.
        whole: [num_blocks] bool, whether a block has all its 128 tokens.
    """

    def __init__(self, tokens: _Tokens) -> None:
        index = torch.arange(len(tokens.kind))
        self.num_blocks = -(-len(index) // BLOCK)
        group = torch.stack([index // BLOCK, tokens.kind, tokens.band], dim=1)
        group, piece = torch.unique_consecutive(group, dim=0, return_inverse=True)
        self.block, self.kind = group[:, 0], group[:, 1]
        edges = [_reduced(tokens.place, piece, len(group), how) for how in ("amin", "amax")]
        self.boxes = Boxes(edges[0][:, :2], edges[1][:, :2], edges[0][:, 2:])
        self.whole = torch.bincount(index // BLOCK) == BLOCK

    def part(self, chosen: slice) -> Boxes:
        """Some of the boxes."""
        return Boxes(self.boxes.first[chosen], self.boxes.last[chosen], self.boxes.grid[chosen])


def _reduced(values: Tensor, group: Tensor, num_groups: int, how: str) -> Tensor:
    """Smallest or largest values [tokens, channels] in each group: [groups, channels]."""
    empty = values.new_zeros(num_groups, values.shape[1])
    return empty.scatter_reduce(0, group[:, None].expand_as(values), values, how, include_self=False)


def _block_sight(region: Region, query_tokens: _Tokens, key_tokens: _Tokens) -> tuple[Tensor, Tensor]:
    """Whether some query sees some key, and every one every one: [query blocks, key blocks] bool each."""
    queries, keys = _Pieces(query_tokens), _Pieces(key_tokens)
    num_touched, num_covered, num_pairs = torch.zeros(3, queries.num_blocks, keys.num_blocks, dtype=torch.int32)
    step = max(1, PAIRS_AT_ONCE // len(keys.block))
    for start in range(0, len(queries.block), step):
        part = slice(start, start + step)
        touches, covers = region.box_sight(queries.part(part), keys.boxes)
        is_text, kind = (queries.kind[part] == TEXT)[:, None], keys.kind
        always = torch.where(is_text, kind != POOLED, kind != IMAGE)
        image = ~is_text & (kind == IMAGE)
        for total, pairs in (
            (num_touched, always | (image & touches)),
            (num_covered, always | (image & covers)),
            (num_pairs, torch.ones_like(touches)),
        ):
            by_key = torch.zeros(len(pairs), keys.num_blocks, dtype=torch.int32)
            by_key.index_add_(1, keys.block, pairs.int())
            total.index_add_(0, queries.block[part], by_key)
    return num_touched > 0, (num_covered == num_pairs) & queries.whole[:, None] & keys.whole


def _listed(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Number and indices of the true columns in each row: [1, 1, rows] and [1, 1, rows, columns], int32."""
    counts = mask.sum(dim=1)
    rows, columns = mask.nonzero(as_tuple=True)
    place = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
    indices = torch.zeros(mask.shape, dtype=torch.int32)
    indices[rows, place] = columns.int()
    return counts[None, None], indices[None, None]


def visited_pairs(layout: Layout, region: Region) -> int:
    """Number of pairs of tokens in the blocks that are looked at, text included."""
    tables = _tables(layout, region, 0, torch.device("cpu"), False)
    return int(tables[0].sum() + tables[2].sum()) * BLOCK * BLOCK


def _mask_mod(region: Region, kind: Tensor, places: Places, key_mask: Tensor | None) -> Callable[..., Tensor]:
    """Sight by the tokens' coordinates: tables of one number for each token, never one number for each pair."""

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        near = region.sees(Places(*(table[query] for table in places)), Places(*(table[key] for table in places)))
        text_sees = kind[key] != POOLED
        image_sees = (kind[key] != IMAGE) | near
        sees = torch.where(kind[query] == TEXT, text_sees, image_sees)
        return sees if key_mask is None else sees & key_mask[batch, key]

    return mask_mod
