"""The tokens of one call, and features of their queries and keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from linearize.errors import LinearizeError
from linearize.layout import Layout
from linearize.mixers.base import MixerContext
from linearize.ops.dense_attention import match_heads
from linearize.ops.feature_maps import FeatureMap, Features
from linearize.ops.precision import has_narrow_products, widen
from linearize.ops.rotary import rotate_features

Value = TypeVar("Value")


def _once(compute: Callable[[Any], Value]) -> Value:
    """A property that is computed once; `functools.cached_property` has a lock, which compilers cannot trace."""

    def read(tokens: Tokens) -> Value:
        if compute.__name__ not in tokens.computed:
            tokens.computed[compute.__name__] = compute(tokens)
        return cast(Value, tokens.computed[compute.__name__])

    return cast(Value, property(read, doc=compute.__doc__))


@dataclass(frozen=True)
class Tokens:
    """Query, key and value of one call: as given, in float32 at least, and as products over many tokens take them.

    Attributes:
        given: Query, key and value as the layer gave them, with key-value heads. Autocast, which is off in mixers, has
            narrowed the value where it was on, but not normed query and key.
        context: The call's context.
        product_dtype: What products over many tokens are computed in; None leaves all in float32 at least.
        computed: The properties below by name, once they are asked for.
    """

    given: tuple[Tensor, Tensor, Tensor]
    context: MixerContext
    product_dtype: torch.dtype | None = None
    computed: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, query: Tensor, key: Tensor, value: Tensor, context: MixerContext, *, wide_products: bool = True
    ) -> Tokens:
        """The tokens of one call, whose products are in the type of the value where `has_narrow_products` says so."""
        narrow = not wide_products and has_narrow_products(value.dtype, value.device.type)
        return cls((query, key, value), context, value.dtype if narrow else None)

    @_once
    def query(self) -> Tensor:
        """[batch, heads, tokens, head_dim], in float32 at least and not rotated."""
        return widen(self.given[0])

    @_once
    def key(self) -> Tensor:
        """Same, for each query head."""
        return widen(match_heads(self.given[1], self.given[0]))

    @_once
    def value(self) -> Tensor:
        """Same, for each query head."""
        return widen(match_heads(self.given[2], self.given[0]))

    @_once
    def given_rotated(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated query and key, and value, in the type of the value and with key-value heads, for softmax."""
        (query, key), value = self._rotated, self.given[2]
        return query.to(value.dtype), key.to(value.dtype), value

    @_once
    def rotated(self) -> tuple[Tensor, Tensor]:
        """Query and key, rotated, in float32 at least and with a key for each query head."""
        query, key = self._rotated
        return widen(query), widen(match_heads(key, query))

    @_once
    def product_value(self) -> Tensor:
        """The value as products take it, for each query head."""
        return self.value if self.product_dtype is None else match_heads(self.given[2], self.given[0])

    @_once
    def product_rotated(self) -> tuple[Tensor, Tensor]:
        """Rotated query and key as products take them, with a key for each query head."""
        if self.product_dtype is None:
            return self.rotated
        query, key, _ = self.given_rotated
        return query, match_heads(key, query)

    def for_products(self, states: Tensor) -> Tensor:
        """A tensor of float32 or wider as products take it."""
        if self.product_dtype is None:
            return states
        # Head by head in memory, in the same copy: products would copy it again.
        return states.to(self.product_dtype, memory_format=torch.contiguous_format)

    @_once
    def _rotated(self) -> tuple[Tensor, Tensor]:
        """Rotated query and key in their own types, with key-value heads."""
        return self.context.rotate_both(self.given[0], self.given[1])

    @property
    def hidden_states(self) -> Tensor:
        """The layer's input, [batch, tokens, hidden_size], in float32 or as wide as the query.

        Raises:
            LinearizeError: The backbone does not pass it on.
        """
        if self.context.hidden_states is None:
            raise LinearizeError("this mixer needs the layer's hidden states; use it in a linearized transformer")
        return self.context.hidden_states.to(torch.promote_types(self.given[0].dtype, torch.float32))

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

    def for_products(self, tokens: Tokens) -> FeaturePair:
        """The features as products take them; their logarithmic scales stay."""
        query, key = (one._replace(values=tokens.for_products(one.values)) for one in (self.query, self.key))
        if self.rotated is None:
            return FeaturePair(query, key)
        return FeaturePair(query, key, (tokens.for_products(self.rotated[0]), tokens.for_products(self.rotated[1])))


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
