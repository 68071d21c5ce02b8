"""What mixers with positive random features of query and key have in common."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linearize.errors import LinearizeError
from linearize.mixers._arguments import check_number
from linearize.mixers._kernel import KernelMixer
from linearize.mixers._tokens import FeaturePair, Tokens
from linearize.mixers.base import AttentionShape
from linearize.ops.random_features import draw_projection, positive_features


class RandomFeatureMixer(KernelMixer):
    """Base of mixers whose features are exp(w_r x - |x|^2 / 2) with random w_r.

    With learned lengths, x = sqrt(t) R q / |q| with a temperature t of each head, so that phi(q)^T phi(k) estimates
    exp(t cos(q, k)); unit lengths are those of t = 1; and with given ones x = sqrt(scale) R q, which estimates the
    softmax's own weights. The relative variance is (exp(|x_q + x_k|^2) - 1) / num_features: at most e^4t / num_features
    with a temperature, and e^sqrt(d) / num_features for an orthogonal pair of queries and keys of a root mean square of
    1 with given lengths.

    The buffer `projection` [num_features, head_dim] is drawn in the constructor from the seed 0, so that layers can
    be built anew, and is saved with the layer. It changes only by `redraw`.

    Args:
        shape: Sizes of the layer.
        name: The mixer's name, for messages.
        num_features: Random features of a head.
        temperature: What t starts from.
        lengths: "learned", "unit" or "given".
        text: "exact" or "state".
        is_rotated: Whether query and key are rotated, R.
    """

    projection: Tensor

    def __init__(
        self,
        shape: AttentionShape,
        name: str,
        *,
        num_features: int,
        temperature: float,
        lengths: str,
        text: str,
        is_rotated: bool = True,
    ) -> None:
        check_number(name, "num_features", num_features, 1)
        if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 < temperature <= 16:
            raise LinearizeError(
                f"mixer {name!r} got temperature={temperature!r}; choose a number above 0 and at most 16 (the variance "
                "of the features grows as its exponential)"
            )
        # exp(q k / sqrt(d)) of unit normals is e^(1/2) on average, exp(t cos) about 1.
        super().__init__(shape, name, text=text, log_mean_product=0.5 if lengths == "given" else 0.0)
        self.num_features, self.lengths, self.is_rotated = num_features, lengths, is_rotated
        if lengths == "learned":
            self.log_temperature = nn.Parameter(torch.full((shape.num_heads,), math.log(temperature)))
        self.register_buffer("projection", torch.empty(num_features, shape.head_dim))
        self.redraw(0)

    def redraw(self, seed: int) -> None:
        """Draws the random features anew, the same ones for a seed everywhere; call it between optimizer steps."""
        drawn = draw_projection(self.num_features, self.shape.head_dim, torch.Generator().manual_seed(seed))
        with torch.no_grad():
            self.projection.copy_(drawn)

    def features(self, tokens: Tokens) -> FeaturePair:
        """See `JointMixer.features`: rotation comes first, as the features estimate a function of q k."""
        pair = tokens.rotated if self.is_rotated else (tokens.query, tokens.key)
        query, key = (self._scaled(states, tokens.context.scale) for states in pair)
        mask, dtype = tokens.context.key_mask, tokens.product_dtype
        return FeaturePair(
            positive_features(query, self.projection, is_key=False, dtype=dtype),
            positive_features(key, self.projection, is_key=True, key_mask=mask, dtype=dtype),
        )

    def _scaled(self, states: Tensor, scale: float) -> Tensor:
        if self.lengths == "given":
            return states * scale**0.5
        unit = F.normalize(states, dim=-1)
        if self.lengths == "unit":
            return unit
        return unit * torch.exp(self.log_temperature / 2)[:, None, None].to(states.dtype)
