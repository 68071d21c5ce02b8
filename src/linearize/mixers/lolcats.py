"""LoLCATs: a window of softmax, and linear attention on all the rest, under one normaliser."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linearize.layout import Layout
from linearize.mixers._arguments import VARIANTS, check_choice, check_number
from linearize.mixers._joint import JointMixer
from linearize.mixers._tokens import FeaturePair, Tokens, map_pair
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
from linearize.ops.feature_maps import HedgehogMap
from linearize.ops.linear_attention import (
    LinearPart,
    SoftmaxPart,
    exact_text_flops,
    linear_attention_flops,
    merge,
)
from linearize.ops.tile_states import window_complement, window_flops

# LoLCATs' factor of the window, sigmoid(-2.197) = 0.1.
WINDOW_FACTOR = math.log(0.1 / 0.9)


class LolcatsMixer(JointMixer):
    """LoLCATs (Zhang et al., arXiv 2410.10254) on the grid: each pair has a softmax or a linear weight, and none both.

    Image token i sees text and the disc A(i), dy^2 + dx^2 < window^2, by softmax, all other image tokens by linear
    attention, under one normaliser:

        o_i = [sum_A e^s_ij v_j + e^c phi_q(q_i) F_i] / [sum_A e^s_ij + e^c phi_q(q_i) f_i],

    where F_i and f_i are the state [num_features, head_dim] and its mass of the tokens outside of A(i), from the states
    of tiles, at linear cost. phi(x) = [softmax(xW), softmax(-xW)], with W [heads, head_dim, width] for query and key;
    c [heads] weighs the linear branch, and calibration brings it as near to the teacher as it can. Text sees everything
    by softmax, or is part of the linear attention with text="state". A window over the picture is the teacher.

    Paper and code multiply the window by e^-max and not the linear part, so that the mix depends on each row's largest
    score, and learn a factor of the window (initially 0.1) instead of c: that is `variant=paper`.

    Args:
        shape: Sizes of the layer.
        window: Radius of the disc in tokens.
        branches: "both"; or "linear", without the window; or "window", without linear attention (CLEAR's).
        width: Width of W; 0 means half of head_dim, as in the paper.
        rope: Rotate query and key before_map, as published, or none, in the linear attention.
        text: "exact" or "state"; with branches=window it is exact.
        variant: "dit" or "paper".

    Raises:
        LinearizeError: An argument is none of its choices.
    """

    # Queries of a tile share what they gather, so their keys should lie together.
    token_order = "tile"
    is_softmax_when_covered = True

    def __init__(
        self,
        shape: AttentionShape,
        *,
        window: int = 8,
        branches: str = "both",
        width: int = 0,
        rope: str = "before_map",
        text: str = "exact",
        variant: str = "dit",
    ) -> None:
        check_window("lolcats", window, branches)
        check_choice("lolcats", "rope", rope, ("before_map", "none"))
        check_choice("lolcats", "variant", variant, VARIANTS)
        check_number("lolcats", "width", width, 0)
        width = width or shape.head_dim // 2
        maps = [HedgehogMap(shape.num_heads, shape.head_dim, width=width) for _ in range(2)]
        is_paper = variant == "paper" and branches == "both"
        super().__init__(
            shape,
            "lolcats",
            text="exact" if branches == "window" else text,
            log_mean_product=maps[0].log_mean_product,
            is_joined=not is_paper and has_log_scale(branches, text),
        )
        self.window, self.branches, self.rope = window, branches, rope
        if branches != "window":
            self.query_map, self.key_map = maps
        self.is_paper = self.keeps_largest = is_paper
        if is_paper:
            self.window_factor = nn.Parameter(torch.full((shape.num_heads,), WINDOW_FACTOR))

    def features(self, tokens: Tokens) -> FeaturePair:
        """See `JointMixer.features`."""
        return map_pair(tokens, self.rope, self.query_map, self.key_map)

    def mix(self, tokens: Tokens) -> Tensor:
        """See `JointMixer.mix`."""
        return window_attention(tokens, self.window) if self.branches == "window" else super().mix(tokens)

    def dense_mix(self, tokens: Tokens) -> Tensor:
        """See `JointMixer.dense_mix`."""
        return (
            window_attention(tokens, self.window, "naive") if self.branches == "window" else super().dense_mix(tokens)
        )

    def image_parts(self, pair: FeaturePair, tokens: Tokens) -> tuple[SoftmaxPart | None, LinearPart]:
        """See `JointMixer.image_parts`."""
        if self.branches == "linear":
            exact, linear = super().image_parts(pair, tokens)
        else:
            image, exact = tokens.image, self._window_part(tokens)
            linear = window_complement(
                (pair.query.values[:, :, image], pair.key.values[:, :, image]),
                tokens.product_value[:, :, image],
                layout=tokens.context.layout,
                window=self.window,
                key_mask=tokens.mask_of(image),
            )
        if self.is_paper and exact is not None and exact.largest is not None:
            exact = over_largest(exact)
            exact = exact._replace(log_mass=exact.log_mass + self._log_factor(exact.log_mass))
        return exact, linear

    def sees_exactly(self, tokens: Tokens) -> Tensor:
        """See `JointMixer.sees_exactly`."""
        seen = super().sees_exactly(tokens)
        return seen if self.branches == "linear" else seen | inside_window(tokens, self.window)

    def weigh_scores(self, scores: Tensor, seen: Tensor) -> Tensor:
        """See `JointMixer.weigh_scores`: the published e^-max and factor of the window."""
        if not self.is_paper:
            return scores
        return scores_over_largest(scores, seen) + self._log_factor(scores)

    def flops(self, layout: Layout, batch: int = 1) -> int:
        """The window's pairs, states of tiles and their readings, and text."""
        head_dim, images = self.shape.head_dim, layout.num_image_tokens
        if self.branches == "window":
            each = window_flops(layout, self.window, head_dim) + exact_text_flops(layout, head_dim)
            return batch * self.shape.num_heads * each
        features = self.query_map.num_features
        if self.branches == "both":
            each = window_flops(layout, self.window, head_dim, features)
        else:
            each = linear_attention_flops(images, images, features, head_dim)
        each += self.text_flops(layout, features)
        each += self.query_map.flops(layout.num_tokens) + self.key_map.flops(layout.num_tokens)
        return batch * self.shape.num_heads * each

    def _window_part(self, tokens: Tokens) -> SoftmaxPart:
        """What image tokens see of the disc, and of the text if it is exact."""
        part = text_and_window(tokens, self.window) if self.text == "exact" and not self.is_paper else None
        if part is not None:
            return part
        window = window_alone(*tokens.product_rotated, tokens, self.window, keep_largest=self.is_paper)
        return merge(self.exact_part(tokens), window)

    def _log_factor(self, like: Tensor) -> Tensor:
        return F.logsigmoid(self.window_factor.to(like.dtype))[:, None, None]
