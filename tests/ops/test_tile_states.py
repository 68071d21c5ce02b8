import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from linearize.layout import TILE, Grid, Layout
from linearize.ops import tile_states
from linearize.ops.dense_attention import dense_attention
from linearize.ops.disc import coordinates
from linearize.ops.linear_attention import LinearPart, dense_join, join
from linearize.ops.tile_states import states_of_far_tiles, window_flops, window_with_complement
from linearize.ops.tile_tables import SIDE, tile_tables


def tokens(layout, dtype=torch.float64, channels=6, num_features=5):
    torch.manual_seed(0)
    size = (2, 2, layout.num_image_tokens, channels)
    query, key, value = torch.randn(3, *size, dtype=dtype).unbind(0)
    features = torch.rand(2, *size[:3], num_features, dtype=dtype).unbind(0)
    return [tensor.clone().requires_grad_() for tensor in (query, key, value, *features)]


def inside_disc(layout, window):
    places = coordinates(layout)
    return (places[:, None] - places).square().sum(-1) < window**2


def compare(layout, window, key_mask=None):
    query, key, value, *features = leaves = tokens(layout)
    ours = join(
        *window_with_complement(
            query, key, value, tuple(features), layout=layout, window=window, scale=0.4, key_mask=key_mask
        )
    )
    inside = inside_disc(layout, window)
    weights = (features[0] @ features[1].transpose(-1, -2)).masked_fill(inside, 0.0)
    if key_mask is not None:
        weights, inside = weights.masked_fill(~key_mask[:, None, None], 0.0), inside & key_mask[:, None, None]
    theirs = dense_join(query @ key.transpose(-1, -2) * 0.4, inside, (weights, weights), value)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    gradients = (torch.autograd.grad(output.sin().sum(), leaves) for output in (ours, theirs))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


@settings(max_examples=15, deadline=None)
@given(
    grids=st.lists(st.builds(Grid, st.integers(1, 19), st.integers(1, 26)), min_size=1, max_size=2),
    window=st.integers(1, 12),
    tile=st.sampled_from([None, TILE]),
    masked=st.booleans(),
)
def test_it_is_the_dense_partition(grids, window, tile, masked):
    layout = Layout(0, tuple(grids), tile=tile)
    key_mask = None
    if masked:
        key_mask = torch.rand(2, layout.num_image_tokens) > 0.3
        key_mask[:, 0] = True
    compare(layout, window, key_mask)


def test_batches_of_tiles_make_no_difference(monkeypatch):
    monkeypatch.setattr(tile_states, "NUMBERS_AT_A_TIME", 2_000_000)
    compare(Layout(0, (Grid(21, 37),)), 5)


def test_the_complement_is_the_total_minus_the_window():
    layout = Layout(0, (Grid(17, 30),))
    query, key, value, *features = tokens(layout)
    _, part = window_with_complement(query, key, value, tuple(features), layout=layout, window=4, scale=1.0)
    weights = features[0] @ features[1].transpose(-1, -2)
    selected = weights.masked_fill(~inside_disc(layout, 4), 0.0)
    torch.testing.assert_close(part.numerator, weights @ value - selected @ value)
    torch.testing.assert_close(part.mass, (weights - selected).sum(-1, keepdim=True))


def test_a_window_over_everything_leaves_nothing_to_the_states():
    layout = Layout(0, (Grid(9, 21),))
    query, key, value, *features = tokens(layout, torch.float32)
    exact, part = window_with_complement(query, key, value, tuple(features), layout=layout, window=40, scale=1.0)
    assert isinstance(part, LinearPart)
    assert part.mass.abs().max() == part.numerator.abs().max() == 0
    expected = dense_attention(query, key, value, scale=1.0)
    torch.testing.assert_close(join(exact, part), expected, rtol=1e-4, atol=1e-5)


def test_in_float32_the_subtraction_costs_little():
    layout = Layout(0, (Grid(40, 56),))
    inputs = tokens(layout)
    outputs = []
    for dtype in (torch.float64, torch.float32):
        query, key, value, *features = (tensor.detach().to(dtype) for tensor in inputs)
        parts = window_with_complement(query, key, value, tuple(features), layout=layout, window=9, scale=0.4)
        outputs.append(join(*parts).double())
    assert (outputs[1] - outputs[0]).norm() < 1e-6 * outputs[0].norm()


def test_every_token_has_one_place_and_far_tiles_are_no_neighbours():
    layout = Layout(3, (Grid(30, 41), Grid(9, 7)), tile=TILE)
    tables = tile_tables(layout, 6, torch.device("cpu"))
    assert torch.equal(tables.index.sort().values, tables.is_token.flatten().nonzero()[:, 0])
    assert int(tables.is_token.sum()) == layout.num_image_tokens
    assert tables.near.shape[1] == 9 + 2
    assert SIDE == 8


@pytest.mark.parametrize("num_features", [0, 64])
def test_operations_grow_linearly_with_the_picture(num_features):
    counts = [window_flops(Layout(0, (Grid(side, 64),)), 8, 64, num_features) for side in (64, 128, 192)]
    assert counts[2] - counts[1] == counts[1] - counts[0] > 0


@pytest.mark.parametrize("window", [3, 9, 40])
def test_states_of_far_tiles_are_those_of_all_tiles_that_are_not_near(window):
    layout = Layout(0, (Grid(30, 41), Grid(9, 70)))
    tables = tile_tables(layout, window, torch.device("cpu"))
    num_tiles = len(tables.near)
    states = torch.rand(2, 1, num_tiles, 3, 2, dtype=torch.float64)
    is_far = torch.ones(num_tiles, num_tiles + 1, dtype=torch.float64).scatter_(1, tables.near, 0.0)[:, :num_tiles]
    expected = torch.einsum("qk,bhkfc->bhqfc", is_far, states)
    torch.testing.assert_close(states_of_far_tiles(states, tables), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("channels", "num_features"), [(6, 5), (64, 32)], ids=["tiles", "kernels"])
@pytest.mark.parametrize("grid", [Grid(40, 56), Grid(48, 56)], ids=["cut tiles", "whole tiles"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_on_a_gpu_it_is_the_float64_form_up_to_rounding(dtype, tolerance, grid, channels, num_features, masked):
    layout = Layout(0, (grid,), tile=TILE)
    drawn = [states.detach() for states in tokens(layout, channels=channels, num_features=num_features)]
    ours = [states.to("cuda", dtype).requires_grad_() for states in drawn]
    exact = [states.detach().cpu().double().requires_grad_() for states in ours]
    key_mask = (torch.arange(layout.num_image_tokens) % 5 > 0).expand(2, -1) if masked else None
    results = []
    for leaves in (ours, exact):
        query, key, value, *features = leaves
        mask = None if key_mask is None else key_mask.to(query.device)
        parts = window_with_complement(
            query, key, value, tuple(features), layout=layout, window=9, scale=channels**-0.5, key_mask=mask
        )
        output = join(*parts)
        results.append([output, *torch.autograd.grad(output.double().sin().sum(), leaves)])
    for one, other in zip(*results, strict=True):
        assert (one.cpu().double() - other).norm() < tolerance * other.norm()
