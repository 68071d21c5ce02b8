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
        mix: Broadcasts to [batch, heads, blocks, blocks].
        index: The block of every token, [tokens].

    Returns:
        [batch, heads, tokens, channels].
    """
    num_blocks = mix.shape[-1]
    place, slots = block_slots(index, num_blocks)
    keys, values = to_blocks(key, place, num_blocks, slots), to_blocks(value, place, num_blocks, slots)
    states = torch.matmul(keys.transpose(-1, -2), values)
    mixed = torch.matmul(mix, states.flatten(3)).unflatten(3, states.shape[3:])
    return torch.matmul(to_blocks(query, place, num_blocks, slots), mixed).flatten(2, 3)[:, :, place]


def mix_block_states_naive(query: Tensor, key: Tensor, value: Tensor, mix: Tensor, index: Tensor) -> Tensor:
    """The same on dense weights."""
    weights = torch.matmul(query, key.transpose(-1, -2)) * mix[..., index, :][..., index]
    return torch.matmul(weights, value)


def block_slots(index: Tensor, num_blocks: int) -> tuple[Tensor, int]:
    """The slot of every token in [blocks x slots], [tokens], and the slots that a block has.

    Args:
        index: The block of every token, [tokens].
        num_blocks: Blocks, some of which may be empty.
    """
    order = torch.argsort(index, stable=True)
    counts = torch.bincount(index, minlength=num_blocks)
    slots, first = int(counts.max()), torch.cumsum(counts, dim=0) - counts
    place = torch.empty_like(order)
    place[order] = index[order] * slots + torch.arange(len(index), device=index.device) - first[index[order]]
    return place, slots


def to_blocks(states: Tensor, place: Tensor, num_blocks: int, slots: int) -> Tensor:
    """[batch, heads, tokens, channels] to [batch, heads, blocks, slots, channels], zeros where a slot is empty."""
    padded = states.new_zeros(*states.shape[:2], num_blocks * slots, states.shape[-1])
    return padded.index_copy(2, place, states).unflatten(2, (num_blocks, slots))
