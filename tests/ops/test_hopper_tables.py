"""The lists of the Hopper kernel hold every pair that sees another, once for each half of a block."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from linearize.layout import TILE, Grid, Layout
from linearize.ops.block_tables import BLOCK
from linearize.ops.hopper_local import PROBE, PROBE_WINDOW
from linearize.ops.hopper_tables import UNIT, pair_tables
from linearize.ops.naive import dense_sight
from linearize.ops.regions import REGIONS
from ops.triton_parity import INNER_CASES

grids = st.builds(lambda rows, columns: Grid(rows * TILE[0], columns * TILE[1]), st.integers(1, 4), st.integers(1, 7))
layouts = st.builds(
    lambda text, first, images: Layout(text * BLOCK, tuple(images), first, TILE),
    st.integers(0, 2),
    st.booleans(),
    st.lists(grids, min_size=1, max_size=2),
)


@settings(max_examples=25, deadline=None)
@given(layout=layouts, name=st.sampled_from(list(REGIONS)), window=st.integers(1, 20))
def test_a_half_meets_what_it_sees_and_little_else(layout, name, window):
    region = REGIONS[name](window)
    tables = pair_tables(layout, region, torch.device("cpu"), share=0.01)
    seen = torch.ones(layout.num_tokens, layout.num_tokens, dtype=torch.bool)
    seen[layout.image_slice, layout.image_slice] = dense_sight(layout, region)
    met = torch.zeros_like(seen)
    for begin, masked, shared, end, _, first, *_, lone in tables.segments.tolist():
        assert begin <= masked <= shared <= end and (end - shared) % 2 == 0
        for half in range(2):
            queries = slice(first + half * UNIT, first + (half + 1) * UNIT)
            for step in (*range(begin, shared), *range(shared + half, end, 2)):
                entry = tables.entries[step].tolist()
                for start, top in (entry[:2], entry[3:5]):
                    if top < -1:
                        assert step >= shared or (lone and step == begin < end - 1)
                        continue
                    keys = slice(start, start + UNIT)
                    assert seen[queries, keys].any() or step < shared
                    assert seen[queries, keys].all() or step >= masked
                    assert not met[queries, keys].any()
                    met[queries, keys] = True
    assert not (seen & ~met).any()


@pytest.mark.parametrize("name", INNER_CASES)
def test_cases_of_the_kernel_have_every_kind_of_step(name):
    (grid,), num_text_tokens, _, tile, region, window = INNER_CASES[name]
    assert _has_every_kind(Layout(num_text_tokens, (grid,), tile=tile), region, window)


@pytest.mark.parametrize("region", ["disc", "neighborhood"])
def test_the_probe_of_a_gpu_has_every_kind_of_step(region):
    assert _has_every_kind(PROBE, region, PROBE_WINDOW)


def _has_every_kind(layout: Layout, region: str, window: int) -> bool:
    """Whether one list has a lone unit, steps of one half, and text in a step that is masked."""
    tables = pair_tables(layout, REGIONS[region](window), torch.device("cpu"))
    for _, masked, shared, end, *_, lone in tables.segments[tables.num_text_segments :].tolist():
        tops = tables.entries[masked:end, 1::3]
        if lone and end > shared and (tops == -1).any() and (tops >= 0).any():
            return True
    return False


def test_text_is_cut_like_that_of_other_tables():
    layout, region, cpu = Layout(512, (Grid(64, 64),), tile=TILE), REGIONS["disc"](16), torch.device("cpu")
    assert pair_tables(layout, region, cpu, share=24 / 132).num_splits == 1
    alone = pair_tables(layout, region, cpu, share=1 / 132)
    assert alone.num_splits > 1
    assert alone.segments[:, 4].tolist() == [*range(alone.num_text_segments), *[-1] * (64 * 64 // BLOCK)]


def test_halves_meet_few_more_keys_than_the_disc_holds():
    """Keys that queries meet at 256 x 256 tokens and window 16, text included, for each that they see."""
    layout = Layout(512, (Grid(256, 256),), tile=TILE)
    tables = pair_tables(layout, REGIONS["disc"](16), torch.device("cpu"), share=24 / 132)
    begin, _, shared, end, *_, lone = tables.segments[tables.num_text_segments :].T
    met = (shared - begin + (end - shared) / 2 - lone / 2).mean() * BLOCK
    inside = sum(1 for y in range(-16, 17) for x in range(-16, 17) if y * y + x * x < 16**2)
    assert met / (512 + inside) < 1.55
