"""Mixer contexts with FLUX's own rotation, for tests of mixers outside a transformer."""

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from torch import Tensor

from linearize.backbones.flux_site import rotary_angles
from linearize.layout import Layout
from linearize.mixers import AttentionShape, MixerContext

AXES = (4, 6, 6)
SHAPE = AttentionShape(num_heads=2, head_dim=16, hidden_size=32)


def flux_positions(layout: Layout) -> Tensor:
    """Position ids [tokens, 3] as the FLUX pipelines make them, in the layout's order; a second grid has first id 1."""
    images = []
    for number, grid in enumerate(layout.grids):
        rows, columns = torch.meshgrid(torch.arange(grid.height), torch.arange(grid.width), indexing="ij")
        images.append(torch.stack([torch.full_like(rows, number), rows, columns], dim=-1).view(-1, 3))
    image = torch.cat(images)[layout.raster_to_tile()]
    text = torch.zeros(layout.num_text_tokens, 3, dtype=image.dtype)
    return torch.cat([text, image] if layout.text_first else [image, text])


def hidden_states(layout: Layout, batch: int = 2, shape: AttentionShape = SHAPE) -> Tensor:
    """The input of the layer, [batch, tokens, hidden_size]: the same for every token in all orders."""
    raster = layout.with_tile(None)
    states = torch.randn(batch, layout.num_tokens, shape.hidden_size, generator=torch.Generator().manual_seed(0))
    return states.double()[:, raster.index_to(layout.tile)]


def flux_context(
    layout: Layout,
    key_mask: Tensor | None = None,
    *,
    shape: AttentionShape = SHAPE,
    device: str = "cpu",
    dtype: torch.dtype = torch.float64,
) -> MixerContext:
    """The context of one layer, its head width a multiple of 16, whose input has this dtype."""
    axes = tuple(shape.head_dim // 16 * dim for dim in AXES)
    positions = flux_positions(layout).to(device)
    rotary = FluxPosEmbed(theta=10000, axes_dim=list(axes))(positions)
    mask = None if key_mask is None else key_mask[:, None, None]
    return MixerContext(
        layout=layout,
        scale=shape.head_dim**-0.5,
        rotate=lambda x: apply_rotary_emb(x, rotary, sequence_dim=2),
        angles=lambda where, dim: rotary_angles(where, dim, axes, 10000),
        positions=positions,
        softmax=lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
        key_mask=key_mask,
        hidden_states=hidden_states(layout, shape=shape).to(device, dtype),
    )


def random_tokens(
    layout: Layout, batch: int = 2, dtype: torch.dtype = torch.float64, *, shape: AttentionShape = SHAPE
) -> tuple[Tensor, Tensor, Tensor]:
    """Random query, key and value [batch, heads, tokens, head_dim] that require gradients."""
    size = (batch, shape.num_heads, layout.num_tokens, shape.head_dim)
    return tuple(torch.randn(size, dtype=dtype, requires_grad=True) for _ in range(3))  # type: ignore[return-value]
