"""Pre-training from its configuration to a pipeline folder: every stage, resumption, several processes, mistakes."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException

from linearize.config import plain, register_resolvers
from linearize.distillation.checkpoint import read_checkpoint
from linearize.errors import LinearizeError
from linearize.files import read_json, weight_hash
from linearize.measure import with_interval
from linearize.overrides import describe
from linearize.pretrain import pretrain
from linearize.scenes.judge import Judge
from pretraining import compose_pretrain
from runs import ROOT

SCRIPT = ROOT / "scripts" / "pretrain_teacher.py"
TEACHER = ROOT / "data" / "teachers" / "scenes"
PARTS = ("text_encoder", "text_encoder_2", "transformer", "vae")
INTERRUPTED = "trainer._target_=pretraining.trainer_interrupted_at"


def run(*overrides: str, output_folder: Path) -> dict[str, Any]:
    return pretrain(compose_pretrain(*overrides, output_folder=output_folder))


def checkpoint(folder: Path, stage: str) -> dict[str, Any]:
    return read_checkpoint(folder / stage / "last.safetensors")


def hashes(pipeline: Path) -> dict[str, str]:
    return {part: weight_hash(pipeline / part) for part in PARTS}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder that every stage wrote, and the report; tests only read it."""
    folder = tmp_path_factory.mktemp("pretrain")
    return folder, run(output_folder=folder)


def test_every_stage_leaves_what_it_promises(made: tuple[Path, dict[str, Any]]) -> None:
    folder, report = made
    assert list(report) == ["autoencoder", "judge", "teacher", "measure", "time"]
    history = read_json(folder / "pipeline" / "training.json")
    assert [record["stage"] for record in history] == ["autoencoder", "teacher"]
    assert [record["steps"] for record in history] == [3, 2]
    assert history[1]["samples_seen"] == 3 and history[1]["options"]["seed"] == 3
    (row,) = read_json(folder / "accuracy.json")["rows"]
    low, high = row["scene_accuracy_interval"]
    assert 0 <= low <= row["scene_accuracy"] <= high <= 1 and row["num_prompts"] == 2
    settings = read_json(folder / "accuracy.json")["settings"]
    assert settings["num_inference_steps"] == 2 and settings["dtype"] == "float32" and "torch" in settings["versions"]
    forward = read_json(folder / "forward_time.json")
    assert 0 < forward["fastest_seconds"] <= forward["median_seconds"] <= forward["slowest_seconds"]
    assert forward["num_threads"] == torch.get_num_threads() and forward["machine"] and forward["num_text_tokens"] == 32
    assert read_json(folder / "judge" / "accuracy.json")["num"] == 2 and Judge.load(folder / "judge")
    assert all((folder / stage / "version_0" / "metrics.csv").exists() for stage in ("autoencoder", "judge", "teacher"))


def test_the_pipeline_is_a_stock_one_with_its_latents_scaled(made: tuple[Path, dict[str, Any]]) -> None:
    pipeline = FluxPipeline.from_pretrained(made[0] / "pipeline", torch_dtype=torch.float32)
    assert type(pipeline.transformer.transformer_blocks[-1]).__name__ == "FluxTransformerBlock"
    assert pipeline.vae.config.scaling_factor != 1.0 and pipeline.vae.config.shift_factor != 0.0
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a cat", height=64, width=96, num_inference_steps=1, max_sequence_length=32, output_type="pt")
    assert image.images.shape == (1, 3, 64, 96) and image.images.isfinite().all()


def test_a_stage_that_ended_is_not_trained_again(made: tuple[Path, dict[str, Any]]) -> None:
    folder, report = made
    before = {path: path.stat().st_mtime_ns for path in (folder / "pipeline").rglob("*")}
    again = run("resume=true", "stages=[autoencoder,judge,teacher]", output_folder=folder)
    assert again == {stage: json.loads(json.dumps(report[stage])) for stage in again}
    assert {path: path.stat().st_mtime_ns for path in (folder / "pipeline").rglob("*")} == before


def test_an_interrupted_autoencoder_ends_with_the_weights_of_one_that_was_not(tmp_path: Path) -> None:
    options = ("stages=autoencoder", "autoencoder.max_steps=4", "resume=true")
    run(*options, output_folder=tmp_path / "whole")
    stop = r"Stopped stage autoencoder after step 2; to go on: the same command with resume=true output_folder="
    with pytest.raises(KeyboardInterrupt, match=stop):
        run(*options, INTERRUPTED, "+trainer.step=2", output_folder=tmp_path / "parts")
    assert checkpoint(tmp_path / "parts", "autoencoder")["global_step"] == 2
    assert not (tmp_path / "parts" / "pipeline").exists()
    run(*options, output_folder=tmp_path / "parts")
    whole, parts = (checkpoint(tmp_path / name, "autoencoder") for name in ("whole", "parts"))
    assert whole["global_step"] == parts["global_step"] == whole["num_batches"] == parts["num_batches"] == 4
    assert all(torch.equal(value, parts["state_dict"][name]) for name, value in whole["state_dict"].items())
    assert hashes(tmp_path / "whole" / "pipeline") == hashes(tmp_path / "parts" / "pipeline")
    record = read_json(tmp_path / "parts" / "pipeline" / "training.json")
    assert len(record) == 1 and record[0]["steps"] == 4


def test_an_interrupted_teacher_goes_on_with_optimizer_and_average(
    made: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Continued at a learning rate of zero, the average moves towards weights that stand still."""
    options = ("stages=[teacher]", f"start_from={made[0] / 'pipeline'}", "pretraining.max_steps=4")
    with pytest.raises(KeyboardInterrupt):
        run(*options, INTERRUPTED, "+trainer.step=2", output_folder=tmp_path)
    stopped = checkpoint(tmp_path, "teacher")
    (report,) = run(*options, "resume=true", "pretraining.learning_rate=0", output_folder=tmp_path).values()
    ended = checkpoint(tmp_path, "teacher")
    assert (stopped["global_step"], ended["global_step"], report["steps"]) == (2, 4, 4)
    assert (stopped["samples_seen"], ended["samples_seen"], report["samples_seen"]) == (4, 6, 6)
    assert all(torch.equal(value, ended["state_dict"][name]) for name, value in stopped["state_dict"].items())
    assert (stopped["average"]["num_updates"], ended["average"]["num_updates"]) == (2, 4)
    for name, average in stopped["average"]["average"].items():
        part, _, rest = name.partition(".")
        for num in (3, 4):
            average = average.lerp(stopped["state_dict"][f"{part}.{rest}"], 1 - (1 + num) / (10 + num))
        torch.testing.assert_close(ended["average"]["average"][name], average, rtol=1e-6, atol=1e-8)
    for old, new in zip(stopped["optimizer_states"], ended["optimizer_states"], strict=True):
        assert {state["step"].item() for state in old["adamw"]["state"].values()} == {2}
        assert {state["step"].item() for state in new["adamw"]["state"].values()} == {4}
        assert old["muon"]["state"].keys() == new["muon"]["state"].keys() != set()


def test_going_on_from_shipped_weights(tmp_path: Path) -> None:
    """The averaged weights that ship are where training starts, with a fresh optimizer; their folder stays as it is."""
    before = {file: file.read_bytes() for file in TEACHER.rglob("*.json")}
    options = ("stages=[teacher]", f"start_from={TEACHER}", "pretraining.max_steps=1", "pretraining.learning_rate=0")
    run(*options, output_folder=tmp_path)
    assert hashes(tmp_path / "pipeline") == hashes(TEACHER)
    history, shipped = (read_json(folder / "training.json") for folder in (tmp_path / "pipeline", TEACHER))
    assert history[:-1] == shipped and history[-1]["steps"] == 1
    assert {file: file.read_bytes() for file in TEACHER.rglob("*.json")} == before


def test_resume_false_takes_the_weights_with_a_fresh_optimizer_and_warm_up(
    made: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    options = ("stages=[teacher]", "pretraining.max_steps=2", "pretraining.warmup_steps=8")
    rate = ("pretraining.learning_rate=0.004", "pretraining.decay_fraction=0")
    run(*options, *rate, f"start_from={made[0] / 'pipeline'}", output_folder=tmp_path)
    run(*options, *rate, "resume=false", output_folder=tmp_path)
    (optimizer,) = checkpoint(tmp_path, "teacher")["optimizer_states"]
    assert {state["step"].item() for state in optimizer["adamw"]["state"].values()} == {2}
    assert optimizer["adamw"]["param_groups"][0]["lr"] == pytest.approx(0.004 * 2 / 8)
    stages = [record["stage"] for record in read_json(tmp_path / "pipeline" / "training.json")]
    assert stages == ["autoencoder", "teacher", "teacher", "teacher"]


def test_guidance_distillation_at_scale_one_is_the_teacher_itself(tmp_path: Path) -> None:
    options = ("stages=[teacher]", f"start_from={TEACHER}", "pretraining.learning_rate=0", "pretraining.max_steps=1")
    losses = {}
    for scale in (1.0, 4.0):
        folder = tmp_path / str(scale)
        run(*options, f"pretraining.guidance=[{scale},{scale}]", "pretraining.prompt_dropout=0", output_folder=folder)
        losses[scale] = read_json(folder / "teacher" / "finished.json")["metrics"]["flow"]
        assert not any("reference" in name for name in checkpoint(folder, "teacher")["state_dict"])
    assert losses[1.0] < 1e-8 and losses[4.0] > 1e-3


def test_a_budget_of_minutes(tmp_path: Path) -> None:
    budget = ("autoencoder.max_steps=null", "autoencoder.max_minutes=1e-6")
    report = run("stages=[autoencoder]", *budget, output_folder=tmp_path)
    assert report["autoencoder"]["steps"] == checkpoint(tmp_path, "autoencoder")["global_step"] == 1


def test_two_processes_end_with_the_same_weights(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    overrides = [
        *("--config-name", "pretrain_smoke", "stages=[teacher]", "progress_bar=false", "pretraining.max_steps=2"),
        *(f"start_from={made[0] / 'pipeline'}", f"output_folder={tmp_path}"),
        *("trainer._target_=pretraining.trainer_recording", f"+trainer.folder={tmp_path}"),
        *("trainer.devices=2", "trainer.strategy=ddp"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run([*torchrun, *overrides], env=environment, capture_output=True, text=True, timeout=180)
    assert ended.returncode == 0, ended.stderr
    first, second = (read_json(tmp_path / f"rank{rank}.json") for rank in range(2))
    assert first["world_size"] == 2 and first["weights"] == second["weights"] and first["average"] == second["average"]
    assert first["loss"] != second["loss"], "each process trains on scenes of its own"
    record = read_json(tmp_path / "pipeline" / "training.json")[-1]
    assert record["num_processes"] == 2 and record["samples_seen"] == first["samples_seen"] == 2 * (4 + 2)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["stages=[autoencoder,teecher]"], "'teecher': choose from autoencoder, judge, teacher, "),
        (["stages=[autoencoder]", f"teacher_folder={TEACHER.parent}"], "holds something else, which would be replaced"),
        (["stages=[judge]"], r"holds no pipeline: run stages=\[autoencoder\] first, or set start_from"),
        (["stages=[time]", "start_from=missing"], "start_from=missing is no pipeline folder"),
        (["stages=[autoencoder]", "autoencoder.max_steps=null"], "max_steps=None with max_minutes=None is no budget"),
        (["stages=[autoencoder]", "autoencoder.max_steps=0"], "max_steps=0 with max_minutes=None is no budget"),
        (["stages=[autoencoder]", "autoencoder.learning_rate=1e30"], r"lower autoencoder\.learning_rate"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(overrides: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(LinearizeError, match=words):
        run(*overrides, output_folder=tmp_path)
    assert not (tmp_path / "pipeline").exists()


def test_a_mistake_on_the_command_line_exits_with_2(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "stages=[teecher]", f"output_folder={tmp_path}"]
    failed = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert failed.returncode == 2 and "Traceback" not in failed.stderr
    assert failed.stderr.splitlines()[-1].startswith("error: stages names 'teecher': choose from ")
    with (
        initialize_config_dir(str(ROOT / "configs"), version_base="1.3"),
        pytest.raises(HydraException) as caught,
    ):
        compose("pretrain", overrides=["judge.max_step=3"])
    told = describe(caught.value, ROOT / "configs", "pretrain", ["judge.max_step=3"])
    assert told.startswith("judge.max_step is no setting (did you mean judge.max_steps?): judge has ")


def commands_of_the_model_card() -> list[list[str]]:
    (block,) = re.findall(r"```bash\n(.*?)```", (TEACHER / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    return [shlex.split(command.replace("\\\n", " ")) for command in block.split("\n\n")]


def test_the_commands_of_the_model_card_are_those_that_made_the_teacher() -> None:
    register_resolvers(ROOT)
    autoencoder, judge, first, second = commands_of_the_model_card()
    made = read_json(TEACHER / "training.json")
    parts = ("autoencoder", "pretraining", "pretraining")
    for command, part, record in zip((autoencoder, first, second), parts, made, strict=True):
        script = command.index("scripts/pretrain_teacher.py")
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            cfg = compose("pretrain", overrides=command[script + 1 :])
        options = plain(cfg[part])
        assert {name: options[name] for name in record["options"]} == record["options"]
        assert record["stage"] in cfg.stages and cfg.seed == record["seed"]
    assert judge == ["python", "scripts/pretrain_teacher.py", "stages=[judge]", "trainer.devices=1"]


def test_an_interval_is_added_to_a_row_of_accuracies() -> None:
    row = with_interval({"num_prompts": 512, "scene_accuracy": 507 / 512, "shape": 1.0})
    assert row["scene_accuracy_interval"] == [0.9773, 0.9958] and row["shape"] == 1.0
