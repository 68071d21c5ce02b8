import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from linearize.errors import LinearizeError
from linearize.layout import TILE, Grid, Layout

sizes = st.integers(1, 20)
grids = st.lists(st.builds(Grid, sizes, sizes, st.integers(1, 2)), min_size=1, max_size=3).map(tuple)
tiles = st.none() | st.tuples(st.integers(1, 9), st.integers(1, 17))


@given(grids, tiles)
def test_the_two_permutations_undo_each_other(grids, tile):
    layout = Layout(3, grids, tile=tile)
    there, back = layout.raster_to_tile(), layout.tile_to_raster()
    assert torch.equal(there[back], torch.arange(layout.num_image_tokens))
    assert torch.equal(back[there], torch.arange(layout.num_image_tokens))


@given(grids, tiles, tiles, st.integers(0, 4), st.booleans())
def test_index_to_goes_from_any_order_to_any_other_and_leaves_text(grids, first, second, num_text_tokens, text_first):
    start = Layout(num_text_tokens, grids, text_first=text_first, tile=first)
    end = start.with_tile(second)
    tokens = torch.arange(start.num_tokens)
    moved = tokens[start.index_to(second)]
    assert torch.equal(moved[start.text_slice], tokens[start.text_slice])
    raster = tokens[start.image_slice][start.tile_to_raster()]
    assert torch.equal(moved[end.image_slice][end.tile_to_raster()], raster)
    assert torch.equal(moved[end.index_to(first)], tokens)


def test_tile_order_is_tile_by_tile_and_ragged_at_the_border():
    layout = Layout(0, (Grid(3, 5),), tile=(2, 3))
    assert layout.raster_to_tile().tolist() == [0, 1, 2, 5, 6, 7, 3, 4, 8, 9, 10, 11, 12, 13, 14]


def test_frames_and_grids_stay_one_after_another():
    layout = Layout(0, (Grid(2, 2, frames=2), Grid(1, 3)), tile=(1, 1))
    assert layout.raster_to_tile().tolist() == list(range(11))


def test_a_tile_of_the_default_size_holds_neighbours():
    order = Layout(0, (Grid(16, 32),), tile=TILE).raster_to_tile()[:128]
    assert (order // 32).max() == 15
    assert (order % 32).max() == 7


def test_slices_of_text_before_and_after_the_image():
    before, after = Layout(4, (Grid(2, 3),)), Layout(4, (Grid(2, 3),), text_first=False)
    assert (before.text_slice, before.image_slice) == (slice(0, 4), slice(4, 10))
    assert (after.text_slice, after.image_slice) == (slice(6, 10), slice(0, 6))


def test_tables_first_made_in_inference_mode_can_be_trained_with():
    layout = Layout(0, (Grid(19, 23),), tile=(7, 5))
    with torch.inference_mode():
        layout.raster_to_tile()
    tokens = torch.randn(1, layout.num_tokens, requires_grad=True)
    tokens[:, layout.raster_to_tile()].square().sum().backward()
    assert torch.allclose(tokens.grad, 2 * tokens)


def test_an_empty_grid_is_refused():
    with pytest.raises(LinearizeError, match="at least one token"):
        Grid(0, 4)


@pytest.mark.parametrize("dynamic", [None, True])
def test_compilers_take_orders_as_constants(dynamic):
    torch.compiler.reset()

    def reorder(tokens, grid):
        raster = Layout(2, (grid,))
        tiled = tokens[raster.index_to(TILE, tokens.device)]
        return tiled, tiled[raster.with_tile(TILE).index_to(None, tokens.device)]

    compiled = torch.compile(reorder, fullgraph=True, backend="eager", dynamic=dynamic)
    for grid in (Grid(9, 20), Grid(20, 9), Grid(3, 4), Grid(9, 20)):
        tokens = torch.randn(2 + grid.num_tokens)
        tiled, back = compiled(tokens, grid)
        assert torch.equal(tiled, tokens[Layout(2, (grid,)).index_to(TILE)])
        assert torch.equal(back, tokens)


def test_tokens_without_a_grid_are_told():
    with pytest.raises(LinearizeError, match=r"there is no grid; name each image's height and width.*grids="):
        Layout(4, ())
