"""Draws what a benchmark measured: times against the number of tokens, and losses against steps."""

import io
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from linearize.files import write_bytes


def plot_attention(result: Mapping[str, Any], path: str | Path) -> None:
    """Writes a log-log plot of the forward pass, one line for each kernel and window, as a whole PNG file.

    Args:
        result: What `runner.benchmark` returns for the suite "attention".
        path: The PNG file.
    """
    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    batch_of = _batch_label(result)
    for row in result["rows"]:
        if row["pass"] == "forward" and "median_seconds" in row:
            label = row["kernel"] if row["window"] is None else f"{row['kernel']}, {row['region']} {row['window']}"
            lines[label + batch_of(row)].append((row["side"] ** 2, 1000 * row["median_seconds"]))
    _draw(lines, path, "image tokens", "milliseconds", f"One attention layer, forward: {result['machine']}", log=True)


def plot_transformer(result: Mapping[str, Any], path: str | Path) -> None:
    """Writes a log-log plot of one forward pass, one line for each model.

    Args:
        result: What `runner.benchmark` returns for the suite "transformer".
        path: The PNG file.
    """
    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    batch_of = _batch_label(result)
    for row in result["rows"]:
        if "median_seconds" in row:
            lines[row["model"] + batch_of(row)].append((row["size"] ** 2, 1000 * row["median_seconds"]))
    _draw(lines, path, "pixels", "milliseconds", f"One forward pass: {result['machine']}", log=True)


def plot_losses(result: Mapping[str, Any], path: str | Path) -> None:
    """Writes the losses of every recipe side by side.

    Args:
        result: What `runner.benchmark` returns for the suite "train_step".
        path: The PNG file.
    """
    batch_of = _batch_label(result)
    lines = {
        f"{row['model']}, {row['size']} px{batch_of(row)}": [
            (float(step), loss) for step, loss in enumerate(row["losses"], start=1)
        ]
        for row in result["rows"]
        if "losses" in row
    }
    _draw(lines, path, "step on the same samples", "loss", f"Distillation: {result['machine']}", log=False)


PLOTS: dict[str, Callable[[Mapping[str, Any], str | Path], None]] = {
    "attention": plot_attention,
    "transformer": plot_transformer,
    "train_step": plot_losses,
}


def _batch_label(result: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], str]:
    """What a row's label says of its batch: something only where batches differ."""
    differ = len({row["batch"] for row in result["rows"]}) > 1
    return lambda row: f", batch {row['batch']}" if differ else ""


def _draw(
    lines: Mapping[str, list[tuple[float, float]]], path: str | Path, across: str, up: str, title: str, *, log: bool
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for label, points in lines.items():
        xs, ys = zip(*sorted(points), strict=True)
        axes.plot(xs, ys, marker="o", markersize=4, label=label, linestyle="--" if "dense" in label else "-")
    if log:
        axes.set(xscale="log", yscale="log")
    axes.set(xlabel=across, ylabel=up, title=title)
    axes.grid(True, which="both", alpha=0.3)
    if lines:
        axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_bytes(path, buffer.getvalue())
