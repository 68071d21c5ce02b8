"""Softmax over text and a disc with its mass, by the kernels of local attention where they serve."""

from __future__ import annotations

from torch import Tensor

from linearize.layout import Layout
from linearize.ops.backends import choose_backend
from linearize.ops.linear_attention import SoftmaxPart
from linearize.ops.regions import Disc
from linearize.ops.triton_local import triton_attention_with_mass


def local_softmax(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    layout: Layout,
    window: int,
    scale: float,
    key_mask: Tensor | None = None,
) -> SoftmaxPart | None:
    """What image tokens see of the text and of the disc around them; None where the kernels do not serve.

    Args:
        query: [batch, heads, tokens, head_dim] of all tokens of the layout, rotated.
        key: Same, with key-value heads.
        value: Same as key.
        layout: Where the tokens are. Several grids lie on top of one another.
        window: Radius of the disc in tokens.
        scale: Softmax scale.
        key_mask: [batch, tokens], True where a key counts.

    Returns:
        A part of [batch, heads, image tokens, head_dim], without the largest scores.
    """
    region, image = Disc(window), layout.image_slice
    report = choose_backend(
        "auto", query, layout=layout, region=region, key_mask=key_mask, num_pooled=0, needs_grad=True
    )
    if report.chosen != "triton" or not query.dtype == key.dtype == value.dtype:
        return None
    output, log_mass = triton_attention_with_mass(query, key, value, layout=layout, region=region, scale=scale)
    return SoftmaxPart(output[:, :, image], log_mass[:, :, image])
