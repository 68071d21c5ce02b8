"""Operations of attention: two per multiply-add, without projections and without pairs that a mask hides."""

from __future__ import annotations

from typing import cast

from torch import nn

from linearize.backbones.base import Backbone
from linearize.layout import Layout
from linearize.mixers import AttentionShape, Mixer


def softmax_flops(shape: AttentionShape, layout: Layout, batch: int = 1) -> int:
    """Operations of softmax attention over all tokens in one layer."""
    return 4 * batch * shape.num_heads * shape.head_dim * layout.num_tokens**2


def attention_flops(backbone: Backbone, transformer: nn.Module, layout: Layout, batch: int = 1) -> int:
    """Operations of all attention layers of a transformer, teacher or student, on one layout."""
    return sum(_site_flops(backbone, site, layout, batch) for site in backbone.sites(transformer).values())


def _site_flops(backbone: Backbone, site: nn.Module, layout: Layout, batch: int) -> int:
    mixer = cast(Mixer | None, getattr(site, "mixer", None))
    return softmax_flops(backbone.shape(site), layout, batch) if mixer is None else mixer.flops(layout, batch)
