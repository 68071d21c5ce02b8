"""Selective scans with a state of one number for each channel (S6 of Mamba, arXiv 2312.00752, with d_state = 1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.errors import LinearizeError

# Tokens that are passed over one after another; chunks of them are passed over at once.
CHUNK = 16


def selective_scan(
    inputs: Tensor, step: Tensor, rate: Tensor, write: Tensor, read: Tensor, *, backend: str = "auto"
) -> Tensor:
    """y_t = C_t h_t with h_t = e^(-step_t rate) h_(t-1) + step_t B_t u_t, in the order of the tokens.

    Args:
        inputs: u, [..., tokens, channels].
        step: Above 0, same.
        rate: Above 0, broadcasts to [..., 1, channels]; Mamba's -A.
        write: B, broadcasts to the inputs.
        read: C, same.
        backend: See `linear_recurrence`.

    Returns:
        Same as inputs.
    """
    return read * linear_recurrence(-step * rate, step * write * inputs, backend=backend)


def linear_recurrence(log_decay: Tensor, inputs: Tensor, *, backend: str = "auto") -> Tensor:
    """h_t = e^(log_decay_t) h_(t-1) + inputs_t, from h = 0.

    Args:
        log_decay: At most 0, [..., tokens, channels].
        inputs: Same.
        backend: "chunked", of a cost and memory linear in tokens; "recurrent", token by token; "dense", on [tokens x
            tokens] weights; or "auto".

    Raises:
        LinearizeError: There is no such backend.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise LinearizeError(f"unknown backend {backend!r}, choose one of auto, {', '.join(BACKENDS)}")
    return BACKENDS["chunked" if backend == "auto" else backend](log_decay, inputs)


def dense(log_decay: Tensor, inputs: Tensor) -> Tensor:
    """The definition: weights e^(sum of log_decay from s + 1 to t) for s <= t."""
    total = log_decay.cumsum(dim=-2)
    is_earlier = torch.ones(total.shape[-2], total.shape[-2], dtype=torch.bool, device=total.device).tril()
    # The exponent of the other half is positive, and would overflow.
    exponents = (total[..., :, None, :] - total[..., None, :, :]).clamp(max=0.0)
    weights = exponents.exp().masked_fill(~is_earlier[..., None], 0.0)
    return torch.einsum("...tsc,...sc->...tc", weights, inputs)


def recurrent(log_decay: Tensor, inputs: Tensor) -> Tensor:
    """Token by token, differentiated as it is written."""
    return _pass_over(log_decay.exp(), inputs)[0]


def chunked(log_decay: Tensor, inputs: Tensor) -> Tensor:
    """All chunks at once, then the states between them in the same way; only the result is kept for the gradient."""
    return _Recurrence.apply(log_decay, inputs)


BACKENDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "chunked": chunked,
    "recurrent": recurrent,
    "dense": dense,
}


class _Recurrence(torch.autograd.Function):
    """The gradient of a recurrence is one from the last token on, with g_t = dh_t + decay_(t+1) g_(t+1)."""

    @staticmethod
    def forward(context: Any, log_decay: Tensor, inputs: Tensor) -> Tensor:
        states = _by_chunks(log_decay.exp(), inputs)
        context.save_for_backward(log_decay, states)
        return states

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        log_decay, states = context.saved_tensors
        following = F.pad(log_decay[..., 1:, :], (0, 0, 0, 1))
        adjoint = chunked(following.flip(-2), gradient.flip(-2)).flip(-2)
        previous = F.pad(states[..., :-1, :], (0, 0, 1, 0))
        return adjoint * log_decay.exp() * previous, adjoint


def _by_chunks(decay: Tensor, inputs: Tensor) -> Tensor:
    num_tokens = inputs.shape[-2]
    if num_tokens <= CHUNK:
        return _pass_over(decay, inputs)[0]
    padded = (F.pad(tensor, (0, 0, 0, -num_tokens % CHUNK)) for tensor in (decay, inputs))
    local, product = _pass_over(*(tensor.unflatten(-2, (-1, CHUNK)) for tensor in padded))
    states = _by_chunks(product[..., -1, :], local[..., -1, :])
    before = F.pad(states[..., :-1, :], (0, 0, 1, 0))
    return (local + product * before[..., None, :]).flatten(-3, -2)[..., :num_tokens, :]


def _pass_over(decay: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """States from 0 and products of decays, along the second-last dimension."""
    state, product = torch.zeros_like(inputs[..., 0, :]), torch.ones_like(inputs[..., 0, :])
    states, products = [], []
    for token in range(inputs.shape[-2]):
        state = decay[..., token, :] * state + inputs[..., token, :]
        product = product * decay[..., token, :]
        states.append(state)
        products.append(product)
    return torch.stack(states, dim=-2), torch.stack(products, dim=-2)


def selective_scan_flops(num_tokens: int, channels: int) -> int:
    """Operations of `selective_scan` by chunks: inputs, states, products, what comes from before, and reading."""
    return num_tokens * channels * 11
