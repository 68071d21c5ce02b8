"""What a mixer is: the thing that stands where softmax(QK^T)V stood, and what it may know of its surroundings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from linearize.layout import Layout


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of the attention layer that a mixer stands in.

    Attributes:
        num_heads: Query heads.
        head_dim: Channels of one head.
        hidden_size: Channels of the hidden states that feed the layer.
        num_key_value_heads: Key and value heads; None means as many as query heads.
    """

    num_heads: int
    head_dim: int
    hidden_size: int
    num_key_value_heads: int | None = None


@dataclass
class MixerContext:
    """All that a mixer may know beside query, key and value. The backbone fills it for every call.

    Attributes:
        layout: Text tokens, image grids and the order in which image tokens stand.
        scale: Softmax scale, usually head_dim ** -0.5.
        rotate: The family's own rotary embedding, bit for bit: [batch, heads, tokens, head_dim] to the same shape.
        angles: The family's rotary angles for features of any even width: (positions [tokens, axes], dim) to [tokens,
            dim // 2].
        positions: Position ids of all tokens, [tokens, axes], in the order of the tokens.
        softmax: The family's own attention call, its backend included, on rotated query and key and on value.
        key_mask: [batch, tokens], True where a key is valid; None when all are.
        hidden_states: The layer's input, [batch, tokens, hidden_size], in the order of the tokens, only for mixers
            that set `uses_hidden_states`.
        timestep_embedding: [batch, embedding_dim], only for mixers that set `uses_timestep_embedding`.
        rotated: Returns query and key of this very call, rotated, in fewer passes than `rotate`; see `rotate_both`.
    """

    layout: Layout
    scale: float
    rotate: Callable[[Tensor], Tensor]
    angles: Callable[[Tensor, int], Tensor]
    positions: Tensor
    softmax: Callable[[Tensor, Tensor, Tensor], Tensor]
    key_mask: Tensor | None = None
    hidden_states: Tensor | None = None
    timestep_embedding: Tensor | None = None
    rotated: Callable[[], tuple[Tensor, Tensor]] | None = None

    def rotate_both(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """The query and key that the mixer was called with, rotated."""
        return (self.rotate(query), self.rotate(key)) if self.rotated is None else self.rotated()


class Mixer(nn.Module):
    """Base of all mixers: its arguments have their defaults in `__init__(self, shape, *, ...)`.

    Parameters never depend on the grid.

    Attributes:
        token_order: The order of image tokens that it wants: "any", "raster" or "tile".
        trained_projections: The teacher's projections that are trained with it, where the layer has them.
        uses_hidden_states: Whether the context must carry the layer's input.
        uses_timestep_embedding: Whether the context must carry the timestep embedding.
        is_softmax_when_covered: Whether it is the teacher's attention when its `window` covers the picture.
    """

    token_order: str = "any"
    trained_projections: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out")
    uses_hidden_states: bool = False
    uses_timestep_embedding: ClassVar[bool] = False
    is_softmax_when_covered: ClassVar[bool] = False

    def __init__(self, shape: AttentionShape) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: MixerContext) -> Tensor:
        """Mixes tokens.

        Args:
            query: [batch, heads, tokens, head_dim], normed and not rotated.
            key: Same, with key-value heads.
            value: Same as key, never rotated.
            context: Layout, rotation, masks and the family's own softmax.

        Returns:
            [batch, heads, tokens, head_dim].
        """
        raise NotImplementedError

    def reference(self, query: Tensor, key: Tensor, value: Tensor, context: MixerContext) -> Tensor:
        """The defining formula on dense [tokens x tokens] weights, which `forward` is tested against."""
        raise NotImplementedError

    def flops(self, layout: Layout, batch: int = 1) -> int:
        """Floating point operations of one forward call, two per multiply-add, without the projections."""
        raise NotImplementedError

    def check_layout(self, layout: Layout) -> None:
        """Checks that the mixer can serve these tokens, as `forward` does; by default it serves all.

        Raises:
            LinearizeError: It cannot; the message names what works.
        """

    def calibrate(self, query: Tensor, key: Tensor, value: Tensor, context: MixerContext) -> None:
        """Sets parameters from one batch of the teacher's query, key and value; by default nothing.

        Args:
            query: As in `forward`.
            key: As in `forward`.
            value: As in `forward`.
            context: As in `forward`.
        """
