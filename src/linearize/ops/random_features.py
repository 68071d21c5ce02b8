"""Positive orthogonal random features: an unbiased estimate of exp(q k) (FAVOR+, arXiv 2009.14794)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from linearize.ops.feature_maps import Features


def haar_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """A matrix [size, size] in float64 that is uniformly distributed among the orthogonal ones.

    The Q of a QR decomposition alone is not: Householder reflections fix the signs of R's diagonal, which biases the
    features (2.55 instead of 2.72 for exp(1) at width 16). The signs are given back to Q.
    """
    normal = torch.randn(size, size, generator=generator, dtype=torch.float64, device="cpu")
    q, r = torch.linalg.qr(normal)
    return q * r.diagonal().sign()


def draw_projection(num_features: int, dim: int, generator: torch.Generator) -> Tensor:
    """Rows [num_features, dim] in float64, each standard normal, orthogonal in blocks of dim rows.

    Directions are rows of Haar-distributed matrices, lengths those of fresh normal vectors.
    """
    blocks = [haar_orthogonal(dim, generator) for _ in range(-(-num_features // dim))]
    normal = torch.randn(num_features, dim, generator=generator, dtype=torch.float64, device="cpu")
    return torch.cat(blocks)[:num_features] * normal.norm(dim=1, keepdim=True)


def positive_features(
    states: Tensor,
    projection: Tensor,
    *,
    is_key: bool,
    key_mask: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Features:
    """exp(w_r x - |x|^2 / 2) / sqrt(m), whose products have the mean exp(q k) over draws of w.

    Queries carry a factor of their own each, keys one for all tokens of a head: a factor of each key would change the
    result.

    Args:
        states: [batch, heads, tokens, head_dim].
        projection: [num_features, head_dim].
        is_key: Whether these are keys.
        key_mask: [batch, tokens], True for keys that count.
        dtype: Of the features; by default that of the states.
    """
    values, largest = _PositiveFeatures.apply(states, projection, is_key, key_mask, dtype or states.dtype)
    return Features(values, largest - math.log(len(projection)) / 2)


class _PositiveFeatures(torch.autograd.Function):
    """exp(w_r x - |x|^2 / 2 - c) and c, of which nothing but the features is kept for the gradient.

    The gradient of x is sum_r g_r f_r (w_r - x).
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, projection: Tensor, is_key: bool, key_mask: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Features of at most 1 and c, [batch, heads, tokens or 1, 1]."""
        exponents = states @ projection.to(states.dtype).T
        half = states.square().sum(dim=-1, keepdim=True) / 2
        largest = exponents.amax(dim=-1, keepdim=True) - half
        if is_key:
            if key_mask is not None:
                largest = largest.masked_fill(~key_mask[:, None, :, None], -torch.inf)
            largest = largest.amax(dim=-2, keepdim=True)
        largest = largest.masked_fill(largest.isinf(), 0.0)
        exponents.sub_(half + largest)
        if key_mask is not None:
            # Masked keys may be larger; they only have to stay finite.
            exponents.clamp_(max=0.0)
        features = exponents.exp_().to(dtype)
        ctx.save_for_backward(states, projection, features)
        ctx.mark_non_differentiable(largest)
        return features, largest

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """A product in the type of the features, with sums in that of the states."""
        states, projection, features = ctx.saved_tensors
        weights = gradient * features
        total = weights.sum(dim=-1, keepdim=True, dtype=states.dtype)
        return (weights @ projection.to(weights.dtype)).to(states.dtype) - states * total, None, None, None, None
