"""The teacher's own attention, as a mixer."""

from __future__ import annotations

from torch import Tensor

from linearize.errors import LinearizeError
from linearize.layout import Layout
from linearize.mixers.base import AttentionShape, Mixer, MixerContext
from linearize.ops.dense_attention import dense_attention


class SoftmaxMixer(Mixer):
    """Softmax attention through the family's own call: the teacher, bit for bit, and what the others are measured by.

    Args:
        shape: Sizes of the layer.
        token_order: "any" keeps the order that other layers want; "tile" and "raster" ask for one, to measure what
            the order does.
    """

    def __init__(self, shape: AttentionShape, *, token_order: str = "any") -> None:
        super().__init__(shape)
        if token_order not in ("any", "raster", "tile"):
            raise LinearizeError(f"mixer 'softmax' got token_order={token_order!r}; choose any, raster or tile")
        self.token_order = token_order

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: MixerContext) -> Tensor:
        """See `Mixer.forward`."""
        return context.softmax(*context.rotate_both(query, key), value)

    def reference(self, query: Tensor, key: Tensor, value: Tensor, context: MixerContext) -> Tensor:
        """softmax(scale rotate(Q) rotate(K)^T) V over all valid keys."""
        return dense_attention(
            context.rotate(query), context.rotate(key), value, scale=context.scale, key_mask=context.key_mask
        )

    def flops(self, layout: Layout, batch: int = 1) -> int:
        """Two products of 2 tokens^2 head_dim operations in each head."""
        return 4 * batch * self.shape.num_heads * self.shape.head_dim * layout.num_tokens**2
