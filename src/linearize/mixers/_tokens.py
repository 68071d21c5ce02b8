"""The tokens of one call, and features of their queries and keys."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from linearize.errors import LinearizeError
from linearize.layout import Layout
from linearize.mixers.base import MixerContext
from linearize.ops.dense_attention import match_heads
from linearize.ops.feature_maps import FeatureMap, Features
from linearize.ops.precision import widen
from linearize.ops.rotary import rotate_features


@dataclass(frozen=True)
class Tokens:
    """Query, key and value of one call: as given, and in float32 at least with a key and value for each query head.

    Attributes:
        query: [batch, heads, tokens, head_dim], not rotated.
        key: Same.
        value: Same.
        given: Query, key and value as the layer gave them, with key-value heads.
        context: The call's context.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    given: tuple[Tensor, Tensor, Tensor]
    context: MixerContext

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor, context: MixerContext) -> Tokens:
        """The tokens of one call."""
        wide = (widen(query), widen(match_heads(key, query)), widen(match_heads(value, query)))
        return cls(*wide, (query, key, value), context)

    @cached_property
    def given_rotated(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated query and key, and value, in their own types and with key-value heads."""
        query, key, value = self.given
        return self.context.rotate(query), self.context.rotate(key), value

    @cached_property
    def rotated(self) -> tuple[Tensor, Tensor]:
        """Query and key, rotated, in float32 at least and with a key for each query head."""
        query, key, _ = self.given_rotated
        return widen(query), widen(match_heads(key, query))

    @property
    def hidden_states(self) -> Tensor:
        """The layer's input, [batch, tokens, hidden_size], in the type of the query.

        Raises:
            LinearizeError: The backbone does not pass it on.
        """
        if self.context.hidden_states is None:
            raise LinearizeError("this mixer needs the layer's hidden states; use it in a linearized transformer")
        return self.context.hidden_states.to(self.query.dtype)

    @property
    def image(self) -> slice:
        """Where image tokens are."""
        return self.context.layout.image_slice

    @property
    def text(self) -> slice:
        """Where text tokens are."""
        return self.context.layout.text_slice

    def mask_of(self, where: slice) -> Tensor | None:
        """The key mask of some tokens."""
        return None if self.context.key_mask is None else self.context.key_mask[:, where]


class FeaturePair(NamedTuple):
    """Features of query and key, and the rotated ones that take their place in the numerator."""

    query: Features
    key: Features
    rotated: tuple[Tensor, Tensor] | None = None

    def at(self, queries: slice, keys: slice) -> FeaturePair:
        """Those of some tokens."""
        rotated = None if self.rotated is None else (self.rotated[0][:, :, queries], self.rotated[1][:, :, keys])
        return FeaturePair(_at(self.query, queries), _at(self.key, keys), rotated)


def _at(features: Features, where: slice) -> Features:
    each = features.log_scale.dim() > 2 and features.log_scale.shape[2] == features.values.shape[2]
    return Features(features.values[:, :, where], features.log_scale[:, :, where] if each else features.log_scale)


def in_order(text: Tensor, image: Tensor, layout: Layout) -> Tensor:
    """Text and image tokens, [batch, heads, tokens, channels], one after another as the layout says."""
    return torch.cat([text, image] if layout.text_first else [image, text], dim=2)


def map_pair(tokens: Tokens, rope: str, query_map: FeatureMap, key_map: FeatureMap) -> FeaturePair:
    """Features of query and key by two maps, or by one, that are rotated before them, after them or not at all."""
    query, key = tokens.rotated if rope == "before_map" else (tokens.query, tokens.key)
    context = tokens.context
    mapped = query_map(query, is_key=False), key_map(key, is_key=True, key_mask=context.key_mask)
    return rotate_pair(*mapped, context, query_map.num_parts) if rope == "after_map" else FeaturePair(*mapped)


def rotate_pair(query: Features, key: Features, context: MixerContext, num_parts: int) -> FeaturePair:
    """Features with RoPE after the map; each part rotates as the positions say, at its own width."""
    angles = context.angles(context.positions, query.values.shape[-1] // num_parts)
    rotated = tuple(rotate_features(features.values, angles, num_parts) for features in (query, key))
    return FeaturePair(query, key, (rotated[0], rotated[1]))
