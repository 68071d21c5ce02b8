"""What the care mixer's formula promises, beside the matrix."""

import pytest
import torch
import torch.nn.functional as F

from contexts import SHAPE, flux_context, random_tokens
from linearize.errors import LinearizeError
from linearize.layout import Grid, Layout
from linearize.mixers import AttentionShape, build_mixer
from linearize.mixers._tokens import Tokens
from linearize.mixers.care import CareMixer

LAYOUT = Layout(4, (Grid(5, 8),))
PICTURE = Layout(0, (Grid(5, 8),))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def randomized(**knobs):
    mixer = CareMixer(SHAPE, **knobs).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return mixer


def parts_of(features):
    """Memory and p of features of heads of 16, [batch, tokens, heads, 16] each."""
    return (half.unflatten(-1, (2, 16)) for half in features.chunk(2, dim=-1))


def test_the_attended_third_is_linear_attention_and_the_others_are_means():
    query, key, value = random_tokens(PICTURE)
    context = flux_context(PICTURE)
    features = CareMixer(SHAPE).double().token_features(Tokens.of(query, key, value, context), dense=False)
    memory, parts = parts_of(features)
    torch.testing.assert_close(memory, value.transpose(1, 2))
    weights = (F.elu(context.rotate(query)) + 1) @ (F.elu(context.rotate(key)) + 1).transpose(-1, -2)
    attended = weights @ value / weights.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(parts[..., :5], attended.transpose(1, 2)[..., :5])
    maps = value.detach().transpose(2, 3).unflatten(3, (5, 8)).flatten(0, 1)
    for side, channels in ((3, slice(5, 10)), (7, slice(10, 16))):
        means = F.avg_pool2d(maps, side, 1, side // 2).flatten(2).unflatten(0, (2, 2)).permute(0, 3, 1, 2)
        torch.testing.assert_close(parts[..., channels].detach(), means[..., channels])


def test_filters_leave_the_attended_third_alone_where_nothing_interacts():
    inputs, context = random_tokens(PICTURE), flux_context(PICTURE)
    mixer = CareMixer(SHAPE).double()
    before = mixer.token_features(Tokens.of(*inputs, context), dense=False)
    for weight in mixer.filters:
        torch.nn.init.zeros_(weight)
    after = mixer.token_features(Tokens.of(*inputs, context), dense=False)
    (_, parts), (_, bare) = parts_of(before), parts_of(after)
    torch.testing.assert_close(parts[..., :5], bare[..., :5])
    assert bare[..., 5:].abs().max() == 0


def test_interactions_change_nothing_at_first():
    mixer = CareMixer(SHAPE).double()
    states = torch.randn(2, 40, 32, dtype=torch.float64)
    torch.testing.assert_close(mixer.among_parts(states, PICTURE, False), states)


@pytest.mark.parametrize("knobs", [{}, {"text": "state"}, {"variant": "paper"}])
def test_pictures_of_a_batch_do_not_depend_on_one_another(knobs):
    mixer, (query, key, value), context = randomized(**knobs), random_tokens(LAYOUT), flux_context(LAYOUT)
    together = mixer(query, key, value, context)
    context.hidden_states = context.hidden_states[1:]
    torch.testing.assert_close(mixer(query[1:], key[1:], value[1:], context), together[1:])


@pytest.mark.parametrize("knobs", [{}, {"text": "state"}, {"variant": "paper"}])
def test_calibration_brings_it_near_the_teacher(knobs):
    query, key, value = (states.detach() for states in random_tokens(LAYOUT))
    context = flux_context(LAYOUT)
    mixer = CareMixer(SHAPE, **knobs).double()
    teacher = build_mixer("softmax", SHAPE, {})(query, key, value, context)
    errors = []
    for _ in range(2):
        output = mixer(query, key, value, context)
        errors.append(((output - teacher).square().sum() / teacher.square().sum()).item())
        mixer.calibrate(query, key, value, context)
    assert errors[1] < min(0.6, errors[0] / 2)


def test_the_published_attention_is_quadratic_attention_of_its_own_projection():
    mixer = CareMixer(AttentionShape(2, 16, 256), variant="paper").double()
    states = torch.randn(2, 1, 7, 64, dtype=torch.float64)
    query, key, value = (
        some[:, 0].unflatten(-1, (2, 32)).transpose(1, 2)
        for some in (*mixer.query_key(states).chunk(2, dim=-1), states)
    )
    weights = (F.elu(query) + 1) @ (F.elu(key) + 1).transpose(-1, -2)
    expected = (weights / weights.sum(dim=-1, keepdim=True)) @ value
    ours = mixer._attend_published(states, None, dense=False)
    torch.testing.assert_close(ours[:, 0], expected.transpose(1, 2).flatten(2))


def test_operations_grow_linearly_with_the_picture():
    mixer = CareMixer(AttentionShape(4, 32, 128))
    small, large, larger = (mixer.flops(Layout(512, (Grid(side, 64),))) for side in (64, 128, 192))
    assert larger - large == large - small


@pytest.mark.parametrize(
    ("shape", "knobs", "sentence"),
    [
        (SHAPE, {"reduction": 0}, "mixer 'care' got reduction=0; choose a whole number, 1 or more"),
        (SHAPE, {"text": "none"}, "mixer 'care' got text='none'; choose exact or state"),
        (AttentionShape(9, 2, 18), {}, "splits 2 channels into up to 4 parts; choose another mixer"),
    ],
)
def test_what_it_cannot_do_is_told(shape, knobs, sentence):
    with pytest.raises(LinearizeError, match=sentence):
        build_mixer("care", shape, knobs)
