"""Renders scenes by signed distance fields, at any resolution, on any device."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.scenes.world import ALONE, COLOUR, SHAPE, SIZE, STACKED, TEXTURE, SceneBatch

# RGB in [0, 1], in the order of the vocabularies in world.py.
OBJECT_RGB = (
    (0.86, 0.12, 0.12),
    (0.10, 0.66, 0.20),
    (0.15, 0.25, 0.92),
    (0.96, 0.86, 0.10),
    (0.60, 0.14, 0.78),
    (0.10, 0.80, 0.86),
)
BACKGROUND_RGB = ((0.92, 0.92, 0.92), (0.52, 0.52, 0.52), (0.07, 0.07, 0.07), (0.42, 0.27, 0.15))
RADII = (0.105, 0.18)
TEXTURE_PERIOD = 1 / 16
TEXTURE_SHADE = 0.3
LIGHT = 0.06


@dataclass(frozen=True)
class Placement:
    """Where the objects of a batch of scenes stand; what a caption leaves open.

    Attributes:
        centre: [batch, 2, 2] x and y of each object, in widths of a square picture.
        radius: [batch, 2] in widths of a square picture.
        angle: [batch, 2] rotation in radians.
        phase: [batch, 2, 2] offset of the texture, in periods.
        light: [batch, 2] direction and strength of the light that crosses the whole picture.
    """

    centre: Tensor
    radius: Tensor
    angle: Tensor
    phase: Tensor
    light: Tensor


def sample_placement(scenes: SceneBatch, generator: torch.Generator) -> Placement:
    """Draws positions that obey each scene's relation, with some freedom in place, size and angle."""
    num, device = len(scenes), generator.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator, device=device)

    along = torch.stack([uniform(0.24, 0.30, num), uniform(0.70, 0.76, num)], dim=1)
    across = uniform(0.40, 0.60, num, 2)
    pair = torch.stack([along, across], dim=-1)
    pair = torch.where((scenes.relation == STACKED)[:, None, None], pair.flip(-1), pair)
    alone = uniform(0.35, 0.65, num, 2, 2)
    centre = torch.where((scenes.relation == ALONE)[:, None, None], alone, pair)
    nominal = torch.tensor(RADII, device=device)[scenes.objects[..., SIZE]]
    return Placement(
        centre=centre,
        radius=nominal * uniform(0.93, 1.07, num, 2),
        angle=uniform(-0.15, 0.15, num, 2),
        phase=uniform(0.0, 1.0, num, 2, 2),
        light=uniform(-LIGHT, LIGHT, num, 2),
    )


def render(scenes: SceneBatch, placement: Placement, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Draws a batch of scenes.

    The scene fills the largest centred square of the picture; the background goes on around it.

    Args:
        scenes: What to draw.
        placement: Where.
        height: Rows in pixels.
        width: Columns in pixels.

    Returns:
        Pictures [batch, 3, height, width] in [0, 1], and the coverage [batch, 2, height, width] of each object.
    """
    device = placement.centre.device
    side = min(height, width)
    y = ((torch.arange(height, device=device) + 0.5 - height / 2) / side + 0.5)[:, None].expand(height, width)
    x = ((torch.arange(width, device=device) + 0.5 - width / 2) / side + 0.5)[None, :].expand(height, width)
    picture = _background(scenes, placement, x, y)
    coverage = []
    for slot in range(2):
        colour, mask = _object(scenes, placement, slot, x, y, side)
        picture = torch.lerp(picture, colour, mask[:, None])
        coverage.append(mask)
    return picture.clamp(0, 1), torch.stack(coverage, dim=1)


def _background(scenes: SceneBatch, placement: Placement, x: Tensor, y: Tensor) -> Tensor:
    base = torch.tensor(BACKGROUND_RGB, device=x.device)[scenes.background][:, :, None, None]
    ramp = placement.light[:, 0, None, None] * (2 * x - 1) + placement.light[:, 1, None, None] * (2 * y - 1)
    return base + ramp[:, None]


def _object(
    scenes: SceneBatch, placement: Placement, slot: int, x: Tensor, y: Tensor, side: int
) -> tuple[Tensor, Tensor]:
    """Colour [batch, 3, height, width] and coverage [batch, height, width] of one object of every scene."""
    centre, radius, angle = placement.centre[:, slot], placement.radius[:, slot], placement.angle[:, slot]
    dx, dy = x - centre[:, 0, None, None], y - centre[:, 1, None, None]
    cosine, sine = angle.cos()[:, None, None], angle.sin()[:, None, None]
    u, v = cosine * dx + sine * dy, cosine * dy - sine * dx
    distance = _signed_distance(scenes.objects[:, slot, SHAPE], u, v, radius[:, None, None])
    mask = (0.5 - distance * side).clamp(0, 1)
    if slot == 1:
        mask = mask * (scenes.relation != ALONE)[:, None, None]
    shade = _texture(scenes.objects[:, slot, TEXTURE], u, v, placement.phase[:, slot], side)
    rgb = torch.tensor(OBJECT_RGB, device=x.device)[scenes.objects[:, slot, COLOUR]][:, :, None, None]
    return rgb * (1 - (1 - TEXTURE_SHADE) * shade[:, None]), mask


def _signed_distance(shape: Tensor, u: Tensor, v: Tensor, radius: Tensor) -> Tensor:
    """Signed distance to every shape of world.SHAPES, picked per scene; negative inside."""
    circle = torch.hypot(u, v) - radius
    square = torch.maximum(u.abs(), v.abs()) - 0.84 * radius
    slope = math.sqrt(3) / 2
    triangle = torch.maximum(v - 0.55 * radius, slope * u.abs() - 0.5 * v - 0.55 * radius)
    star = _star(u, v, radius)
    arm, reach = 0.32 * radius, 0.98 * radius
    bars = [torch.maximum(u.abs() - a, v.abs() - b) for a, b in ((arm, reach), (reach, arm))]
    fields = torch.stack([circle, square, triangle, star, torch.minimum(*bars)])
    return fields[shape, torch.arange(shape.shape[0], device=shape.device)]


def _star(u: Tensor, v: Tensor, radius: Tensor, points: int = 5, inner: float = 0.45) -> Tensor:
    """A star as the edge line of one half point, folded around; exact on the edges, which is all a mask needs."""
    sector = math.pi / points
    angle = torch.atan2(u, -v)
    folded = (torch.remainder(angle + sector, 2 * sector) - sector).abs()
    length = torch.hypot(u, v)
    along, across = length * folded.cos(), length * folded.sin()
    tip = 1.1 * radius
    notch_x, notch_y = inner * tip * math.cos(sector), inner * tip * math.sin(sector)
    edge = torch.hypot(tip - notch_x, notch_y)
    return ((along - tip) * notch_y + across * (tip - notch_x)) / edge


def _texture(texture: Tensor, u: Tensor, v: Tensor, phase: Tensor, side: int) -> Tensor:
    """How dark the texture is at each pixel, [batch, height, width] in [0, 1]: nothing, stripes or dots."""
    sharpness = TEXTURE_PERIOD * side
    a = torch.remainder(u / TEXTURE_PERIOD + phase[:, 0, None, None], 1) - 0.5
    b = torch.remainder(v / TEXTURE_PERIOD + phase[:, 1, None, None], 1) - 0.5
    stripes = (0.5 + (0.25 - a.abs()) * sharpness).clamp(0, 1)
    dots = (0.5 + (0.33 - torch.hypot(a, b)) * sharpness).clamp(0, 1)
    fields = torch.stack([torch.zeros_like(stripes), stripes, dots])
    return fields[texture, torch.arange(texture.shape[0], device=texture.device)]
