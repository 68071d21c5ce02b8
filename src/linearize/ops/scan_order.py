"""The orders in which scans pass over the tokens of pictures."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from linearize.layout import Layout
from linearize.ops.constant_tables import layout_table


@layout_table
@lru_cache(maxsize=64)
def scan_order(layout: Layout, direction: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Index [num_image_tokens] from the layout's order to that of a scan, and back. Not to be written to.

    Several grids, and the frames of one, are passed over one after another.

    Args:
        layout: Where the tokens are.
        direction: "rows", row by row, or "columns", column by column.
        device: Where the indices are needed.
    """
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


@layout_table
@lru_cache(maxsize=64)
def cross_scan(layout: Layout, with_text: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Index [4, length] from the layout's order to four scans, and [4, tokens] back. Not to be written to.

    The scans go row by row, column by column, and the same ways backwards. Without text they hold the image tokens,
    length is their number, and indices are places among them. With text indices are places among all tokens, and the
    text stands on both sides of the picture: in front of it, so that its state is carried into the picture, and behind
    it, where it reads what the picture left.

    Args:
        layout: Where the tokens are.
        with_text: Whether the text is scanned, too.
        device: Where the indices are needed.
    """
    host = torch.device("cpu")
    ahead = [scan_order(layout, direction, host)[0] for direction in ("rows", "columns")]
    orders = torch.stack([*ahead, *(order.flip(0) for order in ahead)])
    back = orders.argsort(dim=1)
    if with_text:
        text = torch.arange(layout.num_text_tokens, device=host)
        places = (text + layout.text_slice.start).expand(4, -1)
        orders = torch.cat([places, orders + layout.image_slice.start, places], dim=1)
        behind = (text + layout.num_tokens).expand(4, -1)
        parts = [behind, back + layout.num_text_tokens]
        back = torch.cat(parts if layout.text_first else parts[::-1], dim=1)
    return orders.to(device), back.to(device)


def in_scan_order(states: Tensor, layout: Layout, direction: str) -> Tensor:
    """Image tokens, [batch, heads, tokens, channels], from the layout's order to that of `scan_order`."""
    if _is_as_it_is(layout, direction):
        return states
    return reordered(states, *scan_order(layout, direction, states.device))


def from_scan_order(states: Tensor, layout: Layout, direction: str) -> Tensor:
    """The inverse of `in_scan_order`."""
    if _is_as_it_is(layout, direction):
        return states
    return reordered(states, *reversed(scan_order(layout, direction, states.device)))


def reordered(states: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """`states[:, :, index]` of a permutation and its inverse, so that the gradient is a look-up, too."""
    return _Reordered.apply(states, index, inverse)


def _is_as_it_is(layout: Layout, direction: str) -> bool:
    return direction == "rows" and layout.tile is None


class _Reordered(torch.autograd.Function):
    """Tokens in another order, and gradients back: each token is taken once, so that nothing has to be added up."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        """`states[:, :, index]`."""
        ctx.save_for_backward(inverse)
        return states.index_select(2, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """By the inverse."""
        (inverse,) = ctx.saved_tensors
        return gradients[0].index_select(2, inverse), None, None
