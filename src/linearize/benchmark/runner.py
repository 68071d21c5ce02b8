"""Runs a benchmark from its config and keeps what it measured: what scripts/benchmark.py calls."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig
from rich.console import Console
from rich.table import Table

from linearize.benchmark.attention import LayerSizes, attention_rows
from linearize.benchmark.mixers import MixerSettings, mixer_rows
from linearize.benchmark.model import ModelSettings, model_rows
from linearize.benchmark.pivot import comparison
from linearize.benchmark.plot import PLOTS
from linearize.benchmark.profile import profile_tables
from linearize.benchmark.scans import ScanSizes, scan_rows
from linearize.benchmark.training import TrainSettings, train_rows
from linearize.config import build_teacher, plain
from linearize.errors import LinearizeError, check_count, check_names
from linearize.evaluation.environment import command, commit, machine, versions
from linearize.evaluation.tables import markdown_table
from linearize.files import read_json_object, write_json, write_text
from linearize.mixers import mixer_names
from linearize.teachers import DTYPES, resolve_device, resolve_dtype

# What is measured of one subject, by name.
Row = dict[str, Any]

# column of the table -> (field of a row, its factor)
_COLUMNS = {
    "kernel": ("kernel", None),
    "model": ("model", None),
    "mixer": ("mixer", None),
    "side": ("side", None),
    "pixels": ("size", None),
    "pass": ("pass", None),
    "region": ("region", None),
    "window": ("window", None),
    "batch": ("batch", None),
    "ms": ("median_seconds", 1000),
    "GiB": ("peak_memory_gib", 1),
    "GiB loaded": ("memory_after_loading_gib", 1),
    "dense ms": ("dense_seconds", 1000),
    "x dense": ("ratio_to_dense", 1),
    "x teacher": ("ratio_to_teacher", 1),
    "x first": ("ratio_to_first", 1),
    "visited / exact": ("visited_over_exact", 1),
    "TFLOP/s visited": ("tflops_visited", 1),
    "TFLOP/s exact": ("tflops_exact", 1),
    "ps / pair": ("picoseconds_per_visited_pair", 1),
    "TFLOP/s": ("tflops_per_second", 1),
    "GB/s": ("gb_per_second", 1),
    "MHz": ("sm_mhz", 1),
    "attention GFLOPs": ("attention_gflops", 1),
    "samples / s": ("samples_per_second", 1),
    "last loss": ("last_loss", 1),
    "parity error": ("parity_error", 1),
    "error": ("error", None),
}
# The least of settings that count something, and of each number in settings that list them.
_COUNTS = {
    **dict.fromkeys(("num_heads", "head_dim", "batch", "window", "repeats", "num_inference_steps"), 1),
    **dict.fromkeys(("max_sequence_length", "train_size", "train_repeats", "curve_steps"), 1),
    **dict.fromkeys(("num_text_tokens", "warmup", "train_batch"), 0),
}
_LISTS = ("sides", "sizes", "windows", "probe", "whole_probe")
# Settings by which runs that are one may differ: what is measured, which rows tell, and how often.
_FREE = {"sides", "windows", "backends", "passes", "kernels", "names", "sizes", "mixers", "baselines", "recipes"}
_FREE |= {"region", "window", "batch", "train_batch", "warmup", "repeats", "train_repeats", "profile"}
# What is measured, of all fields of a row; the others tell how it went.
_SUBJECT = ("kernel", "model", "mixer", "side", "size", "pass", "region", "window", "batch")


def benchmark(cfg: DictConfig) -> dict[str, Any]:
    """Measures one suite, prints a table and writes `<out>.json`, `<out>.md` and, for some suites, `<out>.png`.

    All of it is there after every row, so that what was measured outlives a run that is stopped. With `cfg.extend` the
    rows of an earlier file come first; one that is measured again takes the place of its row there.

    Returns:
        The content of the JSON file: the rows, and the machine, versions, commit, command and configuration.

    Raises:
        LinearizeError: A setting is unknown, or a backend fails the parity check.
    """
    if cfg.suite not in SUITES:
        raise LinearizeError(f"suite={cfg.suite} is unknown: choose {', '.join(SUITES)}.")
    rows_of, settings = SUITES[cfg.suite]
    _check_counts(settings, cfg[settings])
    device, out = resolve_device(cfg.device), Path(cfg.out)
    result: dict[str, Any] = {
        "suite": cfg.suite,
        "rows": [],
        "machine": machine(device),
        "num_threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": cfg.commit or commit(),
        "command": command(),
        "settings": plain(cfg[settings]),
        "dtype": cfg.dtype,
        "teacher": _teacher_of(cfg.teacher),
    }
    if cfg.extend:
        _extend(result, out.with_suffix(".json"))
    out.parent.mkdir(parents=True, exist_ok=True)
    measured = {_subject(row): row for row in result["rows"]}
    for row in _shown(rows_of(cfg, device, list(result["rows"]))):
        measured[_subject(row)] = row
        result["rows"] = list(measured.values())
        _write(result, out)
    # Every row has been told; side by side they fit a terminal.
    rows = result["rows"]
    Console().print(_table(cfg.suite, *(comparison(rows) if cfg.suite in PLOTS else _cells(rows))))
    return result


def _check_counts(place: str, settings: DictConfig) -> None:
    """Raises LinearizeError if a setting that counts something is no number of things, or a list of them no list."""
    for name, least in _COUNTS.items():
        if name in settings:
            check_count(f"{place}.{name}", settings[name], least)
    for name in _LISTS:
        if name in settings:
            numbers = settings[name]
            if not isinstance(numbers, ListConfig) or not numbers:
                raise LinearizeError(f"{place}.{name}={numbers} is no list of numbers: set {place}.{name}=[<number>].")
            for number in numbers:
                check_count(f"{place}.{name}", number)


def _teacher_of(teacher: DictConfig) -> dict[str, Any]:
    """What is known of a teacher before it is loaded; a suite of single layers has none."""
    name = Path(teacher.path).name if teacher.path else teacher.hub_id or (teacher.random or {}).get("name")
    return {"name": name, "dtype": teacher.dtype}


def _subject(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in _SUBJECT)


def _write(result: Mapping[str, Any], out: Path) -> None:
    write_json(out.with_suffix(".json"), result)
    write_text(out.with_suffix(".md"), page(result, out.stem))
    if result["suite"] in PLOTS:
        PLOTS[result["suite"]](result, out.with_suffix(".png"))


def _extend(result: dict[str, Any], path: Path) -> None:
    """Puts the rows and the command of an earlier run of the same code on the same machine before this one's.

    Raises:
        LinearizeError: There is no such file, or it is of other code, another machine or other settings.
    """
    if not path.is_file():
        raise LinearizeError(f"extend=true finds no {path}: leave extend out for the first run.")
    earlier = read_json_object(path)
    for name in ("suite", "machine", "commit", "versions", "dtype", "teacher"):
        if earlier.get(name) != result[name]:
            raise LinearizeError(
                f"extend=true finds another {name} in {path} ({earlier.get(name)}) than this run's ({result[name]}): "
                "measure all of it again, or set another out."
            )
    for name in sorted(result["settings"].keys() - _FREE):
        ours, theirs = result["settings"][name], earlier["settings"].get(name)
        if ours != theirs:
            raise LinearizeError(
                f"extend=true finds rows of {name}={theirs} in {path}, which rows of {name}={ours} do not compare "
                "with: set it as it was, or another out."
            )
    result["rows"] = earlier["rows"]
    result["command"] = f"{earlier['command']}; {result['command']}"


def page(result: Mapping[str, Any], title: str) -> str:
    """The rows as a Markdown table, with where they come from."""
    packages = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    source = [
        f"- Command: `{result['command']}`",
        f"- Machine: {result['machine']}, {result['num_threads']} threads",
        f"- Versions: {packages}",
        f"- Commit: {result['commit']}",
    ]
    names, cells = _cells(result["rows"])
    tables = [markdown_table(names, cells)]
    if result["suite"] in PLOTS:
        tables = [f"![what was measured]({title}.png)", markdown_table(*comparison(result["rows"])), *tables]
    tables += profile_tables(result["rows"])
    return "\n\n".join([f"# {title}", *tables, "\n".join(source)]) + "\n"


def _attention(cfg: DictConfig, device: torch.device, earlier: list[Row]) -> Iterator[Row]:
    settings = plain(cfg.attention)
    axes = {name: settings.pop(name) for name in ("sides", "windows", "backends", "passes")}
    return attention_rows(LayerSizes(**settings, dtype=_dtype(cfg, device), device=device), **axes)


def _scans(cfg: DictConfig, device: torch.device, earlier: list[Row]) -> Iterator[Row]:
    settings = plain(cfg.scans)
    axes = {name: settings.pop(name) for name in ("sides", "kernels", "passes")}
    return scan_rows(ScanSizes(**settings, dtype=_dtype(cfg, device), device=device), **axes)


def _dtype(cfg: DictConfig, device: torch.device) -> torch.dtype:
    check_names("dtype", [cfg.dtype], ("auto", *DTYPES))
    return resolve_dtype(cfg.dtype, device)


def _mixers(cfg: DictConfig, device: torch.device, earlier: list[Row]) -> Iterator[Row]:
    settings = plain(cfg.mixers)
    return mixer_rows(build_teacher(cfg), settings.pop("names") or mixer_names(), MixerSettings(**settings))


def _model(cfg: DictConfig, device: torch.device, earlier: list[Row]) -> Iterator[Row]:
    settings = plain(cfg.model)
    axes = {name: settings.pop(name) for name in ("sizes", "baselines")}
    students = settings.pop("mixers")
    axes |= {"kind": cfg.suite, "students": students, "earlier": earlier}
    return model_rows(build_teacher(cfg), ModelSettings(**settings), **axes)


def _train_step(cfg: DictConfig, device: torch.device, earlier: list[Row]) -> Iterator[Row]:
    settings = plain(cfg.train_step)
    axes = {name: settings.pop(name) for name in ("sizes", "recipes")}
    return train_rows(build_teacher(cfg), TrainSettings(**settings), earlier=earlier, **axes)


# What measures a suite, and where its settings stand in the config.
SUITES: dict[str, tuple[Callable[[DictConfig, torch.device, list[Row]], Iterator[Row]], str]] = {
    "attention": (_attention, "attention"),
    "scans": (_scans, "scans"),
    "mixers": (_mixers, "mixers"),
    "transformer": (_model, "model"),
    "train_step": (_train_step, "train_step"),
    "sampling": (_model, "model"),
}


def _shown(rows: Iterator[Row]) -> Iterator[Row]:
    """Passes rows on, each told in a line as soon as it is measured."""
    console = Console(stderr=True)
    for row in rows:
        names, cells = _cells([row])
        told = ", ".join(f"{name} {cell}" for name, cell in zip(names, cells[0], strict=True) if cell != "-")
        console.print(told, highlight=False, soft_wrap=True)
        yield row


def _table(title: str, names: list[str], cells: list[list[str]]) -> Table:
    table = Table(title=title)
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    for row in cells:
        table.add_row(*row)
    return table


def _cells(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Names and text of the columns that some row fills."""
    names = [name for name, (key, _) in _COLUMNS.items() if any(row.get(key) is not None for row in rows)]
    return names, [[_cell(row.get(_COLUMNS[name][0]), _COLUMNS[name][1]) for name in names] for row in rows]


def _cell(value: Any, factor: float | None) -> str:
    if value is None or isinstance(value, str):
        return value or "-"
    if factor is None:
        return str(value)
    return f"{factor * value:,.0f}" if factor * value >= 1000 else f"{factor * value:.4g}"
