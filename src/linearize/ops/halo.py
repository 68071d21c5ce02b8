"""Local attention of linear cost with nothing but PyTorch: tiles of queries against the keys that their discs touch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.layout import Layout
from linearize.ops.dense_attention import match_heads
from linearize.ops.halo_tables import TileBatch, halo_tables


def halo_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    layout: Layout,
    window: int,
    scale: float,
    key_mask: Tensor | None = None,
    num_pooled: int = 0,
) -> Tensor:
    """Disc attention, for any grid, window, number of text tokens and batch.

    Image queries are cut into tiles; tiles with the same surroundings share a mask and go through one batched attention call, on keys that
    are gathered from the text, the tiles' halo and the pooled keys. Nothing grows faster than tokens x window^2.

    Args:
        query: [batch, heads, tokens, head_dim], rotated.
        key: [batch, key-value heads, tokens + num_pooled, head_dim], rotated.
        value: Same as key.
        layout: Where the tokens are.
        window: Radius of the disc.
        scale: Softmax scale.
        key_mask: [batch, tokens + num_pooled], True where valid.
        num_pooled: Keys behind the tokens that all image queries, and no text query, see.

    Returns:
        [batch, heads, tokens, head_dim].
    """
    tables = halo_tables(layout, window, num_pooled, value.dtype, query.device)
    key, value = match_heads(key, query), match_heads(value, query)
    # Token-major: a gathered token is one run of heads x head_dim numbers, as projections write them.
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))
    outputs = [_text_outputs(query, key, value, layout, scale, key_mask)] if layout.num_text_tokens else []
    queries = _gather(query, tables.query_index, [batch.query_index for batch in tables.batches])
    key_indices = [batch.key_index for batch in tables.batches]
    keys, values = (_gather(states, tables.key_index, key_indices) for states in (key, value))
    for batch, tile_query, tile_key, tile_value in zip(tables.batches, queries, keys, values, strict=True):
        outputs.append(_attend(batch, tile_query, tile_key, tile_value, scale, key_mask))
    return torch.cat(outputs, dim=1).index_select(1, tables.output_index).transpose(1, 2)


def _text_outputs(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, key_mask: Tensor | None
) -> Tensor:
    """Text queries see all tokens: [batch, text tokens, heads, head_dim]."""
    mask = None if key_mask is None else key_mask[:, None, None, : layout.num_tokens]
    tokens = (query[:, layout.text_slice], key[:, : layout.num_tokens], value[:, : layout.num_tokens])
    return _softmax(*(states.transpose(1, 2) for states in tokens), _additive(mask, value.dtype), scale).transpose(1, 2)


def _attend(
    batch: TileBatch, query: Tensor, key: Tensor, value: Tensor, scale: float, key_mask: Tensor | None
) -> Tensor:
    """One batched call over tiles: [batch, tiles * queries, heads, head_dim]."""
    tiles, mask = batch.num_tiles, batch.mask[None, None]
    if key_mask is not None:
        valid = key_mask.index_select(1, batch.key_index).view(len(query) * tiles, 1, 1, -1)
        mask = mask + _additive(valid, mask.dtype)
    per_tile = (states.reshape(len(query) * tiles, -1, *states.shape[2:]) for states in (query, key, value))
    output = _softmax(*(states.transpose(1, 2) for states in per_tile), mask, scale)
    return output.transpose(1, 2).reshape(query.shape)


def _softmax(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """SDPA under an additive mask; a query that sees nothing gets zeros."""
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    if mask is None or mask.shape[0] == 1:
        return output
    return output.masked_fill((mask == float("-inf")).all(dim=-1, keepdim=True), 0.0)


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return (
        None
        if mask is None
        else torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, float("-inf"))
    )


def _gather(states: Tensor, index: Tensor, indices: list[Tensor]) -> Iterator[Tensor]:
    """The tokens of every index. Training gathers once, for one scatter in the backward pass; otherwise only as much as a call needs."""
    if torch.is_grad_enabled() and states.requires_grad:
        yield from _Gather.apply(states, index).split([len(part) for part in indices], dim=1)
    else:
        for part in indices:
            yield states.index_select(1, part)


class _Gather(torch.autograd.Function):
    """index_select over tokens whose gradient adds up in float32: a text token is gathered by every tile, too often for bf16."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.num_tokens = states.shape[1]
        return states.index_select(1, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        wide = torch.promote_types(gradient.dtype, torch.float32)
        shape = (len(gradient), ctx.num_tokens, *gradient.shape[2:])
        total = torch.zeros(shape, dtype=wide, device=gradient.device)
        return total.index_add_(1, index, gradient.to(wide)).to(gradient.dtype), None
