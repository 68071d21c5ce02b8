"""The clock that a GPU holds under a load: chips that reach their power limit run slower than their specification."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch

# Seconds of calls in a row, in the middle of which the clock is read.
_BURST = 0.3


def clock_under_load(call: Callable[[], object], seconds: float, device: torch.device) -> dict[str, Any]:
    """Reads the clock while calls run, one behind another.

    Args:
        call: What the GPU does, without waiting for it.
        seconds: How long one call takes.
        device: The GPU.

    Returns:
        "sm_mhz", the clock of its processors, and "power_capped", whether it is lowered to hold the power limit;
        nothing without the package nvidia-ml-py, or where the GPU does not tell.
    """
    try:
        import pynvml
    except ModuleNotFoundError:
        return {}
    for _ in range(math.ceil(_BURST / seconds)):
        call()
    time.sleep(_BURST / 2)
    try:
        # This finds the chip among those that CUDA_VISIBLE_DEVICES leaves.
        handle = torch.cuda._get_pynvml_handler(device)
        reasons = pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
        return {
            "sm_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "power_capped": bool(reasons & pynvml.nvmlClocksEventReasonSwPowerCap),
        }
    except pynvml.NVMLError:
        return {}
    finally:
        torch.cuda.synchronize(device)
