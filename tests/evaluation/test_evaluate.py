import json
import shutil

import pytest
import torch
from PIL import Image

from linearize.errors import LinearizeError
from linearize.evaluate import evaluate
from linearize.scenes.judge import Judge

SMALL = [
    "num_prompts=3",
    "evaluation.num_rows=2",
    "evaluation.height=32",
    "evaluation.width=48",
    "evaluation.num_inference_steps=2",
    "evaluation.batch_size=2",
    "teacher.device=cpu",
]


@pytest.fixture
def configured(compose_config):
    return lambda folder, *overrides: compose_config("evaluate", *SMALL, "judge=null", f"folder={folder}", *overrides)


@pytest.fixture(scope="module")
def judge_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    torch.manual_seed(0)
    Judge(channels=(4, 4, 4, 4), num_features=4).save(folder)
    return folder


def test_evaluate_as_a_process_writes_numbers_and_picture_and_prints_a_table(
    run_script, student_folder, tiny_flux_folder, judge_folder, tmp_path
):
    done = run_script(
        "evaluate.py",
        tmp_path,
        "hydra.run.dir=run",
        *SMALL,
        f"student={student_folder}",
        f"teacher.path={tiny_flux_folder}",
        f"judge={judge_folder}",
        "reference_folder=reference",
        "save_reference=true",
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["student"]["velocity_error"] > 0
    assert summary["student"]["scene_accuracy"]["n"] == 3
    assert summary["student"]["frechet_distance"] is None
    assert "velocity error" in done.stdout and "caption log-probability" in done.stdout
    assert summary["command"].startswith("python ") and "num_prompts=3" in summary["command"]
    with Image.open(tmp_path / "run" / "samples.png") as picture:
        picture.verify()
    assert len(list((tmp_path / "reference").iterdir())) == 1


def test_the_same_student_gives_the_same_numbers_again(configured, student_folder, tiny_flux_folder, tmp_path):
    overrides = (f"student={student_folder}", f"teacher.path={tiny_flux_folder}")
    first, second = (evaluate(configured(tmp_path / name, *overrides)) for name in ("first", "second"))
    assert first == second
    assert (tmp_path / "first" / "samples.png").read_bytes() == (tmp_path / "second" / "samples.png").read_bytes()


def test_prompts_of_a_file_are_used(configured, student_folder, tiny_flux_folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\na green square\n")
    config = configured(
        tmp_path / "run",
        f"student={student_folder}",
        f"teacher.path={tiny_flux_folder}",
        "prompts=text",
        f"prompts.path={tmp_path / 'prompts.txt'}",
        "num_prompts=2",
    )
    assert evaluate(config)["settings"]["num_prompts"] == 2


def _truncated(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "truncated")
    weights = next((copy / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    return copy


def test_wrong_students_are_told_apart(configured, student_folder, tiny_flux_folder, tmp_path):
    wrong = {
        "null": "student is not given",
        str(tmp_path / "missing"): "no pipeline folder",
        str(tiny_flux_folder): "holds no student",
        str(_truncated(student_folder, tmp_path)): "damaged|truncated",
    }
    for student, message in wrong.items():
        config = configured(tmp_path / "run", f"student={student}", f"teacher.path={tiny_flux_folder}")
        with pytest.raises(LinearizeError, match=message):
            evaluate(config)
    assert not (tmp_path / "run").exists()


def test_a_student_of_another_teacher_is_refused(configured, student_folder, tiny_pipeline, tmp_path):
    with torch.no_grad():
        tiny_pipeline.transformer.proj_out.weight.mul_(1.5)
    tiny_pipeline.save_pretrained(tmp_path / "other")
    config = configured(tmp_path / "run", f"student={student_folder}", f"teacher.path={tmp_path / 'other'}")
    with pytest.raises(LinearizeError, match=r"was not made from teacher other .*proj_out.weight.*teacher.path"):
        evaluate(config)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluation.num_prompts=0", "num_prompts=0"),
        ("evaluation.sigmas=[0.5,1.0]", "noise levels between 0 and 1"),
        ("judge=nowhere", "No judge can be read from nowhere"),
    ],
)
def test_wrong_settings_are_told(configured, student_folder, tiny_flux_folder, tmp_path, override, message):
    config = configured(tmp_path, f"student={student_folder}", f"teacher.path={tiny_flux_folder}", override)
    with pytest.raises(LinearizeError, match=message):
        evaluate(config)


def test_a_mistake_exits_with_two_and_one_sentence(run_script, tiny_flux_folder, tmp_path):
    done = run_script("evaluate.py", tmp_path, "student=nowhere", f"teacher.path={tiny_flux_folder}", *SMALL)
    assert done.returncode == 2
    assert done.stderr.startswith("error: nowhere is no pipeline folder") and done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
