"""Neighborhood attention in NATTEN's kernels (Hassani et al., arXiv 2403.04690), an optional package."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.extras import missing_sentence
from linearize.layout import Layout
from linearize.ops.regions import Neighborhood, Region

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def natten_attention(
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
    """Attention within a neighborhood; `halo_attention` tells the arguments, `refusal` what it takes.

    Image queries see the text as NATTEN's additional keys, and text queries go through dense attention.

    Returns:
        [batch, heads, tokens, head_dim].
    """
    import natten

    raster, sides = layout.with_tile(None), (layout.grids[0].height, layout.grids[0].width)
    if layout.tile is not None:
        index = layout.index_to(None, query.device)
        query, key, value = (states.index_select(2, index) for states in (query, key, value))
    # NATTEN reads tokens before heads.
    token_major = [states.transpose(1, 2).contiguous() for states in (query, key, value)]
    picture = [states[:, raster.image_slice].unflatten(1, sides) for states in token_major]
    text = [states[:, raster.text_slice] for states in token_major]
    more: dict[str, Any] = {"additional_keys": text[1], "additional_values": text[2]} if layout.num_text_tokens else {}
    size = tuple(min(2 * region.window - 1, side) for side in sides)
    output = natten.na2d(*picture, kernel_size=size, scale=scale, **more).flatten(1, 2).transpose(1, 2)
    if layout.num_text_tokens:
        text_query, grouped = query[:, :, raster.text_slice], key.shape[1] != query.shape[1]
        dense = F.scaled_dot_product_attention(text_query, key, value, scale=scale, enable_gqa=grouped)
        output = torch.cat([dense, output] if layout.text_first else [output, dense], dim=2)
    return output if layout.tile is None else output.index_select(2, raster.index_to(layout.tile, query.device))


def refusal(
    query: Tensor, *, layout: Layout, region: Region, key_mask: Tensor | None, num_pooled: int, **_: object
) -> str | None:
    """Why NATTEN cannot compute a call here, in one clause, or None."""
    if not isinstance(region, Neighborhood):
        return "it knows the region 'neighborhood' alone"
    if len(layout.grids) > 1:
        return f"it takes one picture, not {len(layout.grids)}"
    if query.device.type != "cuda":
        return "it needs a GPU"
    if importlib.util.find_spec("natten") is None:
        return missing_sentence("it", ["natten"]).rstrip(".")
    if not _has_kernels():
        return "natten was installed without its kernels: see natten.org/install"
    if query.dtype not in DTYPES:
        return f"it takes bfloat16, float16 and float32, not {str(query.dtype).removeprefix('torch.')}"
    if query.shape[-1] % 8:
        return f"it takes heads of a multiple of 8 channels, not {query.shape[-1]}"
    if region.window < 2 or min(layout.grids[0].height, layout.grids[0].width) < 2:
        return "it takes windows and pictures of 2 tokens or more a side"
    return "it takes neither a key mask nor pooled keys" if key_mask is not None or num_pooled else None


def _has_kernels() -> bool:
    import natten

    return bool(natten.HAS_LIBNATTEN)
