"""Positive orthogonal random features: an unbiased estimate of exp(q k) (FAVOR+, arXiv 2009.14794)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from linearize.ops.feature_maps import Features, safe_exponential


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


def positive_features(states: Tensor, projection: Tensor, *, is_key: bool, key_mask: Tensor | None = None) -> Features:
    """exp(w_r x - |x|^2 / 2) / sqrt(m), whose products have the mean exp(q k) over draws of w.

    Queries carry a factor of their own each, keys one for all tokens of a head: a factor of each key would change the
    result.

    Args:
        states: [batch, heads, tokens, head_dim].
        projection: [num_features, head_dim].
        is_key: Whether these are keys.
        key_mask: [batch, tokens], True for keys that count.
    """
    exponents = states @ projection.to(states.dtype).T - states.square().sum(dim=-1, keepdim=True) / 2
    features = safe_exponential(exponents, is_key, key_mask)
    return Features(features.values, features.log_scale - math.log(len(projection)) / 2)
