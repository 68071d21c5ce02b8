"""CLEAR: softmax attention within a disc around every image token."""

from __future__ import annotations

import warnings
from functools import lru_cache

import torch
from torch import Tensor, nn

from linearize.layout import Layout
from linearize.mixers._arguments import check_number
from linearize.mixers._local import LocalMixer
from linearize.mixers.base import AttentionShape, MixerContext
from linearize.ops.disc import disc_covers
from linearize.ops.pooling import num_cells, pool_image_tokens


class ClearMixer(LocalMixer):
    """CLEAR: "Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up", Liu et al., arXiv 2412.16112.

    An image token attends to all text and to the image tokens with dy^2 + dx^2 < window^2, cut at the borders; text
    attends to everything. The disc alone has no parameters and a cost linear in the number of tokens.

    With `downsample=d` every image token also attends to all image keys and values pooled d x d after rotation, with
    learned weights that start as the mean. **That part is quadratic**: it adds tokens^2 / d^2 pairs, fifteen times
    the disc's cost at 8192 pixels, window 8, d 4.

    Args:
        shape: Sizes of the layer.
        window: Radius of the disc in tokens.
        downsample: Side of the pooled cells in tokens; 1 means no pooled keys.

    Raises:
        LinearizeError: The window or downsample is below 1.
    """

    region = "disc"

    def __init__(self, shape: AttentionShape, *, window: int = 8, downsample: int = 1) -> None:
        super().__init__(shape, window=window)
        check_number("clear", "downsample", downsample, 1)
        self.downsample = downsample
        if downsample > 1:
            self.spatial_weight = nn.Parameter(torch.full((downsample, downsample), downsample**-2.0))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: MixerContext) -> Tensor:
        """See `Mixer.forward`."""
        if not torch.compiler.is_compiling():
            _warn_if_covered(context.layout, self.window)
        return super().forward(query, key, value, context)

    def more_keys(self, key: Tensor, value: Tensor, context: MixerContext) -> dict[str, Tensor | None]:
        """See `LocalMixer.more_keys`: all image keys and values, pooled."""
        if self.downsample == 1:
            return {}
        pooled_key, pooled_mask = pool_image_tokens(key, self.spatial_weight, context.layout, context.key_mask)
        pooled_value, _ = pool_image_tokens(value, self.spatial_weight, context.layout, context.key_mask)
        return {"pooled_key": pooled_key, "pooled_value": pooled_value, "pooled_mask": pooled_mask}

    def flops(self, layout: Layout, batch: int = 1) -> int:
        """4 head_dim operations per pair: the disc, text with all tokens, and the quadratic pooled keys."""
        total = super().flops(layout, batch)
        if self.downsample > 1:
            pooled = sum(num_cells(grid, self.downsample) for grid in layout.grids)
            # Pooling itself is one multiply-add per channel of every key and value.
            pairs = layout.num_image_tokens * (pooled + 1)
            total += 4 * batch * self.shape.num_heads * self.shape.head_dim * pairs
        return total


@lru_cache(maxsize=256)
def _warn_if_covered(layout: Layout, window: int) -> None:
    """Says once per layout that the disc holds the whole picture."""
    if disc_covers(layout.grids, window):
        grids = " + ".join(str(grid) for grid in layout.grids)
        warnings.warn(
            f"window={window} covers the whole grid of {grids} tokens: it is the teacher's own attention",
            stacklevel=2,
        )
