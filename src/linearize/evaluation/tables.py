"""A summary as a table, in the terminal and in Markdown."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

MODELS = ("teacher", "untrained", "student")
# key in the summary -> what a reader sees
METRICS = {
    "scene_accuracy": "scene accuracy ↑",
    "caption_log_probability": "caption log-probability ↑",
    "psnr_to_teacher": "PSNR to teacher, dB ↑",
    "velocity_error": "velocity error ↓",
    "frechet_distance": "Fréchet distance ↓",
}
FACTS = {
    "attention_flops_ratio": "attention FLOPs, student / teacher",
    "trainable_parameters": "trainable parameters",
    "train_seconds": "training, seconds",
    "samples_per_second": "training, samples per second",
}


def format_value(value: Any, separator: str = " ") -> str:
    """A number with four significant digits, a proportion with its interval and n, a dash for nothing."""
    if value is None:
        return "-"
    if isinstance(value, Mapping):
        low, high = value["interval"]
        parts = (f"{100 * value['value']:.1f} %", f"[{100 * low:.1f}, {100 * high:.1f}]", f"n={value['n']}")
        return separator.join(parts)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}"


def summary_rows(summary: Mapping[str, Any], separator: str = " ") -> list[list[str]]:
    """One row per metric: its name, then teacher, untrained and student."""
    return [
        [label, *(format_value(summary[model][metric], separator) for model in MODELS)]
        for metric, label in METRICS.items()
    ]


def fact_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """One row per number that belongs to the run and not to one model."""
    return [[label, format_value(summary[fact])] for fact, label in FACTS.items()]


def print_summary(summary: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints the summary's numbers; the teacher's column is against a second seed of its own, the noise floor."""
    console = console or Console()
    table = Table(title="Student against teacher", caption="teacher: against its own second seed")
    table.add_column("", no_wrap=True)
    for model in MODELS:
        table.add_column(model, justify="right")
    for row in summary_rows(summary, separator="\n"):
        table.add_row(*row)
    console.print(table)
    for label, value in fact_rows(summary):
        console.print(f"{label}: {value}", highlight=False)


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column is left-aligned, the others right-aligned."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, rule, *rows])
