"""Every pair of image tokens is met once outside of the disc, in a near block or in a far one, and never inside."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from linearize.layout import TILE, Grid, Layout
from linearize.ops.block_tables import BLOCK
from linearize.ops.complement_tables import STRIP, complement_tables
from linearize.ops.disc import coordinates

CPU = torch.device("cpu")


def near_pairs(tables, window, size):
    """How often a slot of queries meets one of keys in the lists, [slots, slots], as the kernel masks it."""
    count = torch.zeros(2 * (tables.num_blocks * BLOCK,), dtype=torch.long)
    row, column = torch.arange(BLOCK) // TILE[1], torch.arange(BLOCK) % TILE[1]
    for block, (begin, end) in enumerate(tables.lists.tolist()):
        for slot, down, right in tables.entries[begin:end].tolist():
            below, beside = row[:, None] - row[:size] - down, column[:, None] - column[:size] - right
            met = below.square() + beside.square() >= window**2
            count[block * BLOCK : (block + 1) * BLOCK, slot : slot + size] += met
    return count


def far_pairs(tables):
    """How often a block of queries has the state of another, [blocks, blocks], as the kernels add states up."""
    count = torch.zeros(2 * (tables.num_blocks,), dtype=torch.long)
    rows = tables.rows.tolist()
    for row, (first, columns, begin, end) in enumerate(rows):
        queries = slice(first, first + columns)
        for other in tables.far_rows[row].nonzero()[:, 0].tolist():
            count[queries, rows[other][0] : sum(rows[other][:2])] += 1
        for key_first, left, key_columns in tables.strips[begin:end].tolist():
            key_column = torch.arange(left, min(left + STRIP, key_columns))
            away = (torch.arange(columns)[:, None] - key_column).abs()
            count[queries, key_first : key_first + len(key_column)] += away > tables.reach
    return count


@settings(max_examples=25, deadline=None)
@given(
    grids=st.lists(st.builds(Grid, st.integers(1, 50), st.integers(1, 20)), min_size=1, max_size=2),
    window=st.integers(1, 40),
    tile=st.sampled_from([None, TILE]),
    size=st.sampled_from([32, 64, 128]),
)
def test_every_pair_outside_of_the_disc_is_counted_once(grids, window, tile, size):
    layout = Layout(0, tuple(grids), tile=tile)
    tables = complement_tables(layout, window, size, CPU)
    far = far_pairs(tables).repeat_interleave(BLOCK, dim=0).repeat_interleave(BLOCK, dim=1)
    place = torch.arange(layout.num_image_tokens) if tables.place is None else tables.place
    places = coordinates(layout)
    outside = (places[:, None] - places).square().sum(dim=-1) >= window**2
    assert int(tables.lists.diff(dim=1).min()) > 0
    count = near_pairs(tables, window, size) + far
    assert torch.equal(count[place[:, None], place], outside.long())


def test_rows_that_are_longer_than_a_strip_are_added_up_whole():
    columns = STRIP + 6
    tables = complement_tables(Layout(0, (Grid(3 * TILE[0], columns * TILE[1]),)), 2, 64, CPU)
    row, column = torch.arange(3).repeat_interleave(columns), torch.arange(columns).repeat(3)
    expected = ((row[:, None] - row).abs() > 1) | ((column[:, None] - column).abs() > 1)
    assert torch.equal(far_pairs(tables), expected.long())


def test_tokens_in_whole_tiles_stay_where_they_are():
    grids = (Grid(32, 24), Grid(16, 40))
    assert complement_tables(Layout(0, grids, tile=TILE), 5, 64, CPU).place is None
    for layout in (Layout(0, grids), Layout(0, (Grid(31, 24),), tile=TILE)):
        place = complement_tables(layout, 5, 64, CPU).place
        assert place is not None and len(place.unique()) == layout.num_image_tokens


def test_lists_grow_with_the_window_and_not_with_the_picture():
    """In the middle of a picture a block of queries meets 3 x 5 blocks at window 16, and none of them is all inside."""
    for side in (96, 160):
        tables = complement_tables(Layout(0, (Grid(side, side),), tile=TILE), 16, 64, CPU)
        assert int(tables.lists.diff(dim=1).max()) == 30
