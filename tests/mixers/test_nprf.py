import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from contexts import SHAPE, flux_context, random_tokens
from linearize.errors import LinearizeError
from linearize.layout import Grid, Layout
from linearize.mixers import AttentionShape, build_mixer
from linearize.ops import offset_bias
from linearize.ops.disc import coordinates
from linearize.ops.offset_bias import (
    convolution_flops,
    offset_tables,
    smooth_length,
    weigh_by_offset,
    weigh_by_offset_naive,
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def leaves(layout, height, width):
    shapes = [(2, 2, layout.num_image_tokens, channels) for channels in (3, 3, 5)] + [
        (2, 2 * height - 1, 2 * width - 1)
    ]
    return [torch.rand(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@settings(deadline=None, max_examples=25)
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    other=st.booleans(),
    longest_side=st.sampled_from([0, 64]),
    numbers=st.sampled_from([1, 10**8]),
)
def test_the_transforms_equal_the_sums_and_so_do_gradients(height, width, other, longest_side, numbers):
    grids = (Grid(height, width), Grid(max(1, height // 2), width)) if other else (Grid(height, width),)
    layout = Layout(0, grids)
    inputs, tables = leaves(layout, height, width), offset_tables(layout, torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offset_bias, "LONGEST_SIDE", longest_side)
        patch.setattr(offset_bias, "NUMBERS_AT_A_TIME", numbers)
        ours = weigh_by_offset(*inputs, tables.places, tables.order)
    outputs = [ours, weigh_by_offset_naive(*inputs, tables.places)]
    torch.testing.assert_close(*outputs, rtol=1e-11, atol=1e-11)
    gradients = [torch.autograd.grad(output.sin().sum(), inputs) for output in outputs]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_the_factor_belongs_to_the_offset_from_query_to_key():
    layout = Layout(0, (Grid(3, 4),))
    query = key = torch.ones(1, 1, 12, 1, dtype=torch.float64)
    value = torch.eye(12, dtype=torch.float64)[None, None]
    factor = torch.zeros(1, 5, 7, dtype=torch.float64)
    factor[0, 2 + 1, 3 + 2] = 1.0
    weights = weigh_by_offset(query, key, value, factor, coordinates(layout))[0, 0].round()
    assert weights.nonzero().tolist() == [[y * 4 + x, (y + 1) * 4 + x + 2] for y in range(2) for x in range(2)]


@pytest.mark.parametrize(("least", "length"), [(1, 2), (7, 8), (14, 16), (127, 128), (131, 144), (255, 256)])
def test_lengths_of_transforms_are_smooth(least, length):
    assert smooth_length(least) == length


def test_it_starts_without_a_bias_as_linear_attention():
    layout = Layout(3, (Grid(6, 9),))
    inputs, context = random_tokens(layout), flux_context(layout)
    plain = build_mixer("performer", SHAPE, {"num_features": 16, "temperature": 1.0}).double()
    mixer = build_mixer("nprf", SHAPE, {}).double()
    torch.testing.assert_close(mixer(*inputs, context), plain(*inputs, context), rtol=1e-10, atol=1e-11)


def test_the_bias_is_a_function_of_the_offset_and_bounded_on_every_grid():
    mixer = build_mixer("nprf", SHAPE, {})
    torch.nn.init.normal_(mixer.head_weight, std=9.0)
    mixer = mixer.double()
    small, large = (
        mixer.dense_factor(flux_context(Layout(0, (grid,))), torch.zeros((), dtype=torch.float64))
        for grid in (Grid(3, 4), Grid(5, 8))
    )
    torch.testing.assert_close(small[:, 0, 5], large[:, 0, 9])
    torch.testing.assert_close(large[:, 1, 11], large[:, 10, 20])
    far = mixer.bias(torch.tensor([[0, 1], [-511, 300]]))
    assert far.abs().max() <= 4.0


def test_float32_stays_near_float64_with_the_largest_bias():
    layout = Layout(0, (Grid(24, 40),))
    inputs, context = random_tokens(layout, batch=1), flux_context(layout)
    mixer = build_mixer("nprf", SHAPE, {})
    torch.nn.init.normal_(mixer.head_weight, std=9.0)
    narrow = mixer(*(states.float() for states in inputs), context)
    expected = mixer.double()(*inputs, context)
    assert (narrow - expected).norm() < 1e-3 * expected.norm()


def test_a_convolution_costs_what_its_matrix_products_do():
    layout, channels = Layout(0, (Grid(6, 9),)), 4
    inputs = [torch.rand(1, 1, 54, 1), torch.rand(1, 1, 54, 1), torch.rand(1, 1, 54, channels), torch.rand(1, 11, 17)]
    with FlopCounterMode(display=False) as counter:
        weigh_by_offset(*inputs, coordinates(layout))
    of_the_kernel = 2 * (2 * 6 * 11 * 17)
    assert counter.get_total_flops() - of_the_kernel == channels * convolution_flops(6, 9)


def test_the_cost_is_nearly_linear_in_tokens():
    mixer = build_mixer("nprf", AttentionShape(24, 128, 3072), {})
    costs = [mixer.flops(Layout(512, (Grid(side, side),))) for side in (128, 256)]
    assert 3.8 < costs[1] / costs[0] < 4.8


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"num_features": 1.5}, "mixer 'nprf' got num_features=1.5; choose a whole number, 1 or more"),
        ({"bias_width": 0}, "bias_width=0; choose a whole number, 1 or more"),
        ({"temperature": -1}, "temperature=-1; choose a number above 0"),
    ],
)
def test_wrong_knobs_name_the_choices(knobs, words):
    with pytest.raises(LinearizeError, match=words):
        build_mixer("nprf", SHAPE, knobs)


def test_the_published_formula_written_out():
    """Unit lengths, no rotation, and one number for each offset; beyond the table those of its border."""
    layout = Layout(0, (Grid(3, 7),))
    query, key, value = random_tokens(layout)
    context = flux_context(layout)
    mixer = build_mixer("nprf", SHAPE, {"variant": "paper", "bias_reach": 2, "num_features": 5}).double()
    assert {name for name, _ in mixer.named_parameters()} == {"table"}
    torch.nn.init.normal_(mixer.table)
    features = []
    for states in (query, key):
        unit = states / states.norm(dim=-1, keepdim=True)
        features.append((unit @ mixer.projection.T - 0.5).exp())
    places = coordinates(layout)
    offset = (places[None] - places[:, None]).clamp(-2, 2) + 2
    weights = features[0] @ features[1].transpose(-1, -2) * mixer.table[:, offset[..., 0], offset[..., 1]].exp()
    expected = weights @ value / weights.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(mixer(query, key, value, context), expected)
