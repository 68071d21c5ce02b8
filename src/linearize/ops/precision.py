"""Sums over thousands of tokens are kept in float32 or wider, whatever the model computes in."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def widen(states: Tensor) -> Tensor:
    """The tensor in float32, or as it is where it is wider."""
    return states.to(torch.promote_types(states.dtype, torch.float32))


def has_narrow_products(dtype: torch.dtype, device_type: str) -> bool:
    """Whether products over many tokens are computed in this dtype and not in float32 or wider: bf16 on a GPU.

    fp16 has not the range of exponential features and of sums over tokens.
    """
    return dtype == torch.bfloat16 and device_type == "cuda"


def as_under_autocast(*states: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype that autocast, where it is on, gives PyTorch's own attention; float64 stays."""
    device = states[0].device.type
    if not torch.is_autocast_enabled(device):
        return states
    dtype = torch.get_autocast_dtype(device)
    return tuple(tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in states)


def without_autocast(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function, or method, whose matrix products autocast does not narrow; its first tensor tells the device."""

    @wraps(function)
    def computed(*arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
        device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
        with torch.autocast(device.type, enabled=False):
            return function(*arguments, **named)

    return computed
