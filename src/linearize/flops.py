"""Operations of attention before and after surgery: two per multiply-add, projections not counted, masked pairs not counted."""

from __future__ import annotations

from torch import nn

from linearize.backbones.base import Backbone
from linearize.layout import Layout
from linearize.mixers import AttentionShape


def softmax_flops(shape: AttentionShape, layout: Layout, batch: int = 1) -> int:
    """Operations of softmax attention over all tokens in one layer."""
    return 4 * batch * shape.num_heads * shape.head_dim * layout.num_tokens**2


def attention_flops(backbone: Backbone, transformer: nn.Module, layout: Layout, batch: int = 1) -> int:
    """Operations of all attention layers of a transformer, teacher or student, on one layout."""
    return sum(
        site.mixer.flops(layout, batch)
        if hasattr(site, "mixer")
        else softmax_flops(backbone.shape(site), layout, batch)
        for site in backbone.sites(transformer).values()
    )
