"""Depthwise convolutions over the pictures that image tokens make up."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.layout import Layout
from linearize.ops.scan_order import from_scan_order, in_scan_order


def depthwise_images(states: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout) -> Tensor:
    """Convolves every channel of every picture with its own filter; zeros beyond the borders.

    Args:
        states: [batch, heads, image tokens, head_dim] in the layout's order.
        weight: [heads * head_dim, side, side] with an odd side, or [head_dim, side, side] for all heads alike.
        bias: [heads * head_dim] or [head_dim].
        layout: Where the tokens are; each frame of each grid is a picture.

    Returns:
        Same as states.
    """
    batch, heads, _, head_dim = states.shape
    if len(weight) != heads * head_dim:
        weight, bias = weight.repeat(heads, 1, 1), None if bias is None else bias.repeat(heads)
    image = in_scan_order(states, layout, "rows").transpose(1, 2).flatten(2)
    convolved = []
    for grid, tokens in zip(layout.grids, image.split([grid.num_tokens for grid in layout.grids], dim=1), strict=True):
        maps = tokens.reshape(batch * grid.frames, grid.height, grid.width, -1).permute(0, 3, 1, 2)
        result = F.conv2d(maps, weight[:, None], bias, padding=weight.shape[-1] // 2, groups=len(weight))
        convolved.append(result.permute(0, 2, 3, 1).reshape(batch, grid.num_tokens, -1))
    output = torch.cat(convolved, dim=1).unflatten(2, (heads, head_dim)).transpose(1, 2)
    return from_scan_order(output, layout, "rows")


def depthwise_flops(layout: Layout, channels: int, side: int) -> int:
    """Operations of `depthwise_images` on so many channels in all."""
    return 2 * layout.num_image_tokens * channels * side * side
