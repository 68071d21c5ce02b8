"""What mixers have in common that are softmax attention within a region of image tokens."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from linearize.layout import Layout
from linearize.mixers._arguments import check_number
from linearize.mixers.base import AttentionShape, Mixer, MixerContext
from linearize.ops.halo_tables import seen_pairs
from linearize.ops.local_attention import local_attention
from linearize.ops.regions import REGIONS


class LocalMixer(Mixer):
    """Base of mixers in which an image token sees all text and a region of image tokens, and text sees everything.

    No parameters; a cost linear in the number of tokens.

    Args:
        shape: Sizes of the layer.
        window: Radius of the region in tokens.

    Attributes:
        region: A name of `ops.regions.REGIONS`.
        backend: Of `local_attention`; measurements set another than "auto".

    Raises:
        LinearizeError: The window is below 1.
    """

    token_order = "tile"
    region: ClassVar[str]
    backend: str = "auto"

    def __init__(self, shape: AttentionShape, *, window: int = 8) -> None:
        super().__init__(shape)
        check_number(self._name(), "window", window, 1)
        self.window = window

    @classmethod
    def _name(cls) -> str:
        return cls.__module__.rpartition(".")[2]

    def more_keys(self, key: Tensor, value: Tensor, context: MixerContext) -> dict[str, Tensor | None]:
        """Keys beside the region's that all image tokens see: pooled arguments of `local_attention`, by default none.

        Args:
            key: [batch, heads, tokens, head_dim], rotated.
            value: Same.
            context: As `forward` got it.
        """
        return {}

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: MixerContext) -> Tensor:
        """See `Mixer.forward`."""
        return self._attend(query, key, value, context, self.backend)

    def reference(self, query: Tensor, key: Tensor, value: Tensor, context: MixerContext) -> Tensor:
        """See `Mixer.reference`: the same on dense weights under the region's mask."""
        return self._attend(query, key, value, context, "naive")

    def flops(self, layout: Layout, batch: int = 1) -> int:
        """4 head_dim operations per pair: the region, and text with all tokens."""
        pairs = seen_pairs(layout.grids, REGIONS[self.region](self.window))
        pairs += layout.num_text_tokens * (layout.num_tokens + layout.num_image_tokens)
        return 4 * batch * self.shape.num_heads * self.shape.head_dim * pairs

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, context: MixerContext, backend: str) -> Tensor:
        layout = context.layout
        query, key = context.rotate_both(query, key)
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
            key_mask=context.key_mask,
            region=self.region,
            backend=backend,
            **self.more_keys(key, value, context),
        )
