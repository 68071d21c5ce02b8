import math

import pytest
import torch

from linearize.errors import LinearizeError
from linearize.ops.feature_maps import (
    FEATURE_MAPS,
    build_feature_map,
    floored_relu,
    focus,
    safe_exponential,
    signed_powers,
    swap_signs,
)

HEADS, DIM = 2, 8


@pytest.fixture
def states():
    torch.manual_seed(0)
    return torch.randn(2, HEADS, 13, DIM, dtype=torch.float64)


def test_focusing_keeps_lengths_and_with_power_one_everything(states):
    positive = floored_relu(states)
    torch.testing.assert_close(focus(positive, 3.0).norm(dim=-1), positive.norm(dim=-1))
    torch.testing.assert_close(focus(positive, 1.0), positive)
    whole = focus(positive, 3.0, dim=(1, -1))
    torch.testing.assert_close(whole.norm(dim=(1, 3)), positive.norm(dim=(1, 3)))
    assert not torch.allclose(whole, focus(positive, 3.0))


def test_same_minus_opposite_signs_is_the_product(states):
    query, key = states, states.flip(2) + 0.3
    one = torch.ones((), dtype=torch.float64)
    query_features, key_features = signed_powers(query, one), signed_powers(key, one)
    same = (query_features * key_features).sum(dim=-1)
    opposite = (swap_signs(query_features) * key_features).sum(dim=-1)
    assert (same >= 0).all() and (opposite >= 0).all()
    torch.testing.assert_close(same - opposite, (query * key).sum(dim=-1))


def test_safe_exponentials_are_exponentials_and_never_overflow(states):
    for over_tokens in (False, True):
        features = safe_exponential(states, over_tokens)
        assert features.values.max() == 1
        torch.testing.assert_close(features.values * features.log_scale.exp(), states.exp())
        assert safe_exponential(states * 1e4, over_tokens).values.isfinite().all()
    key_mask = torch.ones(2, 13, dtype=torch.bool)
    key_mask[:, 5] = False
    spoilt = states.clone()
    spoilt[:, :, 5] = 1e4
    assert torch.equal(*(safe_exponential(some, True, key_mask).log_scale for some in (states, spoilt)))
    assert safe_exponential(spoilt, True, key_mask).values.isfinite().all()


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_features_are_not_negative_and_have_the_declared_mean_product(name):
    torch.manual_seed(0)
    feature_map = build_feature_map(name, HEADS, 64)
    query, key = torch.randn(2, 1, HEADS, 400, 64).unbind(0)
    mapped, keys = feature_map(query, is_key=False), feature_map(key, is_key=True)
    assert mapped.values.shape[-1] == feature_map.num_features
    assert (mapped.values >= 0).all()
    product = mapped.values @ keys.values.transpose(-1, -2) * (mapped.log_scale + keys.log_scale).exp()
    assert abs(product.mean().log() - feature_map.log_mean_product) < 0.2
    assert all(parameter.dtype == torch.float32 for parameter in feature_map.parameters())


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_gradients_are_right_and_finite_at_zero(name):
    torch.manual_seed(0)
    feature_map = build_feature_map(name, 1, 4).double()
    states = torch.randn(1, 1, 3, 4, dtype=torch.float64, requires_grad=True)

    def kernel(states):
        features = feature_map(states, is_key=True)
        return features.values * features.log_scale.exp()

    assert torch.autograd.gradcheck(kernel, (states,))
    zeros = torch.zeros_like(states).requires_grad_()
    (gradient,) = torch.autograd.grad(kernel(zeros).sum(), zeros)
    assert gradient.isfinite().all()


def test_hedgehog_starts_as_softmax_of_the_channels(states):
    features = build_feature_map("hedgehog", HEADS, DIM).double().map(states)
    torch.testing.assert_close(features[..., :DIM], states.softmax(dim=-1))
    torch.testing.assert_close(features.sum(dim=-1), torch.full(states.shape[:-1], 2.0, dtype=torch.float64))
    assert math.isclose(build_feature_map("hedgehog", HEADS, DIM, width=5).num_features, 10)


def test_an_unknown_map_names_the_choices():
    with pytest.raises(LinearizeError, match="unknown feature_map 'elo', choose one of elu, relu, "):
        build_feature_map("elo", 1, 4)
