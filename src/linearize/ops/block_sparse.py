"""Softmax of blocks of queries on those blocks of keys that score highest."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from linearize.layout import Layout
from linearize.ops.block_states import block_slots, to_blocks
from linearize.ops.disc import coordinates
from linearize.ops.linear_attention import SoftmaxPart, weigh

# Numbers of gathered keys that are in memory at a time, forward and backward.
NUMBERS_AT_A_TIME = 2**25


def square_blocks(layout: Layout, size: int) -> tuple[Tensor, int]:
    """The block of size x size tokens of every image token, [num_image_tokens], and the number of blocks.

    Blocks at the right and lower border may be cut; every grid has its own.
    """
    places = coordinates(layout)[layout.tile_to_raster()]
    parts, start, blocks = [], 0, 0
    for grid in layout.grids:
        rows, columns = (places[start : start + grid.num_tokens] // size).unbind(dim=1)
        frame = torch.arange(grid.num_tokens) // (grid.height * grid.width)
        in_row, in_column = -(-grid.width // size), -(-grid.height // size)
        parts.append(blocks + (frame * in_column + rows) * in_row + columns)
        start, blocks = start + grid.num_tokens, blocks + grid.frames * in_row * in_column
    return torch.cat(parts)[layout.raster_to_tile()], blocks


@torch.no_grad()
def select_blocks(
    query: Tensor, key: Tensor, index: Tensor, num_blocks: int, num_selected: int, key_mask: Tensor | None = None
) -> Tensor:
    """The blocks of keys whose mean has the largest product with the mean query of each block.

    Args:
        query: [batch, heads, tokens, head_dim], rotated.
        key: Same.
        index: The block of every token, [tokens].
        num_blocks: Blocks.
        num_selected: Blocks of keys for each block of queries.
        key_mask: [batch, tokens], True where a key is valid.

    Returns:
        [batch, heads, blocks, num_selected], ascending; blocks without a valid key come last.
    """
    valid = torch.ones_like(key[..., :1]) if key_mask is None else key_mask[:, None, :, None].to(key.dtype)

    def mean(states: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        zeros = states.new_zeros(*states.shape[:2], num_blocks, states.shape[-1])
        total = zeros.index_add(2, index, states * counts)
        number = zeros[..., :1].index_add(2, index, counts.expand(*states.shape[:3], 1))
        return total / number.clamp(min=1), number > 0

    query_means, _ = mean(query, torch.ones_like(key[..., :1]))
    key_means, present = mean(key, valid)
    scores = torch.matmul(query_means, key_means.transpose(-1, -2))
    scores = scores.masked_fill(~present.transpose(-1, -2), -torch.inf)
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
    index: Tensor,
    num_blocks: int,
    selected: Tensor,
    scale: float,
    key_mask: Tensor | None = None,
) -> SoftmaxPart:
    """Softmax of every query over the keys of the blocks that its block selected; the dense twin is a mask.

    Args:
        query: [batch, heads, tokens, head_dim], rotated.
        key: Same.
        value: Same.
        index: The block of every token, [tokens].
        num_blocks: Blocks.
        selected: As `select_blocks` returns it.
        scale: Softmax scale.
        key_mask: [batch, tokens], True where a key is valid.
    """
    place, slots = block_slots(index, num_blocks)
    valid = torch.ones_like(key[:, :1, :, :1]) if key_mask is None else key_mask[:, None, :, None].to(key.dtype)
    seen = to_blocks(valid, place, num_blocks, slots)[..., 0].expand(-1, query.shape[1], -1, -1) > 0
    queries, keys, values = (to_blocks(states, place, num_blocks, slots) for states in (query, key, value))

    def attend(queries: Tensor, keys: Tensor, values: Tensor, selected: Tensor) -> tuple[Tensor, Tensor]:
        near_keys, near_values, near = (_gather(states, selected) for states in (keys, values, seen))
        scores = torch.matmul(queries, near_keys.transpose(-1, -2)) * scale
        part = weigh(scores, near_values, near[..., None, :])
        return part.output, part.log_mass

    step = max(1, NUMBERS_AT_A_TIME // (selected.shape[-1] * slots * query.shape[-1] * query[..., 0, 0].numel()))
    parts = [
        checkpoint(
            attend,
            queries[:, :, start : start + step],
            keys,
            values,
            selected[:, :, start : start + step],
            use_reentrant=False,
        )
        for start in range(0, num_blocks, step)
    ]
    output, log_mass = (torch.cat(pieces, dim=2).flatten(2, 3)[:, :, place] for pieces in zip(*parts, strict=True))
    return SoftmaxPart(output, log_mass)


def _gather(states: Tensor, selected: Tensor) -> Tensor:
    """[batch, heads, blocks, slots, ...] to [batch, heads, query blocks, num_selected x slots, ...]."""
    batch, heads = (torch.arange(size, device=states.device) for size in states.shape[:2])
    return states[batch[:, None, None, None], heads[:, None, None], selected].flatten(3, 4)
