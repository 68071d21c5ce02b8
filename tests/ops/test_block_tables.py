"""The work lists of block kernels hold every pair that sees another, once, and no block for nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from linearize.layout import TILE, Grid, Layout
from linearize.ops.block_tables import BLOCK, BlockTables, block_tables
from linearize.ops.hopper_tables import pair_tables
from linearize.ops.naive import dense_sight
from linearize.ops.regions import REGIONS

grids = st.builds(Grid, st.integers(1, 21), st.integers(1, 40))
layouts = st.builds(
    lambda text, first, images: Layout(text, tuple(images), first, TILE),
    st.sampled_from([0, 5, 128, 150]),
    st.booleans(),
    st.lists(grids, min_size=1, max_size=2),
)


def units(tables: BlockTables, size: int) -> dict[int, list[int]]:
    """The tokens of every unit of `size` slots."""
    found: dict[int, list[int]] = {}
    for block, (start, _, _, height, width, tokens, *_) in enumerate(tables.blocks.tolist()):
        for slot in range(BLOCK):
            row, column = divmod(slot, TILE[1])
            if row < height and column < width and slot < tokens:
                found.setdefault((block * BLOCK + slot) // size, []).append(start + row * width + column)
    return found


def sight(layout: Layout, region) -> torch.Tensor:
    seen = torch.ones(layout.num_tokens, layout.num_tokens, dtype=torch.bool)
    seen[layout.image_slice, layout.image_slice] = dense_sight(layout, region)
    return seen


@settings(max_examples=25, deadline=None)
@given(
    layout=layouts,
    name=st.sampled_from(list(REGIONS)),
    window=st.integers(1, 20),
    sizes=st.sampled_from([(128, 128, False), (128, 64, False), (64, 128, True), (64, 64, True)]),
)
def test_lists_cover_what_is_seen_and_nothing_else(layout, name, window, sizes):
    region, (size, other_size, transposed) = REGIONS[name](window), sizes
    tables = block_tables(
        layout, region, torch.device("cpu"), size=size, other_size=other_size, transposed=transposed, share=0.01
    )
    seen = sight(layout, region)
    seen = seen.T if transposed else seen
    rows, columns = units(tables, size), units(tables, other_size)
    covered = torch.zeros_like(seen)
    for unit, first, masked, last, _ in tables.segments.tolist():
        for entry, (other, start, *_) in enumerate(tables.entries[first:last].tolist(), first):
            assert start == columns[other][0]
            pairs = seen[rows[unit]][:, columns[other]]
            assert pairs.any()
            if entry < masked:
                assert pairs.all() and len(columns[other]) == other_size
            assert not covered[rows[unit][0], columns[other][0]]
            covered[torch.tensor(rows[unit])[:, None], torch.tensor(columns[other])] = True
    assert not (seen & ~covered).any()


def test_text_is_cut_only_where_its_lists_would_outlast_the_rest():
    layout, region, cpu = Layout(512, (Grid(64, 64),), tile=TILE), REGIONS["disc"](16), torch.device("cpu")
    together = block_tables(layout, region, cpu, size=128, other_size=128, share=24 / 132)
    assert together.num_splits == 1 and (together.segments[:, 4] == -1).all() and together.whole
    alone = block_tables(layout, region, cpu, size=128, other_size=128, share=1 / 132)
    assert alone.num_splits == 3
    assert alone.segments[: alone.num_text_segments, 4].tolist() == list(range(4 * 3))
    assert (alone.segments[alone.num_text_segments :, 4] == -1).all()


@pytest.mark.parametrize(("window", "share"), [(8, 0.18), (16, 0.42), (32, 0.57)])
def test_tiles_touch_few_more_pairs_than_the_disc_holds(window, share):
    """The shares of kernels' work on the exact disc that tiles of 16 x 8 reach at 256 x 256 tokens."""
    layout = Layout(0, (Grid(256, 256),), tile=TILE)
    tables = block_tables(layout, REGIONS["disc"](window), torch.device("cpu"), size=128, other_size=128)
    inside = sum(1 for y in range(-window, window + 1) for x in range(-window, window + 1) if y * y + x * x < window**2)
    assert inside * layout.num_tokens / (len(tables.entries) * BLOCK**2) > share - 0.02


def test_tables_lie_where_they_are_asked_for_whatever_the_default_device():
    layout, region, cpu = Layout(128, (Grid(48, 24),), tile=TILE), REGIONS["disc"](7), torch.device("cpu")
    with torch.device("meta"):
        tables = [block_tables(layout, region, cpu, size=128, other_size=64), pair_tables(layout, region, cpu)]
    assert {table.entries.device for table in tables} == {table.segments.device for table in tables} == {cpu}
