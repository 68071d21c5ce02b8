"""What the regla mixer's formula promises, beside the matrix."""

import math

import pytest
import torch

from contexts import SHAPE, flux_context, random_tokens
from linearize.errors import LinearizeError
from linearize.layout import Grid, Layout
from linearize.mixers import AttentionShape, build_mixer
from linearize.mixers._tokens import Tokens
from linearize.mixers.regla import ReglaMixer, refined_log_gate

LAYOUT = Layout(4, (Grid(7, 12),))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_the_refined_gate_and_its_gradient():
    logits = torch.linspace(-12, 12, 49, dtype=torch.float64, requires_grad=True)
    gate = logits.sigmoid()
    for refinement, expected in (
        (-60.0, gate**2),
        (0.0, gate),
        (60.0, 1 - (1 - gate) ** 2),
        (1.3, None),
    ):
        r = torch.tensor(refinement, dtype=torch.float64).sigmoid()
        refined = refined_log_gate(logits, torch.full_like(logits, refinement)).exp()
        defined = (1 - r) * gate**2 + r * (1 - (1 - gate) ** 2)
        torch.testing.assert_close(refined, defined if expected is None else expected)
        (slope,) = torch.autograd.grad(refined.sum(), logits, retain_graph=True)
        torch.testing.assert_close(slope, (2 * (1 - r) * gate + 2 * r * (1 - gate)) * gate * (1 - gate))


def test_the_gate_is_finite_at_any_logit_and_fine_near_one():
    logits = torch.tensor([-1e4, -100.0, 0.0, 15.0, 100.0, 1e4], requires_grad=True)
    for refinement in (-50.0, 0.0, 50.0):
        log_gate = refined_log_gate(logits, torch.full_like(logits, refinement))
        assert log_gate.isfinite().all() and (log_gate <= 0).all()
        assert torch.autograd.grad(log_gate.sum(), logits)[0].isfinite().all()
    ours = refined_log_gate(torch.tensor(12.0), torch.tensor(-50.0)).double()
    expected = 2 * torch.nn.functional.logsigmoid(torch.tensor(12.0, dtype=torch.float64))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0.0)


def test_it_starts_open_over_a_whole_picture():
    mixer = ReglaMixer(SHAPE)
    (log_gate, *_) = mixer.log_gates(Tokens.of(*random_tokens(LAYOUT), flux_context(LAYOUT)))[0]
    assert 1900 < math.log(0.5) / log_gate.max() < 2200
    assert log_gate.max() == log_gate.min()


def test_open_gates_are_normalised_linear_attention_with_exponentials():
    query, key, value = random_tokens(LAYOUT)
    mixer = ReglaMixer(SHAPE, text="state", rope="none").double()
    torch.nn.init.constant_(mixer.gates.outer.bias, 1e3)
    weights = query.exp() @ key.exp().transpose(-1, -2)
    expected = weights @ value / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(mixer(query, key, value, flux_context(LAYOUT)), expected)


def test_features_are_at_most_one_and_the_factor_of_keys_cancels():
    query, key, value = random_tokens(LAYOUT)
    context = flux_context(LAYOUT)
    for knobs in ({"text": "state", "rope": "none"}, {"variant": "paper"}):
        mixer = ReglaMixer(SHAPE, **knobs).double()
        pair = mixer.features(Tokens.of(query, key, value, context))
        assert pair.query.values.max() == pair.key.values.max() == 1
    mixer = ReglaMixer(SHAPE, text="state", rope="none").double()
    torch.testing.assert_close(mixer(query, key + 5.0, value, context), mixer(query, key, value, context))


def test_the_deviation_is_that_of_unit_normals():
    """Var sum_c exp(u_c + w_c) = d e^2 (e^2 - 1)."""
    mixer = ReglaMixer(AttentionShape(1, 4, 4))
    products = torch.randn(4_000_000, 4, 2).double().sum(-1).exp().sum(-1)
    assert abs(products.std().log() - mixer.log_deviation) < 0.05


def test_the_published_norm_starts_with_the_teachers_statistics():
    query, key, value = (states.detach() for states in random_tokens(LAYOUT))
    context = flux_context(LAYOUT)
    mixer = ReglaMixer(SHAPE, variant="paper").double()
    normed = mixer(query, key, value, context)
    torch.testing.assert_close(normed.mean(-1), torch.zeros_like(normed[..., 0]))
    mixer.calibrate(query, key, value + 3.0, context)
    teacher = build_mixer("softmax", SHAPE, {}).reference(query, key, value + 3.0, context)
    torch.testing.assert_close(mixer.norm_bias[:, 0], teacher.mean(dim=(0, 2)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixer.norm_weight[:, 0], teacher.std(dim=(0, 2)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("text", ["exact", "state"])
def test_rows_sum_to_one(text):
    query, key, value = random_tokens(LAYOUT)
    mixer = ReglaMixer(SHAPE, text=text).double()
    torch.testing.assert_close(mixer(query, key, torch.ones_like(value), flux_context(LAYOUT)), torch.ones_like(value))


def test_operations_grow_linearly_with_the_picture():
    mixer = ReglaMixer(AttentionShape(24, 128, 3072))
    small, large, larger = (mixer.flops(Layout(512, (Grid(side, 64),))) for side in (64, 128, 192))
    assert larger - large == large - small


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({"rope": "after_map"}, "mixer 'regla' got rope='after_map'; choose before_map or none"),
        ({"gate": "token"}, "choose head or channel"),
        ({"rank": -2}, "rank=-2; choose a whole number, 0 or more"),
    ],
)
def test_what_it_cannot_do_is_told(knobs, sentence):
    with pytest.raises(LinearizeError, match=sentence):
        build_mixer("regla", SHAPE, knobs)
