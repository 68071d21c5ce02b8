"""States of blocks of image tokens, mixed by a matrix; the number of blocks does not depend on the grid."""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.layout import Layout
from linearize.ops.disc import coordinates


def block_index(layout: Layout, blocks_per_side: int, device: torch.device | str = "cpu") -> Tensor:
    """The block of every image token in the layout's order, [num_image_tokens], in raster order of blocks.

    A grid of any size is cut into blocks_per_side x blocks_per_side blocks of nearly one size; some are empty where
    a side has fewer tokens. Several grids lie on top of one another: their first blocks are one block.
    """
    sides = torch.cat([torch.tensor([[grid.height, grid.width]]).expand(grid.num_tokens, 2) for grid in layout.grids])
    places = coordinates(layout) * blocks_per_side // sides[layout.raster_to_tile()]
    return (places[:, 0] * blocks_per_side + places[:, 1]).to(device)


def mix_block_states(query: Tensor, key: Tensor, value: Tensor, mix: Tensor, index: Tensor) -> Tensor:
    """sum_j mix[b(i), b(j)] (query_i^T key_j) value_j, through one state per block.

    Args:
        query: Features [batch, heads, tokens, features].
        key: Same.
        value: [batch, heads, tokens, channels].
        mix: [heads, blocks, blocks] or [1, blocks, blocks].
        index: The block of every token, [tokens].

    Returns:
        [batch, heads, tokens, channels].
    """
    num_blocks = mix.shape[-1]
    order, place, slots = _slots(index, num_blocks)
    keys, values = _blocks(key, order, place, num_blocks, slots), _blocks(value, order, place, num_blocks, slots)
    states = torch.matmul(keys.transpose(-1, -2), values)
    mixed = torch.einsum("hij,bhjfc->bhifc", mix.expand(key.shape[1], -1, -1), states)
    output = torch.matmul(_blocks(query, order, place, num_blocks, slots), mixed).flatten(2, 3)
    back = torch.empty_like(order)
    back[order] = place
    return output[:, :, back]


def mix_block_states_naive(query: Tensor, key: Tensor, value: Tensor, mix: Tensor, index: Tensor) -> Tensor:
    """The same on dense weights."""
    weights = torch.matmul(query, key.transpose(-1, -2)) * mix[:, index][:, :, index]
    return torch.matmul(weights, value)


def _slots(index: Tensor, num_blocks: int) -> tuple[Tensor, Tensor, int]:
    """Tokens sorted by block, the slot of each in [blocks x slots], and the slots that a block has."""
    order = torch.argsort(index, stable=True)
    counts = torch.bincount(index, minlength=num_blocks)
    first = torch.cumsum(counts, dim=0) - counts
    slots = int(counts.max())
    block = index[order]
    place = block * slots + torch.arange(len(index), device=index.device) - first[block]
    return order, place, slots


def _blocks(states: Tensor, order: Tensor, place: Tensor, num_blocks: int, slots: int) -> Tensor:
    """[batch, heads, tokens, channels] to [batch, heads, blocks, slots, channels], zeros where a slot is empty."""
    padded = states.new_zeros(*states.shape[:2], num_blocks * slots, states.shape[-1])
    return padded.index_copy(2, place, states[:, :, order]).unflatten(2, (num_blocks, slots))
