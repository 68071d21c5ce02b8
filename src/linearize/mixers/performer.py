"""Performer: softmax's weights estimated by positive orthogonal random features."""

from __future__ import annotations

from linearize.layout import Layout
from linearize.mixers._arguments import VARIANTS, check_choice
from linearize.mixers._random_features import RandomFeatureMixer
from linearize.mixers.base import AttentionShape
from linearize.ops.linear_attention import linear_attention_flops


class PerformerMixer(RandomFeatureMixer):
    """Performer's FAVOR+: "Rethinking Attention with Performers", Choromanski et al., arXiv 2009.14794.

        o_i = phi(q_i)^T sum_j phi(k_j) v_j^T / phi(q_i)^T sum_j phi(k_j),
        phi(x) = m^(-1/2) [exp(w_r x - |x|^2 / 2)]_r,   E phi(q)^T phi(k) = exp(q k),

    with m = num_features rows w_r of random orthogonal matrices times lengths of normal vectors, at a cost linear in
    tokens. `variant="dit"` replaces the lengths of rotated query and key by a learned temperature of each head: with
    normed queries and keys, as in FLUX, the published estimate has a relative variance of 10^7 and more. With
    `variant="paper"` and `text="state"` it is the published formula.

    Where this differs from the published code: the sign fix that makes orthogonal matrices uniform, without which the
    estimate is biased; no constant is added to features, as the largest exponents are split off instead; features
    are redrawn by `redraw(seed)` between optimizer steps and never inside `forward`.

    Query and key are [batch, heads, tokens, head_dim], features [batch, heads, tokens, num_features].

    Args:
        shape: Sizes of the layer.
        num_features: Random features of a head.
        temperature: What the temperature starts from; for "dit" alone.
        variant: "dit" or "paper".
        text: "exact" or "state", see `JointMixer`.

    Raises:
        LinearizeError: A knob has none of its values.
    """

    def __init__(
        self,
        shape: AttentionShape,
        *,
        num_features: int = 256,
        temperature: float = 2.0,
        variant: str = "dit",
        text: str = "exact",
    ) -> None:
        check_choice("performer", "variant", variant, VARIANTS)
        lengths = "learned" if variant == "dit" else "given"
        super().__init__(
            shape, "performer", num_features=num_features, temperature=temperature, lengths=lengths, text=text
        )

    def flops(self, layout: Layout, batch: int = 1) -> int:
        """Features of all tokens that have them, linear attention, and text."""
        tokens, head_dim = layout.num_image_tokens, self.shape.head_dim
        mapped = tokens if self.text == "exact" else layout.num_tokens
        each = 4 * mapped * self.num_features * head_dim
        each += linear_attention_flops(tokens, tokens, self.num_features, head_dim)
        return batch * self.shape.num_heads * (each + self.text_flops(layout, self.num_features))
