"""The Gaussian kernel between vectors, and landmarks that stand for the tokens of a cell."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.layout import Layout
from linearize.ops.block_states import block_index
from linearize.ops.constant_tables import layout_table

# The exponent of what has no part, whose exponential is 0; products of an infinite one with 0 would be no numbers.
NOTHING = -1e30


def gaussian_kernel(
    first: Tensor, second: Tensor, has_first: Tensor | None = None, has_second: Tensor | None = None
) -> Tensor:
    """exp(-|x - y|^2 / 2), [..., first, second].

    It is e^(x y) e^(-|x|^2 / 2) e^(-|y|^2 / 2): on vectors of one length, proportional to softmax's own weights.

    Args:
        first: x, [..., first, channels].
        second: y, [..., second, channels].
        has_first: Broadcasts to [..., first], False where the kernel is 0; None where it is nowhere.
        has_second: Same for [..., second].
    """
    rows = torch.cat([first, _exponent(first, has_first), torch.ones_like(first[..., :1])], dim=-1)
    columns = torch.cat([second, torch.ones_like(second[..., :1]), _exponent(second, has_second)], dim=-1)
    return torch.matmul(rows, columns.transpose(-1, -2)).exp()


def _exponent(states: Tensor, is_there: Tensor | None) -> Tensor:
    """-|x|^2 / 2, [..., 1]."""
    exponent = states.square().sum(dim=-1) / -2
    if is_there is not None:
        exponent = exponent.masked_fill(~is_there, NOTHING)
    return exponent[..., None]


@layout_table
@lru_cache(maxsize=64)
def landmark_index(layout: Layout, per_side: int, with_text: bool, device: torch.device) -> tuple[Tensor, int]:
    """The cell of every image token, [num_image_tokens], and the number of cells: per_side^2 for each grid.

    With text it is that of every token, [num_tokens], and the text has per_side cells more, one after another.
    """
    sizes = torch.tensor([grid.num_tokens for grid in layout.grids], device="cpu")
    grid = torch.arange(len(sizes), device="cpu").repeat_interleave(sizes)[layout.raster_to_tile()]
    index, num_cells = grid * per_side**2 + block_index(layout, per_side), len(sizes) * per_side**2
    if with_text:
        number = layout.num_text_tokens
        text = num_cells + torch.arange(number, device="cpu") * per_side // max(1, number)
        index = torch.cat([text, index] if layout.text_first else [index, text])
        num_cells += per_side
    return index.to(device), num_cells


def cell_landmarks(states: Tensor, index: Tensor, num_cells: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """One landmark for each cell: the mean direction of its valid tokens at their mean length, and how many there are.

    A plain mean of vectors that point many ways is shorter than all of them, and as far from them in this kernel.

    Args:
        states: [batch, heads, tokens, channels].
        index: The cell of every token, [tokens].
        num_cells: Cells, some of which may be empty: their landmark is zero.
        mask: [batch, tokens], True where a token counts.

    Returns:
        [batch, heads, cells, channels] and [batch, 1, cells].
    """
    valid = states.new_ones(states.shape[0], 1, len(index)) if mask is None else mask[:, None].to(states.dtype)
    counts = valid.new_zeros(states.shape[0], 1, num_cells).index_add(2, index, valid)
    with_length = torch.cat([states, states.norm(dim=-1, keepdim=True)], dim=-1) * valid[..., None]
    total = states.new_zeros(*states.shape[:2], num_cells, with_length.shape[-1]).index_add(2, index, with_length)
    mean = total / counts.clamp(min=1)[..., None]
    return F.normalize(mean[..., :-1], dim=-1) * mean[..., -1:], counts
