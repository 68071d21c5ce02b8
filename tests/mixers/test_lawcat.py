"""What the lawcat mixer's formula promises, beside the matrix."""

import pytest
import torch
import torch.nn.functional as F

from contexts import SHAPE, flux_context, random_tokens
from linearize.errors import LinearizeError
from linearize.layout import Grid, Layout
from linearize.mixers import AttentionShape, build_mixer
from linearize.mixers._tokens import Tokens
from linearize.mixers.clear import ClearMixer
from linearize.mixers.gla import GlaMixer
from linearize.mixers.lawcat import LawcatMixer

LAYOUT = Layout(4, (Grid(7, 12),))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("text", ["exact", "state"])
def test_without_window_it_starts_as_gated_linear_attention(text):
    """Filters start as the identity, and the map is the same for query and key."""
    inputs, context = random_tokens(LAYOUT), flux_context(LAYOUT)
    mixer = LawcatMixer(SHAPE, branches="linear", width=16, text=text).double()
    gla = GlaMixer(SHAPE, directions="rows", text=text).double()
    torch.testing.assert_close(mixer(*inputs, context), gla(*inputs, context))


def test_filters_are_identities_and_move_only_images():
    mixer = LawcatMixer(SHAPE)
    for weight in (mixer.query_filter, mixer.key_filter):
        assert weight.shape == (32, 3, 3) and weight.sum() == 32 and (weight[:, 1, 1] == 1).all()
    query, *_ = random_tokens(LAYOUT)
    assert sum(parameter.numel() for parameter in mixer.map.parameters()) == 2 * 16 * 8
    with torch.no_grad():
        mixer.query_filter[:, 0, 1] = 1.0
    tokens = Tokens.of(query, query, query, flux_context(LAYOUT))
    convolved = mixer._convolve(query, mixer.query_filter, tokens)
    torch.testing.assert_close(convolved[:, :, LAYOUT.text_slice], query[:, :, LAYOUT.text_slice])
    image, before = (states[:, :, LAYOUT.image_slice] for states in (convolved, query))
    torch.testing.assert_close(image[:, :, :12], before[:, :, :12])
    torch.testing.assert_close(image[:, :, 12:], before[:, :, 12:] + before[:, :, :-12])


def test_the_window_alone_is_clear_and_so_is_no_weight_on_the_linear_branch():
    inputs, context = random_tokens(LAYOUT), flux_context(LAYOUT)
    clear = ClearMixer(SHAPE, window=3)(*inputs, context)
    window = LawcatMixer(SHAPE, window=3, branches="window").double()
    assert not list(window.parameters())
    torch.testing.assert_close(window(*inputs, context), clear)
    mixer = LawcatMixer(SHAPE, window=3).double()
    torch.nn.init.constant_(mixer.log_scale, -60.0)
    torch.testing.assert_close(mixer(*inputs, context), clear)


def test_a_window_over_the_picture_without_the_linear_branch_is_the_teacher():
    inputs, context = random_tokens(LAYOUT), flux_context(LAYOUT)
    mixer = LawcatMixer(SHAPE, window=30).double()
    torch.nn.init.constant_(mixer.log_scale, -60.0)
    softmax = build_mixer("softmax", SHAPE, {})
    torch.testing.assert_close(mixer(*inputs, context), softmax.reference(*inputs, context))


@pytest.mark.parametrize("branches", ["linear", "both"])
def test_the_published_formula_token_by_token(branches):
    """Convolutions and the tied map without positions, GLA's recurrence from either end with [v, 1], e^-max."""
    layout = Layout(0, (Grid(3, 5),))
    query, key, value = random_tokens(layout)
    context = flux_context(layout)
    mixer = LawcatMixer(SHAPE, variant="paper", branches=branches, window=2).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)

    def features(states, weight):
        maps = states.transpose(2, 3).reshape(2, 32, 3, 5)
        convolved = F.conv2d(maps, weight[:, None], padding=1, groups=32).reshape(2, 2, 16, 15).transpose(2, 3)
        projected = convolved @ mixer.map.weight
        return torch.cat([projected.softmax(-1), (-projected).softmax(-1)], dim=-1)

    phi_query, phi_key = features(query, mixer.query_filter), features(key, mixer.key_filter)
    extended = torch.cat([value, torch.ones_like(value[..., :1])], dim=-1)
    inner = F.linear(context.hidden_states, mixer.gates.inner.weight)
    logits = F.linear(inner, mixer.gates.outer.weight, mixer.gates.outer.bias).unflatten(-1, (2, 2, 16))
    ahead, behind = (logits.sigmoid() ** (1 / 16)).permute(2, 0, 3, 1, 4)
    total = -(phi_query * phi_key).sum(-1, keepdim=True) * extended
    for tokens, gates in ((range(15), ahead), (range(14, -1, -1), behind)):
        state = torch.zeros(2, 2, 16, 17, dtype=torch.float64)
        for i in tokens:
            state = gates[:, :, i, :, None] * state + phi_key[:, :, i, :, None] * extended[:, :, i, None]
            total[:, :, i] += (phi_query[:, :, i, None] @ state)[:, :, 0]
    if branches == "both":
        places = torch.cartesian_prod(torch.arange(3), torch.arange(5))
        seen = (places[:, None] - places).square().sum(-1) < 4
        turned = [context.rotate(states) for states in (query, key)]
        scores = (turned[0] @ turned[1].transpose(-1, -2) * context.scale).masked_fill(~seen, -torch.inf)
        window = (scores - scores.amax(-1, keepdim=True)).exp() @ extended
        total = total * mixer.log_scale.exp()[:, None, None] + window
    torch.testing.assert_close(mixer(query, key, value, context), total[..., :-1] / total[..., -1:])


def test_the_published_start():
    mixer = LawcatMixer(SHAPE, variant="paper")
    assert (mixer.text, mixer.rope) == ("state", "none")
    torch.testing.assert_close(mixer.query_filter.sum(dim=(1, 2)), torch.full((32,), 1.008))
    assert (mixer.key_filter[:, 1, 1] == 1).all()
    assert mixer.gates.outer.bias.abs().max() == 0
    halves = mixer.gates(torch.zeros(1, 1, SHAPE.hidden_size)) * 16
    torch.testing.assert_close(halves.exp(), torch.full_like(halves, 0.5))
    for projection in (mixer.gates.inner, mixer.gates.outer):
        assert 0.003 < projection.weight.std() < 0.009


@pytest.mark.parametrize("knobs", [{}, {"branches": "linear"}, {"text": "state"}, {"variant": "paper"}])
def test_rows_sum_to_one(knobs):
    query, key, value = random_tokens(LAYOUT)
    mixer = LawcatMixer(SHAPE, **{"window": 3, **knobs}).double()
    torch.testing.assert_close(mixer(query, key, torch.ones_like(value), flux_context(LAYOUT)), torch.ones_like(value))


def test_operations_grow_linearly_with_the_picture():
    for branches in ("both", "linear", "window"):
        mixer = LawcatMixer(AttentionShape(24, 128, 3072), branches=branches)
        small, large, larger = (mixer.flops(Layout(512, (Grid(side, 64),))) for side in (64, 128, 192))
        assert larger - large == large - small


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({"convolution": 4}, "mixer 'lawcat' got convolution=4; choose an odd side, or 1 for none"),
        ({"branches": "conv"}, "choose both, linear or window"),
        ({"variant": "code"}, "choose dit or paper"),
        ({"directions": "all"}, "choose rows or rows_and_columns"),
        (
            {"rope": "after_map", "width": 3},
            "width=3 with rope='after_map'.*choose an even width, or rope='before_map'",
        ),
    ],
)
def test_what_it_cannot_do_is_told(knobs, sentence):
    with pytest.raises(LinearizeError, match=sentence):
        build_mixer("lawcat", SHAPE, knobs)
