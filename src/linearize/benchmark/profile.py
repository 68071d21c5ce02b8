"""Where the time of a call goes: the device's kernels by kind, from torch.profiler."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from linearize.evaluation.tables import markdown_table

# What the name of a kernel says of it, on a CPU of an operator; the first that fits.
KINDS = {
    "attention": re.compile(r"attention|flash|sdpa|fmha|flex|^(forward|(query|key)_gradient|delta)_kernel", re.I),
    "products": re.compile(r"gemm|gemv|nvjet|cutlass|xmma|split_?k|cublas|(^|[:_])(add|b|baddb)?mm(_|$)", re.I),
}
REST = "rest"
# Kernels of a row that its page names, and characters of their names there and in the JSON.
_SHOWN, _WIDTH, _KEPT = 8, 90, 200


def kind_of(kernel: str) -> str:
    """Attention, products (of matrices), or the rest: norms, activations, copies."""
    return next((kind for kind, pattern in KINDS.items() if pattern.search(kernel)), REST)


def profiled(call: Callable[[], object], device: torch.device) -> dict[str, Any] | None:
    """Runs a call once more, which has run before, under the profiler.

    Returns:
        "seconds" by kind, and "kernels", the longest first, each with name, kind, calls and seconds; None where the
        profiler sees nothing of the device.
    """
    on_gpu = device.type == "cuda"
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        call()
        if on_gpu:
            torch.cuda.synchronize(device)
    kernels = []
    for event in profiler.key_averages():
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if microseconds > 0:
            kernel = {"name": event.key[:_KEPT], "kind": kind_of(event.key), "calls": event.count}
            kernels.append(kernel | {"seconds": microseconds / 1e6})
    if not kernels:
        return None
    kernels.sort(key=lambda kernel: -kernel["seconds"])
    seconds = {kind: sum(kernel["seconds"] for kernel in kernels if kernel["kind"] == kind) for kind in (*KINDS, REST)}
    return {"seconds": seconds, "kernels": kernels}


def profile_tables(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown: the milliseconds of every profiled row by kind, and its longest kernels; nothing without such rows."""
    found = [row for row in rows if row.get("profile")]
    if not found:
        return []
    kinds = (*KINDS, REST)
    shares = [
        [*_subject(row), *(_milliseconds(row["profile"]["seconds"][kind]) for kind in kinds), _launches(row)]
        for row in found
    ]
    longest = [
        [*_subject(row), _short(kernel["name"]), kernel["kind"], str(kernel["calls"]), _milliseconds(kernel["seconds"])]
        for row in found
        for kernel in row["profile"]["kernels"][:_SHOWN]
    ]
    names = ["model", "pixels", "batch"]
    return [
        "## Where the time goes",
        "Of one call under the profiler, milliseconds by kind of kernel.",
        markdown_table([*names, *kinds, "kernels"], shares),
        markdown_table([*names, "kernel", "kind", "calls", "ms"], longest),
    ]


def _subject(row: Mapping[str, Any]) -> list[str]:
    return [str(row["model"]), str(row["size"]), str(row["batch"])]


def _launches(row: Mapping[str, Any]) -> str:
    return str(sum(kernel["calls"] for kernel in row["profile"]["kernels"]))


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.4g}"


def _short(name: str) -> str:
    name = name.replace("|", "/")
    return name if len(name) <= _WIDTH else name[: _WIDTH - 3] + "..."
