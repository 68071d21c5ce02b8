"""Which keys the two halves of a block of queries meet in the Hopper kernel: pairs of units of 64 tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from linearize.layout import Layout
from linearize.ops.block_tables import BLOCK, Units, blocks_of, cut_list, sight, units_of
from linearize.ops.constant_tables import constant_table
from linearize.ops.regions import Boxes, Region

UNIT = BLOCK // 2
# A unit that no query sees, as it lies above every grid, fills the last pair of a list, and a first that has one unit.
# Its number is -1.
_NOTHING = [0, -(2**20), 0]


@dataclass(frozen=True)
class PairTables:
    """The work lists of one layout and region, int32 on the device; all blocks of the layout are whole.

    A step takes two units of keys. A list has the steps of both halves of a block of queries, first those that need no
    mask, then steps of one half each, by turns. So a half meets few keys that it does not see, and keys that both see
    are fetched once. Where a half meets an odd number of units, the first step has one unit alone.

    Attributes:
        segments: [segments, 11]: first step, first that needs a mask, first of one half, step behind the last, the
            place among partial results, or -1 where it is the whole list; the block's first token, top row (-1 for
            text), left column; height and width of its grid; 1 where the first step has one unit, else 0. Text's
            segments come first.
        entries: [steps, 6]: for each unit its first token, top (-1 for text) and left.
        num_text_segments: Segments of text.
        num_splits: Segments of every text block.
    """

    segments: Tensor
    entries: Tensor
    num_text_segments: int
    num_splits: int


@lru_cache(maxsize=64)
@constant_table
def pair_tables(layout: Layout, region: Region, device: torch.device, *, share: float = 1.0) -> PairTables:
    """Lists for every block of queries.

    Args:
        layout: Where the tokens are, in tiles of `TILE` that are all whole; text fills whole blocks.
        region: Which image tokens an image token sees.
        device: Where the tables go.
        share: Batches x heads for each processor, as in `block_tables`.
    """
    blocks = blocks_of(layout)
    units = units_of(blocks, UNIT)
    places = [*torch.stack([units.start, *units.boxes.first.T], dim=1).tolist(), _NOTHING]
    entries: list[list[int]] = []
    lists: list[tuple[int, int, int, int, int]] = []
    for seen in _seen(region, units):
        steps, num_plain, num_shared = _steps(*seen)
        begin = len(entries)
        entries.extend([*places[first], *places[second]] for first, second in steps)
        bounds = begin, begin + num_plain, begin + num_shared, len(entries)
        lists.append((*bounds, int(num_plain > 0 and steps[0][1] < 0)))
    segments, num_text = _segments(blocks.tolist(), lists, share)
    lists_there, entries_there = (torch.tensor(rows, dtype=torch.int32).to(device) for rows in (segments, entries))
    num_splits = max(1, num_text // max(1, layout.num_text_tokens // BLOCK))
    return PairTables(lists_there, entries_there, num_text, num_splits)


def _segments(
    blocks: list[list[int]], lists: list[tuple[int, int, int, int, int]], share: float
) -> tuple[list[tuple[int, ...]], int]:
    """Rows of `PairTables.segments`, and how many are text's."""
    rows: list[tuple[int, ...]] = []
    num_steps, num_text = lists[-1][3], 0
    for (first, top, left, _, _, _, image, *grid), (begin, masked, shared, end, lone) in zip(
        blocks, lists, strict=True
    ):
        spans = [(begin, end)] if image else cut_list(begin, end, num_steps, share)
        for start, stop in spans:
            bounds = (start, min(masked, stop), min(shared, stop), stop)
            place = -1 if len(spans) == 1 else len(rows)
            rows.append((*bounds, place, first, top, left, *grid, lone))
        num_text += 0 if image else len(spans)
    return rows, num_text


def _seen(region: Region, units: Units) -> Iterator[tuple[list[int], list[int], tuple[list[int], list[int]]]]:
    """For each block of queries the units of keys that both halves see whole, that both see, and that one half sees."""
    for rows in _rows_of_blocks(units):
        # What no query of the row may see is not looked at, or time would grow with tokens squared.
        hull = Boxes(rows.boxes.first.amin(0, True), rows.boxes.last.amax(0, True), rows.boxes.grid[:1])
        near = sight(region, Units(rows.index[:1], rows.start[:1], hull, rows.image[:1], rows.whole[:1]), units)[0][0]
        touches, covers = (seen.unflatten(0, (-1, 2)) for seen in sight(region, rows, units[near]))
        both, plain = touches.all(dim=1), covers.all(dim=1)
        groups = [plain, both & ~plain, *(touches & ~both[:, None]).unbind(1)]
        for whole, part, upper, lower in zip(*(_numbers(group, near) for group in groups), strict=True):
            yield whole, part, (upper, lower)


def _rows_of_blocks(units: Units) -> Iterator[Units]:
    """The units of the blocks that lie side by side."""
    tops = units.boxes.first[::2]
    ends = (tops.diff(dim=0)[:, 1] <= 0).nonzero()[:, 0] + 1
    bounds = [0, *(2 * ends).tolist(), len(units.index)]
    for start, stop in pairwise(bounds):
        yield units[start:stop]


def _numbers(rows: Tensor, near: Tensor) -> list[list[int]]:
    """Where each row of bools holds, counted over all units."""
    found = near.nonzero()[:, 0][rows.nonzero()[:, 1]]
    return [numbers.tolist() for numbers in found.split(rows.sum(dim=1).tolist())]


def _steps(
    plain: list[int], masked: list[int], own: tuple[list[int], list[int]]
) -> tuple[list[tuple[int, int]], int, int]:
    """Pairs of units; how many of them need no mask, and how many are of both halves.

    A unit without a partner goes to the next kind, where it is right, too, but for the first, which may be alone.
    """
    lone, num_units = [], len(plain) + len(masked) + max(map(len, own))
    if plain and num_units > 1 and num_units % 2:
        lone, plain = [(plain[0], -1)], plain[1:]
    if len(plain) % 2:
        masked = [plain[-1], *masked]
    odd = masked[len(masked) // 2 * 2 :]
    length = -(-(max(map(len, own)) + len(odd)) // 2) * 2
    padded = [[*odd, *units, *[-1] * (length - len(units) - len(odd))] for units in own]
    plain_steps, masked_steps = [*lone, *_pairs(plain)], _pairs(masked)
    turns = [step for steps in zip(*map(_pairs, padded), strict=True) for step in steps]
    return [*plain_steps, *masked_steps, *turns], len(plain_steps), len(plain_steps) + len(masked_steps)


def _pairs(units: list[int]) -> list[tuple[int, int]]:
    """Each two neighbours; the last without one is left out."""
    return list(zip(units[::2], units[1::2], strict=False))
