"""Pictures of scenes: the same at every resolution, and what the caption says."""

import pytest
import torch
from torch.nn import functional

from linearize.scenes.render import (
    BACKGROUND_RGB,
    LIGHT,
    OBJECT_RGB,
    RADII,
    TEXTURE_SHADE,
    Placement,
    render,
    sample_placement,
)
from linearize.scenes.world import (
    ALONE,
    BESIDE,
    COLOUR,
    SHAPES,
    SIZE,
    STACKED,
    TEXTURE,
    TEXTURES,
    SceneBatch,
    sample_scenes,
)


def drawn(num: int = 24, seed: int = 0) -> tuple[SceneBatch, Placement]:
    generator = torch.Generator().manual_seed(seed)
    scenes = sample_scenes(num, generator)
    return scenes, sample_placement(scenes, generator)


def middle_of(coverage: torch.Tensor) -> torch.Tensor:
    """Centre of mass [batch, 2, (x, y)] in shares of the picture."""
    height, width = coverage.shape[-2:]
    mass = coverage.sum(dim=(-2, -1)).clamp(min=1e-9)
    x = (coverage * ((torch.arange(width) + 0.5) / width)).sum(dim=(-2, -1)) / mass
    y = (coverage * ((torch.arange(height) + 0.5) / height)[:, None]).sum(dim=(-2, -1)) / mass
    return torch.stack([x, y], dim=-1)


def test_a_picture_is_the_same_at_every_resolution() -> None:
    scenes, placement = drawn()
    small, small_coverage = render(scenes, placement, 128, 128)
    large, large_coverage = render(scenes, placement, 256, 256)
    shrunk = functional.avg_pool2d(large, 2)
    assert (shrunk - small).square().mean().sqrt() < 0.02
    assert (shrunk - small).abs().mean() < 0.004
    assert (functional.avg_pool2d(large_coverage, 2) - small_coverage).abs().mean() < 0.001


def test_values_and_coverage() -> None:
    scenes, placement = drawn(48)
    images, coverage = render(scenes, placement, 96, 96)
    assert images.shape == (48, 3, 96, 96) and coverage.shape == (48, 2, 96, 96)
    assert images.min() >= 0 and images.max() <= 1 and coverage.min() >= 0 and coverage.max() <= 1
    share = coverage.mean(dim=(-2, -1))
    assert (share[:, 1][scenes.relation == ALONE] == 0).all()
    assert (share[:, 0] > 0.005).all() and (share[:, 1][scenes.relation != ALONE] > 0.005).all()
    assert share.max() < 3.2 * (1.07 * RADII[1]) ** 2
    assert (coverage.sum(dim=1) <= 1).all(), "two objects never touch"


@pytest.mark.parametrize(("height", "width"), [(64, 128), (160, 64)])
def test_the_scene_fills_the_middle_of_a_picture_that_is_not_square(height: int, width: int) -> None:
    scenes, placement = drawn(8)
    images, coverage = render(scenes, placement, height, width)
    assert images.shape == (8, 3, height, width)
    top, left = (height - 64) // 2, (width - 64) // 2
    middle = (..., slice(top, top + 64), slice(left, left + 64))
    square, square_coverage = render(scenes, placement, 64, 64)
    torch.testing.assert_close(images[middle], square, atol=1e-4, rtol=0)
    torch.testing.assert_close(coverage[middle], square_coverage, atol=1e-4, rtol=0)
    assert coverage.sum() == pytest.approx(square_coverage.sum().item(), rel=1e-4)


def test_objects_stand_where_the_relation_says() -> None:
    scenes, placement = drawn(200)
    _, coverage = render(scenes, placement, 64, 64)
    first, second = middle_of(coverage).unbind(dim=1)
    for relation, axis in ((BESIDE, 0), (STACKED, 1)):
        pairs = scenes.relation == relation
        assert pairs.sum() > 20
        apart = (second - first)[pairs]
        assert (apart[:, axis] > 0.35).all() and (apart[:, 1 - axis].abs() < 0.3).all()


def test_colours_sizes_textures_and_backgrounds_are_those_of_the_scene() -> None:
    scenes, placement = drawn(100, seed=5)
    images, coverage = render(scenes, placement, 128, 128)
    size = scenes.objects[:, 0, SIZE]
    assert (coverage[size == 0, 0].mean(dim=(-2, -1)).max() < coverage[size == 1, 0].mean(dim=(-2, -1)).max()).all()
    for index in range(20):
        inside = coverage[index, 0] == 1
        pixels = images[index][:, inside]
        rgb = torch.tensor(OBJECT_RGB[scenes.objects[index, 0, COLOUR]])[:, None]
        # Inside an object there is its colour, darker where its texture is.
        shade = (pixels / rgb).mean(dim=0)
        torch.testing.assert_close(pixels, rgb * shade, atol=1e-5, rtol=0)
        plain = TEXTURES[scenes.objects[index, 0, TEXTURE]] == "solid"
        assert shade.min() == pytest.approx(1.0 if plain else TEXTURE_SHADE, abs=0.02)
        outside = (coverage[index] == 0).all(dim=0)
        base = torch.tensor(BACKGROUND_RGB[scenes.background[index]])[:, None]
        assert (images[index][:, outside] - base).abs().max() <= 2 * LIGHT + 1e-6


def test_shapes_differ() -> None:
    objects = torch.zeros(len(SHAPES), 2, 4, dtype=torch.long)
    objects[:, 0, 0], objects[:, 0, SIZE] = torch.arange(len(SHAPES)), 1
    zeros = torch.zeros(len(SHAPES), dtype=torch.long)
    scenes = SceneBatch(objects, zeros + ALONE, zeros)
    middle, none = torch.full((len(SHAPES), 2, 2), 0.5), torch.zeros(len(SHAPES), 2)
    _, coverage = render(scenes, Placement(middle, none + RADII[1], none, torch.zeros(len(SHAPES), 2, 2), none), 96, 80)
    masks = coverage[:, 0]
    for one in range(len(SHAPES)):
        # All of them are their own mirror image.
        torch.testing.assert_close(masks[one], masks[one].flip(-1), atol=1e-3, rtol=0)
        for other in range(one):
            difference = (masks[one] - masks[other]).abs().sum() / torch.maximum(masks[one], masks[other]).sum()
            assert difference > 0.1
