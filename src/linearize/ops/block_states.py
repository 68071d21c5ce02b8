"""States of blocks of image tokens, mixed by a matrix; the number of blocks does not depend on the grid."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from linearize.layout import Layout
from linearize.ops.constant_tables import layout_table
from linearize.ops.disc import coordinates
from linearize.ops.products import aligned, for_products, wide_matmul


class Blocks(NamedTuple):
    """Image tokens cut into blocks.

    Attributes:
        index: The block of every token, [num_image_tokens].
        number: Blocks, some of which may be empty.
        place: The place of every token among number x slots, [num_image_tokens].
        slots: Tokens that a block has room for.
    """

    index: Tensor  # type: ignore[assignment] # tuple.index, which nobody looks for here
    number: int
    place: Tensor
    slots: int

    @classmethod
    def of(cls, index: Tensor, number: int) -> Blocks:
        """The blocks of an index."""
        order = torch.argsort(index, stable=True)
        counts = torch.bincount(index, minlength=number)
        slots, first = int(counts.max()), torch.cumsum(counts, dim=0) - counts
        place = torch.empty_like(order)
        place[order] = index[order] * slots + torch.arange(len(index), device=index.device) - first[index[order]]
        return cls(index, number, place, slots)

    def to(self, device: torch.device) -> Blocks:
        """The same on a device."""
        return self._replace(index=self.index.to(device), place=self.place.to(device))

    def spread(self, states: Tensor) -> Tensor:
        """[batch, heads, tokens, channels] to [batch, heads, blocks, slots, channels], zeros where a slot is empty."""
        padded = states.new_zeros(*states.shape[:2], self.number * self.slots, states.shape[-1])
        return padded.index_copy(2, self.place, states).unflatten(2, (self.number, self.slots))

    def gather(self, states: Tensor) -> Tensor:
        """The inverse of `spread`."""
        return states.flatten(2, 3).index_select(2, self.place)


@layout_table
@lru_cache(maxsize=64)
def even_blocks(layout: Layout, blocks_per_side: int, device: torch.device) -> Blocks:
    """The blocks of `block_index`. Not to be written to."""
    return Blocks.of(block_index(layout, blocks_per_side), blocks_per_side**2).to(device)


def block_index(layout: Layout, blocks_per_side: int) -> Tensor:
    """The block of every image token in the layout's order, [num_image_tokens], in raster order of blocks.

    A grid of any size is cut into blocks_per_side x blocks_per_side blocks of nearly one size; some are empty where
    a side has fewer tokens. Several grids lie on top of one another: their first blocks are one block.
    """
    sides = torch.cat([torch.tensor([[grid.height, grid.width]]).expand(grid.num_tokens, 2) for grid in layout.grids])
    places = coordinates(layout) * blocks_per_side // sides[layout.raster_to_tile()]
    return places[:, 0] * blocks_per_side + places[:, 1]


def mix_block_states(query: Tensor, key: Tensor, value: Tensor, mix: Tensor, blocks: Blocks) -> Tensor:
    """sum_j mix[b(i), b(j)] (query_i^T key_j) value_j, through one state per block.

    Args:
        query: Features [batch, heads, tokens, features].
        key: Same.
        value: [batch, heads, tokens, channels].
        mix: Broadcasts to [batch, heads, blocks, blocks].
        blocks: Of the tokens.

    Returns:
        [batch, heads, tokens, channels]: bf16 on a GPU where query, key and value are, with states in float32; else
        float32 at least.
    """
    query, key, value = for_products(query, key, value)
    states = wide_matmul(blocks.spread(key).transpose(-1, -2), blocks.spread(aligned(value)))
    mixed = torch.matmul(mix.to(states.dtype), states.flatten(3)).unflatten(3, states.shape[3:])
    return blocks.gather(torch.matmul(blocks.spread(query), mixed.to(query.dtype)))[..., : value.shape[-1]]


def mix_block_states_naive(query: Tensor, key: Tensor, value: Tensor, mix: Tensor, blocks: Blocks) -> Tensor:
    """The same on dense weights."""
    weights = torch.matmul(query, key.transpose(-1, -2)) * mix[..., blocks.index, :][..., blocks.index]
    return torch.matmul(weights, value)
