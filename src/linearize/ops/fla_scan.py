"""Gated scans by the chunk kernels of flash-linear-attention (the `fla` extra), forward and backward."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from linearize.extras import missing_sentence
from linearize.ops.precision import widen
from linearize.ops.products import aligned
from linearize.ops.scan_gradients import scan_gradients
from linearize.ops.scan_probe import failure

# Query, key, value and logarithmic gate, [batch, tokens, heads, ...], to sum_{j <= i} (q_i M_ij k_j) v_j.
Scan = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
# The kernels want channels in multiples of it.
ALIGNMENT = 16


def scan_heads(query: Tensor, key: Tensor, value: Tensor, gate: Tensor) -> Tensor:
    """Fla's scan with one gate in each head, [batch, tokens, heads, 1]."""
    from fla.ops.simple_gla import chunk_simple_gla

    return chunk_simple_gla(query, key, value, gate[..., 0], scale=1.0)[0]


def scan_channels(query: Tensor, key: Tensor, value: Tensor, gate: Tensor) -> Tensor:
    """Fla's scan with gates of each feature."""
    from fla.ops.gla import chunk_gla

    return chunk_gla(query, key, value, gate, scale=1.0)[0]


# A compiler would break its graph at each kernel.
@torch.compiler.disable
def fla(query: Tensor, key: Tensor, value: Tensor, forward_gate: Tensor, backward_gate: Tensor) -> Tensor:
    """See `bidirectional_gated_attention`; bf16 on a GPU, see `refusal`."""
    arguments = (query, key, value, forward_gate, backward_gate)
    if forward_gate.shape[-1] == 1:
        return ScanOfHeads.apply(scan_heads, *arguments)
    ahead, behind = both_ways(scan_channels, *arguments)
    return ahead + behind - (query * key).sum(dim=-1, keepdim=True) * value


def both_ways(
    scan: Scan, query: Tensor, key: Tensor, value: Tensor, forward_gate: Tensor, backward_gate: Tensor
) -> tuple[Tensor, Tensor]:
    """The scan from the first and that from the last token, each with the diagonal: [batch, heads, tokens, channels].

    Both are one call on twice the batch: the kernels that carry states on have little else to do at a time.
    """
    whole = [aligned(states, ALIGNMENT) for states in (query, key, value)]
    gates = [gate if gate.shape[-1] == 1 else aligned(gate, ALIGNMENT) for gate in (forward_gate, backward_gate)]
    pairs = [(states, states) for states in whole] + [(gates[0], gates[1])]
    turned = ((ahead.transpose(1, 2), behind.transpose(1, 2).flip(1)) for ahead, behind in pairs)
    found = scan(*(torch.cat(directions) for directions in turned))
    ahead, behind = found[..., : value.shape[-1]].transpose(1, 2).chunk(2)
    return ahead, behind.flip(2)


class ScanOfHeads(torch.autograd.Function):
    """Both scans with one gate in each head, whose gradients are scans of the same kind: no other kernel is needed.

    fla's own backward kernel of such gates refuses Hopper GPUs with Triton 3.4 to 3.7.0, which miscompile it.
    """

    @staticmethod
    def forward(
        ctx: Any, scan: Scan, query: Tensor, key: Tensor, value: Tensor, forward_gate: Tensor, backward_gate: Tensor
    ) -> Tensor:
        """Both directions, with the diagonal once."""
        ctx.save_for_backward(query, key, value, forward_gate, backward_gate)
        ctx.scan = scan
        return _once(scan, query, key, value, forward_gate, backward_gate)[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """See `scan_gradients`."""
        query, key, value, *gates = ctx.saved_tensors

        def attend(*arguments: Tensor) -> Tensor:
            return _once(ctx.scan, *arguments)[0]

        def attend_with_rows(*arguments: Tensor) -> tuple[Tensor, Tensor]:
            output, directions = _once(ctx.scan, *arguments[:5])
            return output, torch.stack([_dot(arguments[5], direction) for direction in directions])

        gradient = gradients[0].to(value.dtype)
        return None, *scan_gradients(attend, attend_with_rows, gradient, query, key, value, *gates)


def _once(scan: Scan, query: Tensor, key: Tensor, value: Tensor, *gates: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The sum of both directions with the diagonal counted once, and both with the diagonal."""
    ahead, behind = both_ways(scan, query, key, value, *gates)
    return ahead + behind - (query * key).sum(dim=-1, keepdim=True) * value, (ahead, behind)


def _dot(first: Tensor, second: Tensor) -> Tensor:
    return (widen(first) * widen(second)).sum(dim=-1, keepdim=True)


def refusal(value: Tensor, num_features: int, gate_width: int) -> str | None:
    """Why fla's kernels cannot serve a call, in one clause, or None where they can.

    Args:
        value: [batch, heads, tokens, channels], or a stand-in with its type and device.
        num_features: Channels of query and key.
        gate_width: Gates of each head.
    """
    if value.device.type != "cuda":
        return f"it needs a GPU, and this is a {value.device.type}"
    if value.dtype != torch.bfloat16:
        return f"it computes in bfloat16, and query, key and value are {value.dtype}".replace("torch.", "")
    return _fails(value.device, value.shape[1], num_features, value.shape[3], gate_width)


# To a compiler it is a constant.
@torch.compiler.assume_constant_result
def _fails(device: torch.device, num_heads: int, num_features: int, channels: int, gate_width: int) -> str | None:
    return _failure(device, num_heads, num_features, channels, gate_width)


@lru_cache(maxsize=64)
def _failure(device: torch.device, num_heads: int, num_features: int, channels: int, gate_width: int) -> str | None:
    if importlib.util.find_spec("fla") is None:
        return missing_sentence("it", ["fla"]).rstrip(".")
    return failure(fla, device, num_heads, num_features, channels, gate_width)
