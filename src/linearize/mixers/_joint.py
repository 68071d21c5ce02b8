"""What mixers with a linear branch share: text that is handled exactly, one normaliser, and its calibration."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linearize.layout import Layout
from linearize.mixers._arguments import TEXT, check_choice
from linearize.mixers._tokens import FeaturePair, Tokens, in_order
from linearize.mixers.base import AttentionShape, Mixer, MixerContext
from linearize.ops.dense_attention import match_heads
from linearize.ops.least_squares import least_error_weight
from linearize.ops.linear_attention import (
    LinearPart,
    SoftmaxPart,
    dense_join,
    dense_linear_weights,
    exact_text_flops,
    join,
    linear_attention,
    linear_attention_flops,
    softmax_part,
    with_text_queries,
)
from linearize.ops.precision import widen, without_autocast


class JointMixer(Mixer):
    """Base of mixers in which image tokens see image tokens by linear attention and text by softmax.

    With text="exact" text tokens see all tokens by softmax, and image tokens join softmax over the text with their
    linear attention under one normaliser; `log_scale` weighs the linear branch in each head. With text="state" text
    is part of the linear attention: cheaper, and no longer the teacher's attention for text.

    A subclass gives features of all tokens (`features`) and may say how image tokens mix (`mix_images`,
    `dense_images`).

    Args:
        shape: Sizes of the layer.
        name: The mixer's name, for messages.
        text: "exact" or "state".
        log_mean_product: Logarithm of the mean product of two features, for independent unit normals.
        is_joined: Whether the linear branch has a `log_scale`; by default with exact text alone.

    Attributes:
        has_normaliser: Whether weights are divided by their sum; only text="state" can do without.
        keeps_largest: Whether the softmax part keeps each query's largest score, which takes memory for all scores.
        has_wide_products: Whether products stay in float32 at least on GPUs too, where rounding would be amplified or
            an operation has no narrower form.
    """

    has_normaliser: bool = True
    keeps_largest: bool = False
    has_wide_products: bool = False

    def __init__(
        self, shape: AttentionShape, name: str, *, text: str, log_mean_product: float, is_joined: bool | None = None
    ) -> None:
        super().__init__(shape)
        check_choice(name, "text", text, TEXT)
        self.text, self.has_log_scale = text, text == "exact" if is_joined is None else is_joined
        if self.has_log_scale:
            # An average key weighs as much as under softmax: for unit normal vectors the mean of exp(qk / sqrt(d)) is
            # near exp(1/2). Calibration does better.
            self.log_scale = nn.Parameter(torch.full((shape.num_heads,), 0.5 - log_mean_product))

    def features(self, tokens: Tokens) -> FeaturePair:
        """Features of all tokens, in float32 at least."""
        raise NotImplementedError

    def attend(self, pair: FeaturePair, value: Tensor, key_mask: Tensor | None) -> LinearPart:
        """Linear attention of some queries on some keys."""
        return linear_attention(pair.query, pair.key, value, key_mask=key_mask, rotated=pair.rotated)

    def mix_images(self, pair: FeaturePair, tokens: Tokens) -> LinearPart:
        """Linear attention of image tokens on image tokens; without gates unless a subclass has them."""
        return self.attend(pair, tokens.product_value[:, :, tokens.image], tokens.mask_of(tokens.image))

    def dense_weights(self, pair: FeaturePair) -> tuple[Tensor, Tensor]:
        """The definition of `attend`: weights of numerator and mass, before masks."""
        return dense_linear_weights(pair.query, pair.key, pair.rotated)

    def dense_images(self, pair: FeaturePair, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """The definition of `mix_images`: weights of numerator and mass, before masks."""
        return self.dense_weights(pair)

    def exact_part(self, tokens: Tokens) -> SoftmaxPart | None:
        """What image tokens see by softmax, if anything."""
        if self.text == "state":
            return None
        query, key, value = tokens.given_rotated
        return softmax_part(
            query[:, :, tokens.image],
            match_heads(key[:, :, tokens.text], query),
            match_heads(value[:, :, tokens.text], query),
            scale=tokens.context.scale,
            key_mask=tokens.mask_of(tokens.text),
            keep_largest=self.keeps_largest,
        )

    def image_parts(self, pair: FeaturePair, tokens: Tokens) -> tuple[SoftmaxPart | None, LinearPart]:
        """What image tokens see by softmax, and image tokens by linear attention, before `log_scale`."""
        return self.exact_part(tokens), self.mix_images(pair.at(tokens.image, tokens.image), tokens)

    def sees_exactly(self, tokens: Tokens) -> Tensor:
        """The definition of `exact_part`: [tokens, tokens], True where the softmax weight holds, text rows included."""
        is_text = torch.zeros(tokens.query.shape[2], dtype=torch.bool, device=tokens.query.device)
        is_text[tokens.text] = self.text == "exact"
        return is_text[:, None] | is_text

    def is_not_linear(self, tokens: Tokens, seen: Tensor) -> Tensor:
        """The pairs [tokens, tokens] without a linear weight: by default those that have a softmax weight."""
        return seen

    def weigh_scores(self, scores: Tensor, seen: Tensor) -> Tensor:
        """What a subclass does to softmax scores [batch, heads, tokens, tokens] before they meet linear weights."""
        return scores

    def add_to_images(self, output: Tensor, tokens: Tokens) -> Tensor:
        """What a subclass adds to the image tokens' output, [batch, heads, image tokens, head_dim]."""
        return output

    def finish(self, output: Tensor, tokens: Tokens) -> Tensor:
        """What a subclass does to the output of all tokens."""
        return output

    @without_autocast
    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: MixerContext) -> Tensor:
        """See `Mixer.forward`."""
        tokens = Tokens.of(query, key, value, context, wide_products=self.has_wide_products)
        return self.finish(self.mix(tokens), tokens).to(value.dtype)

    @without_autocast
    def reference(self, query: Tensor, key: Tensor, value: Tensor, context: MixerContext) -> Tensor:
        """See `Mixer.reference`."""
        tokens = Tokens.of(query, key, value, context)
        return self.finish(self.dense_mix(tokens), tokens).to(value.dtype)

    def normalise(self, exact: SoftmaxPart | None, part: LinearPart) -> Tensor:
        """Joins both parts; or where a formula has no normaliser, the sum as it is."""
        if self.has_normaliser:
            return join(exact, part)
        return part.numerator * part.log_scale.exp()

    def joined_parts(self, pair: FeaturePair, tokens: Tokens) -> tuple[SoftmaxPart | None, LinearPart]:
        """What image tokens see by softmax, and all that they see by linear attention, before `log_scale`."""
        exact, part = self.image_parts(pair, tokens)
        if self.text == "exact":
            return exact, part
        image, text = tokens.image, tokens.text
        from_text = self.attend(pair.at(image, text), tokens.product_value[:, :, text], tokens.mask_of(text))
        mass = part.mass + from_text.mass
        return exact, part._replace(numerator=part.numerator + from_text.numerator, mass=mass)

    def mix(self, tokens: Tokens) -> Tensor:
        """The output of all tokens."""
        pair, text, context = self.features(tokens).for_products(tokens), tokens.text, tokens.context
        exact, part = self.joined_parts(pair, tokens)
        if self.has_log_scale:
            part = part.scaled(self.log_scale)
        output = self.add_to_images(self.normalise(exact, part), tokens)
        if self.text == "state":
            part = self.attend(pair.at(text, slice(None)), tokens.product_value, context.key_mask)
            return in_order(self.normalise(None, part), output, context.layout)
        return with_text_queries(
            output, *tokens.given_rotated, layout=context.layout, scale=context.scale, key_mask=context.key_mask
        )

    def dense_mix(self, tokens: Tokens) -> Tensor:
        """The definition of `mix`."""
        output = self.dense_attention(tokens, self.features(tokens))
        image = self.add_to_images(output[:, :, tokens.image], tokens)
        return in_order(output[:, :, tokens.text], image, tokens.context.layout)

    def dense_attention(self, tokens: Tokens, pair: FeaturePair) -> Tensor:
        """Softmax and linear weights of all tokens on all tokens under one normaliser."""
        query, key = tokens.rotated
        image, seen = tokens.image, self.sees_exactly(tokens)
        linear = []
        for weights, among in zip(
            self.dense_weights(pair), self.dense_images(pair.at(image, image), tokens), strict=True
        ):
            placed = weights.clone()
            placed[..., image, image] = among
            if self.has_log_scale:
                placed = placed * self.log_scale.exp()[:, None, None]
            linear.append(placed.masked_fill(self.is_not_linear(tokens, seen), 0.0))
        if tokens.context.key_mask is not None:
            valid = tokens.context.key_mask[:, None, None]
            seen, linear = seen & valid, [weights.masked_fill(~valid, 0.0) for weights in linear]
        if not self.has_normaliser:
            return linear[0] @ tokens.value
        scores = self.weigh_scores(query @ key.transpose(-1, -2) * tokens.context.scale, seen)
        return dense_join(scores, seen, (linear[0], linear[1]), tokens.value)

    def text_flops(self, layout: Layout, num_features: int) -> int:
        """Operations in one head that text costs: exact pairs, or its state for all and all states for it."""
        head_dim, text = self.shape.head_dim, layout.num_text_tokens
        if self.text == "exact":
            return exact_text_flops(layout, head_dim)
        for_text = linear_attention_flops(text, layout.num_image_tokens, num_features, head_dim)
        return for_text + linear_attention_flops(layout.num_tokens, text, num_features, head_dim)

    def complete_images(self, output: Tensor, tokens: Tokens) -> Tensor:
        """What becomes of the joined output of image tokens; affine in it, so that errors can be told beforehand."""
        return self.add_to_images(output, tokens)

    @without_autocast
    @torch.no_grad()
    def calibrate(self, query: Tensor, key: Tensor, value: Tensor, context: MixerContext) -> None:
        """See `Mixer.calibrate`: `log_scale` brings the output of image tokens as near to the teacher's as it can."""
        if not self.has_log_scale:
            return
        tokens = Tokens.of(query, key, value, context)
        exact, part = self.joined_parts(self.features(tokens), tokens)
        if exact is None:
            return
        tiny = torch.finfo(part.mass.dtype).tiny
        log_ratio = part.mass.clamp(min=tiny).log() + part.log_scale - exact.log_mass
        base, other = (self.complete_images(output, tokens) for output in (exact.output, join(None, part)))
        wanted = widen(context.softmax(*tokens.given_rotated))[:, :, tokens.image]
        self.log_scale.copy_(least_error_weight(log_ratio, base, other, wanted))
