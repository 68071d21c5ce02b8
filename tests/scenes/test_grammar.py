"""Captions and scenes are two ways to write the same thing."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer, T5Tokenizer

from linearize.scenes.accuracy import scenes_of
from linearize.scenes.grammar import _caption, captions, parse, prompts, words
from linearize.scenes.world import ALONE, ATTRIBUTES, BACKGROUNDS, SceneBatch, held_out

TEACHER = Path(__file__).parents[2] / "data" / "teachers" / "scenes"
OBJECTS = st.tuples(*(st.integers(0, len(values) - 1) for values in ATTRIBUTES.values())).map(list)


@st.composite
def scenes(draw: st.DrawFn) -> SceneBatch:
    relation = draw(st.integers(0, 2))
    second = [0, 0, 0, 0] if relation == ALONE else draw(OBJECTS)
    background = draw(st.integers(0, len(BACKGROUNDS) - 1))
    return SceneBatch(torch.tensor([[draw(OBJECTS), second]]), torch.tensor([relation]), torch.tensor([background]))


def same(first: SceneBatch, second: SceneBatch) -> bool:
    names = ("objects", "relation", "background")
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in names)


@given(scenes(), st.booleans())
@settings(max_examples=200, deadline=None)
def test_a_caption_is_read_as_its_scene_in_both_orders(scene: SceneBatch, canonical: bool) -> None:
    objects, relation, background = scene.objects[0].tolist(), int(scene.relation), int(scene.background)
    caption = _caption(objects, relation, background, canonical)
    again = parse(caption)
    assert again is not None and same(again, scene)
    assert set(caption.split()) <= set(words())
    other = parse(f"  {caption.upper()}. ")
    assert other is not None and same(other, scene)


@pytest.mark.parametrize(
    ("one", "other"), [("to the left of", "to the right of"), ("above", "below")], ids=["beside", "stacked"]
)
def test_a_relation_and_its_reverse_are_one_scene(one: str, other: str) -> None:
    a, b = "a small solid red circle", "a large dotted cyan star"
    first, second = (parse(f"{text} on a gray background") for text in (f"{a} {one} {b}", f"{b} {other} {a}"))
    swapped = parse(f"{b} {one} {a} on a gray background")
    assert first is not None and second is not None and swapped is not None
    assert same(first, second) and not same(first, swapped)


def test_captions_name_either_object_first() -> None:
    batch = scenes_of(prompts(64, seed=3, num_objects=2))
    texts = captions(batch, torch.Generator().manual_seed(0))
    assert same(scenes_of(texts), batch)
    phrases = ("to the left of", "to the right of", "above", "below")
    assert all(any(phrase in text for text in texts) for phrase in phrases)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a cat",
        "a small solid red circle",
        "a small solid red circle on a pink background",
        "a solid small red circle on a white background",
        "a small solid red circle beside a small solid red circle on a white background",
        "a small solid red circle on a white background and more",
    ],
)
def test_what_is_no_caption(text: str) -> None:
    assert parse(text) is None
    with pytest.raises(ValueError, match="is no caption of the scenes grammar"):
        scenes_of([text])


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_prompts_belong_to_their_split_and_fit_the_teacher(split: str) -> None:
    texts = prompts(200, split, seed=4)
    assert texts == prompts(200, split, seed=4) != prompts(200, split, seed=5)
    assert (held_out(scenes_of(texts)) == (split == "held_out")).all()
    t5, clip = (
        T5Tokenizer.from_pretrained(TEACHER / "tokenizer_2"),
        CLIPTokenizer.from_pretrained(TEACHER / "tokenizer"),
    )
    for tokenizer in (t5, clip):
        ids = tokenizer(texts).input_ids
        assert max(len(one) for one in ids) <= 32
        assert all(one[-1] == tokenizer.eos_token_id for one in ids)
    assert not any(t5.unk_token_id in one for one in t5(texts).input_ids)
