"""Linear attention without causality, and how it is joined to exact softmax under one normaliser."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.layout import Layout
from linearize.ops.dense_attention import masked_attention_or_zeros
from linearize.ops.feature_maps import Features
from linearize.ops.precision import widen
from linearize.ops.products import for_products, in_chunks, wide_matmul, with_ones
from linearize.ops.softmax_mass import softmax_with_mass

# Most tokens whose state is one matrix product.
TOKENS_OF_A_STATE = 4096


class LinearPart(NamedTuple):
    """Unnormalised linear attention; both sums are to be multiplied by exp(log_scale).

    Attributes:
        numerator: [batch, heads, queries, head_dim], sum_j w_ij v_j.
        mass: [batch, heads, queries, 1 or head_dim], sum_j w_ij.
        log_scale: Broadcasts to [batch, heads, queries, 1].
    """

    numerator: Tensor
    mass: Tensor
    log_scale: Tensor

    def scaled(self, log_scale: Tensor) -> LinearPart:
        """The same with all weights times exp(log_scale), [heads] or what broadcasts to [batch, heads, queries, 1]."""
        more = log_scale[:, None, None] if log_scale.dim() == 1 else log_scale
        return self._replace(log_scale=self.log_scale + more)


class SoftmaxPart(NamedTuple):
    """Softmax attention over some of the keys.

    Attributes:
        output: [batch, heads, queries, head_dim], zeros where no key is valid.
        log_mass: [batch, heads, queries, 1], log sum_j exp(s_ij), -inf where no key is valid.
        largest: Same, max_j s_ij, where it is kept.
    """

    output: Tensor
    log_mass: Tensor
    largest: Tensor | None = None


def linear_attention(
    query: Features,
    key: Features,
    value: Tensor,
    *,
    key_mask: Tensor | None = None,
    rotated: tuple[Tensor, Tensor] | None = None,
) -> LinearPart:
    """sum_j phi(q_i) phi(k_j) v_j and its mass, over all keys.

    Args:
        query: Features of [batch, heads, queries, num_features].
        key: Features of [batch, heads, keys, num_features].
        value: [batch, heads, keys, head_dim].
        key_mask: [batch, keys], True where a key counts.
        rotated: Rotated features of query and key, which take their place in the numerator alone (RoPE after the
            map: weights that depend on relative positions, but may be negative and do not sum to 1).

    Returns:
        A part of [batch, heads, queries, head_dim]: bf16 on a GPU where features and value are, with states summed in
        float32; else float32 at least.
    """
    log_scale = query.log_scale + key.log_scale
    queries, keys, value = for_products(query.values, mask_keys(key.values, key_mask), value)
    if rotated is None:
        sums = queries @ state_of(keys, with_ones(value)).to(queries.dtype)
        return LinearPart(*numerator_and_mass(sums, value.shape[-1]), log_scale)
    rotated_queries, rotated_keys = (states.to(value.dtype) for states in rotated)
    state = state_of(mask_keys(rotated_keys, key_mask), value)
    mass = queries @ widen(keys).sum(dim=-2)[..., None].to(queries.dtype)
    return LinearPart(rotated_queries @ state.to(queries.dtype), mass, log_scale)


def numerator_and_mass(sums: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Sums of what `with_ones` made of a value with so many channels, parted; the gradient is one copy."""
    numerator, mass, _ = sums.split([channels, 1, sums.shape[-1] - channels - 1], dim=-1)
    return numerator, mass


def state_of(key: Tensor, value: Tensor) -> Tensor:
    """sum_j key_j value_j^T, [batch, heads, num_features, channels], in float32 at least.

    It is summed over chunks of tokens first: one product for each head would leave most of a GPU idle.
    """
    num_tokens = key.shape[2]
    size = -(-num_tokens // max(1, -(-num_tokens // TOKENS_OF_A_STATE)))
    keys, values = (in_chunks(states, max(1, size)) for states in (key, value))
    return wide_matmul(keys.transpose(-1, -2), values).sum(dim=2)


def dense_linear_weights(
    query: Features, key: Features, rotated: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The definition of `linear_attention`: weights of numerator and mass, [batch, heads, queries, keys] each."""
    factor = (query.log_scale + key.log_scale).exp()
    mass = query.values @ key.values.transpose(-1, -2) * factor
    if rotated is None:
        return mass, mass
    return rotated[0] @ rotated[1].transpose(-1, -2) * factor, mass


def softmax_part(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    key_mask: Tensor | None = None,
    keep_largest: bool = False,
) -> SoftmaxPart | None:
    """Softmax attention with its mass over few keys, such as the text; None where there is no key at all.

    Args:
        query: [batch, heads, queries, head_dim], rotated.
        key: [batch, heads, keys, head_dim], rotated.
        value: Same as key.
        scale: Softmax scale.
        key_mask: [batch, keys], True where a key is valid.
        keep_largest: Keep the largest score of each query; all scores are in memory then.
    """
    if key.shape[-2] == 0:
        return None
    if not keep_largest:
        return SoftmaxPart(*softmax_with_mass(query, key, value, scale=scale, key_mask=key_mask))
    scores = widen(query) @ widen(key).transpose(-1, -2) * scale
    return weigh(scores, widen(value), None if key_mask is None else key_mask[:, None, None])


def weigh(scores: Tensor, value: Tensor, seen: Tensor | None = None) -> SoftmaxPart:
    """Softmax of scores [..., queries, keys] over the keys that are seen, applied to value [..., keys, head_dim]."""
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    maximum = scores.amax(dim=-1, keepdim=True)
    largest = maximum.detach().masked_fill(maximum.isinf(), 0.0)
    weights = (scores - largest).exp()
    mass = weights.sum(dim=-1, keepdim=True)
    tiny = torch.finfo(mass.dtype).tiny
    log_mass = torch.where(mass > 0, mass.clamp(min=tiny).log() + largest, -torch.inf)
    return SoftmaxPart(weights.to(value.dtype) @ value / mass.clamp(min=tiny), log_mass, maximum)


def merge(first: SoftmaxPart | None, second: SoftmaxPart) -> SoftmaxPart:
    """Softmax over the keys of both parts, which share none."""
    if first is None:
        return second
    largest = torch.maximum(first.log_mass, second.log_mass).detach()
    largest = largest.masked_fill(largest.isinf(), 0.0)
    masses = [(part.log_mass - largest).exp() for part in (first, second)]
    total = masses[0] + masses[1]
    tiny = torch.finfo(total.dtype).tiny
    shares = [mass / total.clamp(min=tiny) for mass in masses]
    output = _WeightedSum.apply(shares[0], first.output, shares[1], second.output)
    log_mass = torch.where(total > 0, total.clamp(min=tiny).log() + largest, -torch.inf)
    maximum = None
    if first.largest is not None and second.largest is not None:
        maximum = torch.maximum(first.largest, second.largest)
    return SoftmaxPart(output, log_mass, maximum)


def join(exact: SoftmaxPart | None, linear: LinearPart) -> Tensor:
    """[sum_A e^s v + n] / [sum_A e^s + z]: softmax on the keys A and linear attention on others, one normaliser.

    Both branches carry the factor e^-c, where c is the larger of their logarithmic masses; it cancels. (LoLCATs,
    arXiv 2410.10254, applies it to the softmax branch alone, which is another function.)

    Returns:
        [batch, heads, queries, head_dim], zeros where nothing is seen, in the type of output and numerator.
    """
    tiny = torch.finfo(linear.mass.dtype).tiny
    if exact is None:
        # What sees nothing is divided by infinity: by the least number, its gradient would overflow.
        return linear.numerator / linear.mass.masked_fill(linear.mass < tiny, torch.inf)
    log_mass = linear.mass.detach().clamp(min=tiny).log() + linear.log_scale.detach()
    largest = torch.maximum(exact.log_mass.detach(), log_mass)
    largest = largest.masked_fill(largest.isinf(), 0.0)
    near, far = (exact.log_mass - largest).exp(), (linear.log_scale - largest).exp()
    total = near + far * linear.mass
    total = total.masked_fill(total <= 0, torch.inf)
    return _WeightedSum.apply(near / total, exact.output, far / total, linear.numerator)


class _WeightedSum(torch.autograd.Function):
    """a x + b y in the type of x and y, with weights [..., 1 or channels] that may be wider: sums are as wide."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, x: Tensor, b: Tensor, y: Tensor) -> Tensor:
        """See the class."""
        ctx.save_for_backward(a, x, b, y)
        return (a * x).addcmul_(b, y).to(torch.promote_types(x.dtype, y.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        """Products in the type of the inputs."""
        (gradient,), (a, x, b, y) = gradients, ctx.saved_tensors
        of_weights = [_sum_like(gradient.to(states.dtype) * states, weight) for weight, states in ((a, x), (b, y))]
        of_states = [gradient.to(states.dtype) * weight.to(states.dtype) for weight, states in ((a, x), (b, y))]
        return of_weights[0], of_states[0], of_weights[1], of_states[1]


def _sum_like(states: Tensor, weight: Tensor) -> Tensor:
    """Summed over channels if the weight has one for all."""
    if weight.shape[-1] == states.shape[-1]:
        return states.to(weight.dtype)
    return states.sum(dim=-1, keepdim=True, dtype=weight.dtype)


def dense_join(scores: Tensor, seen: Tensor, linear: tuple[Tensor, Tensor], value: Tensor) -> Tensor:
    """The definition of `join` on dense weights.

    Args:
        scores: [batch, heads, queries, keys], scaled.
        seen: Broadcasts to the scores, True where a pair has its softmax weight.
        linear: Weights of numerator and mass where a pair has its linear weight, and 0 elsewhere.
        value: [batch, heads, keys, head_dim].
    """
    numerator, mass = linear
    exact = scores.exp().masked_fill(~seen, 0.0)
    total = (exact + mass).sum(dim=-1, keepdim=True)
    return (exact + numerator) @ value / total.masked_fill(total == 0, 1.0)


def with_text_queries(
    image_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    layout: Layout,
    scale: float,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Puts the text tokens, which see all tokens by softmax, beside the image tokens' output.

    Args:
        image_output: [batch, heads, image tokens, head_dim].
        query: [batch, heads, tokens, head_dim] of all tokens, rotated.
        key: Same, with key-value heads.
        value: Same as key.
        layout: Where the tokens are.
        scale: Softmax scale.
        key_mask: [batch, tokens], True where a key is valid.

    Returns:
        [batch, heads, tokens, head_dim], in the type of the value.
    """
    image_output = image_output.to(value.dtype)
    if layout.num_text_tokens == 0:
        return image_output
    text_output = _softmax(query[:, :, layout.text_slice], key, value, scale, key_mask)
    parts = [text_output, image_output] if layout.text_first else [image_output, text_output]
    return torch.cat(parts, dim=2)


def _softmax(query: Tensor, key: Tensor, value: Tensor, scale: float, key_mask: Tensor | None) -> Tensor:
    if key_mask is None:
        grouped = key.shape[1] != query.shape[1]
        return F.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=grouped)
    return masked_attention_or_zeros(query, key, value, key_mask[:, None, None], scale=scale)


def mask_keys(features: Tensor, key_mask: Tensor | None) -> Tensor:
    """Zero features, [batch, heads, keys, num_features], for keys that do not count."""
    return features if key_mask is None else features.masked_fill(~key_mask[:, None, :, None], 0.0)


def linear_attention_flops(num_queries: int, num_keys: int, num_features: int, head_dim: int) -> int:
    """Operations of `linear_attention` in one head: the state with its mass, and reading it."""
    return 2 * (num_queries + num_keys) * num_features * (head_dim + 1)


def exact_text_flops(layout: Layout, head_dim: int) -> int:
    """Operations in one head of text queries on all tokens and image queries on text."""
    return 4 * head_dim * layout.num_text_tokens * (layout.num_tokens + layout.num_image_tokens)
