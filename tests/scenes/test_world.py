"""What training never sees: held-out triples are nowhere in one split and everywhere in the other."""

import itertools

import pytest
import torch

from linearize.scenes.world import (
    ALONE,
    ATTRIBUTES,
    BACKGROUNDS,
    RELATIONS,
    SceneBatch,
    concatenate,
    held_out,
    held_out_objects,
    sample_scenes,
)

ALL_OBJECTS = torch.tensor(list(itertools.product(*(range(len(values)) for values in ATTRIBUTES.values()))))


def drawn(split: str, num: int = 2000, num_objects: int | None = None) -> SceneBatch:
    return sample_scenes(num, torch.Generator().manual_seed(1), split=split, num_objects=num_objects)


def visible_objects(scenes: SceneBatch) -> torch.Tensor:
    return torch.cat([scenes.objects[:, 0], scenes.objects[scenes.relation != ALONE][:, 1]])


def test_training_never_contains_a_held_out_triple() -> None:
    assert not held_out_objects(visible_objects(drawn("train"))).any()


def test_every_held_out_scene_contains_one() -> None:
    scenes = drawn("held_out")
    first, second = held_out_objects(scenes.objects[:, 0]), held_out_objects(scenes.objects[:, 1])
    assert (first | (second & (scenes.relation != ALONE))).all()
    # The padding of a scene with one object does not count.
    alone = SceneBatch(torch.tensor([[[1, 0, 0, 0], [0, 0, 0, 0]]]), torch.tensor([ALONE]), torch.tensor([0]))
    assert held_out_objects(alone.objects).tolist() == [[False, True]] and not held_out(alone).any()


def test_one_triple_in_five_is_held_out() -> None:
    unseen = held_out_objects(ALL_OBJECTS)
    assert unseen.double().mean().item() == pytest.approx(0.2, abs=0.01)


def test_every_pair_of_attributes_occurs_in_training() -> None:
    seen = visible_objects(drawn("train", 20_000))
    for first, second in itertools.combinations(range(4), 2):
        pairs = {tuple(pair) for pair in seen[:, [first, second]].tolist()}
        assert pairs == {tuple(pair) for pair in ALL_OBJECTS[:, [first, second]].tolist()}


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("num_objects", [1, 2, None])
def test_scenes_have_the_objects_asked_for(split: str, num_objects: int | None) -> None:
    scenes = drawn(split, 400, num_objects)
    assert len(scenes) == 400
    assert set(scenes.num_objects.tolist()) == ({1, 2} if num_objects is None else {num_objects})
    relations = {1: {0}, 2: {1, 2}, None: set(range(len(RELATIONS)))}[num_objects]
    assert set(scenes.relation.tolist()) == relations
    assert set(scenes.background.tolist()) == set(range(len(BACKGROUNDS)))


def test_a_draw_is_a_function_of_its_seed() -> None:
    first, again = drawn("train", 100), drawn("train", 100)
    assert torch.equal(first.objects, again.objects) and torch.equal(first.relation, again.relation)
    other = sample_scenes(100, torch.Generator().manual_seed(2))
    assert not torch.equal(first.objects, other.objects)
    joined = concatenate([first[:30], first[30:]])
    assert torch.equal(joined.objects, first.objects) and torch.equal(joined.background, first.background)


def test_an_unknown_split() -> None:
    with pytest.raises(ValueError, match="'train' or 'held_out', not 'test'"):
        drawn("test")
