"""Whole runs on the tiny teacher: what they leave behind, taking them up again, several processes."""

import contextlib
import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from linearize.distillation.checkpoint import SafetensorsCheckpointIO
from linearize.errors import LinearizeError
from linearize.export import load_pipeline
from linearize.train import train
from runs import ROOT, assert_same_training, compose_train, last, tiny_overrides

BARE = ("evaluate=false", "export=null", "logger=none", "callbacks.progress.every_n_steps=1")


@pytest.fixture(scope="module")
def tiny(tiny_flux_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of a tiny run; its samples are generated once."""
    return tiny_overrides(tiny_flux_folder, tmp_path_factory.mktemp("cache"))


def test_a_whole_run_leaves_what_it_promises(tiny: list[str], tmp_path: Path) -> None:
    overrides = ("stages.transfer=2", "callbacks.pictures.every_n_steps=3", "callbacks.pictures.num_prompts=2")
    metrics = train(compose_train(*tiny, *overrides, "evaluation.sigmas=[0.5]", run_dir=tmp_path))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["student"]["velocity_error"] < summary["untrained"]["velocity_error"]
    assert summary["train_seconds"] > 0 and summary["samples_per_second"] > 0
    assert metrics["summary"]["student"] == summary["student"]
    assert 0 < metrics["val/velocity_error"] < 1
    with open(next(tmp_path.glob("csv/version_0/metrics.csv"))) as file:
        rows = list(csv.DictReader(file))
    assert {"train/loss", "train/transfer", "train/prediction", "train/samples_per_second"} <= set(rows[0])
    assert [row["step"] for row in rows if row["train/transfer"]] == ["0", "1"]
    assert [row["step"] for row in rows if row["train/prediction"]] == ["2", "3", "4", "5"]
    for name in ("samples.png", "pictures/step-0000003.png", "pictures/step-0000006.png"):
        assert Image.open(tmp_path / name).width > 200
    assert last(tmp_path)["state_dict"].keys() == {
        f"student.{block}.{layer}.attn.{name}"
        for block, names in (
            ("transformer_blocks", ("to_q", "to_k", "to_v", "to_out.0")),
            ("single_transformer_blocks", ("to_q", "to_k", "to_v")),
        )
        for layer in range(2)
        for projection in names
        for name in (f"{projection}.weight", f"{projection}.bias")
    }
    student = load_pipeline(tmp_path / "student").transformer
    average = last(tmp_path)["linearize"]["ema"]["average"]
    assert all(torch.equal(student.get_parameter(name), value) for name, value in average.items())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(
    tiny: list[str], tmp_path: Path, accumulate: int
) -> None:
    overrides = [*tiny, *BARE, "stages.transfer=2", f"trainer.accumulate_grad_batches={accumulate}"]
    train(compose_train(*overrides, run_dir=tmp_path / "whole"))
    stop = ("+callbacks.stop._target_=runs.InterruptAt", "+callbacks.stop.step=3")
    with pytest.raises(KeyboardInterrupt, match=r"Stopped after step 3 of 6; .* resume=.*last\.safetensors"):
        train(compose_train(*overrides, *stop, run_dir=tmp_path / "halves"))
    assert last(tmp_path / "halves")["global_step"] == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    train(compose_train(*overrides, "resume=last", run_dir=tmp_path / "halves"))
    assert_same_training(tmp_path / "whole", tmp_path / "halves")


def test_more_steps_may_be_given_and_another_student_may_not(
    tiny: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(compose_train(*tiny, *BARE, "trainer.max_steps=2", run_dir=tmp_path))
    resume = f"resume={tmp_path}"
    other = tmp_path / "other"
    with pytest.raises(
        LinearizeError, match=r"another plan \(clear \{'window': 2.*than this run \(clear \{'window': 3"
    ):
        train(compose_train(*tiny, *BARE, resume, "window=3", run_dir=other))
    with pytest.raises(LinearizeError, match=r"another plan .*than this run \(softmax"):
        softmax = [one for one in tiny if not one.startswith("window")]
        train(compose_train(*softmax, *BARE, resume, "mixer=softmax", run_dir=other))
    with pytest.raises(LinearizeError, match=r"at step 2, past trainer\.max_steps=1"):
        train(compose_train(*tiny, *BARE, resume, "trainer.max_steps=1", run_dir=other))
    with pytest.raises(LinearizeError, match=r"another optimizer \(torch\.optim\.AdamW\) than this run"):
        train(compose_train(*tiny, *BARE, resume, "optimizer=sgd", run_dir=other))
    assert not (other / "checkpoints").exists()
    train(compose_train(*tiny, *BARE, resume, "trainer.max_steps=3", run_dir=other))
    assert "the learning-rate schedule changes" in caplog.text
    assert last(other)["global_step"] == 3


def test_a_finished_run_that_is_resumed_is_measured_with_the_features_it_ended_with(
    tiny: list[str], tmp_path: Path
) -> None:
    overrides = [one for one in tiny if not one.startswith("window")] + ["mixer=performer", "num_features=16"]
    overrides += [*BARE, "callbacks.redrawing.every_n_steps=2", "trainer.max_steps=3"]
    errors = [
        train(compose_train(*overrides, *resume, run_dir=tmp_path))["val/velocity_error"]
        for resume in ((), ("resume=last",))
    ]
    assert errors[0] == errors[1]


def test_a_resumed_run_takes_the_rates_of_its_own_config(tiny: list[str], tmp_path: Path) -> None:
    overrides = [*tiny, *BARE, "schedule=constant", "stages.transfer=2", "transfer_lr=1e-2"]
    train(compose_train(*overrides, "trainer.max_steps=2", run_dir=tmp_path))
    changed = ("optimizer.lr=1e-5", "optimizer.weight_decay=0.1", "resume=last", "trainer.max_steps=3")
    metrics = train(compose_train(*overrides, *changed, run_dir=tmp_path))
    assert metrics["train/learning_rate"] == pytest.approx(1e-5)
    assert last(tmp_path)["optimizer_states"][0]["param_groups"][0]["weight_decay"] == 0.1


def test_a_damaged_checkpoint_is_told(tiny: list[str], tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "last.safetensors"
    SafetensorsCheckpointIO().save_checkpoint({"state_dict": {"student.a": torch.zeros(3)}, "loops": {}}, path)
    with pytest.raises(LinearizeError, match="not written by training"):
        train(compose_train(*tiny, *BARE, "resume=last", run_dir=tmp_path))
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(LinearizeError, match="truncated"):
        train(compose_train(*tiny, *BARE, f"resume={path}", run_dir=tmp_path))


def test_two_runs_with_one_seed_are_equal_and_another_seed_is_not(tiny: list[str], tmp_path: Path) -> None:
    for name, seed in (("first", 5), ("second", 5), ("third", 6)):
        train(compose_train(*tiny, *BARE, f"seed={seed}", "trainer.max_steps=2", run_dir=tmp_path / name))
    assert_same_training(tmp_path / "first", tmp_path / "second")
    with pytest.raises(AssertionError, match="state_dict"):
        assert_same_training(tmp_path / "first", tmp_path / "third")


def test_weights_move_in_bfloat16_as_in_float32(tiny: list[str], tmp_path: Path) -> None:
    """Trained tensors are float32 beside frozen bfloat16: small steps are not lost."""
    overrides = [*tiny, *BARE, "optimizer.lr=1e-5", "trainer.max_steps=20", "schedule=constant", "ema_decay=0"]
    moved = {}
    for precision in ("32-true", "bf16-mixed"):
        start, end = tmp_path / precision / "start", tmp_path / precision / "end"
        train(compose_train(*overrides, f"trainer.precision={precision}", "optimizer.lr=0", run_dir=start))
        train(compose_train(*overrides, f"trainer.precision={precision}", run_dir=end))
        before, after = last(start)["state_dict"], last(end)["state_dict"]
        assert {value.dtype for value in after.values()} == {torch.float32}
        moved[precision] = torch.cat([(after[name] - before[name]).flatten() for name in before])
    exact, mixed = moved["32-true"], moved["bf16-mixed"]
    assert (mixed != 0).float().mean() > 0.99
    assert mixed.norm() / exact.norm() == pytest.approx(1, abs=0.05)
    assert torch.nn.functional.cosine_similarity(exact, mixed, dim=0) > 0.95


def test_a_run_without_validation_has_no_numbers_of_it(tiny: list[str], tmp_path: Path) -> None:
    metrics = train(compose_train(*tiny, *BARE, "trainer.limit_val_batches=0", "trainer.max_steps=1", run_dir=tmp_path))
    assert "train/loss" in metrics and "val/velocity_error" not in metrics


def test_two_processes_train_as_one(tiny: list[str], tmp_path: Path) -> None:
    train(compose_train(*tiny, *BARE, "optimizer=sgd", run_dir=tmp_path / "one"))
    with cli(
        *tiny, *BARE, "trainer.devices=2", "trainer.strategy=ddp", "optimizer=sgd", run_dir=tmp_path / "two"
    ) as process:
        output, _ = process.communicate()
    assert process.returncode == 0, output
    one, two = last(tmp_path / "one")["state_dict"], last(tmp_path / "two")["state_dict"]
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], atol=1e-6, rtol=1e-5, msg=name)


@contextlib.contextmanager
def cli(*arguments: str, run_dir: Path) -> Iterator[subprocess.Popen[str]]:
    """`python train.py <arguments>`; it and its processes end with the block, and after two minutes at the latest."""
    command = [sys.executable, str(ROOT / "train.py"), *arguments, f"hydra.run.dir={run_dir}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}"}
    process = subprocess.Popen(
        command,
        cwd=run_dir.parent,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    watchdog = threading.Timer(120, os.killpg, (process.pid, signal.SIGKILL))
    watchdog.start()
    try:
        yield process
    finally:
        watchdog.cancel()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def stop_by(number: signal.Signals, at: str, *overrides: str, run_dir: Path) -> int:
    """Sends a running `train.py` a signal when it prints `at`; returns the step that it says it stopped after."""
    lines = []
    with cli(*overrides, run_dir=run_dir) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if at in line:
                process.send_signal(number)
                break
        lines.append(process.communicate()[0])
    output = "".join(lines)
    assert process.returncode == 130, output
    told = re.search(r"Stopped after step (\d+) of 100; to go on: the same command with resume=(\S+)", output)
    assert told is not None, output
    assert "Traceback" not in output
    assert last(run_dir)["global_step"] == int(told.group(1))
    return int(told.group(1))


def test_a_process_that_is_stopped_twice_ends_with_the_weights_of_one_that_was_not(
    tiny: list[str], tmp_path: Path
) -> None:
    overrides = [*tiny, *BARE, "trainer.max_steps=100", "trainer.val_check_interval=1000"]
    first = stop_by(signal.SIGINT, "step 3/100", *overrides, run_dir=tmp_path / "stopped")
    stopped = [*overrides, "resume=last"]
    second = stop_by(signal.SIGTERM, f"step {first + 2}/100", *stopped, run_dir=tmp_path / "stopped")
    assert 3 <= first < second < 100
    train(compose_train(*stopped, run_dir=tmp_path / "stopped"))
    train(compose_train(*overrides, run_dir=tmp_path / "whole"))
    assert_same_training(tmp_path / "stopped", tmp_path / "whole")


def test_a_resumed_run_goes_on_in_its_wandb_run(tiny: list[str], tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    overrides = [*tiny, "evaluate=false", "export=null", "logger=wandb"]
    for steps, *resume in ((2,), (3, "resume=last")):
        train(compose_train(*overrides, f"trainer.max_steps={steps}", *resume, run_dir=tmp_path))
        wandb.finish()
    kept = json.loads((tmp_path / "checkpoints" / "wandb.json").read_text())["id"]
    assert [file.name for file in tmp_path.glob("wandb/offline-run-*/*.wandb")] == [f"run-{kept}.wandb"] * 2


def test_a_run_that_its_time_limit_ends_can_be_taken_up_again(tiny: list[str], tmp_path: Path) -> None:
    tiny = [*tiny, *BARE, "data.batch_size=1", "trainer.accumulate_grad_batches=4"]
    limited = [*tiny, "trainer.max_steps=5000", "trainer.val_check_interval=50000"]
    train(compose_train(*limited, "+trainer.max_time=00:00:00:01", run_dir=tmp_path))
    checkpoint = last(tmp_path)
    step, batches = checkpoint["global_step"], checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    assert 0 < step < 5000
    # A step is whole after four micro steps, or at the end of an epoch.
    assert batches["current"]["completed"] % 4 == 0 or batches["is_last_batch"]
    halves = [*tiny, f"trainer.max_steps={step + 2}", "schedule=constant", "resume=last"]
    train(compose_train(*halves, run_dir=tmp_path))
    assert last(tmp_path)["global_step"] == step + 2
