"""Sums over thousands of tokens are kept in float32 or wider, whatever the model computes in."""

from __future__ import annotations

import torch
from torch import Tensor


def full_precision(like: Tensor) -> torch.autocast:
    """A context in which autocast does not narrow matrix products."""
    return torch.autocast(like.device.type, enabled=False)


def widen(states: Tensor) -> Tensor:
    """The tensor in float32, or as it is where it is wider."""
    return states.to(torch.promote_types(states.dtype, torch.float32))
