"""What each part of a run costs in time and in GPU memory."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from linearize.files import write_json

GIB = 2**30


class Costs:
    """Seconds and peak GPU memory of named parts, written to a file after each, so that an interrupted run has them.

    Args:
        path: The JSON file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.parts: dict[str, dict[str, float | None]] = {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Measures what runs within the block; ``peak_memory_gib`` is null without a GPU."""
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        yield
        if on_gpu:
            torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() / GIB if on_gpu else None
        self.parts[name] = {
            "seconds": round(time.perf_counter() - start, 2),
            "peak_memory_gib": None if peak is None else round(peak, 2),
        }
        write_json(self.path, self.parts)
