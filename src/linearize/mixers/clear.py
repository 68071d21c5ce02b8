"""CLEAR: softmax attention within a disc around every image token."""

from __future__ import annotations

import warnings
from functools import lru_cache

import torch
from torch import Tensor, nn

from linearize.errors import LinearizeError
from linearize.layout import Layout
from linearize.mixers.base import AttentionShape, Mixer, MixerContext
from linearize.ops.disc import disc_covers, exact_pairs
from linearize.ops.local_attention import local_attention
from linearize.ops.pooling import num_cells, pool_image_tokens


class ClearMixer(Mixer):
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

    token_order = "tile"

    def __init__(self, shape: AttentionShape, *, window: int = 8, downsample: int = 1) -> None:
        super().__init__(shape)
        for name, number in (("window", window), ("downsample", downsample)):
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise LinearizeError(f"mixer 'clear' got {name}={number!r}; choose a whole number of tokens, 1 or more")
        self.window, self.downsample = window, downsample
        if downsample > 1:
            self.spatial_weight = nn.Parameter(torch.full((downsample, downsample), downsample**-2.0))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: MixerContext) -> Tensor:
        """See `Mixer.forward`."""
        return self._attend(query, key, value, context, "auto")

    def reference(self, query: Tensor, key: Tensor, value: Tensor, context: MixerContext) -> Tensor:
        """See `Mixer.reference`: the same on dense weights under the disc's mask."""
        return self._attend(query, key, value, context, "naive")

    def flops(self, layout: Layout, batch: int = 1) -> int:
        """4 head_dim operations per pair: the disc, text with all tokens, and the quadratic pooled keys."""
        pairs = exact_pairs(layout.grids, self.window)
        pairs += layout.num_text_tokens * (layout.num_tokens + layout.num_image_tokens)
        if self.downsample > 1:
            pooled = sum(num_cells(grid, self.downsample) for grid in layout.grids)
            # Pooling itself is one multiply-add per channel of every key and value.
            pairs += layout.num_image_tokens * (pooled + 1)
        return 4 * batch * self.shape.num_heads * self.shape.head_dim * pairs

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, context: MixerContext, backend: str) -> Tensor:
        layout, mask = context.layout, context.key_mask
        if not torch.compiler.is_compiling():
            _warn_if_covered(layout, self.window)
        query, key = context.rotate(query), context.rotate(key)
        pooled_key = pooled_value = pooled_mask = None
        if self.downsample > 1:
            pooled_key, pooled_mask = pool_image_tokens(key, self.spatial_weight, layout, mask)
            pooled_value, _ = pool_image_tokens(value, self.spatial_weight, layout, mask)
        return local_attention(
            query,
            key,
            value,
            grid=layout.grids,
            window=self.window,
            num_text_tokens=layout.num_text_tokens,
            text_first=layout.text_first,
            tile=layout.tile,
            scale=context.scale,
            key_mask=mask,
            pooled_key=pooled_key,
            pooled_value=pooled_value,
            pooled_mask=pooled_mask,
            backend=backend,
        )


@lru_cache(maxsize=256)
def _warn_if_covered(layout: Layout, window: int) -> None:
    """Says once per layout that the disc holds the whole picture."""
    if disc_covers(layout.grids, window):
        grids = " + ".join(str(grid) for grid in layout.grids)
        warnings.warn(
            f"window={window} covers the whole grid of {grids} tokens: it is the teacher's own attention",
            stacklevel=2,
        )
