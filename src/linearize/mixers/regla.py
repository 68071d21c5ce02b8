"""ReGLA: safe exponential features, a refined gate, and a norm of the output."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linearize.layout import Layout
from linearize.mixers._arguments import VARIANTS, check_choice, check_number
from linearize.mixers._gated import DIRECTIONS, GATES, GatedMixer, LogGates, both_ways
from linearize.mixers._tokens import FeaturePair, Tokens
from linearize.mixers.base import AttentionShape, MixerContext
from linearize.ops.feature_maps import Features, safe_exponential
from linearize.ops.precision import without_autocast

# sigmoid(8)^2, at r = 0, leaves half of a weight after 1000 tokens; at r = 1/2, where it starts, after 2000.
OPEN = 8.0


class ReglaMixer(GatedMixer):
    """ReGLA (Lu et al., arXiv 2502.01578): exponential features, a refined gate, in both directions.

    The features are exp(q) and exp(k) [batch, heads, tokens, head_dim] of the teacher's query and key, as numbers of at
    most 1: less the largest channel of each query, and the largest of all keys. Their product is divided by
    e sqrt(head_dim (e^2 - 1)), its standard deviation for unit normals. Gates of the layer's input x are

        F = (1 - r) g^2 + r (1 - (1 - g)^2),   g = sigmoid(W_g x + b_g),   r = sigmoid(W_r x + b_r),

    whose gradient dF/dg = 2 (1 - r) g + 2 r (1 - g) does not vanish with g near 0 or 1. Scans in both directions (see
    `GlaMixer`) give n and z, and o_i = n_i / z_i, with text exact, or a state. What is taken off the largest numbers is
    given back to the sums, so that it cancels and does not weigh text against image tokens.

    `variant=paper` is the published formula in both directions: features stay below 1, there is no z, and each head's
    output goes through a layer norm, which calibration gives the teacher's mean and deviation of each channel. It
    holds text as a state. The paper's gates have full matrices: `rank=0`.

    Args:
        shape: Sizes of the layer.
        rope: Rotate query and key before_map, or none.
        gate: One in each "head" or each "channel" of the features.
        directions: "rows" or "rows_and_columns".
        text: "exact" or "state".
        rank: Width of the gates' low-rank projections; 0 means one matrix.
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
        rope: str = "before_map",
        gate: str = "channel",
        directions: str = "rows",
        text: str = "exact",
        rank: int = 16,
        variant: str = "dit",
    ) -> None:
        check_choice("regla", "rope", rope, ("before_map", "none"))
        check_choice("regla", "gate", gate, GATES)
        check_choice("regla", "directions", directions, tuple(DIRECTIONS))
        check_choice("regla", "variant", variant, VARIANTS)
        check_number("regla", "rank", rank, 0)
        is_paper = variant == "paper"
        log_mean = math.log(shape.head_dim) + 1
        log_deviation = 1 + 0.5 * math.log(shape.head_dim * (math.e**2 - 1))
        super().__init__(shape, "regla", text="state" if is_paper else text, log_mean_product=log_mean - log_deviation)
        self.rope, self.directions, self.has_normaliser = rope, DIRECTIONS[directions], not is_paper
        self.log_deviation = log_deviation
        width = shape.head_dim if gate == "channel" else 1
        sizes = (shape.hidden_size, 2 * len(self.directions), shape.num_heads, width)
        self.gates = LogGates(*sizes, rank=rank, bias=OPEN, temperature=1.0)
        self.refinement = LogGates(*sizes, rank=rank, bias=0.0, temperature=1.0)
        if is_paper:
            self.norm_weight = nn.Parameter(torch.ones(shape.num_heads, 1, shape.head_dim))
            self.norm_bias = nn.Parameter(torch.zeros(shape.num_heads, 1, shape.head_dim))

    def features(self, tokens: Tokens) -> FeaturePair:
        """See `JointMixer.features`."""
        query, key = tokens.rotated if self.rope == "before_map" else (tokens.query, tokens.key)
        mapped = safe_exponential(query, over_tokens=False)
        keys = safe_exponential(key, over_tokens=True, key_mask=tokens.context.key_mask)
        if not self.has_normaliser:
            zero = query.new_zeros(())
            mapped, keys = mapped._replace(log_scale=zero), keys._replace(log_scale=zero)
        return FeaturePair(Features(mapped.values, mapped.log_scale - self.log_deviation), keys)

    def log_gates(self, tokens: Tokens) -> list[tuple[Tensor, Tensor | None]]:
        """See `GatedMixer.log_gates`."""
        states = tokens.hidden_states[:, tokens.image]
        return both_ways(refined_log_gate(self.gates.logits(states), self.refinement.logits(states)))

    def finish(self, output: Tensor, tokens: Tokens) -> Tensor:
        """See `JointMixer.finish`: the published norm."""
        if self.has_normaliser:
            return output
        normed = F.layer_norm(output, output.shape[-1:])
        return normed * self.norm_weight.to(output.dtype) + self.norm_bias.to(output.dtype)

    @without_autocast
    @torch.no_grad()
    def calibrate(self, query: Tensor, key: Tensor, value: Tensor, context: MixerContext) -> None:
        """See `JointMixer.calibrate`; the published norm gets the teacher's mean and deviation of each channel."""
        if self.has_normaliser:
            super().calibrate(query, key, value, context)
            return
        tokens = Tokens.of(query, key, value, context)
        output = context.softmax(*tokens.given_rotated).to(self.norm_weight.dtype)
        self.norm_weight.copy_(output.std(dim=(0, 2))[:, None])
        self.norm_bias.copy_(output.mean(dim=(0, 2))[:, None])

    def flops(self, layout: Layout, batch: int = 1) -> int:
        """Scans, both projections of the gates, and text."""
        features, images = self.shape.head_dim, layout.num_image_tokens
        each = self.scan_flops(images, features) + self.text_flops(layout, features)
        return batch * (self.shape.num_heads * each + self.gates.flops(images) + self.refinement.flops(images))


def refined_log_gate(gate: Tensor, refinement: Tensor) -> Tensor:
    """Logarithm of F, of the logits of g and r: log g + log(1 - (1 - g) (1 - 2 r)), which is exact for g near 1."""
    # 2 r - 1 is the hyperbolic tangent of half the logit.
    opened = (-gate).sigmoid() * (refinement / 2).tanh()
    return F.logsigmoid(gate) + torch.log1p(opened.clamp(min=torch.finfo(gate.dtype).eps - 1))
