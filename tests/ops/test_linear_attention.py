import pytest
import torch

from contexts import flux_context
from linearize.layout import Grid, Layout
from linearize.ops.dense_attention import dense_attention
from linearize.ops.feature_maps import Features, elu_plus_one, floored_relu
from linearize.ops.linear_attention import (
    LinearPart,
    dense_join,
    dense_linear_weights,
    join,
    linear_attention,
    softmax_part,
    state_of,
    with_text_queries,
)
from linearize.ops.products import wide_matmul
from linearize.ops.rotary import rotate_features

LAYOUT = Layout(5, (Grid(3, 7),))
ZERO = torch.zeros((), dtype=torch.float64)


@pytest.fixture
def tokens():
    torch.manual_seed(0)
    return torch.randn(3, 2, 2, LAYOUT.num_tokens, 16, dtype=torch.float64).unbind(0)


def features(states, feature_map=elu_plus_one):
    return Features(feature_map(states), ZERO)


def test_the_state_equals_the_dense_weights_and_rows_sum_to_one(tokens):
    query, key, value = tokens
    part = linear_attention(features(query), features(key), value)
    _, weights = dense_linear_weights(features(query), features(key))
    torch.testing.assert_close(join(None, part), weights @ value / weights.sum(-1, keepdim=True))
    ones = linear_attention(features(query), features(key), torch.ones_like(value))
    torch.testing.assert_close(join(None, ones), torch.ones_like(value))


def shifted(layout, by):
    context = flux_context(layout)
    angles = context.angles(context.positions + torch.tensor([0, *by]), 16).double()
    return lambda states: rotate_features(states, angles)


def test_rope_after_the_map_is_relative_and_before_it_is_not(tokens):
    query, key, value = tokens

    def after(rotate):
        maps = features(query, floored_relu), features(key, floored_relu)
        return join(None, linear_attention(*maps, value, rotated=tuple(rotate(one.values) for one in maps)))

    def before(rotate):
        return join(
            None, linear_attention(features(rotate(query), floored_relu), features(rotate(key), floored_relu), value)
        )

    image = LAYOUT.image_slice
    query, key, value = (states[:, :, image] for states in (query, key, value))
    here, there = (shifted(Layout(0, LAYOUT.grids), by) for by in ((0, 0), (9, 4)))
    torch.testing.assert_close(after(here), after(there), rtol=1e-9, atol=1e-9)
    assert (before(here) - before(there)).abs().max() > 0.1


def test_rotating_features_is_the_familys_rotation_at_its_own_width(tokens):
    query = tokens[0].float()
    context = flux_context(LAYOUT)
    ours = rotate_features(query, context.angles(context.positions, 16))
    torch.testing.assert_close(ours, context.rotate(query))
    twice = rotate_features(torch.cat([query, 2 * query], -1), context.angles(context.positions, 16), num_parts=2)
    torch.testing.assert_close(twice, torch.cat([ours, 2 * ours], -1))


@pytest.mark.parametrize("shift", [0.0, 300.0, -300.0])
def test_one_normaliser_over_softmax_and_linear_keys(tokens, shift):
    query, key, value = tokens
    text, image = LAYOUT.text_slice, LAYOUT.image_slice
    query = query + shift / key[:, :, :1].square().sum(-1, keepdim=True) * key[:, :, :1]
    exact = softmax_part(query, key[:, :, text], value[:, :, text], scale=1.0)
    far = linear_attention(features(query), features(key[:, :, image]), value[:, :, image])
    seen = torch.zeros(LAYOUT.num_tokens, dtype=torch.bool)
    seen[text] = True
    scores = query @ key.transpose(-1, -2)
    weights, _ = dense_linear_weights(features(query), features(key))
    weights = weights.masked_fill(seen, 0.0)
    torch.testing.assert_close(join(exact, far), dense_join(scores, seen, (weights, weights), value))
    # The factor e^-c on one branch alone is another function.
    unscaled = far._replace(log_scale=exact.log_mass)
    assert (join(exact, unscaled) - join(exact, far)).abs().max() > 1e-3


def test_where_neither_branch_sees_anything_there_are_zeros(tokens):
    query, key, value = tokens
    nothing = softmax_part(query, key, value, scale=0.25, key_mask=torch.zeros(2, LAYOUT.num_tokens, dtype=torch.bool))
    blind = torch.full_like(query[..., :1], -torch.inf)
    parts = [LinearPart(value, torch.ones_like(blind), blind), LinearPart(0 * value, torch.zeros_like(blind), ZERO)]
    for part in parts:
        assert torch.equal(join(nothing, part), torch.zeros_like(value))


def test_softmax_on_all_keys_and_nothing_linear_is_softmax(tokens):
    query, key, value = tokens
    nothing = LinearPart(torch.zeros_like(value), torch.zeros_like(value[..., :1]), ZERO)
    exact = softmax_part(query, key, value, scale=0.25)
    torch.testing.assert_close(join(exact, nothing), dense_attention(query, key, value, scale=0.25))
    mask = torch.zeros(2, LAYOUT.num_tokens, dtype=torch.bool)
    blind = softmax_part(query.requires_grad_(), key, value, scale=0.25, key_mask=mask)
    output = join(blind, nothing)
    assert (output == 0).all()
    assert torch.autograd.grad(output.sum(), query)[0].isfinite().all()


def test_linear_attention_on_nothing_has_gradients_of_zero(tokens):
    query, key, value = leaves = [states.clone().requires_grad_() for states in tokens]
    mask = torch.ones(2, LAYOUT.num_tokens, dtype=torch.bool)
    mask[1] = False
    output = join(None, linear_attention(features(query), features(key), value, key_mask=mask))
    assert (output[1] == 0).all() and (output[0] != 0).any()
    for gradient in torch.autograd.grad(10 * output.sum(), leaves):
        assert gradient.isfinite().all() and (gradient[1] == 0).all()


@pytest.mark.parametrize("masked", [False, True])
def test_text_sees_everything_by_softmax(tokens, masked):
    query, key, value = tokens
    mask = (torch.rand(2, LAYOUT.num_tokens) > 0.3) if masked else None
    if masked:
        mask[1] = False
    image = torch.zeros_like(value[:, :, LAYOUT.image_slice])
    output = with_text_queries(image, query, key, value, layout=LAYOUT, scale=0.3, key_mask=mask)
    expected = dense_attention(query, key, value, scale=0.3, key_mask=mask)
    torch.testing.assert_close(output[:, :, LAYOUT.text_slice], expected[:, :, LAYOUT.text_slice])
    assert (output[:, :, LAYOUT.image_slice] == 0).all()


@pytest.mark.parametrize("num_tokens", [1, 4096, 9001])
def test_states_of_many_tokens_are_summed_in_pieces(num_tokens):
    torch.manual_seed(0)
    key, value = torch.randn(2, 1, 2, num_tokens, 3, dtype=torch.float64)
    torch.testing.assert_close(state_of(key, value), key.transpose(-1, -2) @ value)


@pytest.mark.gpu
@pytest.mark.parametrize("after_map", [False, True])
def test_bf16_on_a_gpu_is_the_float64_form_up_to_rounding(after_map):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 9001, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    ours = [states.requires_grad_() for states in (query.abs(), key.abs(), value)]
    exact = [states.detach().cpu().double().requires_grad_() for states in ours]
    results = []
    for query, key, value in (ours, exact):
        zero = torch.zeros((), device=query.device)
        rotated = (query.flip(-1), key.flip(-1)) if after_map else None
        output = join(None, linear_attention(Features(query, zero), Features(key, zero), value, rotated=rotated))
        results.append([output, *torch.autograd.grad((output.double() * 30).sin().sum(), (query, key, value))])
    assert results[0][0].dtype == torch.bfloat16
    for one, other in zip(*results, strict=True):
        assert (one.cpu().double() - other).norm() < 3e-2 * other.norm()


@pytest.mark.gpu
def test_products_of_bf16_on_a_gpu_are_not_rounded_and_have_gradients():
    torch.manual_seed(0)
    first, second = torch.randn(2, 3, 70, 40, device="cuda"), torch.randn(2, 3, 40, 50, device="cuda")
    leaves = [states.bfloat16().requires_grad_() for states in (first, second)]
    exact = [states.detach().double().requires_grad_() for states in leaves]
    product, expected = wide_matmul(*leaves), exact[0] @ exact[1]
    assert product.dtype == torch.float32
    assert (product - expected).norm() < 1e-6 * expected.norm()
    gradients = (
        torch.autograd.grad(found.sin().sum(), states) for found, states in ((product, leaves), (expected, exact))
    )
    for one, other in zip(*gradients, strict=True):
        assert (one - other).norm() < 1e-2 * other.norm()
