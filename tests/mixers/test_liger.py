"""What the liger mixer's formula promises, beside the matrix."""

import pytest
import torch
import torch.nn.functional as F

from contexts import SHAPE, flux_context, random_tokens
from linearize.errors import LinearizeError
from linearize.layout import Grid, Layout
from linearize.mixers import AttentionShape, build_mixer
from linearize.mixers.clear import ClearMixer
from linearize.mixers.liger import LigerMixer
from linearize.ops.dense_attention import dense_attention

LAYOUT = Layout(4, (Grid(7, 12),))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_it_has_no_parameter_but_the_weight_of_exact_text():
    assert [name for name, _ in LigerMixer(SHAPE).named_parameters()] == ["log_scale"]
    for knobs in ({"text": "state"}, {"variant": "paper"}, {"branches": "window"}):
        assert not list(LigerMixer(SHAPE, **knobs).parameters())


def test_either_branch_alone_and_their_shares():
    inputs, context = random_tokens(LAYOUT), flux_context(LAYOUT)
    outputs = {
        name: LigerMixer(SHAPE, window=3, branches=name).double()(*inputs, context) for name in ("linear", "window")
    }
    torch.testing.assert_close(outputs["window"], ClearMixer(SHAPE, window=3)(*inputs, context))
    for share in (0.0, 0.3, 1.0):
        both = LigerMixer(SHAPE, window=3, share=share).double()(*inputs, context)
        torch.testing.assert_close(both, (1 - share) * outputs["linear"] + share * outputs["window"])


def test_a_window_over_the_picture_with_all_the_share_is_the_teacher():
    query, key, value = random_tokens(LAYOUT)
    context = flux_context(LAYOUT)
    expected = dense_attention(context.rotate(query), context.rotate(key), value, scale=context.scale)
    torch.testing.assert_close(LigerMixer(SHAPE, window=30, share=1.0).double()(query, key, value, context), expected)


def test_open_gates_are_linear_attention_with_softmax_features():
    query, key, value = random_tokens(LAYOUT)
    mixer = LigerMixer(SHAPE, branches="linear", text="state", rope="none").double()
    mixer.bias = 1e3
    weights = query.softmax(-1) @ key.softmax(-1).transpose(-1, -2)
    expected = weights @ value / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(mixer(query, key, value, flux_context(LAYOUT)), expected)


def test_rows_sum_to_one_and_as_published_grow_with_the_picture():
    masses = []
    for grid in (Grid(3, 5), Grid(9, 11)):
        layout = Layout(0, (grid,))
        query, key, value = random_tokens(layout)
        ones, context = torch.ones_like(value), flux_context(layout)
        torch.testing.assert_close(LigerMixer(SHAPE, window=3).double()(query, key, ones, context), ones)
        paper = LigerMixer(SHAPE, branches="linear", variant="paper").double()
        masses.append(paper(query, key, ones, context).mean())
    assert masses[1] > 2 * masses[0]


def test_the_published_recurrence_token_by_token():
    layout = Layout(0, (Grid(3, 5),))
    query, key, value = random_tokens(layout)
    gate = (F.logsigmoid(key) / 16).exp()
    mapped, keys = query.softmax(-1), key.softmax(-1)
    state, outputs = torch.zeros(2, 2, 16, 16, dtype=torch.float64), []
    for i in range(15):
        state = gate[:, :, i, :, None] * state + keys[:, :, i, :, None] * value[:, :, i, None]
        outputs.append((mapped[:, :, i, None] @ state)[:, :, 0])
    # The last token has nothing behind it: the forward scan is all that it sees.
    mixer = LigerMixer(SHAPE, branches="linear", variant="paper", rope="none").double()
    torch.testing.assert_close(mixer(query, key, value, flux_context(layout))[:, :, -1], outputs[-1])


def test_operations_grow_linearly_with_the_picture():
    for branches in ("both", "linear", "window"):
        mixer = LigerMixer(AttentionShape(24, 128, 3072), branches=branches)
        small, large, larger = (mixer.flops(Layout(512, (Grid(side, 64),))) for side in (64, 128, 192))
        assert larger - large == large - small


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({"share": 1.5}, "mixer 'liger' got share=1.5; choose a number from 0 to 1"),
        ({"share": True}, "share=True"),
        ({"branches": "gate"}, "choose both, linear or window"),
        ({"window": 0}, "window=0; choose a whole number, 1 or more"),
    ],
)
def test_what_it_cannot_do_is_told(knobs, sentence):
    with pytest.raises(LinearizeError, match=sentence):
        build_mixer("liger", SHAPE, knobs)
