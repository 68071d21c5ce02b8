"""The scenes world: which attributes a picture has and which combinations training never sees."""

from dataclasses import dataclass

import torch
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
TEXTURES = ("solid", "striped", "dotted")
SIZES = ("small", "large")
BACKGROUNDS = ("white", "gray", "black", "brown")
RELATIONS = ("alone", "beside", "stacked")

SHAPE, COLOUR, TEXTURE, SIZE = range(4)
ATTRIBUTES: dict[str, tuple[str, ...]] = {"shape": SHAPES, "colour": COLOURS, "texture": TEXTURES, "size": SIZES}
ALONE, BESIDE, STACKED = range(3)


@dataclass(frozen=True)
class SceneBatch:
    """What a batch of pictures shows, as indices into the vocabularies above.

    Objects are in canonical order: the first one is the left one (``BESIDE``) or the upper one (``STACKED``), so that
    "A left of B" and "B right of A", which are one picture, are one label. The second object of an ``ALONE`` scene
    is padding.

    Attributes:
        objects: [batch, 2, 4] shape, colour, texture and size of each object.
        relation: [batch] index into ``RELATIONS``.
        background: [batch] index into ``BACKGROUNDS``.
    """

    objects: Tensor
    relation: Tensor
    background: Tensor

    def __len__(self) -> int:
        return self.relation.shape[0]

    @property
    def num_objects(self) -> Tensor:
        """[batch] one or two."""
        return (self.relation != ALONE).long() + 1

    def __getitem__(self, index: Tensor | slice) -> "SceneBatch":
        return SceneBatch(self.objects[index], self.relation[index], self.background[index])

    def to(self, device: torch.device | str) -> "SceneBatch":
        """The same scenes on another device."""
        return SceneBatch(self.objects.to(device), self.relation.to(device), self.background.to(device))


def concatenate(batches: list[SceneBatch]) -> SceneBatch:
    """Joins batches of scenes into one."""
    return SceneBatch(
        torch.cat([batch.objects for batch in batches]),
        torch.cat([batch.relation for batch in batches]),
        torch.cat([batch.background for batch in batches]),
    )


def held_out_objects(objects: Tensor) -> Tensor:
    """Which objects carry a held-out (shape, colour, texture) triple.

    One triple in five is held out, chosen so that every pair of two attributes still occurs in training.

    Args:
        objects: [..., 4] attribute indices.

    Returns:
        [...] bool.
    """
    return (objects[..., SHAPE] + objects[..., COLOUR] + objects[..., TEXTURE]) % len(SHAPES) == 0


def held_out(scenes: SceneBatch) -> Tensor:
    """[batch] True where some object of the scene carries a triple that training never sees."""
    unseen = held_out_objects(scenes.objects)
    unseen[:, 1] &= scenes.relation != ALONE
    return unseen.any(dim=1)


def sample_scenes(
    num: int, generator: torch.Generator, *, split: str = "train", num_objects: int | None = None
) -> SceneBatch:
    """Draws scenes uniformly from one split.

    Args:
        num: How many.
        generator: Source of randomness; its device is the device of the result.
        split: ``train`` (no held-out triple anywhere) or ``held_out`` (at least one).
        num_objects: 1 or 2; both, half and half, when None.

    Raises:
        ValueError: If the split is unknown.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split must be 'train' or 'held_out', not {split!r}.")
    kept: list[SceneBatch] = []
    missing = num
    while missing > 0:
        drawn = _draw(2 * missing + 16, generator, num_objects)
        wanted = held_out(drawn) == (split == "held_out")
        kept.append(drawn[wanted.nonzero().squeeze(1)[:missing]])
        missing -= len(kept[-1])
    return concatenate(kept)


def _draw(num: int, generator: torch.Generator, num_objects: int | None) -> SceneBatch:
    def index(size: int, *shape: int) -> Tensor:
        return torch.randint(size, shape, generator=generator, device=generator.device)

    objects = torch.stack([index(len(values), num, 2) for values in ATTRIBUTES.values()], dim=-1)
    pair = 1 + index(2, num)
    relation = {1: torch.zeros_like(pair), 2: pair}.get(num_objects or 0, pair * index(2, num))
    return SceneBatch(objects, relation, index(len(BACKGROUNDS), num))
