"""GLA: gated linear attention in both directions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linearize.layout import Layout
from linearize.mixers._arguments import ROPE, VARIANTS, check_choice, check_number
from linearize.mixers._gated import DIRECTIONS, GATES, GatedMixer, LogGates, both_ways
from linearize.mixers._tokens import FeaturePair, Tokens, map_pair
from linearize.mixers.base import AttentionShape
from linearize.ops.feature_maps import Features, build_feature_map


class GlaMixer(GatedMixer):
    """Gated linear attention (Yang et al., arXiv 2312.06635), for pictures as in DiG (arXiv 2405.18428).

    The published layers are causal: S_i = G_i S_{i-1} + k_i v_i^T, o_i = q_i S_i, with gates G = sigmoid(W x)^(1/16)
    from the layer's input x. Here image tokens are scanned in both directions, the diagonal counts once, and weights
    have a sum: with S forward and backward [num_features, head_dim + 1],

        [n_i, z_i] = phi(q_i) (S_i + S'_i - phi(k_i) [v_i, 1]^T),

    which weighs token j by phi(q_i) phi(k_j) times the product of the gates on the way. With gates of 1, as almost at
    the start, it is the linear mixer. Rows and columns are averaged (DiG takes turns among layers). Text is exact, or
    a state without gates; see `JointMixer`.

    `variant=paper` is the published formula in both directions: phi is the identity of query and key, which are not
    rotated, nothing is divided by a sum, each head's output is RMS-normed and multiplied by silu(W_g x); text is a
    state. It starts far from the teacher.

    Args:
        shape: Sizes of the layer.
        feature_map: elu, relu, focused, hedgehog, polar (its positive part) or exponential.
        rope: before_map, after_map or none, see `LinearMixer`; with variant=paper it is none.
        gate: One in each "head" or each "channel" of the features.
        directions: "rows" or "rows_and_columns".
        text: "exact" or "state".
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
        feature_map: str = "hedgehog",
        rope: str = "before_map",
        gate: str = "channel",
        directions: str = "rows_and_columns",
        text: str = "exact",
        rank: int = 16,
        variant: str = "dit",
    ) -> None:
        check_choice("gla", "rope", rope, ROPE)
        check_choice("gla", "gate", gate, GATES)
        check_choice("gla", "directions", directions, tuple(DIRECTIONS))
        check_choice("gla", "variant", variant, VARIANTS)
        check_number("gla", "rank", rank, 0)
        maps = [build_feature_map(feature_map, shape.num_heads, shape.head_dim) for _ in range(2)]
        is_paper = variant == "paper"
        super().__init__(shape, "gla", text="state" if is_paper else text, log_mean_product=maps[0].log_mean_product)
        self.directions, self.rope, self.has_normaliser = DIRECTIONS[directions], rope, not is_paper
        self.num_features = shape.head_dim if is_paper else maps[0].num_features
        width = self.num_features if gate == "channel" else 1
        self.gates = LogGates(shape.hidden_size, 2 * len(self.directions), shape.num_heads, width, rank=rank)
        if is_paper:
            self.output_gate = nn.Linear(shape.hidden_size, shape.num_heads * shape.head_dim)
            self.norm_weight = nn.Parameter(torch.ones(shape.head_dim))
        else:
            self.query_map, self.key_map = maps

    def features(self, tokens: Tokens) -> FeaturePair:
        """See `JointMixer.features`."""
        if self.has_normaliser:
            return map_pair(tokens, self.rope, self.query_map, self.key_map)
        zero = tokens.query.new_zeros(())
        return FeaturePair(Features(tokens.query * tokens.context.scale, zero), Features(tokens.key, zero))

    def log_gates(self, tokens: Tokens) -> list[tuple[Tensor, Tensor | None]]:
        """See `GatedMixer.log_gates`."""
        return both_ways(self.gates(tokens.hidden_states[:, tokens.image]))

    def finish(self, output: Tensor, tokens: Tokens) -> Tensor:
        """See `JointMixer.finish`: the published norm and output gate."""
        if self.has_normaliser:
            return output
        states, weights = tokens.hidden_states, self.output_gate
        opened = F.linear(states, weights.weight.to(states.dtype), weights.bias.to(states.dtype))
        gate = F.silu(opened.unflatten(-1, (self.shape.num_heads, -1)).transpose(1, 2))
        return F.rms_norm(output, output.shape[-1:], self.norm_weight.to(output.dtype), 1e-6) * gate

    def flops(self, layout: Layout, batch: int = 1) -> int:
        """Scans, gates, maps, exact text or its state, and the output gate of variant=paper."""
        shape, images = self.shape, layout.num_image_tokens
        each = self.scan_flops(images, self.num_features) + self.text_flops(layout, self.num_features)
        total = shape.num_heads * each + self.gates.flops(images)
        if self.has_normaliser:
            maps = self.query_map.flops(layout.num_tokens) + self.key_map.flops(layout.num_tokens)
            total += shape.num_heads * maps
        else:
            total += 2 * layout.num_tokens * self.output_gate.weight.numel()
        return batch * total
