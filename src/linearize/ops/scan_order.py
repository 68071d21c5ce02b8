"""The orders in which scans pass over the tokens of pictures."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from linearize.layout import Layout


@torch.compiler.disable
@lru_cache(maxsize=64)
def scan_order(layout: Layout, direction: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Index [num_image_tokens] from the layout's order to that of a scan, and back. Not to be written to.

    Several grids, and the frames of one, are passed over one after another.

    Args:
        layout: Where the tokens are.
        direction: "rows", row by row, or "columns", column by column.
        device: Where the indices are needed.
    """
    # What sampling, in inference mode, needed first is used for training later.
    with torch.inference_mode(False):
        order = layout.tile_to_raster()
        if direction == "columns":
            parts = order.split([grid.num_tokens for grid in layout.grids])
            order = torch.cat(
                [
                    part.view(grid.frames, grid.height, grid.width).transpose(1, 2).flatten()
                    for grid, part in zip(layout.grids, parts, strict=True)
                ]
            )
        return order.to(device), order.argsort().to(device)
