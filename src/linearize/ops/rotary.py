"""Rotation of features whose width is not that of the family's own rotary embedding."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate_features(features: Tensor, angles: Tensor, num_parts: int = 1) -> Tensor:
    """Rotates consecutive pairs of channels, each part of the features by the same angles.

    Args:
        features: [batch, heads, tokens, num_parts * width].
        angles: [tokens, width // 2].
        num_parts: Blocks of channels that stand for the same positions, such as the two signs of a feature map.

    Returns:
        [batch, heads, tokens, num_parts * width].
    """
    pairs = features.unflatten(-1, (num_parts, -1, 2))
    cosine, sine = (wave.to(features.dtype)[:, None] for wave in (angles.cos(), angles.sin()))
    first, second = pairs.unbind(-1)
    rotated = torch.stack([first * cosine - second * sine, first * sine + second * cosine], dim=-1)
    return rotated.flatten(-3)
