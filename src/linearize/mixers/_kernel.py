"""What mixers have in common whose linear weights carry a factor of the two places: c(i, j) phi(q_i)^T phi(k_j)."""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.mixers._joint import JointMixer
from linearize.mixers._tokens import FeaturePair, Tokens
from linearize.mixers.base import MixerContext
from linearize.ops.linear_attention import LinearPart, dense_linear_weights, mask_keys, numerator_and_mass, state_of
from linearize.ops.products import aligned, for_products, with_ones


class KernelMixer(JointMixer):
    """Base of mixers whose image tokens see image tokens with weights c(i, j) phi(q_i)^T phi(k_j) at linear cost.

    Text is as in `JointMixer`; pairs with text have c = 1, and so have all by default.
    """

    def weigh(self, query: Tensor, key: Tensor, value: Tensor, context: MixerContext) -> Tensor:
        """sum_j c(i, j) (query_i^T key_j) value_j over image tokens, at linear cost.

        Args:
            query: Features [batch, heads, image tokens, num_features].
            key: Same, zero where a key is not valid.
            value: [batch, heads, image tokens, channels].
            context: As `forward` got it.
        """
        query, key, value = for_products(query, key, value)
        return (query @ state_of(key, aligned(value)).to(query.dtype))[..., : value.shape[-1]]

    def dense_factor(self, context: MixerContext, like: Tensor) -> Tensor:
        """c(i, j), to be broadcast to [batch, heads, image tokens, image tokens], in the type of `like`."""
        return like.new_ones(())

    def mix_images(self, pair: FeaturePair, tokens: Tokens) -> LinearPart:
        """See `JointMixer.mix_images`."""
        context, mask, value = tokens.context, tokens.mask_of(tokens.image), tokens.product_value[:, :, tokens.image]
        query, key = pair.query.values, mask_keys(pair.key.values, mask)
        log_scale = pair.query.log_scale + pair.key.log_scale
        if pair.rotated is None:
            sums = self.weigh(query, key, with_ones(value), context)
            return LinearPart(*numerator_and_mass(sums, value.shape[-1]), log_scale)
        numerator = self.weigh(pair.rotated[0], mask_keys(pair.rotated[1], mask), value, context)
        return LinearPart(numerator, self.weigh(query, key, torch.ones_like(value[..., :1]), context), log_scale)

    def dense_images(self, pair: FeaturePair, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """See `JointMixer.dense_images`."""
        weights, mass = dense_linear_weights(pair.query, pair.key, pair.rotated)
        factor = self.dense_factor(tokens.context, mass)
        return weights * factor, mass * factor
