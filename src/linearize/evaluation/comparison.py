"""One table of many runs, such as every mixer on one budget: from the folders of a sweep and from nothing else."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from linearize.errors import LinearizeError
from linearize.files import read_json_object

# Of a run's configuration: what a reader of the table must know of the budget.
_BUDGET = ("trainer.max_steps", "data.batch_size", "data.num_samples", "optimizer.lr", "ema_decay", "seed")


def compare_runs(folder: str | Path, speed: str | Path | None = None) -> dict[str, Any]:
    """Collects the runs of a sweep.

    Args:
        folder: The sweep's folder, with a folder for each run.
        speed: The JSON file of `scripts/benchmark.py suite=mixers`; None leaves out what it measures.

    Returns:
        `rows`, one for each run, the best velocity first and runs that failed last, with their error; what they
        share (`teacher`, `budget`, `settings`, `versions`, ...); and `speed`, where it was measured.

    Raises:
        LinearizeError: There is no run that ended, or two of them had another budget or teacher.
    """
    folder = Path(folder)
    runs = sorted({file.parent for name in ("summary.json", "job.json") for file in folder.glob(f"*/{name}")})
    jobs = {run: read_json_object(run / "job.json") if (run / "job.json").is_file() else {} for run in runs}
    ended = [run for run in runs if not jobs[run].get("error") and (run / "summary.json").is_file()]
    if not ended:
        raise LinearizeError(f"{folder} holds no <run>/summary.json: give the folder of a sweep whose runs have ended.")
    summaries = {run: read_json_object(run / "summary.json") for run in ended}
    budget = _shared_budget(ended)
    for field in ("teacher_source", "settings"):
        _check_same({run: summaries[run][field] for run in ended}, field)
    first = summaries[ended[0]]
    measured = None if speed is None else read_json_object(Path(speed))
    rows = [_row(run.name, summary, jobs[run], measured) for run, summary in summaries.items()]
    failed = [{"name": run.name, "error": jobs[run].get("error") or "no summary"} for run in runs if run not in ended]
    return {
        "rows": [*sorted(rows, key=lambda row: row["velocity_error"]), *failed],
        "teacher": first["teacher"],
        "budget": budget,
        "command": _command(folder),
        **{field: first[field] for field in ("teacher_source", "settings", "versions", "machine")},
        "commits": sorted({summary["commit"] for summary in summaries.values() if summary.get("commit")}),
        "speed": None if measured is None else _speed(measured),
    }


def _row(
    name: str, summary: Mapping[str, Any], job: Mapping[str, Any], measured: Mapping[str, Any] | None
) -> dict[str, Any]:
    if len(summary["plan"]) != 1:
        raise LinearizeError(f"{name} has several mixers: compare runs with one mixer in all layers.")
    rule, student, starts = summary["plan"][0], summary["student"], (summary["start_errors"] or {}).values()
    row = {
        "name": name,
        "mixer": rule["mixer"],
        "arguments": rule["arguments"],
        **{key: student[key] for key in ("scene_accuracy", "psnr_to_teacher", "frechet_distance", "velocity_error")},
        "untrained": {key: summary["untrained"][key] for key in ("scene_accuracy", "velocity_error")},
        "start_error": sum(starts) / len(starts) if starts else None,
        "attention_flops_ratio": summary["attention_flops_ratio"],
        "trainable_parameters": summary["trainable_parameters"],
        "train_seconds": summary["train_seconds"],
        "samples_per_second": summary["samples_per_second"],
        "jobs_per_device": job.get("jobs_per_device", 1),
    }
    return row | (_speed_of(measured, rule["mixer"], rule["arguments"]) if measured is not None else {})


def _speed(measured: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: measured[key] for key in ("command", "machine", "versions", "commit", "settings")}
    graphed = all(row.get("graphed") for row in measured["rows"] if row.get("pass") == "forward")
    return {**kept, "graphed": graphed, "dense": _speed_of(measured, "softmax")}


def _speed_of(measured: Mapping[str, Any], mixer: str, arguments: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What was measured of a mixer with these arguments, the others at their defaults, as in a run of older code.

    It is the parameters of a layer, its times, and a training step.
    """
    rows = [row for row in measured["rows"] if row["mixer"] == mixer]
    if arguments is not None:
        rows = [row for row in rows if arguments.items() <= row["arguments"].items()]
    forward = [row for row in rows if row.get("pass") == "forward"]
    steps = [row for row in rows if row.get("pass") == "train_step"]
    return {
        "layer_parameters": forward[0]["parameters"] if forward else None,
        "forward_seconds": {str(row["side"]): row["median_seconds"] for row in forward},
        "step_samples_per_second": steps[0].get("samples_per_second") if steps else None,
        "speed_error": next((row["error"] for row in rows if "error" in row), None),
    }


def _shared_budget(runs: list[Path]) -> dict[str, Any]:
    """The budget that all runs had: their configurations are the same but for the mixer and its knobs."""
    configs = {}
    for run in runs:
        file = run / ".hydra" / "config.yaml"
        if not file.is_file():
            raise LinearizeError(f"{run} has no .hydra/config.yaml, so its budget is unknown: train it again.")
        config: Any = OmegaConf.to_container(OmegaConf.load(file))
        knobs = {"mixer", *config["mixer"]}
        configs[run] = {key: value for key, value in config.items() if key not in knobs}
    _check_same(configs, "configuration")
    config = cast(DictConfig, OmegaConf.load(runs[0] / ".hydra" / "config.yaml"))
    budget = {key: OmegaConf.select(config, key) for key in _BUDGET}
    budget |= {"stages": OmegaConf.to_container(config.stages)}
    return budget | {"loss": {name: term["weight"] for name, term in config.loss.items()}}


def _check_same(values: Mapping[Path, Mapping[str, Any]], what: str) -> None:
    first, *others = values
    for other in others:
        for key in sorted({*values[first], *values[other]}):
            ours, theirs = values[first].get(key), values[other].get(key)
            if ours != theirs:
                raise LinearizeError(
                    f"{first.name} and {other.name} are not comparable, their {what} has {key}={ours} and {theirs}: "
                    "train both with the same settings."
                )


def _command(folder: Path) -> str | None:
    """The command line of the sweep, where Hydra kept it."""
    file = folder / "multirun.yaml"
    if not file.is_file():
        return None
    hydra: Any = OmegaConf.load(file).hydra
    overrides = [*hydra.overrides.task, *(one for one in hydra.overrides.hydra if not one.startswith("hydra.mode="))]
    return shlex.join(["python", f"{hydra.job.name}.py", "-m", *overrides])
