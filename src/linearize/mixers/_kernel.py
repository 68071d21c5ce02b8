"""What mixers with weights c(i, j) phi(q_i)^T phi(k_j) have in common: text, the normaliser, the reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from linearize.errors import LinearizeError
from linearize.layout import Layout
from linearize.mixers.base import AttentionShape, Mixer, MixerContext
from linearize.ops.dense_attention import match_heads
from linearize.ops.feature_maps import Features
from linearize.ops.linear_attention import (
    LinearPart,
    exact_text_flops,
    join,
    linear_attention,
    linear_attention_flops,
    mask_keys,
    softmax_part,
    with_text_queries,
)
from linearize.ops.precision import full_precision, widen


@dataclass
class KernelFeatures:
    """Features of all tokens.

    Attributes:
        query: As the normaliser sees them, [batch, heads, tokens, num_features].
        key: Same, with one factor for all tokens of a head.
        rotated: Query and key as the numerator sees them; None where it sees the same.
    """

    query: Features
    key: Features
    rotated: tuple[Tensor, Tensor] | None = None

    def of(self, queries: slice, keys: slice) -> KernelFeatures:
        """Those of some queries and some keys."""
        log_scale = self.query.log_scale
        if log_scale.dim() == 4:
            log_scale = log_scale[:, :, queries]
        rotated = self.rotated and (self.rotated[0][:, :, queries], self.rotated[1][:, :, keys])
        query = Features(self.query.values[:, :, queries], log_scale)
        return KernelFeatures(query, Features(self.key.values[:, :, keys], self.key.log_scale), rotated)


def check_choice(mixer: str, knob: str, value: object, choices: tuple[str, ...]) -> None:
    """Raises LinearizeError where a knob has none of its values."""
    if value not in choices:
        raise LinearizeError(f"mixer {mixer!r} got {knob}={value!r}; choose one of {', '.join(choices)}")


def check_count(mixer: str, knob: str, value: object, least: int = 1) -> None:
    """Raises LinearizeError where a knob is no whole number, or below the least."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise LinearizeError(f"mixer {mixer!r} got {knob}={value!r}; choose a whole number, {least} or more")


class KernelMixer(Mixer):
    """Base of mixers whose image tokens see image tokens with weights c(i, j) phi(q_i)^T phi(k_j) at linear cost.

    With `text="exact"` image queries see text keys by softmax, joined with the linear part under one normaliser, and
    text queries see everything by softmax: T tokens of text cost T N pairs, which is linear in the picture. With
    `text="state"` text keys are one more state, which everybody sees with c = 1, and text queries are linear, too.

    The parameter `log_scale` [heads] is the logarithm of a factor on the linear weights against the softmax's.

    Args:
        shape: Sizes of the layer.
        name: The mixer's name, for messages.
        text: "exact" or "state".
    """

    def __init__(self, shape: AttentionShape, name: str, text: str) -> None:
        super().__init__(shape)
        check_choice(name, "text", text, ("exact", "state"))
        self.text = text
        self.log_scale = nn.Parameter(torch.zeros(shape.num_heads, dtype=torch.float32))

    def features(self, query: Tensor, key: Tensor, context: MixerContext) -> KernelFeatures:
        """Features of all tokens; query and key are [batch, heads, tokens, head_dim] and not rotated."""
        raise NotImplementedError

    def weigh(self, query: Tensor, key: Tensor, value: Tensor, context: MixerContext) -> Tensor:
        """sum_j c(i, j) (query_i^T key_j) value_j over image tokens, at linear cost.

        Args:
            query: Features [batch, heads, image tokens, num_features].
            key: Same, zero where a key is not valid.
            value: [batch, heads, image tokens, channels].
            context: As `forward` got it.
        """
        raise NotImplementedError

    def dense_factor(self, context: MixerContext, like: Tensor) -> Tensor:
        """c(i, j), to be broadcast to [batch, heads, image tokens, image tokens], in the type of `like`."""
        raise NotImplementedError

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: MixerContext) -> Tensor:
        """See `Mixer.forward`."""
        key, value = match_heads(key, query), match_heads(value, query)
        with full_precision(query):
            features = self.features(widen(query), widen(key), context)
            part = self.image_part(features, value, context)
            if self.text == "state":
                return self._add_states(features, value, part, context).to(value.dtype)
            query, key = context.rotate(query), context.rotate(key)
            text, image, mask = context.layout.text_slice, context.layout.image_slice, context.key_mask
            exact = softmax_part(
                query[:, :, image],
                key[:, :, text],
                value[:, :, text],
                scale=context.scale,
                key_mask=None if mask is None else mask[:, text],
            )
            return with_text_queries(
                join(exact, part.scaled(widen(self.log_scale))),
                query,
                key,
                value,
                layout=context.layout,
                scale=context.scale,
                key_mask=mask,
            )

    def image_part(self, features: KernelFeatures, value: Tensor, context: MixerContext) -> LinearPart:
        """Image queries over image keys, before `log_scale`."""
        image, mask = context.layout.image_slice, context.key_mask
        mask = None if mask is None else mask[:, image]
        of_image, value = features.of(image, image), widen(value[:, :, image])
        query, key = of_image.query.values, mask_keys(of_image.key.values, mask)
        log_scale = of_image.query.log_scale + of_image.key.log_scale
        ones = torch.ones_like(value[..., :1])
        if of_image.rotated is None:
            sums = self.weigh(query, key, torch.cat([value, ones], dim=-1), context)
            return LinearPart(sums[..., :-1], sums[..., -1:], log_scale)
        rotated_query, rotated_key = of_image.rotated[0], mask_keys(of_image.rotated[1], mask)
        numerator = self.weigh(rotated_query, rotated_key, value, context)
        return LinearPart(numerator, self.weigh(query, key, ones, context), log_scale)

    def reference(self, query: Tensor, key: Tensor, value: Tensor, context: MixerContext) -> Tensor:
        """See `Mixer.reference`: one matrix of weights for the numerator and one for the normaliser."""
        key, value = match_heads(key, query), match_heads(value, query)
        image, features = context.layout.image_slice, self.features(query, key, context)
        mass = torch.matmul(features.query.values, features.key.values.transpose(-1, -2))
        weights = mass
        if features.rotated is not None:
            weights = torch.matmul(features.rotated[0], features.rotated[1].transpose(-1, -2))
        factor = torch.exp(features.query.log_scale + features.key.log_scale).expand_as(mass).clone()
        factor[:, :, image, image] *= self.dense_factor(context, mass)
        weights, mass = weights * factor, mass * factor
        if self.text == "exact":
            scores = torch.matmul(context.rotate(query), context.rotate(key).transpose(-1, -2)) * context.scale
            linear = torch.zeros(mass.shape[-2:], dtype=torch.bool, device=mass.device)
            linear[image, image] = True
            scale = torch.exp(self.log_scale[:, None, None])
            weights = torch.where(linear, weights * scale, scores.exp())
            mass = torch.where(linear, mass * scale, scores.exp())
        if context.key_mask is not None:
            valid = context.key_mask[:, None, None, :]
            weights, mass = weights * valid, mass * valid
        return torch.matmul(weights, value) / mass.sum(dim=-1, keepdim=True)

    def text_flops(self, layout: Layout, num_features: int) -> int:
        """Operations in one head that text costs: exact pairs, or states."""
        head_dim = self.shape.head_dim
        if self.text == "exact":
            return exact_text_flops(layout, head_dim)
        num_text = layout.num_text_tokens
        over_all = linear_attention_flops(num_text, layout.num_tokens, num_features, head_dim)
        return over_all + linear_attention_flops(layout.num_image_tokens, num_text, num_features, head_dim)

    def _add_states(self, features: KernelFeatures, value: Tensor, part: LinearPart, context: MixerContext) -> Tensor:
        """Text keys as a state for image queries, and text queries on the states of text and image."""
        layout, mask = context.layout, context.key_mask
        text, everything = layout.text_slice, slice(None)

        def attend(queries: slice, keys: slice) -> LinearPart:
            some = features.of(queries, keys)
            seen = None if mask is None else mask[:, keys]
            return linear_attention(some.query, some.key, value[:, :, keys], key_mask=seen, rotated=some.rotated)

        of_text, to_text = attend(text, everything), attend(layout.image_slice, text)
        part = part._replace(numerator=part.numerator + to_text.numerator, mass=part.mass + to_text.mass)
        outputs = [join(None, of_text), join(None, part)]
        return torch.cat(outputs if layout.text_first else outputs[::-1], dim=2)
