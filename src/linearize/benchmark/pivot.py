"""Rows of a benchmark side by side: one line for each size, one column for each kernel or model."""

from collections.abc import Mapping, Sequence
from typing import Any

# What a line stands for, in the order of the columns on the left, where rows have it.
_LINES = {"side": "side", "size": "pixels", "batch": "batch", "pass": "pass", "region": "region", "window": "window"}
# Told apart only where there are several.
_SHARED = ("batch", "region")
# What dense attention has none of.
_LOCAL = ("region", "window")
_NAMES = ("kernel", "model")
_RATIOS = ("ratio_to_dense", "ratio_to_teacher", "ratio_to_first")


def comparison(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The header and the cells of a table that compares kernels or models.

    A cell is the time, and in brackets how many times faster than what the ratios are to; a dash where nothing was
    measured. Rows without a window, dense attention, stand in the lines of every window and region. Batches and
    regions have a column where they differ.

    Args:
        rows: Of one suite.
    """
    found = {name: {row.get(name) for row in rows} - {None} for name in _LINES}
    lines = [name for name, values in found.items() if len(values) > (name in _SHARED)]
    names = list(dict.fromkeys(_name(row) for row in rows))
    keys = list(dict.fromkeys(tuple(row.get(name) for name in lines) for row in rows))
    windowed = [key for key in keys if "window" not in lines or key[-1] is not None]
    cells = {(tuple(row.get(name) for name in lines), _name(row)): _cell(row) for row in rows}
    table = []
    for key in windowed or keys:
        anywhere = tuple(None if name in _LOCAL else value for name, value in zip(lines, key, strict=True))
        times = [cells.get((key, name)) or cells.get((anywhere, name)) or "-" for name in names]
        table.append([*(str(value) for value in key), *times])
    return [*(_LINES[name] for name in lines), *names], table


def _name(row: Mapping[str, Any]) -> str:
    return next(str(row[name]) for name in _NAMES if name in row)


def _cell(row: Mapping[str, Any]) -> str:
    if "median_seconds" not in row:
        return "-"
    ratio = next((row[name] for name in _RATIOS if row.get(name) is not None), None)
    milliseconds = (
        f"{1000 * row['median_seconds']:,.4g} ms" if row["median_seconds"] < 1 else (f"{row['median_seconds']:,.4g} s")
    )
    return milliseconds if ratio is None else f"{milliseconds} ({ratio:.3g}x)"
