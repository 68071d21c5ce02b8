"""LAWCAT: convolved query and key, gated linear attention, and perhaps a window, under one normaliser."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linearize.errors import LinearizeError
from linearize.layout import Layout
from linearize.mixers._arguments import ROPE, check_choice, check_number, check_rotation
from linearize.mixers._gated import DIRECTIONS, GatedMixer, LogGates, both_ways
from linearize.mixers._tokens import FeaturePair, Tokens, in_order, rotate_pair
from linearize.mixers._window import (
    check_window,
    has_log_scale,
    inside_window,
    text_and_window,
    window_alone,
    window_attention,
)
from linearize.mixers.base import AttentionShape
from linearize.ops.depthwise import depthwise_flops, depthwise_images
from linearize.ops.feature_maps import HedgehogMap
from linearize.ops.linear_attention import SoftmaxPart, exact_text_flops, merge
from linearize.ops.tile_states import window_flops


class LawcatMixer(GatedMixer):
    """LAWCAT (arXiv 2509.18467) on the grid: depthwise convolutions, a tied map, gates and an optional window.

    Query and key [batch, heads, tokens, head_dim] of image tokens are convolved depthwise, 3 x 3 from the identity,
    and mapped by one phi(x) = [softmax(xW), softmax(-xW)], W [heads, head_dim, width]. With gates from the layer's
    input x, logsigmoid(W2 W1 x + b) / 16 for each channel of phi, scans in both directions (see `GlaMixer`) give n and
    z; with the disc A(i) of text and image tokens with dy^2 + dx^2 < window^2,

        o_i = (sum_A e^s_ij v_j + e^c n_i) / (sum_A e^s_ij + e^c z_i),

    with c in each head in place of the paper's two factors, of which only the ratio matters. The linear part holds all
    image tokens, those of the window included. Text sees everything by softmax, or is a state with text="state".

    The published layer is causal, convolves the last 4 tokens (1 for the last, 0.001 for the others), opens no gate
    (b = 0 halves a weight within 16 tokens), applies no e^-max to the linear part and has no window by default; its
    form here is `branches=linear rope=none text=state directions=rows`.

    Args:
        shape: Sizes of the layer.
        window: Radius of the disc in tokens.
        branches: "both"; or "linear", without the window; or "window", without linear attention (CLEAR's).
        convolution: Odd side of the filters of query and key; 1 means none.
        width: Width of W; 0 means half of head_dim.
        rope: Rotate convolved query and key before_map, features after_map, or none, as published.
        directions: "rows" or "rows_and_columns".
        text: "exact" or "state"; with branches=window it is exact.
        rank: Width of the gates' low-rank projection; 0 means one matrix.

    Raises:
        LinearizeError: An argument is none of its choices.
    """

    uses_hidden_states = True
    token_order = "raster"

    def __init__(
        self,
        shape: AttentionShape,
        *,
        window: int = 8,
        branches: str = "both",
        convolution: int = 3,
        width: int = 0,
        rope: str = "before_map",
        directions: str = "rows",
        text: str = "exact",
        rank: int = 16,
    ) -> None:
        check_window("lawcat", window, branches)
        check_choice("lawcat", "rope", rope, ROPE)
        check_choice("lawcat", "directions", directions, tuple(DIRECTIONS))
        check_number("lawcat", "width", width, 0)
        check_number("lawcat", "rank", rank, 0)
        check_number("lawcat", "convolution", convolution, 1)
        if convolution % 2 == 0:
            raise LinearizeError(f"mixer 'lawcat' got convolution={convolution}; choose an odd side, or 1 for none")
        width = width or shape.head_dim // 2
        check_rotation("lawcat", rope, width)
        feature_map = HedgehogMap(shape.num_heads, shape.head_dim, width=width)
        super().__init__(
            shape,
            "lawcat",
            text="exact" if branches == "window" else text,
            log_mean_product=feature_map.log_mean_product,
            is_joined=has_log_scale(branches, text),
        )
        self.window, self.branches, self.rope = window, branches, rope
        self.convolution, self.directions = convolution, DIRECTIONS[directions]
        if branches == "window":
            return
        self.map = feature_map
        self.gates = LogGates(
            shape.hidden_size, 2 * len(self.directions), shape.num_heads, feature_map.num_features, rank=rank
        )
        if convolution > 1:
            channels = shape.num_heads * shape.head_dim
            self.query_filter, self.key_filter = (nn.Parameter(_identity(channels, convolution)) for _ in range(2))

    def features(self, tokens: Tokens) -> FeaturePair:
        """See `JointMixer.features`."""
        query, key = tokens.query, tokens.key
        if self.convolution > 1:
            query, key = self._convolve(query, self.query_filter, tokens), self._convolve(key, self.key_filter, tokens)
        if self.rope == "before_map":
            query, key = tokens.context.rotate(query), tokens.context.rotate(key)
        pair = FeaturePair(self.map(query, is_key=False), self.map(key, is_key=True))
        return rotate_pair(*pair[:2], tokens.context, self.map.num_parts) if self.rope == "after_map" else pair

    def log_gates(self, tokens: Tokens) -> list[tuple[Tensor, Tensor | None]]:
        """See `GatedMixer.log_gates`."""
        return both_ways(self.gates(tokens.hidden_states[:, tokens.image]))

    def exact_part(self, tokens: Tokens) -> SoftmaxPart | None:
        """See `JointMixer.exact_part`: the window, and the text if it is exact."""
        if self.branches == "linear":
            return super().exact_part(tokens)
        part = text_and_window(tokens, self.window) if self.text == "exact" else None
        if part is not None:
            return part
        return merge(super().exact_part(tokens), window_alone(*tokens.product_rotated, tokens, self.window))

    def sees_exactly(self, tokens: Tokens) -> Tensor:
        """See `JointMixer.sees_exactly`."""
        seen = super().sees_exactly(tokens)
        return seen if self.branches == "linear" else seen | inside_window(tokens, self.window)

    def is_not_linear(self, tokens: Tokens, seen: Tensor) -> Tensor:
        """See `JointMixer.is_not_linear`: the linear part holds the window's tokens, too."""
        return super().sees_exactly(tokens)

    def mix(self, tokens: Tokens) -> Tensor:
        """See `JointMixer.mix`."""
        return window_attention(tokens, self.window) if self.branches == "window" else super().mix(tokens)

    def dense_mix(self, tokens: Tokens) -> Tensor:
        """See `JointMixer.dense_mix`."""
        if self.branches == "window":
            return window_attention(tokens, self.window, "naive")
        return super().dense_mix(tokens)

    def flops(self, layout: Layout, batch: int = 1) -> int:
        """The window's pairs, scans, gates, W, convolutions and text."""
        shape, images = self.shape, layout.num_image_tokens
        window = 0 if self.branches == "linear" else window_flops(layout, self.window, shape.head_dim)
        if self.branches == "window":
            return batch * shape.num_heads * (window + exact_text_flops(layout, shape.head_dim))
        features = self.map.num_features
        each = window + self.scan_flops(images, features) + self.text_flops(layout, features)
        each += 2 * layout.num_tokens * shape.head_dim * features
        total = shape.num_heads * each + self.gates.flops(images)
        if self.convolution > 1:
            total += 2 * depthwise_flops(layout, shape.num_heads * shape.head_dim, self.convolution)
        return batch * total

    def _convolve(self, states: Tensor, weight: Tensor, tokens: Tokens) -> Tensor:
        """Image tokens through the filters; text stays as it is."""
        layout = tokens.context.layout
        image = depthwise_images(states[:, :, tokens.image], weight.to(states.dtype), None, layout)
        return in_order(states[:, :, tokens.text], image, layout)


def _identity(channels: int, side: int) -> Tensor:
    """Filters [channels, side, side] with 1 in the centre and 0 elsewhere."""
    weight = torch.zeros(channels, side, side)
    weight[:, side // 2, side // 2] = 1.0
    return weight
