"""Softmax attention that also tells the mass it divided by, without scores of all pairs in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from linearize.ops.precision import widen
from linearize.ops.products import wide_matmul

# Scores that are in memory at a time where no fused kernel computes them.
SCORES_AT_A_TIME = 2**26


def softmax_with_mass(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention and log sum_j exp(s_ij), both differentiable.

    The forward pass is a fused kernel on a CPU, and on a GPU in bf16 and fp16 without a mask; else, and in the backward
    pass, scores are computed for some queries at a time.

    Args:
        query: [batch, heads, queries, head_dim].
        key: [batch, heads, keys, head_dim].
        value: Same as key.
        scale: Softmax scale.
        key_mask: [batch, keys], True where a key is valid.

    Returns:
        Output [batch, heads, queries, head_dim] in the type of the value, zeros where no key is valid, and logarithmic
        mass [batch, heads, queries, 1] in float32 at least, -inf where no key is valid.
    """
    return _Softmax.apply(query, key, value, key_mask, scale)


class _Softmax(torch.autograd.Function):
    """Kernels that return the mass have no gradient of it: dS = P (dP - rowsum(P dP) + dL)."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        if query.device.type == "cpu":
            output, log_mass = _on_cpu(query, key, value, key_mask, scale)
        elif key_mask is None and _fits_flash(query):
            found = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)
            output, log_mass = found[0], found[1]
        else:
            output, log_mass = _in_blocks(query, key, value, key_mask, scale)
        ctx.save_for_backward(query, key, value, key_mask, log_mass)
        ctx.scale = scale
        return output, log_mass[..., None]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, key_mask, log_mass = ctx.saved_tensors
        of_output, of_mass = gradients[0].to(value.dtype), gradients[1]
        # A query that sees nothing has scores and a mass of -inf.
        log_mass = log_mass.masked_fill(log_mass.isinf(), 0.0)[..., None]
        of_query, of_key, of_value = [], torch.zeros_like(widen(key)), torch.zeros_like(widen(value))
        for some in _blocks(query, key):
            weights = (_scores(query[:, :, some], key, key_mask, ctx.scale) - log_mass[:, :, some]).exp()
            of_scores = weights * wide_matmul(of_output[:, :, some], value.transpose(-1, -2))
            # The mean over keys is that of dO O.
            shift = of_mass[:, :, some] - of_scores.sum(dim=-1, keepdim=True)
            of_scores = (of_scores.addcmul_(weights, shift) * ctx.scale).to(query.dtype)
            of_query.append(of_scores @ key)
            of_key += wide_matmul(of_scores.transpose(-1, -2), query[:, :, some])
            of_value += wide_matmul(weights.to(value.dtype).transpose(-1, -2), of_output[:, :, some])
        return torch.cat(of_query, dim=2), of_key.to(key.dtype), of_value.to(value.dtype), None, None


def _fits_flash(query: Tensor) -> bool:
    head_dim = query.shape[-1]
    return query.dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0 and head_dim <= 256


def _on_cpu(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    compute = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if key_mask is None:
        return compute(query, key, value, scale=scale)
    # Without a valid key all are taken and the result is dropped: the kernel returns NaN for such rows.
    blind = ~key_mask.any(dim=-1)
    hidden = ~(key_mask | blind[:, None])[:, None, None]
    bias = torch.zeros(hidden.shape, dtype=query.dtype).masked_fill(hidden, -torch.inf)
    output, log_mass = compute(query, key, value, attn_mask=bias, scale=scale)
    blind = blind[:, None, None]
    return output.masked_fill(blind[..., None], 0.0), log_mass.masked_fill(blind, -torch.inf)


def _in_blocks(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    outputs, masses = [], []
    for some in _blocks(query, key):
        scores = _scores(query[:, :, some], key, key_mask, scale)
        log_mass = scores.logsumexp(dim=-1, keepdim=True)
        weights = (scores - log_mass.masked_fill(log_mass.isinf(), 0.0)).exp()
        outputs.append(weights.to(value.dtype) @ value)
        masses.append(log_mass[..., 0])
    return torch.cat(outputs, dim=2), torch.cat(masses, dim=2)


def _scores(query: Tensor, key: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
    """[batch, heads, queries, keys]; a score rounded to bf16 would be off by more than its weight may be."""
    scores = wide_matmul(query, key.transpose(-1, -2)) * scale
    return scores if key_mask is None else scores.masked_fill(~key_mask[:, None, None], -torch.inf)


def _blocks(query: Tensor, key: Tensor) -> Iterator[slice]:
    size = max(1, SCORES_AT_A_TIME // (query.shape[0] * query.shape[1] * key.shape[2]))
    return (slice(start, start + size) for start in range(0, query.shape[2], size))
