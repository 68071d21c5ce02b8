import re

import numpy as np
import pytest
import torch
from PIL import Image

from linearize.errors import LinearizeError
from linearize.export import load_pipeline
from linearize.sample import sample

SMALL = ["height=32", "width=48", "num_inference_steps=2", "max_sequence_length=24", "teacher.device=cpu"]


@pytest.fixture
def configured(compose_config):
    return lambda *overrides: compose_config("sample", *SMALL, *overrides)


def test_sample_as_a_process_writes_the_student_s_picture(run_script, student_folder, tmp_path):
    done = run_script(
        "sample.py", tmp_path, *SMALL, f"student={student_folder}", "prompt=a red circle", "seed=3", "out=picture.png"
    )
    assert done.returncode == 0, done.stderr
    generator = torch.Generator().manual_seed(3)
    expected = load_pipeline(student_folder)(
        "a red circle",
        height=32,
        width=48,
        num_inference_steps=2,
        guidance_scale=3.5,
        max_sequence_length=24,
        generator=generator,
    ).images[0]
    with Image.open(tmp_path / "picture.png") as picture:
        assert np.abs(np.asarray(picture, int) - np.asarray(expected, int)).max() <= 1


def test_a_file_of_prompts_gives_numbered_pictures_of_the_teacher(configured, tiny_flux_folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\n\na green square\n")
    config = configured(
        f"teacher.path={tiny_flux_folder}",
        f"prompts.path={tmp_path / 'prompts.txt'}",
        f"out={tmp_path / 'new' / 'picture.png'}",
    )
    files = sample(config)
    assert [file.name for file in files] == ["picture-0.png", "picture-1.png"]
    first, second = (np.asarray(Image.open(file)) for file in files)
    assert first.shape == (32, 48, 3) and not np.array_equal(first, second)


def test_a_prompt_may_be_a_number(configured, tiny_flux_folder, tmp_path):
    assert sample(configured(f"teacher.path={tiny_flux_folder}", "prompt=3", f"out={tmp_path / 'three.png'}"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "No prompt is given"),
        (["prompts.path=missing.txt"], r"missing\.txt cannot be read"),
        (["prompt=a", "num_inference_steps=0"], "num_inference_steps=0; choose a whole number, 1 or more"),
        (["prompt=a", "max_sequence_length=513"], "max_sequence_length=513 is more text than a FluxPipeline takes"),
        (["prompt=a", "num_prompts=-1"], "num_prompts=-1; choose a whole number, 1 or more"),
        (["prompt=a", "height=0"], "height=0; choose a whole number, 1 or more"),
        (["prompt=a", "width=9"], "width=9 is no whole number of this teacher's tokens: choose 8 or 16 pixels"),
        (["prompt=a", "out=picture.jpg"], "out=picture.jpg is no name of a PNG file"),
        (["prompt=a", "student=missing"], "missing is no pipeline folder"),
        (["prompt=a", "teacher.path=missing"], "missing is no pipeline folder"),
    ],
)
def test_mistakes_are_told(configured, overrides, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LinearizeError, match=message):
        sample(configured(*overrides))
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_no_memory_holds_is_told_in_one_sentence(run_script, tiny_flux_folder, tmp_path):
    done = run_script(
        "sample.py", tmp_path, *SMALL, f"teacher.path={tiny_flux_folder}", "prompt=a", "height=4194304", "width=4194304"
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search(r"error: This machine ran out of memory \(tried to allocate \d+ bytes\): .*pictures", done.stderr)
