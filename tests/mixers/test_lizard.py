"""What the lizard mixer's formula promises, beside the matrix."""

from dataclasses import replace

import pytest
import torch

from contexts import SHAPE, flux_context, random_tokens
from linearize.errors import LinearizeError
from linearize.layout import Grid, Layout
from linearize.mixers import AttentionShape, build_mixer
from linearize.mixers.clear import ClearMixer
from linearize.mixers.linear import LinearMixer
from linearize.mixers.lizard import OPEN, LizardMixer

LAYOUT = Layout(4, (Grid(7, 12),))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("text", ["exact", "state"])
def test_the_linear_branch_with_open_gates_is_the_linear_mixer(text):
    inputs, context = random_tokens(LAYOUT), flux_context(LAYOUT)
    mixer = LizardMixer(SHAPE, branches="linear", text=text).double()
    assert (mixer.gates.outer.bias == OPEN).all() and (mixer.gates.outer.weight == 0).all()
    torch.nn.init.constant_(mixer.gates.outer.bias, 1e3)
    expected = LinearMixer(SHAPE, feature_map="exponential", text=text).double()(*inputs, context)
    torch.testing.assert_close(mixer(*inputs, context), expected)


def test_closed_gates_leave_a_token_its_own_value():
    layout = Layout(0, LAYOUT.grids)
    query, key, value = random_tokens(layout)
    mixer = LizardMixer(SHAPE, branches="linear").double()
    torch.nn.init.constant_(mixer.gates.outer.bias, -1e5)
    torch.testing.assert_close(mixer(query, key, value, flux_context(layout)), value)


def test_meta_memory_takes_its_share_and_gives_nothing():
    query, key, value = random_tokens(LAYOUT)
    context, image = flux_context(LAYOUT), LAYOUT.image_slice
    clear = ClearMixer(SHAPE, window=3)(query, key, value, context)
    none = LizardMixer(SHAPE, window=3, branches="window", num_meta=0).double()
    torch.testing.assert_close(none(query, key, value, context), clear)
    mixer = LizardMixer(SHAPE, window=3, branches="window").double()
    torch.nn.init.constant_(mixer.meta, -1e3)
    torch.testing.assert_close(mixer(query, key, value, context), clear)
    torch.nn.init.constant_(mixer.meta, 0.7)
    share = mixer(query, key, torch.ones_like(value), context)
    torch.testing.assert_close(mixer(query, key, value, context), clear * share)
    assert (share[:, :, image] < 0.99).all()
    torch.testing.assert_close(share[:, :, LAYOUT.text_slice], torch.ones_like(share[:, :, LAYOUT.text_slice]))
    # Equal logits are one logit larger by the logarithm of their number.
    single = LizardMixer(SHAPE, window=3, branches="window", num_meta=1).double()
    torch.nn.init.constant_(single.meta, 0.7 + torch.tensor(4.0).log().item())
    torch.testing.assert_close(
        single(query, key, value, context), mixer(query, key, value, context), rtol=1e-6, atol=1e-6
    )


def test_either_branch_alone_and_their_shares():
    inputs, context = random_tokens(LAYOUT), flux_context(LAYOUT)
    linear, window = (
        LizardMixer(SHAPE, window=3, branches=branches).double()(*inputs, context) for branches in ("linear", "window")
    )
    both = LizardMixer(SHAPE, window=3).double()
    torch.testing.assert_close(both(*inputs, context), (linear + window) / 2)
    with torch.no_grad():
        both.balance.fill_(-60.0)
    torch.testing.assert_close(both(*inputs, context), linear)
    published = LizardMixer(SHAPE, window=3, variant="paper", num_meta=0).double()
    rows = published(*inputs[:2], torch.ones_like(inputs[2]), context)
    torch.testing.assert_close(rows, torch.full_like(rows, 2.0))
    assert published.balance.shape == (1,) and published.gates.outer.bias.shape == (2,)


def test_a_window_over_the_picture_without_the_linear_branch_is_the_teacher():
    inputs, context = random_tokens(LAYOUT), flux_context(LAYOUT)
    mixer = LizardMixer(SHAPE, window=30).double()
    with torch.no_grad():
        mixer.balance.fill_(60.0)
        mixer.meta.fill_(-1e3)
    softmax = build_mixer("softmax", SHAPE, {})
    torch.testing.assert_close(mixer(*inputs, context), softmax.reference(*inputs, context))


@pytest.mark.parametrize("factor", [1.0, 30.0])
def test_large_queries_and_keys_do_not_overflow(factor):
    inputs, context = random_tokens(LAYOUT, dtype=torch.float32), flux_context(LAYOUT)
    mixer = LizardMixer(SHAPE, window=3)
    output = mixer(inputs[0] * factor, inputs[1] * factor, inputs[2], context)
    gradients = torch.autograd.grad(output.square().sum(), [*inputs, *mixer.parameters()])
    assert output.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)


def test_operations_grow_linearly_with_the_picture():
    for branches in ("both", "linear", "window"):
        mixer = LizardMixer(AttentionShape(24, 128, 3072), branches=branches)
        small, large, larger = (mixer.flops(Layout(512, (Grid(side, 64),))) for side in (64, 128, 192))
        assert larger - large == large - small


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({"num_meta": -1}, "mixer 'lizard' got num_meta=-1; choose a whole number, 0 or more"),
        ({"variant": "code"}, "choose dit or paper"),
        (
            {"rope": "after_map", "width": 5},
            "width=5 with rope='after_map'.*choose an even width, or rope='before_map'",
        ),
        ({"branches": "gate"}, "choose both, linear or window"),
    ],
)
def test_what_it_cannot_do_is_told(knobs, sentence):
    with pytest.raises(LinearizeError, match=sentence):
        build_mixer("lizard", SHAPE, knobs)


def test_the_published_window_is_not_rotated():
    inputs, context = random_tokens(LAYOUT), flux_context(LAYOUT)
    still = replace(context, rotate=lambda states: states)
    found = {
        variant: LizardMixer(SHAPE, window=3, branches="window", variant=variant).double()
        for variant in ("paper", "dit")
    }
    torch.testing.assert_close(found["paper"](*inputs, context), found["dit"](*inputs, still))
    assert (found["dit"](*inputs, context) - found["dit"](*inputs, still)).abs().max() > 0.01
