"""Draws the time of an attention layer against its number of tokens."""

import io
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from linearize.files import write_bytes


def plot_attention(result: Mapping[str, Any], path: str | Path) -> None:
    """Writes a log-log plot of the forward pass, one line for each kernel and window, as a whole PNG file.

    Args:
        result: What `runner.benchmark` returns for the suite "attention".
        path: The PNG file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in result["rows"]:
        if row["pass"] == "forward":
            label = row["kernel"] if row["window"] is None else f"{row['kernel']}, window {row['window']}"
            lines[label].append((row["side"] ** 2, 1000 * row["median_seconds"]))
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for label, points in lines.items():
        tokens, milliseconds = zip(*sorted(points), strict=True)
        axes.loglog(tokens, milliseconds, marker="o", label=label, linestyle="--" if "dense" in label else "-")
    axes.set(xlabel="image tokens", ylabel="milliseconds", title=f"One attention layer, forward: {result['machine']}")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_bytes(path, buffer.getvalue())
