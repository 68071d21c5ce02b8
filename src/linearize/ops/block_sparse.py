"""Softmax of blocks of queries on those blocks of keys that score highest."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from linearize.layout import Layout
from linearize.ops.block_states import Blocks
from linearize.ops.constant_tables import layout_table
from linearize.ops.disc import coordinates
from linearize.ops.linear_attention import SoftmaxPart, weigh
from linearize.ops.products import wide_matmul
from linearize.ops.softmax_mass import softmax_with_mass

# Numbers of gathered keys that are in memory at a time, forward and backward.
NUMBERS_AT_A_TIME = 2**25


@layout_table
@lru_cache(maxsize=64)
def square_blocks(layout: Layout, size: int, device: torch.device) -> Blocks:
    """Blocks of size x size tokens; those at the right and lower border may be cut, and every grid has its own."""
    places = coordinates(layout)[layout.tile_to_raster()]
    parts, start, blocks = [], 0, 0
    for grid in layout.grids:
        rows, columns = (places[start : start + grid.num_tokens] // size).unbind(dim=1)
        frame = torch.arange(grid.num_tokens, device="cpu") // (grid.height * grid.width)
        in_row, in_column = -(-grid.width // size), -(-grid.height // size)
        parts.append(blocks + (frame * in_column + rows) * in_row + columns)
        start, blocks = start + grid.num_tokens, blocks + grid.frames * in_row * in_column
    return Blocks.of(torch.cat(parts)[layout.raster_to_tile()], blocks).to(device)


@torch.no_grad()
def select_blocks(
    query: Tensor, key: Tensor, blocks: Blocks, num_selected: int, key_mask: Tensor | None = None
) -> Tensor:
    """The blocks of keys whose mean has the largest product with the mean query of each block.

    Args:
        query: [batch, heads, tokens, head_dim], rotated.
        key: Same.
        blocks: Of the tokens.
        num_selected: Blocks of keys for each block of queries.
        key_mask: [batch, tokens], True where a key is valid.

    Returns:
        [batch, heads, blocks, num_selected], ascending; blocks without a valid key come last.
    """
    ones = key.new_ones(1, 1, key.shape[2], 1)
    valid = ones if key_mask is None else key_mask[:, None, :, None].to(key.dtype)
    keys = key if key_mask is None else key * valid
    query_sums, key_sums, counts, key_counts = (
        blocks.spread(states).sum(dim=3) for states in (query, keys, ones, valid)
    )
    scores = torch.matmul(query_sums / counts, (key_sums / key_counts.clamp(min=1)).transpose(-1, -2))
    scores = scores.masked_fill((key_counts == 0).transpose(-1, -2), -torch.inf)
    return scores.topk(num_selected, dim=-1).indices.sort(dim=-1).values


def chosen(selected: Tensor, num_blocks: int) -> Tensor:
    """Pairs of blocks, [batch, heads, blocks, blocks], True where the block of keys is selected."""
    shape = (*selected.shape[:3], num_blocks)
    return torch.zeros(shape, dtype=torch.bool, device=selected.device).scatter(-1, selected, True)


def block_sparse_softmax(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    blocks: Blocks,
    selected: Tensor,
    scale: float,
    key_mask: Tensor | None = None,
) -> SoftmaxPart:
    """Softmax of every query over the keys of the blocks that its block selected; the dense twin is a mask.

    Args:
        query: [batch, heads, tokens, head_dim], rotated.
        key: Same.
        value: Same.
        blocks: Of the tokens.
        selected: As `select_blocks` returns it.
        scale: Softmax scale.
        key_mask: [batch, tokens], True where a key is valid.

    Returns:
        A part of [batch, heads, tokens, head_dim]: scores and sums are float32 at least, products as those of the ops.
    """
    valid = torch.ones_like(key[:, :1, :, :1]) if key_mask is None else key_mask[:, None, :, None].to(key.dtype)
    seen = blocks.spread(valid).expand(-1, query.shape[1], -1, -1, -1) > 0
    sees_all = key_mask is None and blocks.number * blocks.slots == query.shape[2]
    queries, keys, values = (blocks.spread(states) for states in (query, key, value))

    def attend(queries: Tensor, keys: Tensor, values: Tensor, selected: Tensor) -> tuple[Tensor, Tensor]:
        near_keys, near_values = (_gather(states, selected) for states in (keys, values))
        if sees_all:
            # Blocks take the place of heads.
            flat = (states.flatten(0, 1) for states in (queries, near_keys, near_values))
            output, log_mass = softmax_with_mass(*flat, scale=scale)
            return output.unflatten(0, queries.shape[:2]), log_mass.unflatten(0, queries.shape[:2])
        scores = wide_matmul(queries, near_keys.transpose(-1, -2)) * scale
        part = weigh(scores, near_values, _gather(seen, selected).transpose(-1, -2))
        return part.output, part.log_mass

    step = max(1, NUMBERS_AT_A_TIME // (selected.shape[-1] * blocks.slots * query.shape[-1] * query[..., 0, 0].numel()))
    parts = [
        checkpoint(
            attend,
            queries[:, :, start : start + step],
            keys,
            values,
            selected[:, :, start : start + step],
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for start in range(0, blocks.number, step)
    ]
    output, log_mass = (blocks.gather(torch.cat(pieces, dim=2)) for pieces in zip(*parts, strict=True))
    return SoftmaxPart(output, log_mass)


def _gather(states: Tensor, selected: Tensor) -> Tensor:
    """[batch, heads, blocks, slots, channels] to [batch, heads, query blocks, num_selected x slots, channels]."""
    # As rows of one matrix: GPUs copy whole rows, and not number by number.
    batch, heads, num_blocks = states.shape[:3]
    first = torch.arange(0, batch * heads * num_blocks, num_blocks, device=states.device).view(batch, heads, 1, 1)
    rows = states.reshape(batch * heads * num_blocks, -1).index_select(0, (first + selected).flatten())
    return rows.view(*selected.shape[:3], -1, states.shape[-1])
