"""Local attention of linear cost with nothing but PyTorch: tiles of queries against the keys that they see."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.layout import Layout
from linearize.ops.dense_attention import masked_attention, masked_attention_or_zeros, match_heads
from linearize.ops.halo_tables import TileBatch, halo_tables
from linearize.ops.regions import Region


# A compiler would unroll the tables of every new grid; SDPA, where the time goes, gains nothing from being compiled.
@torch.compiler.disable
def halo_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    layout: Layout,
    region: Region,
    scale: float,
    key_mask: Tensor | None = None,
    num_pooled: int = 0,
) -> Tensor:
    """Attention within a region, for any grid, window, number of text tokens and batch.

    Image queries are cut into tiles; tiles with the same surroundings share a mask and go through one batched
    attention call, on keys that are gathered from the text, the tiles' halo and the pooled keys. Nothing grows faster
    than tokens x window^2.

    Args:
        query: [batch, heads, tokens, head_dim], rotated.
        key: [batch, key-value heads, tokens + num_pooled, head_dim], rotated.
        value: Same as key.
        layout: Where the tokens are.
        region: Which image tokens an image token sees.
        scale: Softmax scale.
        key_mask: [batch, tokens + num_pooled], True where valid.
        num_pooled: Keys behind the tokens that all image queries, and no text query, see.

    Returns:
        [batch, heads, tokens, head_dim].
    """
    tables = halo_tables(layout, region, num_pooled, value.dtype, query.device)
    key, value = match_heads(key, query), match_heads(value, query)
    # Token-major: a gathered token is one run of heads x head_dim numbers, as projections write them. Tensors that are
    # not are copied here once, or else by every gather.
    query, key, value = (states.transpose(1, 2).contiguous() for states in (query, key, value))
    outputs = [_text_outputs(query, key, value, layout, scale, key_mask)] if layout.num_text_tokens else []
    key_indices = [batch.key_index for batch in tables.batches]
    queries = _gather(query, [batch.query_index for batch in tables.batches])
    keys, values = (_gather(states, key_indices) for states in (key, value))
    for batch, tile_query, tile_key, tile_value in zip(tables.batches, queries, keys, values, strict=True):
        outputs.append(_attend(batch, tile_query, tile_key, tile_value, scale, key_mask))
    return torch.cat(outputs, dim=1).index_select(1, tables.output_index).transpose(1, 2)


def _text_outputs(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, key_mask: Tensor | None
) -> Tensor:
    """Text queries see all tokens: [batch, text tokens, heads, head_dim]."""
    query, key, value = query[:, layout.text_slice], key[:, : layout.num_tokens], value[:, : layout.num_tokens]
    if key_mask is None:
        return _token_major(F.scaled_dot_product_attention, query, key, value, scale=scale)
    mask = key_mask[:, None, None, : layout.num_tokens]
    return _token_major(masked_attention_or_zeros, query, key, value, mask=mask, scale=scale)


def _attend(
    batch: TileBatch, query: Tensor, key: Tensor, value: Tensor, scale: float, key_mask: Tensor | None
) -> Tensor:
    """One batched call over tiles: [batch, tiles * queries, heads, head_dim]."""
    size, mask, shape = len(query) * batch.num_tiles, batch.mask[None, None], query.shape
    query, key, value = (states.reshape(size, -1, *states.shape[2:]) for states in (query, key, value))
    if key_mask is None:
        return _token_major(masked_attention, query, key, value, mask=mask, scale=scale).reshape(shape)
    valid = key_mask.index_select(1, batch.key_index).view(size, 1, 1, -1)
    mask = mask.masked_fill(~valid, float("-inf"))
    return _token_major(masked_attention_or_zeros, query, key, value, mask=mask, scale=scale).reshape(shape)


def _token_major(attend: Callable[..., Tensor], *states: Tensor, **options: Any) -> Tensor:
    """Attention of token-major tensors, [batch, tokens, heads, head_dim]."""
    return attend(*(tokens.transpose(1, 2) for tokens in states), **options).transpose(1, 2)


def _gather(states: Tensor, indices: list[Tensor]) -> Iterator[Tensor]:
    """The tokens of one index after another; without gradients all in one buffer, which the next one overwrites."""
    if torch.is_grad_enabled():
        yield from _Gather.apply(states, *indices)
        return
    batch, _, *channels = states.shape
    buffer = states.new_empty(batch * max(len(index) for index in indices) * math.prod(channels))
    for index in indices:
        tokens = buffer[: batch * len(index) * math.prod(channels)].view(batch, len(index), *channels)
        yield torch.index_select(states, 1, index, out=tokens)


class _Gather(torch.autograd.Function):
    """index_select over tokens for many indices.

    Gradients add up in one float32 buffer: a text token is gathered by every tile, too often for a sum in bf16.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, *indices: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*indices)
        ctx.num_tokens = states.shape[1]
        return tuple(states.index_select(1, index) for index in indices)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        first = gradients[0]
        wide = torch.promote_types(first.dtype, torch.float32)
        total = first.new_zeros((len(first), ctx.num_tokens, *first.shape[2:]), dtype=wide)
        for index, gradient in zip(ctx.saved_tensors, gradients, strict=True):
            total.index_add_(1, index, gradient.to(wide))
        return total.to(first.dtype), *(None for _ in gradients)
