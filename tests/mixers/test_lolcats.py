"""What the lolcats mixer's formula promises, beside the matrix."""

import pytest
import torch

from contexts import SHAPE, flux_context, random_tokens
from linearize.errors import LinearizeError
from linearize.layout import TILE, Grid, Layout
from linearize.mixers import AttentionShape, build_mixer
from linearize.mixers.clear import ClearMixer
from linearize.mixers.linear import LinearMixer
from linearize.mixers.lolcats import LolcatsMixer

LAYOUT = Layout(4, (Grid(11, 19),), tile=TILE)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_the_window_alone_is_clear_and_the_linear_branch_alone_the_linear_mixer():
    inputs, context = random_tokens(LAYOUT), flux_context(LAYOUT)
    window = LolcatsMixer(SHAPE, window=4, branches="window").double()
    assert not list(window.parameters())
    torch.testing.assert_close(window(*inputs, context), ClearMixer(SHAPE, window=4)(*inputs, context))
    linear = LolcatsMixer(SHAPE, branches="linear", width=16).double()
    expected = LinearMixer(SHAPE, feature_map="hedgehog").double()(*inputs, context)
    torch.testing.assert_close(linear(*inputs, context), expected)


def test_without_weight_the_linear_branch_leaves_clear_and_with_all_the_complement():
    inputs, context = random_tokens(LAYOUT), flux_context(LAYOUT)
    mixer = LolcatsMixer(SHAPE, window=3).double()
    torch.nn.init.constant_(mixer.log_scale, -60.0)
    torch.testing.assert_close(mixer(*inputs, context), ClearMixer(SHAPE, window=3)(*inputs, context))
    torch.nn.init.constant_(mixer.log_scale, 60.0)
    tokens = LAYOUT.image_slice
    marked = inputs[2].detach().clone()
    marked[:, :, tokens.start + 7] += 100.0
    query, key, _ = inputs
    change = (mixer(query, key, marked, context) - mixer(*inputs, context)).abs().amax(dim=(0, 1, 3))[tokens]
    rows, columns = (LAYOUT.raster_to_tile() // 19, LAYOUT.raster_to_tile() % 19)
    near = (rows - rows[7]).square() + (columns - columns[7]).square() < 9
    assert change[near].max() < 1e-6 < change[~near].min()


@pytest.mark.parametrize("variant", ["dit", "paper"])
@pytest.mark.parametrize("text", ["exact", "state"])
def test_rows_sum_to_one(variant, text):
    query, key, value = random_tokens(LAYOUT)
    mixer = LolcatsMixer(SHAPE, window=3, text=text, variant=variant).double()
    torch.testing.assert_close(mixer(query, key, torch.ones_like(value), flux_context(LAYOUT)), torch.ones_like(value))


def test_the_published_mix_depends_on_the_largest_score_and_ours_does_not():
    """A factor on all weights of a row cancels under one normaliser, unless it meets one branch alone."""
    layout = Layout(0, (Grid(9, 17),), tile=TILE)
    query, key, value = (states.detach() for states in random_tokens(layout))
    context = flux_context(layout)
    ours, paper = (LolcatsMixer(SHAPE, window=3, variant=variant).double() for variant in ("dit", "paper"))
    torch.nn.init.constant_(ours.log_scale, 0.0)
    torch.nn.init.constant_(paper.window_factor, 60.0)
    difference = (ours(query, key, value, context) - paper(query, key, value, context)).abs().max()
    assert difference > 0.05
    mass = LolcatsMixer(SHAPE, window=3, variant="paper")
    torch.testing.assert_close(mass.window_factor.sigmoid(), torch.full((2,), 0.1))


def test_parameters_are_few_and_as_published():
    """2 H d f/2 weights of the maps and one number in each head; less than 0.2 % of a layer's projections."""
    mixer = LolcatsMixer(AttentionShape(24, 128, 3072))
    assert sum(parameter.numel() for parameter in mixer.parameters()) == 2 * 24 * 128 * 64 + 24
    assert all(parameter.dtype == torch.float32 for parameter in mixer.parameters())


def test_operations_grow_linearly_with_the_picture():
    for branches in ("both", "linear", "window"):
        mixer = LolcatsMixer(AttentionShape(24, 128, 3072), branches=branches)
        small, large, larger = (mixer.flops(Layout(512, (Grid(side, 64),))) for side in (64, 128, 192))
        assert larger - large == large - small


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({"window": 0}, "mixer 'lolcats' got window=0; choose a whole number, 1 or more"),
        ({"branches": "none"}, "got branches='none'; choose both, linear or window"),
        ({"rope": "after_map"}, "got rope='after_map'; choose before_map or none"),
        ({"variant": "code"}, "choose dit or paper"),
    ],
)
def test_what_it_cannot_do_is_told(knobs, sentence):
    with pytest.raises(LinearizeError, match=sentence):
        build_mixer("lolcats", SHAPE, knobs)
