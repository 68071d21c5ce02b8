"""Softmax attention on dense weights: the reference that everything else is tested against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """softmax(scale Q K^T) V over the keys that a query may see; a query that may see none gets zeros.

    Args:
        query: [batch, heads, queries, head_dim].
        key: [batch, key-value heads, keys, head_dim]; each key-value head serves as many consecutive query heads.
        value: Same as key.
        scale: Softmax scale; None means head_dim ** -0.5.
        mask: Broadcasts to [batch, heads, queries, keys], True where a query sees a key.
        key_mask: [batch, keys], True where a key is valid.

    Returns:
        [batch, heads, queries, head_dim].
    """
    key, value = match_heads(key, query), match_heads(value, query)
    scores = torch.matmul(query, key.transpose(-1, -2)) * (query.shape[-1] ** -0.5 if scale is None else scale)
    seen = torch.ones((), dtype=torch.bool, device=query.device) if mask is None else mask
    if key_mask is not None:
        seen = seen & key_mask[:, None, None, :]
    weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
    return torch.matmul(weights.masked_fill(~seen, 0.0), value)


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, scale: float) -> Tensor:
    """PyTorch's attention under a mask, by kernels that are right.

    Args:
        query: [batch, heads, queries, head_dim].
        key: [batch, key-value heads, keys, head_dim].
        value: Same as key.
        mask: Broadcasts to [batch, heads, queries, keys]: True where a query sees a key, or what is added to scores.
            Every query sees some key.
        scale: Softmax scale.

    Returns:
        [batch, heads, queries, head_dim].
    """
    key, value = match_heads(key, query), match_heads(value, query)
    if not query.is_cuda:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    # Not by cuDNN, PyTorch's choice on Hopper GPUs: with it halo's gradients in bf16 are off by 0.4 (torch 2.11); see
    # pytorch#191612 and #196678 for other masks.
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def masked_attention_or_zeros(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, scale: float) -> Tensor:
    """`masked_attention`, and zeros for queries that see no key."""
    is_bool = mask.dtype == torch.bool
    blind = ~mask.any(dim=-1, keepdim=True) if is_bool else (mask == float("-inf")).all(dim=-1, keepdim=True)
    # They are shown all keys, as fused kernels may return NaN for them, or for their gradients.
    output = masked_attention(query, key, value, mask.masked_fill(blind, True if is_bool else 0.0), scale=scale)
    return output.masked_fill(blind, 0.0)


def match_heads(states: Tensor, query: Tensor) -> Tensor:
    """Repeats key-value heads [batch, key-value heads, tokens, head_dim] until there are as many as query heads."""
    groups = query.shape[1] // states.shape[1]
    return states if groups == 1 else states.repeat_interleave(groups, dim=1)
