"""Liger: gates from the teacher's own keys, and a window."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from linearize.errors import LinearizeError
from linearize.layout import Layout
from linearize.mixers._arguments import ROPE, VARIANTS, check_choice
from linearize.mixers._convex import ConvexMixer
from linearize.mixers._gated import DIRECTIONS, OPEN, TEMPERATURE
from linearize.mixers._tokens import FeaturePair, Tokens, map_pair
from linearize.mixers._window import check_window
from linearize.mixers.base import AttentionShape
from linearize.ops.feature_maps import build_feature_map


class LigerMixer(ConvexMixer):
    """Liger (Lan et al., arXiv 2503.01496), its GLA form: a linear branch without parameters, and a window.

    With phi the softmax over the channels of a head and gates log G = logsigmoid(k + b) / 16 from the teacher's key,
    [batch, heads, tokens, head_dim], scans in both directions (see `GlaMixer`) give n and z; the window is softmax over
    text and the disc dy^2 + dx^2 < window^2:

        o_i = (1 - share) n_i / z_i + share window_i.

    The gate between two tokens is the same in both directions, so that the decay is symmetric. b = 5.5 opens the gates:
    half of a weight is left after 2700 tokens. With exact text n_i / z_i has text in its sum by softmax, weighed by one
    number in each head, the only parameter; with text="state" there is none.

    `variant=paper` is the published formula in both directions: b = 0, no rotation in the linear branch, and no z,
    whereupon the output grows with the picture. It holds text as a state. (The published code pools a key of head_dim
    channels to head_dim channels, which changes nothing.)

    Args:
        shape: Sizes of the layer.
        window: Radius of the disc in tokens.
        branches: "both"; or "linear", without the window; or "window", without linear attention (CLEAR's).
        share: The window's share, 0.5 as published.
        rope: In the linear branch: before_map, after_map, or none; with variant=paper it is none. The window is always
            rotated.
        directions: "rows" or "rows_and_columns".
        text: "exact" or "state", in the linear branch; the window always sees text.
        variant: "dit" or "paper".

    Raises:
        LinearizeError: An argument is none of its choices.
    """

    token_order = "raster"

    def __init__(
        self,
        shape: AttentionShape,
        *,
        window: int = 8,
        branches: str = "both",
        share: float = 0.5,
        rope: str = "before_map",
        directions: str = "rows",
        text: str = "exact",
        variant: str = "dit",
    ) -> None:
        check_window("liger", window, branches)
        check_choice("liger", "rope", rope, ROPE)
        check_choice("liger", "directions", directions, tuple(DIRECTIONS))
        check_choice("liger", "variant", variant, VARIANTS)
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise LinearizeError(f"mixer 'liger' got share={share!r}; choose a number from 0 to 1")
        feature_map = build_feature_map("softmax", shape.num_heads, shape.head_dim)
        is_paper = variant == "paper"
        super().__init__(
            shape,
            "liger",
            text="state" if is_paper else text,
            log_mean_product=feature_map.log_mean_product,
            is_joined=not is_paper and text == "exact" and branches != "window",
        )
        self.window, self.branches, self.share = window, branches, share
        self.rope = "none" if is_paper else rope
        self.directions, self.has_normaliser = DIRECTIONS[directions], not is_paper
        self.map, self.bias = feature_map, 0.0 if is_paper else OPEN

    def features(self, tokens: Tokens) -> FeaturePair:
        """See `JointMixer.features`."""
        return map_pair(tokens, self.rope, self.map, self.map)

    def log_gates(self, tokens: Tokens) -> list[tuple[Tensor, Tensor | None]]:
        """See `GatedMixer.log_gates`."""
        gate = F.logsigmoid(tokens.key[:, :, tokens.image] + self.bias) / TEMPERATURE
        return [(gate, None) for _ in self.directions]

    def combine(self, linear: Tensor, window: Tensor) -> Tensor:
        """See `ConvexMixer.combine`."""
        return (1 - self.share) * linear + self.share * window

    def flops(self, layout: Layout, batch: int = 1) -> int:
        """Scans, the window's pairs, and text in both branches."""
        return batch * self.shape.num_heads * self.branch_flops(layout, self.shape.head_dim)
