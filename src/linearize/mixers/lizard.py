"""Lizard: gated linear attention with learned exponential maps, and a window with meta memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linearize.layout import Layout
from linearize.mixers._arguments import ROPE, VARIANTS, check_choice, check_number, check_rotation
from linearize.mixers._convex import ConvexMixer
from linearize.mixers._gated import DIRECTIONS, LogGates, both_ways
from linearize.mixers._tokens import FeaturePair, Tokens, in_order, map_pair
from linearize.mixers._window import check_window, inside_window, text_and_window, window_alone
from linearize.mixers.base import AttentionShape
from linearize.ops.feature_maps import ExponentialMap
from linearize.ops.linear_attention import merge, softmax_part, with_text_queries

# One gate in each head and no sixteenth root: this bias leaves half of a weight after 2000 tokens.
OPEN = 8.0
# Logits of the meta memory at the start: it takes next to nothing.
META = -6.0


class LizardMixer(ConvexMixer):
    """Lizard (Van Nguyen et al., arXiv 2507.09025) on the grid: a gated linear branch and a window with meta memory.

    With phi(x) = [exp(xW), exp(-xW)], W [heads, head_dim, width] for query and key, computed with one common factor,
    and a gate sigmoid(w x + b) in each head from the layer's input x, scans in both directions (see `GlaMixer`) give
    n and z. The window is softmax over text and the disc dy^2 + dx^2 < window^2, with logits t_r that take mass and
    give no value:

        a_i = sum_A e^s_ij v_j / (sum_A e^s_ij + sum_r e^t_r),    o_i = (1 - beta) n_i / z_i + beta a_i,

    with beta = sigmoid of one number in each head, at first 1/2. Text tokens see everything by softmax in both
    branches, without meta memory; with text="state" they are a state in the linear branch. Of t [heads, num_meta] only
    the sum of e^t matters.

    `variant=paper` is the published sum n / z + alpha a, with one alpha and one gate for all heads, and without
    rotation. Its rows sum to more than 1. The paper does not say how alpha, t and the gate start: here at 1, near
    nothing, and open. Its forms as a recurrence and as a matrix lack the denominator z, which its definition has.

    Args:
        shape: Sizes of the layer.
        window: Radius of the disc in tokens.
        branches: "both"; or "linear", without the window; or "window", without linear attention.
        num_meta: Logits of the meta memory; 0 means none.
        width: Width of W; 0 means head_dim.
        rope: In the linear branch: before_map, after_map, or none; with variant=paper it is none.
        directions: "rows" or "rows_and_columns".
        text: "exact" or "state", in the linear branch; the window always sees text.
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
        num_meta: int = 4,
        width: int = 0,
        rope: str = "before_map",
        directions: str = "rows",
        text: str = "exact",
        variant: str = "dit",
    ) -> None:
        check_window("lizard", window, branches)
        check_number("lizard", "num_meta", num_meta, 0)
        check_number("lizard", "width", width, 0)
        check_choice("lizard", "rope", rope, ROPE)
        check_choice("lizard", "directions", directions, tuple(DIRECTIONS))
        check_choice("lizard", "variant", variant, VARIANTS)
        rope = "none" if variant == "paper" else rope
        check_rotation("lizard", rope, width or shape.head_dim)
        maps = [ExponentialMap(shape.num_heads, shape.head_dim, width=width or shape.head_dim) for _ in range(2)]
        is_joined = text == "exact" and branches != "window"
        super().__init__(shape, "lizard", text=text, log_mean_product=maps[0].log_mean_product, is_joined=is_joined)
        self.window, self.branches, self.num_meta, self.rope = window, branches, num_meta, rope
        self.directions, self.is_paper = DIRECTIONS[directions], variant == "paper"
        if branches != "window":
            self.query_map, self.key_map = maps
            heads = 1 if self.is_paper else shape.num_heads
            self.gates = LogGates(
                shape.hidden_size, 2 * len(self.directions), heads, 1, rank=0, bias=OPEN, temperature=1.0
            )
        if branches != "linear" and num_meta:
            self.meta = nn.Parameter(torch.full((shape.num_heads, num_meta), META))
        if branches == "both":
            self.balance = nn.Parameter(torch.ones(1) if self.is_paper else torch.zeros(shape.num_heads))

    def features(self, tokens: Tokens) -> FeaturePair:
        """See `JointMixer.features`."""
        return map_pair(tokens, self.rope, self.query_map, self.key_map)

    def log_gates(self, tokens: Tokens) -> list[tuple[Tensor, Tensor | None]]:
        """See `GatedMixer.log_gates`."""
        gates = self.gates(tokens.hidden_states[:, tokens.image])
        return both_ways(gates.expand(-1, -1, self.shape.num_heads, -1, -1))

    def combine(self, linear: Tensor, window: Tensor) -> Tensor:
        """See `ConvexMixer.combine`."""
        balance = self.balance.to(linear.dtype)
        if self.is_paper:
            return linear + balance * window
        share = balance.sigmoid()[:, None, None]
        return (1 - share) * linear + share * window

    def attend_window(self, tokens: Tokens) -> Tensor:
        """See `ConvexMixer.attend_window`."""
        query, key = (tokens.for_products(states) for states in self._window_pair(tokens))
        image, text, context, value = tokens.image, tokens.text, tokens.context, tokens.product_value
        part = None if self.is_paper else text_and_window(tokens, self.window)
        if part is None:
            seen = query[:, :, image], key[:, :, text], value[:, :, text]
            of_text = softmax_part(*seen, scale=context.scale, key_mask=tokens.mask_of(text))
            part = merge(of_text, window_alone(query, key, tokens, self.window))
        output = part.output
        if self.num_meta:
            output = output * (part.log_mass - self._log_meta(part.log_mass)).sigmoid()
        return with_text_queries(
            output, query, key, value, layout=context.layout, scale=context.scale, key_mask=context.key_mask
        )

    def dense_window(self, tokens: Tokens) -> Tensor:
        """See `ConvexMixer.dense_window`."""
        (query, key), image, context = self._window_pair(tokens), tokens.image, tokens.context
        is_text = torch.zeros(query.shape[2], dtype=torch.bool, device=query.device)
        is_text[tokens.text] = True
        seen = inside_window(tokens, self.window) | is_text | is_text[:, None]
        if context.key_mask is not None:
            seen = seen & context.key_mask[:, None, None]
        weights = (query @ key.transpose(-1, -2) * context.scale).exp().masked_fill(~seen, 0.0)
        mass = weights.sum(dim=-1, keepdim=True)
        if self.num_meta:
            mass = mass + self._log_meta(mass).exp() * (~is_text)[:, None]
        output = weights @ tokens.value / mass.masked_fill(mass == 0, 1.0)
        return in_order(output[:, :, tokens.text], output[:, :, image], context.layout)

    def flops(self, layout: Layout, batch: int = 1) -> int:
        """Both branches, W of query and key, and the gates."""
        if self.branches == "window":
            return batch * self.shape.num_heads * self.branch_flops(layout, 0)
        features = self.query_map.num_features
        each = self.branch_flops(layout, features)
        each += self.query_map.flops(layout.num_tokens) + self.key_map.flops(layout.num_tokens)
        return batch * (self.shape.num_heads * each + self.gates.flops(layout.num_image_tokens))

    def _window_pair(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        return (tokens.query, tokens.key) if self.is_paper else tokens.rotated

    def _log_meta(self, like: Tensor) -> Tensor:
        return self.meta.to(like.dtype).logsumexp(dim=-1)[:, None, None]
