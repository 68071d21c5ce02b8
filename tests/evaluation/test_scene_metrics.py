import pytest
import torch

from linearize.evaluation.metrics import wilson_interval
from linearize.evaluation.scene_metrics import judge_features, scene_numbers
from linearize.scenes.grammar import parse, prompts
from linearize.scenes.judge import Judge
from linearize.scenes.world import concatenate


@pytest.fixture(scope="module")
def judge():
    torch.manual_seed(0)
    return Judge(channels=(4, 4, 4, 4), num_features=4).eval()


@pytest.fixture(scope="module")
def images():
    return torch.rand(70, 3, 32, 48, generator=torch.Generator().manual_seed(0))


def test_numbers_are_those_of_the_judge_over_all_pictures(judge, images):
    texts = prompts(70, "held_out", seed=3)
    scenes = concatenate([parse(text) for text in texts])
    score = judge.score(images, scenes)
    found = scene_numbers(judge, images, texts)
    num_correct = int(score.correct.sum())
    assert found.scene_accuracy["value"] == num_correct / 70
    assert found.scene_accuracy["n"] == 70
    assert found.scene_accuracy["interval"] == list(wilson_interval(num_correct, 70))
    assert found.caption_log_probability == pytest.approx(score.log_probability.mean().item(), rel=1e-5)
    for name, right in score.attributes.items():
        assert found.scene_accuracy["attributes"][name] == pytest.approx(right.double().mean().item())
    for count, part in found.scene_accuracy["num_objects"].items():
        chosen = score.correct[scenes.num_objects == int(count)]
        assert (part["value"], part["n"]) == (chosen.double().mean().item(), len(chosen))


def test_only_captions_of_the_grammar_are_scored(judge, images):
    texts = ["a portrait of a cat", *prompts(3, "held_out"), "a photo"]
    found = scene_numbers(judge, images[:5], texts)
    assert found == scene_numbers(judge, images[1:4], texts[1:4])
    assert found.scene_accuracy["n"] == 3


def test_without_judge_or_captions_the_numbers_are_null(judge, images):
    for judge_or_none, texts in ((None, prompts(2)), (judge, ["a cat", "a dog"])):
        found = scene_numbers(judge_or_none, images[:2], texts)
        assert found.scene_accuracy is None and found.caption_log_probability is None


def test_features_of_many_pictures_are_those_of_the_judge(judge, images):
    with torch.no_grad():
        expected = judge.features(images)
    torch.testing.assert_close(judge_features(judge, images), expected)
