"""The judge that ships reads scenes; a judge comes back from disk as it was."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from linearize.errors import LinearizeError
from linearize.scenes.judge import HEADS, Judge, labels, score
from linearize.scenes.judge_stage import judge_accuracy
from linearize.scenes.render import Placement, render, sample_placement
from linearize.scenes.world import ALONE, BESIDE, SceneBatch, sample_scenes

DATA = Path(__file__).parents[2] / "data"


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load(DATA / "judge")


def pictures(num: int, seed: int, **options) -> tuple[SceneBatch, Placement, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scenes = sample_scenes(num, generator, **options)
    placement = sample_placement(scenes, generator)
    return scenes, placement, render(scenes, placement, 128, 128)[0]


def test_it_is_small() -> None:
    assert sum(file.stat().st_size for file in (DATA / "judge").iterdir()) <= 5_000_000


def test_it_reads_renders_of_unseen_combinations(judge: Judge) -> None:
    assert judge_accuracy(judge, None, 256, torch.Generator().manual_seed(1)) >= 0.995


def test_it_reads_what_went_through_the_autoencoder(judge: Judge) -> None:
    autoencoder = AutoencoderKL.from_pretrained(DATA / "teachers" / "scenes", subfolder="vae").eval()
    assert judge_accuracy(judge, autoencoder, 24, torch.Generator().manual_seed(2), batch_size=12) >= 0.97


def test_pictures_that_are_not_square_and_of_other_sizes(judge: Judge) -> None:
    scenes, placement, square = pictures(12, 3)
    wide, _ = render(scenes, placement, 128, 200)
    large, _ = render(scenes, placement, 192, 192)
    assert judge.score(square, scenes).correct.all()
    assert judge.score(wide, scenes).correct.all() and judge.score(large, scenes).correct.all()
    features = judge.features(square)
    assert features.shape == (12, judge.num_features) and features.std(dim=0).min() > 0


def test_labels_are_free_of_order(judge: Judge) -> None:
    """The mirror image of "A left of B" is "B left of A": the same two objects named in the other slots."""
    scenes, placement, images = pictures(16, 4, num_objects=2)
    beside = scenes.relation == BESIDE
    swapped = replace(scenes, objects=scenes.objects.flip(1))
    mirrored = images.flip(-1)
    assert judge.score(images[beside], scenes[beside]).correct.all()
    assert judge.score(mirrored[beside], swapped[beside]).correct.all()
    differs = (scenes.objects[:, 0] != scenes.objects[:, 1]).any(dim=1) & beside
    assert not judge.score(mirrored[differs], scenes[differs]).correct.any()
    # Drawn in the other order, the same objects in the same places are the same picture.
    turned = Placement(
        *(getattr(placement, name).flip(1) for name in ("centre", "radius", "angle", "phase")), placement.light
    )
    torch.testing.assert_close(render(swapped, turned, 128, 128)[0], images, atol=1e-6, rtol=0)


def test_a_wrong_attribute_is_found_and_costs_log_probability(judge: Judge) -> None:
    scenes, _, images = pictures(16, 5)
    right = judge.score(images, scenes)
    assert right.correct.all() and right.log_probability.min() > -0.5
    objects = scenes.objects.clone()
    objects[:, 0, 1] = (objects[:, 0, 1] + 1) % 6
    wrong = judge.score(images, replace(scenes, objects=objects))
    assert not wrong.correct.any() and not wrong.attributes["colour"].any()
    assert all(wrong.attributes[name].all() for name in ("shape", "texture", "size", "relation", "background"))
    assert (wrong.log_probability < right.log_probability - 1).all()
    background = judge.score(images, replace(scenes, background=(scenes.background + 1) % 4))
    assert not background.attributes["background"].any() and background.attributes["colour"].all()


def test_the_padding_of_a_scene_with_one_object_does_not_count() -> None:
    scene = SceneBatch(torch.tensor([[[1, 2, 0, 1], [0, 0, 0, 0]]]), torch.tensor([ALONE]), torch.tensor([2]))
    logits = {name: torch.zeros(1, size) for name, size in HEADS.items()}
    for name, label in labels(scene).items():
        logits[name][0, label] = 50.0
    padded = {name: torch.roll(value, 1, dims=1) if name.endswith("_1") else value for name, value in logits.items()}
    assert score(padded, scene).correct.all()
    assert score(padded, scene).log_probability.item() == score(logits, scene).log_probability.item()


def test_a_saved_judge_is_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    judge = Judge(channels=(8, 8, 8), num_features=12).eval()
    judge.save(tmp_path / "judge")
    again = Judge.load(tmp_path / "judge")
    assert again.config == judge.config and not again.training
    images = torch.rand(3, 3, 128, 128)
    for name, logits in again(images).items():
        torch.testing.assert_close(logits, judge(images)[name], atol=5e-3, rtol=1e-2)


def test_a_folder_without_a_judge(tmp_path: Path) -> None:
    with pytest.raises(LinearizeError, match=r"No judge can be read from .*stages=\[judge\]"):
        Judge.load(tmp_path / "missing")
    Judge(channels=(8, 8), num_features=4).save(tmp_path / "judge")
    (tmp_path / "judge" / "model.safetensors").write_bytes(b"truncated")
    with pytest.raises(LinearizeError, match="No judge can be read"):
        Judge.load(tmp_path / "judge")
