"""Captions of scenes in plain English, and the way back from a caption to the scene."""

import re

import torch

from linearize.scenes.world import (
    ALONE,
    ATTRIBUTES,
    BACKGROUNDS,
    BESIDE,
    COLOURS,
    SHAPES,
    SIZES,
    STACKED,
    TEXTURES,
    SceneBatch,
    sample_scenes,
)

# phrase -> (relation, whether the first object named is the canonical first one)
RELATION_PHRASES: dict[str, tuple[int, bool]] = {
    "to the left of": (BESIDE, True),
    "to the right of": (BESIDE, False),
    "above": (STACKED, True),
    "below": (STACKED, False),
}
_OBJECT = rf"a ({'|'.join(SIZES)}) ({'|'.join(TEXTURES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_CAPTION = re.compile(
    rf"^{_OBJECT}(?: ({'|'.join(RELATION_PHRASES)}) {_OBJECT})? on a ({'|'.join(BACKGROUNDS)}) background$"
)


def words() -> list[str]:
    """Every word that a caption can contain, sorted."""
    vocabulary = {"a", "on", "background"}
    for values in (*ATTRIBUTES.values(), BACKGROUNDS):
        vocabulary.update(values)
    for phrase in RELATION_PHRASES:
        vocabulary.update(phrase.split())
    return sorted(vocabulary)


def captions(scenes: SceneBatch, generator: torch.Generator) -> list[str]:
    """One caption for each scene; the generator chooses which object of a pair is named first.

    Args:
        scenes: Scenes on any device.
        generator: A CPU generator.
    """
    first_named = torch.randint(2, (len(scenes),), generator=generator).tolist()
    rows = zip(scenes.objects.tolist(), scenes.relation.tolist(), scenes.background.tolist(), first_named, strict=True)
    return [_caption(objects, relation, background, bool(first)) for objects, relation, background, first in rows]


def _caption(objects: list[list[int]], relation: int, background: int, canonical: bool) -> str:
    named = [_describe(item) for item in (objects if canonical else objects[::-1])]
    ending = f"on a {BACKGROUNDS[background]} background"
    if relation == ALONE:
        return f"{_describe(objects[0])} {ending}"
    phrase = next(text for text, meaning in RELATION_PHRASES.items() if meaning == (relation, canonical))
    return f"{named[0]} {phrase} {named[1]} {ending}"


def _describe(item: list[int]) -> str:
    shape, colour, texture, size = item
    return f"a {SIZES[size]} {TEXTURES[texture]} {COLOURS[colour]} {SHAPES[shape]}"


def parse(caption: str) -> SceneBatch | None:
    """The scene that a caption describes, as a batch of one; None when it is no caption of this grammar."""
    match = _CAPTION.match(caption.strip().lower().rstrip("."))
    if match is None:
        return None
    first, phrase, second, background = match.groups()[:4], match.group(5), match.groups()[5:9], match.group(10)
    relation, canonical = RELATION_PHRASES[phrase] if phrase else (ALONE, True)
    items = [_indices(first), _indices(second) if phrase else [0, 0, 0, 0]]
    return SceneBatch(
        torch.tensor([items if canonical else items[::-1]]),
        torch.tensor([relation]),
        torch.tensor([BACKGROUNDS.index(background)]),
    )


def _indices(described: tuple[str, ...]) -> list[int]:
    size, texture, colour, shape = described
    return [SHAPES.index(shape), COLOURS.index(colour), TEXTURES.index(texture), SIZES.index(size)]


def prompts(num: int, split: str = "train", seed: int = 0, num_objects: int | None = None) -> list[str]:
    """Captions of scenes drawn from one split; the same arguments give the same list.

    Args:
        num: How many.
        split: ``train`` or ``held_out``.
        seed: Seed of the draw.
        num_objects: 1 or 2; both when None.
    """
    generator = torch.Generator().manual_seed(seed)
    return captions(sample_scenes(num, generator, split=split, num_objects=num_objects), generator)
