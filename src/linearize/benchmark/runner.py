"""Runs a benchmark from its config and keeps what it measured: what scripts/benchmark.py calls."""

import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from linearize.benchmark.attention import LayerSizes, attention_rows
from linearize.benchmark.mixers import MixerSettings, mixer_rows
from linearize.benchmark.model import ModelSettings, model_rows
from linearize.benchmark.plot import plot_attention
from linearize.benchmark.scans import ScanSizes, scan_rows
from linearize.config import build_teacher, plain
from linearize.evaluation.environment import command, machine, versions
from linearize.evaluation.tables import markdown_table
from linearize.files import write_json, write_text
from linearize.mixers import mixer_names
from linearize.teachers import resolve_device, resolve_dtype

# column of the table -> (field of a row, its factor)
_COLUMNS = {
    "kernel": ("kernel", None),
    "model": ("model", None),
    "mixer": ("mixer", None),
    "side": ("side", None),
    "pixels": ("size", None),
    "pass": ("pass", None),
    "window": ("window", None),
    "ms": ("median_seconds", 1000),
    "GiB": ("peak_memory_gib", 1),
    "x dense": ("ratio_to_dense", 1),
    "x teacher": ("ratio_to_teacher", 1),
    "visited / exact": ("visited_over_exact", 1),
    "ps / pair": ("picoseconds_per_visited_pair", 1),
    "TFLOP/s": ("tflops_per_second", 1),
    "GB/s": ("gb_per_second", 1),
    "attention GFLOPs": ("attention_gflops", 1),
    "samples / s": ("samples_per_second", 1),
    "parity error": ("parity_error", 1),
    "error": ("error", None),
}


def benchmark(cfg: DictConfig) -> dict[str, Any]:
    """Measures one suite, prints a table and writes `<out>.json`, `<out>.md` and, for attention, `<out>.png`.

    Returns:
        The content of the JSON file: the rows, and the machine, versions, commit, command and configuration.

    Raises:
        LinearizeError: A setting is unknown, or a backend fails the parity check.
    """
    device = resolve_device(cfg.device)
    rows = list(_shown(_LAYER_SUITES.get(cfg.suite, _model)(cfg, device)))
    result = {
        "suite": cfg.suite,
        "rows": rows,
        "machine": machine(device),
        "num_threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": _commit(Path(cfg.root)),
        "command": command(),
        "settings": plain(cfg[cfg.suite] if cfg.suite in _LAYER_SUITES else cfg.model),
    }
    out = Path(cfg.out)
    write_json(out.with_suffix(".json"), result)
    write_text(out.with_suffix(".md"), page(result, out.stem))
    if cfg.suite == "attention":
        plot_attention(result, out.with_suffix(".png"))
    Console().print(_table(rows, cfg.suite))
    return result


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
    return f"# {title}\n\n{markdown_table(names, cells)}\n\n" + "\n".join(source) + "\n"


def _attention(cfg: DictConfig, device: torch.device) -> Iterator[dict[str, Any]]:
    settings = plain(cfg.attention)
    axes = {name: settings.pop(name) for name in ("sides", "windows", "backends", "passes")}
    dtype = resolve_dtype(cfg.dtype, device)
    return attention_rows(LayerSizes(**settings, dtype=dtype, device=device), **axes)


def _scans(cfg: DictConfig, device: torch.device) -> Iterator[dict[str, Any]]:
    settings = plain(cfg.scans)
    axes = {name: settings.pop(name) for name in ("sides", "kernels", "passes")}
    return scan_rows(ScanSizes(**settings, dtype=resolve_dtype(cfg.dtype, device), device=device), **axes)


def _mixers(cfg: DictConfig, device: torch.device) -> Iterator[dict[str, Any]]:
    settings = plain(cfg.mixers)
    return mixer_rows(build_teacher(cfg), settings.pop("names") or mixer_names(), MixerSettings(**settings))


def _model(cfg: DictConfig, device: torch.device) -> Iterator[dict[str, Any]]:
    settings = plain(cfg.model)
    sizes, mixers = settings.pop("sizes"), settings.pop("mixers")
    plans = {name: [{"layers": "*", **rule}] for name, rule in mixers.items()}
    return model_rows(build_teacher(cfg), ModelSettings(**settings), kind=cfg.suite, sizes=sizes, plans=plans)


# What has settings of its own; every other suite measures whole models.
_LAYER_SUITES = {"attention": _attention, "scans": _scans, "mixers": _mixers}


def _shown(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Passes rows on, each told in a line as soon as it is measured."""
    console = Console(stderr=True)
    for row in rows:
        names, cells = _cells([row])
        told = ", ".join(f"{name} {cell}" for name, cell in zip(names, cells[0], strict=True) if cell != "-")
        console.print(told, highlight=False, soft_wrap=True)
        yield row


def _table(rows: list[dict[str, Any]], title: str) -> Table:
    table = Table(title=title)
    names, cells = _cells(rows)
    for name in names:
        table.add_column(name, justify="right")
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


def _commit(root: Path) -> str | None:
    """The commit of the code, marked where files differ from it; None outside a repository."""
    try:
        found = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
