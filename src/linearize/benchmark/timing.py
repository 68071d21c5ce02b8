"""Times calls on a CPU or a GPU: warm-up first, then medians."""

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch

from linearize.benchmark.clocks import clock_under_load
from linearize.costs import GIB
from linearize.errors import is_out_of_memory

# Seconds of timed calls that are enough for a median.
PATIENCE = 60.0
# As many as PyTorch's notes make, which let libraries set up what a capture forbids.
_CALLS_BEFORE_CAPTURE = 3


@dataclass(frozen=True)
class Timing:
    """Seconds of one call.

    Attributes:
        median_seconds: Median over the repeats.
        min_seconds: The fastest.
        max_seconds: The slowest.
        repeats: How many were timed.
        peak_memory_gib: Peak GPU memory of the calls; None on a CPU.
        graphed: Whether replays of a CUDA graph were timed: the GPU's work alone.
        sm_mhz: Clock of the GPU's processors under a row of replays; None where no graph is timed, or nvidia-ml-py is
            not installed.
        power_capped: Whether that clock is lowered to hold the GPU's power limit.
    """

    median_seconds: float
    min_seconds: float
    max_seconds: float
    repeats: int
    peak_memory_gib: float | None
    graphed: bool
    sm_mhz: int | None = None
    power_capped: bool | None = None

    def as_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


def measure(
    call: Callable[[], object],
    device: torch.device,
    *,
    warmup: int,
    repeats: int,
    patience: float = PATIENCE,
    graphed: bool = False,
) -> Timing:
    """Times `call`, by CUDA events on a GPU and by the wall clock on a CPU.

    Args:
        call: What is timed; it does the same work every time.
        device: Where it works.
        warmup: Calls before the clock starts.
        repeats: Calls that are timed, one by one.
        patience: Seconds after which no more calls are begun; one is timed in any case.
        graphed: On a GPU, time replays of a CUDA graph of the call, where one can be captured: the GPU's work without
            its launching, which a short call alone does not hide and a model does.
    """
    for _ in range(warmup):
        call()
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    replay = _captured(call, device) if graphed and on_gpu else None
    timed = replay or call
    clock = _gpu_seconds if on_gpu else _cpu_seconds
    seconds = [clock(timed)]
    while len(seconds) < repeats and sum(seconds) < patience:
        seconds.append(clock(timed))
    peak = torch.cuda.max_memory_allocated(device) / GIB if on_gpu else None
    median = statistics.median(seconds)
    clock_held = clock_under_load(replay, median, device) if replay else {}
    return Timing(median, min(seconds), max(seconds), len(seconds), peak, replay is not None, **clock_held)


def measured_or_reason(
    call: Callable[[], object], device: torch.device, *, warmup: int, repeats: int, graphed: bool = False
) -> dict[str, Any]:
    """Times `call` as `measure` does.

    Returns:
        The fields of the timing, or where memory does not hold it, "error": one sentence.
    """
    return fitting(
        lambda: measure(call, device, warmup=warmup, repeats=repeats, graphed=graphed).as_dict(),
        device,
        "a smaller size or batch",
    )


def fitting(measured: Callable[[], dict[str, Any]], device: torch.device, smaller: str) -> dict[str, Any]:
    """What a function finds, or where memory does not hold it, "error": one sentence.

    Args:
        measured: Allocates and measures.
        device: Where.
        smaller: What the user may choose instead.
    """
    try:
        return measured()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    # Outside of the handler, where the failed call's tensors are gone.
    memory = "this machine has"
    if device.type == "cuda":
        torch.cuda.empty_cache()
        memory = f"this GPU's {torch.cuda.get_device_properties(device).total_memory / GIB:.0f} GiB"
    return {"error": f"out of memory: it needs more than {memory}; choose {smaller}"}


def _captured(call: Callable[[], object], device: torch.device) -> Callable[[], object] | None:
    """Replays of the call, or None where it cannot be captured; what it returns is overwritten by the next replay.

    As PyTorch's notes on CUDA graphs capture a whole network: after calls on a stream that is not the default one.
    """
    stream = _capture_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    graph = torch.cuda.CUDAGraph()
    # A capture that fails may leave its stream the current one, which this block undoes.
    with torch.cuda.stream(stream):
        for _ in range(_CALLS_BEFORE_CAPTURE):
            call()
        try:
            with torch.cuda.graph(graph, stream=stream):
                call()
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            warnings.warn(f"a call is timed with its launches, as no CUDA graph holds it: {reason}", stacklevel=4)
            torch.cuda.synchronize(device)
            return None
    torch.cuda.current_stream(device).wait_stream(stream)
    graph.replay()
    torch.cuda.synchronize(device)
    return graph.replay


@lru_cache(maxsize=8)
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: the room that cuBLAS takes for a stream, 32 MiB on Hopper, is never given back."""
    return torch.cuda.Stream(device)


def _cpu_seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _gpu_seconds(call: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000
