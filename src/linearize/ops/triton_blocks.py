"""What the Triton kernels of local attention share: tokens of units, entries of lists, masks, work of a program.

Within a tile of 16 x 8 the rows and columns of slots are constants, so that a mask costs two instructions a pair.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Sizes of a block and numbers of fields, see `BlockTables`.
_BLOCK = tl.constexpr(128)
WIDTH = tl.constexpr(8)
BLOCK_FIELDS = tl.constexpr(9)
SEGMENT_FIELDS = tl.constexpr(5)
ENTRY_FIELDS = tl.constexpr(4)
# Below every score, so that its weight is 0.
FAR = tl.constexpr(1e30)
# More than the square of any distance on a grid.
_ALL = tl.constexpr(1e7)


@triton.jit
def tokens_of(blocks, unit, start, SIZE: tl.constexpr, WHOLE: tl.constexpr):
    """Token of every slot of a unit, and whether there is one. `start` is the token of the first slot."""
    slot = tl.arange(0, SIZE)
    if WHOLE:
        return (start + slot).to(tl.int64), slot >= 0
    at = blocks + unit // (_BLOCK // SIZE) * BLOCK_FIELDS
    skipped = unit % (_BLOCK // SIZE) * (SIZE // WIDTH)
    row, column, width = slot // WIDTH, slot % WIDTH, tl.load(at + 4)
    exists = (row + skipped < tl.load(at + 3)) & (column < width) & (slot + skipped * WIDTH < tl.load(at + 5))
    return (start + row * width + column).to(tl.int64), exists


@triton.jit
def load_rows(base, token, token_step, exists, D: tl.constexpr, GUARDED: tl.constexpr):
    """The channels of tokens, [tokens, channels]; zeros where there is none, if that is looked at."""
    at = base + token[:, None] * token_step + tl.arange(0, D)[None, :]
    if GUARDED:
        return tl.load(at, mask=exists[:, None], other=0.0)
    return tl.load(at)


@triton.jit
def unit_at(blocks, unit, SIZE: tl.constexpr):
    """First token, top and left of a unit; the top of text is -1."""
    at = blocks + unit // (_BLOCK // SIZE) * BLOCK_FIELDS
    skipped = unit % (_BLOCK // SIZE) * (SIZE // WIDTH)
    top = tl.load(at + 1)
    return tl.load(at) + skipped * tl.load(at + 4), tl.where(top < 0, top, top + skipped), tl.load(at + 2)


@triton.jit
def _nearest(place, window, length):
    """First row or column of a query's neighborhood, which is shifted inward at the borders."""
    return tl.minimum(tl.maximum(place - window + 1, 0), length - tl.minimum(2 * window - 1, length))


@triton.jit
def hide_unseen(
    scores,
    blocks,
    key_unit,
    query_top,
    query_left,
    key_top,
    key_left,
    exists,
    window,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    REGION: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Scores [queries, keys], far below all where the query does not see the key or there is none."""
    limit = score_limit(
        blocks, key_unit, query_top, query_left, key_top, key_left, window, QUERIES, KEYS, REGION, False
    )
    scores = tl.minimum(scores, limit)
    return scores if WHOLE else tl.where(exists[None, :], scores, -FAR)


@triton.jit
def score_limit(
    blocks,
    key_unit,
    query_top,
    query_left,
    key_top,
    key_left,
    window,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    REGION: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """The most that scores may be, [queries, keys] or transposed: far below all where the query does not see the key.

    Text sees all and is seen by all.
    """
    images = (query_top >= 0) & (key_top >= 0)
    query_slot = tl.expand_dims(tl.arange(0, QUERIES), 0 if TRANSPOSED else 1)
    key_slot = tl.expand_dims(tl.arange(0, KEYS), 1 if TRANSPOSED else 0)
    if REGION == "neighborhood":
        at = blocks + key_unit // (_BLOCK // KEYS) * BLOCK_FIELDS
        height, width = tl.load(at + 7), tl.load(at + 8)
        down = key_slot // WIDTH + key_top - _nearest(query_slot // WIDTH + query_top, window, height)
        right = key_slot % WIDTH + key_left - _nearest(query_slot % WIDTH + query_left, window, width)
        inside = (down >= 0) & (down < tl.minimum(2 * window - 1, height))
        inside = inside & (right >= 0) & (right < tl.minimum(2 * window - 1, width))
        return tl.where(inside | (images == 0), FAR, -FAR)
    limit = tl.where(images & (REGION == "disc"), window * window - 0.5, _ALL)
    down = (query_slot // WIDTH + (query_top - key_top) - key_slot // WIDTH).to(tl.float32)
    right = (query_slot % WIDTH + (query_left - key_left) - key_slot % WIDTH).to(tl.float32)
    # One term depends on rows alone and one on columns, so each is shared by many pairs.
    return (limit - down * down) * FAR - right * right * FAR


@triton.jit
def entry_at(entries, i):
    """Unit of an entry, its first token, top and left."""
    at = entries + i * ENTRY_FIELDS
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def work_of_program(num_text_segments, num_segments, segments, lanes):
    """This program's segment, see `BlockTables`, and its lane (batch x head).

    All lanes' text comes first, as it has the longest lists.
    """
    program = tl.program_id(0)
    is_text = program < num_text_segments * lanes
    place = tl.where(is_text, program, program - num_text_segments * lanes)
    length = tl.where(is_text, num_text_segments, num_segments - num_text_segments)
    segment = tl.where(is_text, 0, num_text_segments) + place % length
    at = segments + segment * SEGMENT_FIELDS
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4), place // length
