"""Local attention by its definition, on dense weights: what every other backend is tested against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.layout import Layout
from linearize.ops.constant_tables import constant_table
from linearize.ops.dense_attention import dense_attention
from linearize.ops.disc import coordinates
from linearize.ops.regions import Places, Region


def naive_attention(
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
    mask = _sight_with_text(layout, region, num_pooled, query.device)
    return dense_attention(query, key, value, scale=scale, mask=mask, key_mask=key_mask)


def naive_with_mass(
    query: Tensor, key: Tensor, value: Tensor, *, layout: Layout, region: Region, scale: float
) -> tuple[Tensor, Tensor]:
    """The definition, and log sum_j exp(s_ij), [batch, heads, tokens, 1]."""
    hidden = ~_sight_with_text(layout, region, 0, query.device)
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(hidden, float("-inf"))
    return scores.softmax(dim=-1) @ value, scores.logsumexp(dim=-1, keepdim=True)


def full_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float, **_: object) -> Tensor:
    """Every token sees every token: for a region that covers the picture."""
    return F.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=key.shape[1] != query.shape[1])


def dense_sight(layout: Layout, region: Region) -> Tensor:
    """Which image tokens see which, [image tokens, image tokens] bool in the layout's order."""
    parts = [(coordinates(Layout(0, (grid,))), grid) for grid in layout.grids]
    keys = [Places.of(places, grid) for places, grid in parts]
    queries = [Places.of(places[:, None], grid) for places, grid in parts]
    rows = [torch.cat([region.sees(query, key) for key in keys], dim=1) for query in queries]
    order = layout.raster_to_tile()
    return torch.cat(rows)[order][:, order]


@constant_table
def _sight_with_text(layout: Layout, region: Region, num_pooled: int, device: torch.device) -> Tensor:
    """Who sees whom with text and pooled keys, [tokens, tokens + num_pooled] bool."""
    is_text = torch.zeros(layout.num_tokens, dtype=torch.bool)
    is_text[layout.text_slice] = True
    inside = torch.zeros(layout.num_tokens, layout.num_tokens, dtype=torch.bool)
    inside[layout.image_slice, layout.image_slice] = dense_sight(layout, region)
    sees = is_text[:, None] | is_text[None, :] | inside
    sees_pooled = (~is_text)[:, None].expand(-1, num_pooled)
    return torch.cat([sees, sees_pooled], dim=1).to(device)
