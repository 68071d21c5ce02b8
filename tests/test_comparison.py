"""From one sweep command over mixers to the table: the launcher, the collection of runs, the page."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from hydra_plugins.linearize_processes import Job
from linearize.benchmark.runner import benchmark
from linearize.config import register_resolvers
from linearize.errors import LinearizeError
from linearize.evaluation.comparison import compare_runs
from linearize.evaluation.comparison_page import comparison_page
from linearize.mixers import mixer_names
from runs import ROOT, tiny_overrides

SWEEP = ("-m", "experiment=scenes_mixers", "sweep=mixers", "launcher=processes", "hydra.launcher.jobs_per_device=2")


def python(script: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / script), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, text=True, capture_output=True, timeout=480)


@pytest.fixture(scope="module")
def arguments(tiny_flux_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    tiny = [one for one in tiny_overrides(tiny_flux_folder, tmp_path_factory.mktemp("cache")) if "window" not in one]
    return [*SWEEP, *tiny, "stages.transfer=2", "evaluation.sigmas=[0.5]", "hydra.sweep.dir=sweep"]


@pytest.fixture(scope="module")
def swept(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a sweep and what it printed; soft has more landmarks than this picture has tokens."""
    cwd = tmp_path_factory.mktemp("swept")
    done = python("train.py", *arguments, "mixer=linear,soft", cwd=cwd)
    assert done.returncode == 1, done.stdout + done.stderr
    return cwd / "sweep", done.stdout + done.stderr


@pytest.fixture(scope="module")
def speed(tiny_flux_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `scripts/benchmark.py suite=mixers` writes about two mixers."""
    out = tmp_path_factory.mktemp("speed") / "mixers"
    sizes = (
        "sizes=[64,96]",
        "probe=[112,208]",
        "whole_probe=[256,128]",
        "train_batch=2",
        "train_size=64",
        "train_repeats=1",
        "warmup=0",
        "repeats=1",
    )
    overrides = [f"mixers.{one}" for one in ("names=[linear,soft]", *sizes)]
    register_resolvers(ROOT)
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose(
            "benchmark", ["suite=mixers", f"teacher.path={tiny_flux_folder}", "device=cpu", f"out={out}", *overrides]
        )
    cfg.teacher.device, cfg.teacher.dtype = "cpu", "bfloat16"
    benchmark(cfg)
    return out.with_suffix(".json")


def test_the_sweep_takes_every_mixer_but_softmax() -> None:
    params = OmegaConf.load(ROOT / "configs" / "sweep" / "mixers.yaml").hydra.sweeper.params
    register_resolvers(ROOT)
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        (override,) = parser.parse_overrides([f"mixer={params.mixer}"])
        assert list(override.sweep_string_iterator()) == [name for name in mixer_names() if name != "softmax"]


def test_a_job_that_fails_is_told_and_stops_no_other(swept: tuple[Path, str]) -> None:
    folder, output = swept
    assert json.loads((folder / "linear" / "job.json").read_text())["exit_code"] == 0
    assert (folder / "linear" / "summary.json").is_file()
    record = json.loads((folder / "soft" / "job.json").read_text())
    assert record["exit_code"] == 2 and "landmarks" in record["error"]
    assert "error: 1 of 2 jobs failed" in output and f"mixer=soft: {record['error']}" in output


def test_the_same_command_goes_on_with_what_is_not_done(arguments: list[str], swept: tuple[Path, str]) -> None:
    folder, _ = swept
    before = (folder / "linear" / "summary.json").stat().st_mtime_ns
    done = python("train.py", *arguments, "mixer=linear", cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    assert "1 of 1 jobs are done already" in done.stdout
    assert (folder / "linear" / "summary.json").stat().st_mtime_ns == before


def test_every_mixer_is_timed_after_it_was_compared_with_its_definition(speed: Path) -> None:
    rows = json.loads(speed.read_text())["rows"]
    forward = [row for row in rows if row.get("pass") == "forward"]
    assert [(row["mixer"], row["side"]) for row in forward] == [
        (name, side) for name in ("softmax", "linear", "soft") for side in (8, 12)
    ]
    for row in forward:
        dense = next(one for one in forward if one["side"] == row["side"])
        assert 0 < row["parity_error"] < 2e-2
        assert row["ratio_to_dense"] == pytest.approx(dense["median_seconds"] / row["median_seconds"])
    steps = [row for row in rows if row.get("pass") == "train_step"]
    assert [row["mixer"] for row in steps] == ["softmax", "linear", "soft"]
    assert all(row["samples_per_second"] == pytest.approx(2 / row["median_seconds"]) for row in steps)
    assert "| soft |" in speed.with_suffix(".md").read_text()


def test_the_runs_become_a_table_with_its_sources(swept: tuple[Path, str], speed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(swept[0], tmp_path / "sweep"))
    better = Path(shutil.copytree(folder / "linear", folder / "better"))
    summary = json.loads((better / "summary.json").read_text())
    summary["student"]["velocity_error"] /= 2
    summary["plan"][0]["arguments"]["feature_map"] = "relu"
    (better / "summary.json").write_text(json.dumps(summary))
    # As of older code, which had fewer arguments.
    summary = json.loads((folder / "linear" / "summary.json").read_text())
    del summary["plan"][0]["arguments"]["feature_map"]
    (folder / "linear" / "summary.json").write_text(json.dumps(summary))
    done = python("scripts/report.py", str(tmp_path), "--compare", str(folder), "--speed", str(speed), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    comparison = json.loads((tmp_path / "sweep.json").read_text())
    assert [row["name"] for row in comparison["rows"]] == ["better", "linear", "soft"]
    failed = comparison["rows"][2]
    for row in comparison["rows"][:2]:
        summary = json.loads((folder / row["name"] / "summary.json").read_text())
        assert row["velocity_error"] == summary["student"]["velocity_error"]
        assert row["start_error"] == pytest.approx(sum(summary["start_errors"].values()) / 4)
        assert set(row["forward_seconds"]) == ({"8", "12"} if row["name"] == "linear" else set())
    page = (tmp_path / "sweep.md").read_text()
    command = "python train.py -m experiment=scenes_mixers sweep=mixers launcher=processes"
    for part in (command, "6 steps of 4 samples", "| 8 x 8, ms | 12 x 12, ms |", f"- soft failed: {failed['error']}"):
        assert part in page
    assert page.count("\n| linear |") == 2 and page.count("\n| better |") == 2 and "up to 2 at a time" in page


def test_a_training_step_that_failed_is_told(swept: tuple[Path, str], speed: Path, tmp_path: Path) -> None:
    measured = json.loads(speed.read_text())
    (step,) = [row for row in measured["rows"] if row["mixer"] == "linear" and row["pass"] == "train_step"]
    del step["samples_per_second"]
    step["error"] = "out of memory"
    (tmp_path / "speed.json").write_text(json.dumps(measured))
    comparison = compare_runs(swept[0], tmp_path / "speed.json")
    assert comparison["rows"][0]["step_samples_per_second"] is None
    assert "- linear was not timed: out of memory" in comparison_page("sweep", comparison, "sweep.json")


def _write_run(folder: Path, mixer: str, **config: Any) -> None:
    (folder / mixer / ".hydra").mkdir(parents=True)
    content = {"mixer": {"name": mixer, "window": 8}, "window": 8, "trainer": {"max_steps": 6}, **config}
    OmegaConf.save(OmegaConf.create(content), folder / mixer / ".hydra" / "config.yaml")
    (folder / mixer / "summary.json").write_text("{}")


def test_jobs_that_would_share_a_folder_are_refused(arguments: list[str], tmp_path: Path) -> None:
    done = python("train.py", *arguments, "mixer=linear,soft", "hydra.sweep.subdir=one", cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "The jobs mixer=linear and mixer=soft have one folder" in done.stderr
    assert not (tmp_path / "sweep" / "one").exists()


def test_runs_with_other_budgets_are_not_compared(tmp_path: Path) -> None:
    with pytest.raises(LinearizeError, match=r"holds no <run>/summary\.json"):
        compare_runs(tmp_path)
    _write_run(tmp_path, "clear", seed=0)
    _write_run(tmp_path, "lolcats", seed=1)
    with pytest.raises(LinearizeError, match=r"clear and lolcats are not comparable, .* has seed=0 and 1"):
        compare_runs(tmp_path)
    (tmp_path / "clear" / ".hydra" / "config.yaml").unlink()
    with pytest.raises(LinearizeError, match=r"clear has no \.hydra/config\.yaml"):
        compare_runs(tmp_path)


def test_a_job_is_out_of_reach_of_ctrl_c_in_the_launchers_terminal(tmp_path: Path) -> None:
    """Two signals, the terminal's and the launcher's, would end a training without a checkpoint."""
    job = Job("job", [], tmp_path / "job", OmegaConf.create())
    job.begin([sys.executable, "-c", "import os; print(os.getpgid(0) == os.getpid())"], None, 1)
    assert job.process is not None and job.process.wait(timeout=60) == 0
    assert (tmp_path / "job" / "log.txt").read_text().strip() == "True"
