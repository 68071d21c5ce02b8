"""Mixers that take nothing of the teacher's attention but its projections: a read-out fitted to one batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from linearize.layout import Layout
from linearize.mixers._joint import JointMixer
from linearize.mixers._tokens import Tokens, in_order
from linearize.mixers.base import AttentionShape, MixerContext
from linearize.ops.least_squares import ridge
from linearize.ops.linear_attention import LinearPart, exact_text_flops, join, softmax_part, with_text_queries
from linearize.ops.precision import widen, without_autocast

# Shares of the features' mean square. With less the read-out learns the few pictures of its batch by heart: on the
# scenes teacher the error on other pictures is higher.
READ_OUT_RIDGE = 0.1
MASS_RIDGE = 1e-3


class FittedMixer(JointMixer):
    """Base of mixers with o_i = W f_i + b, where features f of the tokens are no weights on values and have no mass.

    With text="exact" image tokens have features of image tokens alone, and join them with the softmax over the text
    as if they were attention of the mass m_i = num_keys e^(w q_i + c) in each head, of the query q that is not rotated:

        o_i = (sum_text e^s_ij v_j + m_i (W f_i + b)) / (sum_text e^s_ij + m_i).

    With text="state" all tokens have features and no softmax.

    `calibrate` sets w and c, W and b by least squares in closed form: first the logarithm of the mass that the teacher
    has on image tokens, then, with these, the teacher's output. The error on other pictures of the scenes teacher
    is about twice that on the batch after 16 samples, and five to six times after 4.

    Args:
        shape: Sizes of the layer.
        name: The mixer's name, for messages.
        num_features: Channels of f.
        text: "exact" or "state".
    """

    def __init__(self, shape: AttentionShape, name: str, *, num_features: int, text: str) -> None:
        super().__init__(shape, name, text=text, log_mean_product=0.0)
        self.read_out = nn.Linear(num_features, shape.num_heads * shape.head_dim)
        if self.has_log_scale:
            self.mass_weight = nn.Parameter(torch.zeros(shape.num_heads, shape.head_dim))

    def token_features(self, tokens: Tokens, *, dense: bool) -> Tensor:
        """Features f, [batch, tokens, num_features], of image tokens, or of all with text="state".

        Args:
            tokens: Of this call.
            dense: Whether to compute the definition, which has weights of all pairs of tokens.
        """
        raise NotImplementedError

    def mix(self, tokens: Tokens) -> Tensor:
        """See `JointMixer.mix`."""
        output = self._read(tokens.for_products(self.token_features(tokens, dense=False)))
        if self.text == "state":
            return output
        part = LinearPart(output, torch.ones_like(output[..., :1]), self._log_mass(tokens))
        joined, context = join(self.exact_part(tokens), part), tokens.context
        return with_text_queries(
            joined, *tokens.given_rotated, layout=context.layout, scale=context.scale, key_mask=context.key_mask
        )

    def dense_mix(self, tokens: Tokens) -> Tensor:
        """See `JointMixer.dense_mix`."""
        output = self._read(self.token_features(tokens, dense=True))
        if self.text == "state":
            return output
        (query, key), image, context = tokens.rotated, tokens.image, tokens.context
        weights = (query @ key.transpose(-1, -2) * context.scale).exp() * self.sees_exactly(tokens)
        if context.key_mask is not None:
            weights = weights.masked_fill(~context.key_mask[:, None, None], 0.0)
        mass = torch.zeros_like(weights[..., :1])
        mass[:, :, image] = self._log_mass(tokens).exp()
        placed = in_order(torch.zeros_like(query[:, :, tokens.text]), output, context.layout)
        total = weights.sum(dim=-1, keepdim=True) + mass
        return (weights @ tokens.value + mass * placed) / total.masked_fill(total == 0, 1.0)

    @without_autocast
    @torch.no_grad()
    def calibrate(self, query: Tensor, key: Tensor, value: Tensor, context: MixerContext) -> None:
        """See `Mixer.calibrate`."""
        tokens = Tokens.of(query, key, value, context)
        features = widen(self.token_features(tokens, dense=False))
        target = widen(context.softmax(*tokens.given_rotated))
        share = torch.ones_like(target[..., :1])
        if self.text == "exact":
            target, share = target[:, :, tokens.image], share[:, :, tokens.image]
            self._fit_mass(tokens)
            exact = self.exact_part(tokens)
            if exact is not None:
                share = (self._log_mass(tokens) - exact.log_mass).sigmoid()
                target = target - (1 - share) * exact.output
        counted = self._counted(tokens)
        rows = torch.cat([features, torch.ones_like(features[..., :1])], dim=-1)[counted].flatten(0, 1)
        for head, (weights, wanted) in enumerate(zip(share[counted].unbind(1), target[counted].unbind(1), strict=True)):
            fitted = ridge(rows * weights.flatten(0, 1), wanted.flatten(0, 1), READ_OUT_RIDGE)
            channels = slice(head * self.shape.head_dim, (head + 1) * self.shape.head_dim)
            self.read_out.weight[channels] = fitted[:-1].T.to(self.read_out.weight)
            self.read_out.bias[channels] = fitted[-1].to(self.read_out.bias)

    def joining_flops(self, layout: Layout) -> int:
        """Operations of text and of the mass that joins it."""
        if self.text == "state":
            return 0
        mass = 2 * layout.num_image_tokens * self.shape.head_dim
        return self.shape.num_heads * (exact_text_flops(layout, self.shape.head_dim) + mass)

    def _fit_mass(self, tokens: Tokens) -> None:
        """Sets w and c to the least error of the logarithm of the teacher's mass on image tokens."""
        (query, key), image = tokens.rotated, tokens.image
        part = softmax_part(
            query[:, :, image],
            key[:, :, image],
            tokens.value[:, :, image],
            scale=tokens.context.scale,
            key_mask=tokens.mask_of(image),
        )
        assert part is not None
        counted = self._counted(tokens)
        wanted = (part.log_mass - self._log_num_keys(tokens))[counted]
        rows = torch.cat([tokens.query[counted][:, :, image], torch.ones_like(wanted)], dim=-1)
        for head, (row, one) in enumerate(zip(rows.unbind(1), wanted.unbind(1), strict=True)):
            fitted = ridge(row.flatten(0, 1), one.flatten(0, 1), MASS_RIDGE)[:, 0]
            self.mass_weight[head] = fitted[:-1].to(self.mass_weight)
            self.log_scale[head] = fitted[-1].to(self.log_scale)

    def _counted(self, tokens: Tokens) -> slice | Tensor:
        """The samples to fit to: those with a valid key to have features of, for without one there is no mass."""
        mask = tokens.mask_of(slice(None) if self.text == "state" else tokens.image)
        return slice(None) if mask is None else mask.any(dim=1)

    def _read(self, features: Tensor) -> Tensor:
        """W f + b in heads, [batch, heads, tokens, head_dim]."""
        weight, bias = (parameter.to(features.dtype) for parameter in (self.read_out.weight, self.read_out.bias))
        output = nn.functional.linear(features, weight, bias)
        return output.unflatten(-1, (self.shape.num_heads, -1)).transpose(1, 2)

    def _log_mass(self, tokens: Tokens) -> Tensor:
        """Logarithm of m, [batch, heads, image tokens, 1]."""
        query = tokens.query[:, :, tokens.image]
        exponent = query @ self.mass_weight.to(query.dtype)[..., None] + self.log_scale.to(query.dtype)[:, None, None]
        return exponent + self._log_num_keys(tokens)

    def _log_num_keys(self, tokens: Tokens) -> float | Tensor:
        """Logarithm of the number of valid image tokens; -inf where there is none."""
        mask = tokens.mask_of(tokens.image)
        if mask is None:
            return math.log(tokens.context.layout.num_image_tokens)
        return mask.sum(dim=1).to(tokens.query.dtype).log()[:, None, None, None]


def flat(states: Tensor) -> Tensor:
    """[batch, heads, tokens, head_dim] to [batch, tokens, channels]."""
    return states.transpose(1, 2).flatten(2)
