"""Local attention behind one function; how it is computed is a table, where GPU kernels are added."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.errors import LinearizeError
from linearize.layout import Grid, Layout
from linearize.ops.dense_attention import dense_attention
from linearize.ops.disc import coordinates, disc_covers
from linearize.ops.halo import halo_attention
from linearize.ops.regions import REGIONS, Region


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: Grid | tuple[Grid, ...],
    window: int,
    num_text_tokens: int,
    text_first: bool = True,
    tile: tuple[int, int] | None = None,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    pooled_key: Tensor | None = None,
    pooled_value: Tensor | None = None,
    pooled_mask: Tensor | None = None,
    region: str = "disc",
    backend: str = "auto",
) -> Tensor:
    """Softmax attention in which an image token sees a region of image tokens: CLEAR's disc, or another of `REGIONS`.

    Text tokens see all tokens and are seen by all. Several grids lie on top of one
    another: an image token sees the region around its own row and column in each. A query none of whose keys is valid
    gets zeros.

    Args:
        query: [batch, heads, tokens, head_dim], rotated.
        key: [batch, key-value heads, tokens, head_dim], rotated.
        value: Same as key.
        grid: The image, or several, in tokens.
        window: Radius of the region in tokens.
        num_text_tokens: Text tokens among the tokens; may be 0.
        text_first: Whether they stand before the image tokens.
        tile: The order of image tokens, see `Layout`.
        scale: Softmax scale; None means head_dim ** -0.5.
        key_mask: [batch, tokens], True where a key is valid.
        pooled_key: [batch, key-value heads, pooled, head_dim] more keys, which all image queries see and no text
            query does.
        pooled_value: Their values.
        pooled_mask: [batch, pooled], True where valid.
        region: "disc": dy^2 + dx^2 < window^2, cut at the borders (CLEAR, arXiv 2412.16112); "tiles": all 8 x 16 tiles
            that the discs of the query's tile touch; "neighborhood": a square of 2 window - 1, shifted at the borders.
        backend: "naive" on dense weights, "halo" of linear cost, or "auto".

    Returns:
        [batch, heads, tokens, head_dim].

    Raises:
        LinearizeError: The window, the region or the backend does not exist, or tokens and grid disagree.
    """
    layout = Layout(num_text_tokens, (grid,) if isinstance(grid, Grid) else tuple(grid), text_first, tile)
    _check(query, layout, window, region, backend)
    num_pooled = 0
    if pooled_key is not None and pooled_value is not None:
        num_pooled = pooled_key.shape[2]
        key, value = torch.cat([key, pooled_key], dim=2), torch.cat([value, pooled_value], dim=2)
        if key_mask is not None and pooled_mask is not None:
            key_mask = torch.cat([key_mask, pooled_mask], dim=1)
    covered = disc_covers(layout.grids, window) and key_mask is None and not num_pooled
    compute = _dense if backend == "auto" and covered else BACKENDS["halo" if backend == "auto" else backend]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return compute(
        query,
        key,
        value,
        layout=layout,
        region=REGIONS[region](window),
        scale=scale,
        key_mask=key_mask,
        num_pooled=num_pooled,
    )


def _check(query: Tensor, layout: Layout, window: int, region: str, backend: str) -> None:
    if window < 1:
        raise LinearizeError(f"window={window} sees nothing; it is a radius in tokens, choose 1 or more")
    if region not in REGIONS:
        raise LinearizeError(f"unknown region {region!r}, choose one of {', '.join(REGIONS)}")
    if backend != "auto" and backend not in BACKENDS:
        raise LinearizeError(f"unknown backend {backend!r}, choose one of auto, {', '.join(BACKENDS)}")
    if query.shape[2] != layout.num_tokens:
        grids = " + ".join(str(grid) for grid in layout.grids)
        raise LinearizeError(
            f"{query.shape[2]} tokens are not {layout.num_text_tokens} text tokens and a grid of {grids}"
        )
    if any(grid.frames > 1 for grid in layout.grids):
        raise LinearizeError(
            f"windows are defined on pictures, got {layout.grids[0].frames} frames; use a mixer for video"
        )


def naive(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    layout: Layout,
    region: Region,
    scale: float,
    key_mask: Tensor | None = None,
    num_pooled: int = 0,
) -> Tensor:
    """The definition, on dense weights; arguments as `halo_attention`."""
    is_text = torch.zeros(layout.num_tokens, dtype=torch.bool)
    is_text[layout.text_slice] = True
    inside = torch.zeros(layout.num_tokens, layout.num_tokens, dtype=torch.bool)
    inside[layout.image_slice, layout.image_slice] = dense_sight(layout, region)
    sees = is_text[:, None] | is_text[None, :] | inside
    sees_pooled = (~is_text)[:, None].expand(-1, num_pooled)
    mask = torch.cat([sees, sees_pooled], dim=1).to(query.device)
    return dense_attention(query, key, value, scale=scale, mask=mask, key_mask=key_mask)


def dense_sight(layout: Layout, region: Region) -> Tensor:
    """Which image tokens see which, [image tokens, image tokens] bool in the layout's order."""
    parts = [coordinates(Layout(0, (grid,))) for grid in layout.grids]
    rows = [
        torch.cat([region.sees(query, key, grid, other) for key, other in zip(parts, layout.grids, strict=True)], dim=1)
        for query, grid in zip(parts, layout.grids, strict=True)
    ]
    order = layout.raster_to_tile()
    return torch.cat(rows)[order][:, order]


def _dense(query: Tensor, key: Tensor, value: Tensor, *, scale: float, **_: object) -> Tensor:
    """Every token sees every token: for a disc that covers the picture."""
    return F.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=key.shape[1] != query.shape[1])


BACKENDS: dict[str, Callable[..., Tensor]] = {"naive": naive, "halo": halo_attention}
