"""LAWCAT: convolved query and key, gated linear attention, and perhaps a window, under one normaliser."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linearize.errors import LinearizeError
from linearize.layout import Layout
from linearize.mixers._arguments import ROPE, VARIANTS, check_choice, check_number, check_rotation
from linearize.mixers._gated import DIRECTIONS, OPEN, GatedMixer, LogGates, both_ways
from linearize.mixers._tokens import FeaturePair, Tokens, in_order, rotate_pair
from linearize.mixers._window import (
    check_window,
    has_log_scale,
    inside_window,
    over_largest,
    scores_over_largest,
    text_and_window,
    window_alone,
    window_attention,
)
from linearize.mixers.base import AttentionShape
from linearize.ops.depthwise import depthwise_flops, depthwise_images
from linearize.ops.feature_maps import HedgehogMap
from linearize.ops.linear_attention import SoftmaxPart, exact_text_flops, merge
from linearize.ops.tile_states import window_flops

# Where the published layer starts: filters off their centre, and the deviation of the gates' projections.
OFF_CENTRE, GATE_DEVIATION = 1e-3, 0.006


class LawcatMixer(GatedMixer):
    """LAWCAT (arXiv 2509.18467) on the grid: depthwise convolutions, a tied map, gates and an optional window.

    Query and key [batch, heads, tokens, head_dim] of image tokens are convolved depthwise, 3 x 3 from the identity,
    and mapped by one phi(x) = [softmax(xW), softmax(-xW)], W [heads, head_dim, width]. With gates from the layer's
    input x, logsigmoid(W2 W1 x + b) / 16 for each channel of phi, scans in both directions (see `GlaMixer`) give n and
    z; with the disc A(i) of text and image tokens with dy^2 + dx^2 < window^2,

        o_i = (sum_A e^s_ij v_j + e^c n_i) / (sum_A e^s_ij + e^c z_i),

    with c in each head in place of the paper's two factors, of which only the ratio matters. The linear part holds all
    image tokens, those of the window included. Text sees everything by softmax, or is a state with text="state".

    `variant=paper` is the published formula in both directions, whose default has no window (`branches=linear`): query
    and key are not rotated in the linear part, text is a state, filters start at 0.001 off the centre, and gates with
    W1, W2 of deviation 0.006 and b = 0, which halves a weight within 16 tokens. The window is multiplied by e^-max, and
    the linear part is not. The published layer is causal, and convolves the last 4 tokens of the sequence.

    Args:
        shape: Sizes of the layer.
        window: Radius of the disc in tokens.
        branches: "both"; or "linear", without the window; or "window", without linear attention (CLEAR's).
        convolution: Odd side of the filters of query and key; 1 means none.
        width: Width of W; 0 means half of head_dim.
        rope: Rotate convolved query and key before_map, features after_map, or none; with variant=paper it is none.
        directions: "rows" or "rows_and_columns".
        text: "exact" or "state"; with branches=window it is exact, else with variant=paper a state.
        rank: Width of the gates' low-rank projection; 0 means one matrix.
        variant: "dit" or "paper".

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
        variant: str = "dit",
    ) -> None:
        check_window("lawcat", window, branches)
        check_choice("lawcat", "variant", variant, VARIANTS)
        check_choice("lawcat", "rope", rope, ROPE)
        check_choice("lawcat", "directions", directions, tuple(DIRECTIONS))
        check_number("lawcat", "width", width, 0)
        check_number("lawcat", "rank", rank, 0)
        check_number("lawcat", "convolution", convolution, 1)
        if convolution % 2 == 0:
            raise LinearizeError(f"mixer 'lawcat' got convolution={convolution}; choose an odd side, or 1 for none")
        width = width or shape.head_dim // 2
        is_paper = variant == "paper" and branches != "window"
        if is_paper:
            rope, text = "none", "state"
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
        self.keeps_largest = is_paper
        if branches == "window":
            return
        self.map = feature_map
        sizes = (shape.hidden_size, 2 * len(self.directions), shape.num_heads, feature_map.num_features)
        self.gates = LogGates(*sizes, rank=rank, bias=0.0 if is_paper else OPEN)
        if is_paper:
            for projection in filter(None, (self.gates.inner, self.gates.outer)):
                nn.init.normal_(projection.weight, std=GATE_DEVIATION)
        if convolution > 1:
            channels, others = shape.num_heads * shape.head_dim, OFF_CENTRE if is_paper else 0.0
            filters = (nn.Parameter(_centred(channels, convolution, others)) for _ in range(2))
            self.query_filter, self.key_filter = filters

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
        window = window_alone(*tokens.product_rotated, tokens, self.window, keep_largest=self.keeps_largest)
        part = merge(super().exact_part(tokens), window)
        return over_largest(part) if self.keeps_largest else part

    def sees_exactly(self, tokens: Tokens) -> Tensor:
        """See `JointMixer.sees_exactly`."""
        seen = super().sees_exactly(tokens)
        return seen if self.branches == "linear" else seen | inside_window(tokens, self.window)

    def is_not_linear(self, tokens: Tokens, seen: Tensor) -> Tensor:
        """See `JointMixer.is_not_linear`: the linear part holds the window's tokens, too."""
        return super().sees_exactly(tokens)

    def weigh_scores(self, scores: Tensor, seen: Tensor) -> Tensor:
        """See `JointMixer.weigh_scores`: the published e^-max."""
        return scores_over_largest(scores, seen) if self.keeps_largest else scores

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
        each += 2 * self.map.flops(layout.num_tokens)
        total = shape.num_heads * each + self.gates.flops(images)
        if self.convolution > 1:
            total += 2 * depthwise_flops(layout, shape.num_heads * shape.head_dim, self.convolution)
        return batch * total

    def _convolve(self, states: Tensor, weight: Tensor, tokens: Tokens) -> Tensor:
        """Image tokens through the filters; text stays as it is."""
        layout = tokens.context.layout
        image = depthwise_images(states[:, :, tokens.image], weight.to(states.dtype), None, layout)
        return in_order(states[:, :, tokens.text], image, layout)


def _centred(channels: int, side: int, others: float) -> Tensor:
    """Filters [channels, side, side] with 1 in the centre."""
    weight = torch.full((channels, side, side), others)
    weight[:, side // 2, side // 2] = 1.0
    return weight
