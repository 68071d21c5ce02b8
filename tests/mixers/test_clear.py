import warnings

import pytest
import torch

from contexts import SHAPE, flux_context, random_tokens
from linearize.layout import TILE, Grid, Layout
from linearize.mixers import AttentionShape, build_mixer
from linearize.mixers.clear import ClearMixer
from linearize.ops.pooling import pool_image_tokens


@pytest.mark.parametrize(
    ("window", "side", "gflops"),
    [(8, 64, 63.5), (16, 64, 86.6), (32, 64, 154.1), (8, 128, 246.2), (16, 128, 352.6), (32, 128, 724.3)],
)
def test_operations_are_those_of_the_paper(window, side, gflops):
    """CLEAR's tables 2, 3 and 7: GFLOPs of one FLUX.1-dev layer, 24 heads of 128, 512 text tokens."""
    mixer = ClearMixer(AttentionShape(24, 128, 3072), window=window)
    assert round(mixer.flops(Layout(512, (Grid(side, side),))) / 1e9, 1) == gflops


def test_pooled_keys_declare_their_quadratic_cost():
    mixer = ClearMixer(AttentionShape(24, 128, 3072), window=8, downsample=4)
    assert round(mixer.flops(Layout(512, (Grid(64, 64),))) / 1e12, 3) == 0.076
    assert round(mixer.flops(Layout(512, (Grid(512, 512),))) / 1e12, 1) == 56.7


def test_pooling_starts_as_the_mean_also_of_cut_and_masked_cells():
    layout = Layout(2, (Grid(5, 7),), tile=TILE)
    mixer = ClearMixer(SHAPE, window=1, downsample=3).double()
    _, key, _ = random_tokens(layout, batch=1)
    pooled, _ = pool_image_tokens(key, mixer.spatial_weight, layout)
    image = key[:, :, 2:][:, :, layout.tile_to_raster()].unflatten(2, (5, 7))
    means = [image[:, :, y : y + 3, x : x + 3].mean(dim=(2, 3)) for y in (0, 3) for x in (0, 3, 6)]
    torch.testing.assert_close(pooled, torch.stack(means, dim=2))
    valid = torch.ones(1, layout.num_tokens, dtype=torch.bool)
    valid[:, 2:][:, layout.raster_to_tile() == 6] = False
    masked, seen = pool_image_tokens(key, mixer.spatial_weight, layout, valid)
    torch.testing.assert_close(masked[:, :, 2], image[:, :, 1:3, 6].mean(dim=2))
    assert seen.all()


def test_a_disc_over_the_picture_warns_once():
    layout = Layout(0, (Grid(3, 31),))
    inputs, context = random_tokens(layout), flux_context(layout)
    with pytest.warns(UserWarning, match="window=50 covers the whole grid of 3x31"):
        build_mixer("clear", SHAPE, {"window": 50})(*inputs, context)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_mixer("clear", SHAPE, {"window": 50})(*inputs, context)
        build_mixer("clear", SHAPE, {"window": 4})(*inputs, context)
