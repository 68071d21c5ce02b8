"""What the linear mixer's formula promises, beside the matrix."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from contexts import SHAPE, flux_context, random_tokens
from linearize.errors import LinearizeError
from linearize.layout import TILE, Grid, Layout
from linearize.mixers import AttentionShape, build_mixer
from linearize.mixers.linear import LinearMixer
from linearize.ops.depthwise import depthwise_images
from linearize.ops.feature_maps import elu_plus_one

LAYOUT = Layout(5, (Grid(7, 11),))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_without_exact_text_it_is_the_published_formula():
    query, key, value = random_tokens(LAYOUT)
    mixer = LinearMixer(SHAPE, rope="none", text="state").double()
    weights = elu_plus_one(query) @ elu_plus_one(key).transpose(-1, -2)
    expected = weights @ value / weights.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(mixer(query, key, value, flux_context(LAYOUT)), expected)


def attend(query, key, value, numerator=None):
    """Linear attention by its weights; `numerator` are other features, of the weights above alone."""
    above, below = ((one @ other.transpose(-1, -2)) for one, other in (numerator or (query, key), (query, key)))
    return above @ value / below.sum(dim=-1, keepdim=True)


def convolve(mixer, value):
    """The mixer's filters on the pictures of LAYOUT without text, [batch, heads, tokens, channels]."""
    maps = value.transpose(2, 3).reshape(-1, value.shape[-1], 7, 11)
    convolved = F.conv2d(maps, mixer.filter[:, None], mixer.filter_bias, padding=2, groups=len(mixer.filter))
    return convolved.reshape(*value.shape[:2], -1, 77).transpose(2, 3)


def linfusion(mixer, query, key, value, _):
    def moved(mlp, states):
        wide = states.transpose(1, 2).flatten(2)
        wide = wide + mlp.outer(F.leaky_relu(F.layer_norm(mlp.inner(wide), (8,), mlp.norm.weight, mlp.norm.bias)))
        return F.elu(wide.unflatten(-1, (2, 16)).transpose(1, 2)) + 1

    return attend(moved(mixer.query_mlp, query), moved(mixer.key_mlp, key), value)


def lit(mixer, query, key, value, _):
    query, key, value = (states.transpose(1, 2).flatten(2)[:, None] for states in (query, key, value))
    output = attend(query.relu() + 1e-6, key.relu() + 1e-6, value) + convolve(mixer, value)
    return output[:, 0].unflatten(-1, (2, 16)).transpose(1, 2)


def sana(mixer, query, key, value, _):
    return attend(query.relu() + 1e-6, key.relu() + 1e-6, value)


def sana_video(mixer, query, key, value, context):
    query, key = query.relu() + 1e-6, key.relu() + 1e-6
    return attend(query, key, value, (context.rotate(query), context.rotate(key)))


def flatten(mixer, query, key, value, _):
    def focused(states, width):
        states = (states.relu() + 1e-6) / F.softplus(width)
        return states.norm(dim=-1, keepdim=True) * states**3 / (states**3).norm(dim=-1, keepdim=True)

    query, key = focused(query, mixer.query_map.width), focused(key, mixer.key_map.width)
    return attend(query, key, value) + convolve(mixer, value)


def polaformer(mixer, query, key, value, _):
    def signs(states, features):
        states, power = states / F.softplus(features.width), 1 + 4 * features.power.sigmoid()
        return states.relu() ** power, (-states).relu() ** power

    (more, less), keys = signs(query, mixer.query_map), torch.cat(signs(key, mixer.key_map), dim=-1)
    same, opposite = torch.cat([more, less], dim=-1), torch.cat([less, more], dim=-1)
    first, second = value.chunk(2, dim=-1)
    return torch.cat([attend(same, keys, first), attend(opposite, keys, second)], dim=-1) + convolve(mixer, value)


@pytest.mark.parametrize(
    ("formula", "knobs"),
    [
        (linfusion, {"feature_map": "elu", "mlp": 8}),
        (lit, {"feature_map": "relu", "num_heads": 1, "convolution": 5}),
        (sana, {"feature_map": "relu"}),
        (sana_video, {"feature_map": "relu", "rope": "after_map"}),
        (flatten, {"feature_map": "focused", "convolution": 5}),
        (polaformer, {"feature_map": "polar", "convolution": 5}),
    ],
)
def test_published_systems_are_choices_of_arguments(formula, knobs):
    layout = Layout(0, LAYOUT.grids)
    inputs, context = random_tokens(layout), flux_context(layout)
    mixer = LinearMixer(SHAPE, **{"rope": "none", "text": "state", **knobs}).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    torch.testing.assert_close(mixer(*inputs, context), formula(mixer, *inputs, context))


@pytest.mark.parametrize("text", ["exact", "state"])
def test_few_heads_are_wide_heads(text):
    """LiT: one linear head of width 32 instead of two of 16; the shapes of query, key and value stay."""
    inputs, context = random_tokens(LAYOUT), flux_context(LAYOUT)
    merged = LinearMixer(SHAPE, rope="none", num_heads=1, text="state").double()
    wide = [states.transpose(1, 2).flatten(2)[:, None] for states in inputs]
    alone = LinearMixer(AttentionShape(1, 32, 32), rope="none", text="state").double()
    expected = alone(*wide, context)[:, 0].unflatten(-1, (2, 16)).transpose(1, 2)
    torch.testing.assert_close(merged(*inputs, context), expected)


def test_rows_sum_to_one_except_with_rope_after_the_map():
    query, key, value = random_tokens(LAYOUT)
    for feature_map in ("elu", "relu", "focused", "hedgehog", "polar", "exponential"):
        for text in ("exact", "state"):
            sums = {}
            for rope in ("before_map", "after_map", "none"):
                mixer = LinearMixer(SHAPE, feature_map=feature_map, rope=rope, text=text).double()
                sums[rope] = mixer(query, key, torch.ones_like(value), flux_context(LAYOUT))
            for rope in ("before_map", "none"):
                torch.testing.assert_close(sums[rope], torch.ones_like(value))
            assert (sums["after_map"][:, :, LAYOUT.image_slice] - 1).abs().max() > 1e-2


@pytest.mark.parametrize("knobs", [{"convolution": 5}, {"mlp": 8}])
def test_new_branches_start_as_nothing(knobs):
    inputs, context = random_tokens(LAYOUT), flux_context(LAYOUT)
    plain = build_mixer("linear", SHAPE, {}).double()
    torch.testing.assert_close(build_mixer("linear", SHAPE, knobs).double()(*inputs, context), plain(*inputs, context))


@pytest.mark.parametrize(("num_heads", "filters"), [(0, 16), (1, 32)])
def test_the_convolution_has_the_published_number_of_parameters(num_heads, filters):
    """LiT and FLatten: 26 parameters for each channel of one head, shared by heads."""
    with_filter, without = (LinearMixer(SHAPE, num_heads=num_heads, convolution=side) for side in (5, 0))
    count = [sum(parameter.numel() for parameter in mixer.parameters()) for mixer in (with_filter, without)]
    assert count[0] - count[1] == 26 * filters


def test_the_convolution_sees_every_picture_alone_in_any_order():
    layout = Layout(0, (Grid(5, 9), Grid(4, 17)), tile=TILE)
    states, weight, bias = torch.randn(2, 3, layout.num_image_tokens, 4), torch.randn(4, 3, 3), torch.randn(4)
    raster = depthwise_images(states, weight, bias, layout)[:, :, layout.tile_to_raster()]
    parts = states[:, :, layout.tile_to_raster()].split([45, 68], dim=2)
    for grid, tokens, ours in zip(layout.grids, parts, raster.split([45, 68], dim=2), strict=True):
        maps = tokens.flatten(0, 1).unflatten(1, (grid.height, grid.width)).permute(0, 3, 1, 2)
        expected = F.conv2d(maps, weight[:, None], bias, padding=1, groups=4)
        torch.testing.assert_close(ours.flatten(0, 1), expected.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_permuting_tokens_commutes_unless_there_is_a_convolution():
    layout = Layout(0, (Grid(6, 9),))
    inputs, context = random_tokens(layout), flux_context(layout)
    order = torch.randperm(layout.num_tokens)
    for convolution, commutes in ((0, True), (3, False)):
        mixer = LinearMixer(SHAPE, rope="none", convolution=convolution).double()
        if convolution:
            torch.nn.init.normal_(mixer.filter)
        moved = mixer(*(states[:, :, order] for states in inputs), context)
        assert torch.allclose(moved, mixer(*inputs, context)[:, :, order]) == commutes


def test_operations_grow_linearly_with_the_picture():
    mixer = LinearMixer(AttentionShape(24, 128, 3072), feature_map="hedgehog", convolution=5)
    small, large, larger = (mixer.flops(Layout(512, (Grid(side, 64),))) for side in (64, 128, 192))
    assert larger - large == large - small


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({"feature_map": "silu"}, "unknown feature_map 'silu', choose one of elu, relu"),
        ({"rope": "before"}, "got rope='before'; choose before_map, after_map or none"),
        ({"text": "exactly"}, "got text='exactly'; choose exact or state"),
        ({"num_heads": 3}, "num_heads=3, but the layer has 2; choose a divisor"),
        ({"convolution": 4}, "convolution=4; choose an odd side"),
        ({"mlp": -1}, "mlp=-1; choose a whole number, 0 or more"),
    ],
)
def test_what_it_cannot_do_is_told(knobs, sentence):
    with pytest.raises(LinearizeError, match=sentence):
        build_mixer("linear", SHAPE, knobs)


@pytest.mark.parametrize("knobs", [{}, {"num_heads": 2, "mlp": 8}, {"feature_map": "polar", "convolution": 3}])
def test_declared_operations_are_those_that_run(knobs):
    shape, layout = AttentionShape(4, 64, 256), Layout(64, (Grid(16, 24),))
    mixer, context = LinearMixer(shape, text="state", **knobs), flux_context(layout, shape=shape, dtype=torch.float32)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        mixer(*random_tokens(layout, batch=1, dtype=torch.float32, shape=shape), context)
    # More are run on the zeros behind a value that align it.
    assert 1 <= counter.get_total_flops() / mixer.flops(layout) < 1.25
