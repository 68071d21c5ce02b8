"""Weighted pooling of image tokens into cells of size x size tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.layout import Grid, Layout


def pool_image_tokens(
    states: Tensor, weight: Tensor, layout: Layout, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Pools the image tokens of every grid; cells at the right and lower border may be cut.

    A whole cell is sum_ij weight_ij x_ij. A cell that holds only n valid tokens, because it is cut or some are
    masked, is that sum over them times size^2 / n, so that the initial weight 1 / size^2 gives the mean of what is
    there.

    Args:
        states: [batch, heads, tokens, head_dim] of all tokens.
        weight: [size, size].
        layout: Where the tokens are.
        key_mask: [batch, tokens], True where valid.

    Returns:
        [batch, heads, pooled, head_dim], and [batch, pooled] which cells hold a valid token (None without `key_mask`).
    """
    order = layout.tile_to_raster(states.device)
    image = states[:, :, layout.image_slice][:, :, order]
    valid = None
    if key_mask is not None:
        valid = key_mask[:, layout.image_slice][:, order]
        image = image.masked_fill(~valid[:, None, :, None], 0.0)
    pooled, counts, start = [], [], 0
    for grid in layout.grids:
        tokens = slice(start, start + grid.num_tokens)
        present = torch.ones(1, grid.num_tokens, device=states.device) if valid is None else valid[:, tokens].float()
        counts.append(_cells(present[:, None, :, None], grid, len(weight)).sum(dim=-1)[:, 0, :, 0])
        pooled.append((_cells(image[:, :, tokens], grid, len(weight)) * weight.flatten().to(states.dtype)).sum(dim=-1))
        start += grid.num_tokens
    count = torch.cat(counts, dim=1)
    correction = weight.numel() / count.clamp(min=1)
    result = torch.cat(pooled, dim=2) * correction[:, None, :, None].to(states.dtype)
    return result, None if valid is None else count > 0


def num_cells(grid: Grid, size: int) -> int:
    """Cells that a grid is cut into."""
    return grid.frames * -(-grid.height // size) * -(-grid.width // size)


def _cells(states: Tensor, grid: Grid, size: int) -> Tensor:
    """[batch, heads, tokens, channels] in raster order to [batch, heads, cells, channels, size^2], padded by zeros."""
    batch, heads, _, channels = states.shape
    image = states.reshape(batch, heads * grid.frames, grid.height, grid.width, channels)
    image = F.pad(image, (0, 0, 0, -grid.width % size, 0, -grid.height % size))
    rows, columns = image.shape[2] // size, image.shape[3] // size
    cells = image.reshape(batch, heads, grid.frames, rows, size, columns, size, channels)
    return cells.permute(0, 1, 2, 3, 5, 7, 4, 6).reshape(batch, heads, num_cells(grid, size), channels, size * size)
