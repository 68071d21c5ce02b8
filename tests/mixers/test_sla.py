import pytest
import torch

from contexts import SHAPE, flux_context, random_tokens
from linearize.errors import LinearizeError
from linearize.layout import TILE, Grid, Layout
from linearize.mixers import AttentionShape, build_mixer
from linearize.mixers._tokens import Tokens
from linearize.ops import block_sparse
from linearize.ops.block_sparse import block_sparse_softmax, chosen, select_blocks, square_blocks
from linearize.ops.block_states import Blocks, mix_block_states
from linearize.ops.dense_attention import dense_attention
from linearize.ops.linear_attention import merge, weigh

LAYOUT = Layout(4, (Grid(9, 14),))
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def image_tokens(layout=LAYOUT):
    return tuple(states[:, :, layout.image_slice] for states in random_tokens(layout))


def test_blocks_are_squares_cut_at_the_border_and_every_grid_has_its_own():
    index, num_blocks, *_ = square_blocks(Layout(3, (Grid(5, 7), Grid(2, 3))), 3, CPU)
    assert num_blocks == 7
    assert index[:35].view(5, 7)[::2].tolist() == [[0, 0, 0, 1, 1, 1, 2]] * 2 + [[3, 3, 3, 4, 4, 4, 5]]
    assert index[35:].tolist() == [6] * 6
    tiled = Layout(0, (Grid(11, 19),), tile=TILE)
    raster = square_blocks(tiled.with_tile(None), 4, CPU).index
    assert torch.equal(square_blocks(tiled, 4, CPU).index[tiled.tile_to_raster()], raster)


@pytest.mark.parametrize("variant", ["dit", "paper"])
@pytest.mark.parametrize("layout", [LAYOUT, Layout(0, (Grid(5, 6), Grid(7, 3)))], ids=["text", "two grids"])
def test_all_keys_are_the_teacher(variant, layout):
    inputs, context = random_tokens(layout), flux_context(layout)
    mixer = build_mixer("sla", SHAPE, {"key_ratio": 1.0, "block_size": 3, "variant": variant}).double()
    expected = build_mixer("softmax", SHAPE, {}).reference(*inputs, context)
    torch.testing.assert_close(mixer(*inputs, context), expected, rtol=1e-12, atol=1e-13)


def test_all_keys_leave_the_published_linear_part_without_a_gradient():
    mixer = build_mixer("sla", SHAPE, {"key_ratio": 1.0, "block_size": 3, "variant": "paper"}).double()
    torch.nn.init.normal_(mixer.projection.weight)
    inputs = random_tokens(LAYOUT)
    output = mixer(*inputs, flux_context(LAYOUT))
    assert all(one.isfinite().all() for one in torch.autograd.grad(10 * output.sum(), inputs))


def test_selected_blocks_are_those_of_the_largest_products_of_means():
    query, key, _ = image_tokens()
    key_mask = torch.rand(2, key.shape[2]) > 0.3
    blocks = square_blocks(LAYOUT, 4, CPU)
    selected = select_blocks(query, key, blocks, 3, key_mask)
    for sample in range(2):
        inside = [blocks.index == block for block in range(blocks.number)]
        queries = torch.stack([query[sample][:, where].mean(dim=1) for where in inside], dim=1)
        keys = torch.stack([key[sample][:, where & key_mask[sample]].mean(dim=1) for where in inside], dim=1)
        best = (queries @ keys.transpose(-1, -2)).topk(3, dim=-1).indices.sort(dim=-1).values
        assert torch.equal(selected[sample], best)


def test_the_rest_is_the_total_less_what_is_selected():
    query, key, value = (states.exp() for states in image_tokens())
    blocks = square_blocks(LAYOUT, 3, CPU)
    is_chosen = chosen(select_blocks(query, key, blocks, 4), blocks.number)
    some, rest = (mix_block_states(query, key, value, mask.double(), blocks) for mask in (is_chosen, ~is_chosen))
    torch.testing.assert_close(rest, query @ (key.transpose(-1, -2) @ value) - some, rtol=1e-11, atol=1e-9)


@pytest.mark.parametrize("at_a_time", [1, 2**25])
def test_sparse_softmax_equals_its_mask_and_parts_join_by_their_masses(at_a_time, monkeypatch):
    """Full attention is m O_selected + (1 - m) O_rest, with m the selected keys' share of the mass."""
    monkeypatch.setattr(block_sparse, "NUMBERS_AT_A_TIME", at_a_time)
    query, key, value = image_tokens()
    blocks = square_blocks(LAYOUT, 4, CPU)
    key_mask = torch.rand(2, len(blocks.index)) > 0.3
    arguments = dict(blocks=blocks, scale=0.3, key_mask=key_mask)
    selected = select_blocks(query, key, blocks, 3, key_mask)
    mask = chosen(selected, blocks.number)[..., blocks.index, :][..., blocks.index]
    part = block_sparse_softmax(query, key, value, selected=selected, **arguments)
    dense = dense_attention(query, key, value, scale=0.3, mask=mask, key_mask=key_mask)
    torch.testing.assert_close(part.output, dense, rtol=1e-12, atol=1e-13)
    rest = weigh(query @ key.transpose(-1, -2) * 0.3, value, ~mask & key_mask[:, None, None])
    share = torch.sigmoid(part.log_mass - rest.log_mass)
    full = dense_attention(query, key, value, scale=0.3, key_mask=key_mask)
    torch.testing.assert_close(share * part.output + (1 - share) * rest.output, full, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(merge(rest, part).output, full, rtol=1e-12, atol=1e-13)


def test_selected_blocks_are_those_with_the_largest_means():
    key = torch.zeros(1, 1, 16, 2)
    key[0, 0, 8:12, 0], key[0, 0, 12:, 1] = 3.0, 5.0
    query = torch.zeros(1, 1, 16, 2)
    query[..., :8, 0], query[..., 8:, 1] = 1.0, 1.0
    blocks = Blocks.of(torch.arange(4).repeat_interleave(4), 4)
    assert select_blocks(query, key, blocks, 1)[0, 0, :, 0].tolist() == [2, 2, 3, 3]
    hidden = torch.arange(16)[None] < 12
    assert 3 not in select_blocks(query, key, blocks, 1, hidden)[0, 0]


def test_a_projection_of_zero_leaves_the_sparse_part():
    inputs, context = random_tokens(LAYOUT), flux_context(LAYOUT)
    mixer = build_mixer("sla", SHAPE, {"key_ratio": 0.2, "block_size": 3, "variant": "paper"}).double()
    tokens = Tokens.of(*inputs, context)
    expected = dense_attention(*tokens.rotated, tokens.value, scale=context.scale, mask=mixer.sees_exactly(tokens))
    torch.testing.assert_close(mixer(*inputs, context), expected, rtol=1e-12, atol=1e-13)


def test_at_least_one_block_is_selected_where_rounding_would_leave_none():
    inputs, context = random_tokens(LAYOUT), flux_context(LAYOUT)
    mixer = build_mixer("sla", SHAPE, {"key_ratio": 0.001}).double()
    assert mixer.sees_exactly(Tokens.of(*inputs, context))[..., LAYOUT.image_slice].any(dim=-1).all()
    assert mixer(*inputs, context).isfinite().all()


def test_the_cost_is_quadratic_and_near_the_key_ratio():
    mixer = build_mixer("sla", AttentionShape(24, 128, 3072), {"key_ratio": 0.05})
    costs = [mixer.flops(Layout(0, (Grid(side, side),))) for side in (256, 512)]
    assert 15 < costs[1] / costs[0] < 16
    assert 0.05 < costs[1] / (4 * 24 * 128 * 512**4) < 0.09


def test_either_branch_can_be_turned_off():
    inputs, context = random_tokens(LAYOUT), flux_context(LAYOUT)
    knobs = {"key_ratio": 0.2, "block_size": 3, "feature_map": "elu"}
    tokens = Tokens.of(*inputs, context)
    linear = build_mixer("sla", SHAPE, {**knobs, "branches": "linear"}).double()
    assert not linear.sees_exactly(tokens)[LAYOUT.image_slice, LAYOUT.image_slice].any()
    window = build_mixer("sla", SHAPE, {**knobs, "branches": "window"}).double()
    expected = dense_attention(*tokens.rotated, tokens.value, scale=context.scale, mask=window.sees_exactly(tokens))
    torch.testing.assert_close(window(*inputs, context), expected, rtol=1e-12, atol=1e-13)
    window.calibrate(*inputs, context)
    assert not [name for name, _ in window.named_parameters() if "log_scale" in name]


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"key_ratio": 0}, "key_ratio=0; choose a share above 0 and at most 1"),
        ({"key_ratio": 1.5}, "key_ratio=1.5; choose a share above 0 and at most 1"),
        ({"block_size": 0}, "block_size=0; choose a whole number, 1 or more"),
        ({"variant": "sla2"}, "variant='sla2'; choose dit or paper"),
        ({"variant": "paper", "text": "state"}, "choose text='exact' or variant='dit'"),
        ({"variant": "paper", "branches": "linear"}, "choose branches='both' or variant='dit'"),
        ({"branches": "none"}, "branches='none'; choose both, linear or window"),
    ],
)
def test_wrong_knobs_name_the_choices(knobs, words):
    with pytest.raises(LinearizeError, match=words):
        build_mixer("sla", SHAPE, knobs)
