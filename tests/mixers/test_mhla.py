import pytest
import torch

from contexts import SHAPE, flux_context, random_tokens
from linearize.errors import LinearizeError
from linearize.layout import TILE, Grid, Layout
from linearize.mixers import AttentionShape, build_mixer
from linearize.ops.block_states import block_index, even_blocks, mix_block_states, mix_block_states_naive
from linearize.ops.feature_maps import floored_relu
from linearize.ops.rotary import rotate_features


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def features(num_tokens, num_features=3):
    return [torch.rand(2, 2, num_tokens, width, dtype=torch.float64) for width in (num_features, num_features, 5)]


def test_blocks_are_of_one_size_and_their_number_does_not_depend_on_the_grid():
    index = block_index(Layout(0, (Grid(6, 10),)), 2).view(6, 10)
    assert index[0].tolist() == [0] * 5 + [1] * 5 and index[:, 9].tolist() == [1] * 3 + [3] * 3
    assert block_index(Layout(3, (Grid(1, 5),)), 4).tolist() == [0, 0, 1, 2, 3]
    two = Layout(2, (Grid(4, 6), Grid(3, 2)))
    assert torch.equal(block_index(two, 3), torch.cat([block_index(Layout(0, (grid,)), 3) for grid in two.grids]))
    tiled = Layout(0, (Grid(11, 19),), tile=TILE)
    assert torch.equal(block_index(tiled, 4)[tiled.tile_to_raster()], block_index(tiled.with_tile(None), 4))


def test_states_equal_dense_weights_and_so_do_gradients():
    blocks = even_blocks(Layout(0, (Grid(5, 7), Grid(2, 3))), 3, torch.device("cpu"))
    inputs = [x.requires_grad_() for x in (*features(len(blocks.index)), torch.randn(2, 9, 9, dtype=torch.float64))]
    outputs = [mix(*inputs, blocks) for mix in (mix_block_states, mix_block_states_naive)]
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(output.sin().sum(), inputs) for output in outputs]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def plain_linear(query, key, value, layout):
    weights = floored_relu(query) @ floored_relu(key).transpose(-1, -2)
    return weights @ value / weights.sum(dim=-1, keepdim=True)


def test_a_constant_matrix_is_plain_linear_attention():
    layout = Layout(0, (Grid(9, 14),))
    inputs, context = random_tokens(layout), flux_context(layout)
    mixer = build_mixer("mhla", SHAPE, {"feature_map": "relu", "rope": "none"}).double()
    torch.nn.init.constant_(mixer.log_mix, -0.7)
    torch.testing.assert_close(mixer(*inputs, context), plain_linear(*inputs, layout), rtol=1e-12, atol=1e-12)
    one = build_mixer("mhla", SHAPE, {"feature_map": "relu", "rope": "none", "blocks_per_side": 1}).double()
    torch.testing.assert_close(one(*inputs, context), plain_linear(*inputs, layout), rtol=1e-12, atol=1e-12)


def test_the_identity_is_linear_attention_within_blocks():
    layout = Layout(0, (Grid(7, 10),))
    inputs, context = random_tokens(layout), flux_context(layout)
    mixer = build_mixer("mhla", SHAPE, {"feature_map": "relu", "rope": "none", "blocks_per_side": 2}).double()
    with torch.no_grad():
        mixer.log_mix.copy_(torch.eye(4).log())
    output, index = mixer(*inputs, context), block_index(layout, 2)
    for block in range(4):
        inside = index == block
        expected = plain_linear(*(states[:, :, inside] for states in inputs), layout)
        torch.testing.assert_close(output[:, :, inside], expected, rtol=1e-12, atol=1e-12)


def test_the_rank_rises_above_the_number_of_features():
    blocks = even_blocks(Layout(0, (Grid(8, 12),)), 3, torch.device("cpu"))
    query, key, _ = features(len(blocks.index))
    values = torch.eye(len(blocks.index), dtype=torch.float64).expand(2, 2, -1, -1)
    ranks = [
        torch.linalg.matrix_rank(mix_block_states(query, key, values, mix[None].double(), blocks))[0, 0].item()
        for mix in (torch.ones(9, 9), torch.eye(9), torch.rand(9, 9))
    ]
    assert ranks == [3, 27, 27]


def test_it_starts_near_plain_linear_attention_and_near_blocks_weigh_more():
    mix = build_mixer("mhla", SHAPE, {"blocks_per_side": 3}).log_mix.exp()
    assert mix.dtype == torch.float32 and mix.shape == (2, 9, 9)
    torch.testing.assert_close(mix.diagonal(dim1=1, dim2=2), torch.ones(2, 9))
    assert mix.min().item() == pytest.approx(2**-0.5)
    assert mix[0, 0].argsort(descending=True)[:3].sort().values.tolist() == [0, 1, 3]


def test_rotation_after_the_map_is_relative_and_before_it_is_not():
    layout = Layout(0, (Grid(6, 8),))
    inputs, context = random_tokens(layout), flux_context(layout)
    outputs = {}
    for rope in ("before_map", "after_map"):
        mixer = build_mixer("mhla", SHAPE, {"feature_map": "relu", "rope": rope}).double()
        moved = flux_context(layout)
        moved.positions = context.positions + torch.tensor([0, 5, 3])
        angles = context.angles(moved.positions, SHAPE.head_dim)
        moved.rotate = lambda x, angles=angles: rotate_features(x, angles)
        outputs[rope] = (mixer(*inputs, moved) - mixer(*inputs, context)).abs().max().item()
    assert outputs["after_map"] < 1e-10 and outputs["before_map"] > 0.01


def test_the_cost_is_linear_in_tokens():
    mixer = build_mixer("mhla", AttentionShape(24, 128, 3072), {})
    costs = [mixer.flops(Layout(512, (Grid(side, side),))) for side in (128, 256)]
    assert 3.5 < costs[1] / costs[0] < 4.1


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"blocks_per_side": 0}, "blocks_per_side=0; choose a whole number, 1 or more"),
        ({"rope": "after"}, "rope='after'; choose before_map, after_map or none"),
        ({"text": "none"}, "text='none'; choose exact or state"),
        ({"feature_map": "gelu"}, "unknown feature_map 'gelu', choose one of elu, relu"),
    ],
)
def test_wrong_knobs_name_the_choices(knobs, words):
    with pytest.raises(LinearizeError, match=words):
        build_mixer("mhla", SHAPE, knobs)


def test_the_published_matrix_is_free_shared_and_may_be_negative():
    layout = Layout(0, (Grid(4, 6),))
    query, key, value = random_tokens(layout)
    mixer = build_mixer("mhla", SHAPE, {"blocks_per_side": 2, "feature_map": "elu", "variant": "paper"}).double()
    torch.testing.assert_close(mixer.mix_of_blocks.sum(dim=1), torch.ones(1, 4, dtype=torch.float64))
    torch.nn.init.normal_(mixer.mix_of_blocks)
    index = block_index(layout, 2)
    mix = mixer.mix_of_blocks[0][index][:, index]
    assert (mix < 0).any()
    weights = (torch.nn.functional.elu(query) + 1) @ (torch.nn.functional.elu(key) + 1).transpose(-1, -2) * mix
    expected = weights @ value / weights.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(mixer(query, key, value, flux_context(layout)), expected)
