import math

import pytest
import torch

from contexts import SHAPE, flux_context, random_tokens
from linearize.errors import LinearizeError
from linearize.layout import Grid, Layout
from linearize.mixers import AttentionShape, build_mixer
from linearize.ops.feature_maps import Features
from linearize.ops.linear_attention import linear_attention
from linearize.ops.random_features import draw_projection, haar_orthogonal, positive_features

DIM, DRAWS = 16, 3000


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def product(query, key):
    return (query.values * key.values).sum(dim=-1) * torch.exp(query.log_scale + key.log_scale)[..., 0]


def estimates(query, key, projections):
    """phi(q)^T phi(k) of one query and one key for each projection, [draws]."""
    results = []
    for projection in projections:
        features = [
            positive_features(x.view(1, 1, 1, -1), projection, is_key=is_key)
            for x, is_key in ((query, False), (key, True))
        ]
        results.append(product(*features).item())
    return torch.tensor(results, dtype=torch.float64)


def deviation(samples, mean):
    """How many standard errors the mean of samples is away."""
    return abs(samples.mean() - mean).item() / (samples.std().item() / math.sqrt(len(samples)))


def test_orthogonal_features_are_unbiased_and_plain_qr_is_not():
    half = torch.eye(DIM, dtype=torch.float64)[0] / 2
    source = generator()
    fixed = estimates(half, half, [draw_projection(DIM, DIM, source) for _ in range(DRAWS)])
    assert deviation(fixed, math.exp(0.25)) < 3.5

    def plain(source):
        normal = torch.randn(DIM, DIM, generator=source, dtype=torch.float64)
        lengths = torch.randn(DIM, DIM, generator=source, dtype=torch.float64).norm(dim=1, keepdim=True)
        return torch.linalg.qr(normal).Q.T * lengths  # as in the published code

    assert deviation(estimates(half, half, [plain(source) for _ in range(DRAWS)]), math.exp(0.25)) > 6


def test_the_mean_is_the_exponential_for_any_pair_and_any_number_of_features():
    source = generator(1)
    query, key = (torch.randn(DIM, generator=source, dtype=torch.float64) / 5 for _ in range(2))
    for num_features in (5, 24):
        samples = estimates(query, key, [draw_projection(num_features, DIM, source) for _ in range(DRAWS)])
        assert deviation(samples, math.exp(query @ key)) < 3.5


def test_the_variance_of_independent_features_is_the_law():
    """Var / E^2 = (exp(|q + k|^2) - 1) / m for independent rows."""
    source = generator(2)
    query, key = (torch.randn(DIM, generator=source, dtype=torch.float64) / 5 for _ in range(2))
    rows = torch.randn(20_000, 8, DIM, generator=source, dtype=torch.float64)
    samples = torch.exp(rows @ (query + key) - (query @ query + key @ key) / 2).mean(dim=1)
    law = ((query + key).square().sum().exp() - 1) / 8
    assert (samples.var() / math.exp(2 * query @ key)).item() == pytest.approx(law.item(), rel=0.08)


def test_rows_are_orthogonal_in_blocks_with_normal_lengths():
    projection = draw_projection(40, DIM, generator())
    directions = projection / projection.norm(dim=1, keepdim=True)
    for block in directions.split(DIM):
        torch.testing.assert_close(block @ block.T, torch.eye(len(block), dtype=torch.float64), rtol=0, atol=1e-12)
    lengths = draw_projection(4000, DIM, generator()).square().sum(dim=1)
    assert lengths.mean().item() == pytest.approx(DIM, rel=0.03) and lengths.std().item() > 4
    columns = torch.stack([haar_orthogonal(4, generator(seed))[:, 0] for seed in range(2000)])
    assert columns.mean(dim=0).abs().max() < 0.05


def test_a_factor_of_each_query_cancels_and_a_factor_of_each_key_does_not():
    query, key, value = (torch.randn(1, 1, 12, DIM, dtype=torch.float64) for _ in range(3))
    projection = draw_projection(32, DIM, generator())
    features = [positive_features(x, projection, is_key=is_key) for x, is_key in ((query, False), (key, True))]

    def output(query, key):
        part = linear_attention(query, key, value)
        return part.numerator / part.mass

    expected = output(*features)
    scaled = Features(features[0].values * torch.rand(12, 1, dtype=torch.float64), features[0].log_scale)
    torch.testing.assert_close(output(scaled, features[1]), expected, rtol=1e-12, atol=1e-12)
    per_key = positive_features(key, projection, is_key=False)
    wrong = output(features[0], Features(per_key.values, torch.zeros(())))
    assert (wrong - expected).abs().max() > 0.1


def test_the_published_form_approaches_softmax_as_features_grow():
    layout = Layout(3, (Grid(6, 9),))
    query, key, value = (
        states.detach() * size for states, size in zip(random_tokens(layout), (0.5, 0.5, 1), strict=True)
    )
    context = flux_context(layout)
    teacher = build_mixer("softmax", SHAPE, {}).reference(query, key, value, context)
    errors = []
    for num_features in (64, 16_384):
        mixer = build_mixer("performer", SHAPE, {"num_features": num_features, "variant": "paper", "text": "state"})
        errors.append((mixer.double()(query, key, value, context) - teacher).norm() / teacher.norm())
    assert errors[1] < 0.04 and errors[1] < errors[0] / 5


def test_lengths_of_query_and_key_do_not_matter_beside_the_temperature():
    layout = Layout(0, (Grid(5, 8),))
    query, key, value = random_tokens(layout)
    mixer, context = build_mixer("performer", SHAPE, {"num_features": 24}).double(), flux_context(layout)
    torch.testing.assert_close(mixer(3 * query, key / 7, value, context), mixer(query, key, value, context))


def test_features_change_by_redraw_alone_and_by_the_seed():
    mixer, other = (build_mixer("performer", SHAPE, {"num_features": 24}) for _ in range(2))
    before = mixer.projection.clone()
    assert torch.equal(before, other.projection) and "projection" in mixer.state_dict()
    layout = Layout(2, (Grid(3, 4),))
    mixer.train()(*random_tokens(layout, dtype=torch.float32), flux_context(layout))
    assert torch.equal(mixer.projection, before)
    mixer.redraw(7)
    assert not torch.equal(mixer.projection, before)
    other.redraw(7)
    assert torch.equal(mixer.projection, other.projection)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    mixer.redraw(8)
    assert torch.equal(torch.get_rng_state(), state)


def test_lengths_of_normed_vectors_stay_finite_in_float32():
    """At a width of 128 exponents reach 10^3, which a shared float32 scale would not survive."""
    layout = Layout(2, (Grid(8, 12),))
    shape = AttentionShape(num_heads=1, head_dim=128, hidden_size=128)
    query, key, value = (torch.randn(1, 1, layout.num_tokens, 128) * size for size in (3.0, 3.0, 1.0))
    context = flux_context(layout)
    context.scale, context.rotate = 128**-0.5, lambda states: states
    for variant in ("dit", "paper"):
        output = build_mixer("performer", shape, {"variant": variant})(query, key, value, context)
        assert output.isfinite().all()


def test_the_cost_is_linear_in_tokens():
    mixer = build_mixer("performer", AttentionShape(24, 128, 3072), {})
    costs = [mixer.flops(Layout(512, (Grid(side, side),))) for side in (128, 256)]
    assert 3.8 < costs[1] / costs[0] < 4.1


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"num_features": 0}, "num_features=0; choose a whole number, 1 or more"),
        ({"temperature": 0.0}, "temperature=0.0; choose a number above 0 and at most 16"),
        ({"temperature": 50}, "temperature=50; choose a number above 0 and at most 16"),
        ({"variant": "favor"}, "variant='favor'; choose dit or paper"),
        ({"text": True}, "text=True; choose exact or state"),
    ],
)
def test_wrong_knobs_name_the_choices(knobs, words):
    with pytest.raises(LinearizeError, match=words):
        build_mixer("performer", SHAPE, knobs)


@pytest.mark.parametrize("is_key", [False, True])
def test_gradients_of_features_are_those_of_the_exponential(is_key):
    projection = draw_projection(5, 4, generator())
    states = torch.randn(2, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    features = positive_features(states, projection, is_key=is_key)
    # The factor that is split off is a constant to the gradient.
    exponents = states @ projection.T - states.square().sum(dim=-1, keepdim=True) / 2 - math.log(5) / 2
    plain = (exponents - features.log_scale).exp()
    torch.testing.assert_close(features.values, plain)
    gradients = [torch.autograd.grad(values.sin().sum(), states)[0] for values in (features.values, plain)]
    torch.testing.assert_close(*gradients)
