"""CARE: linear attention for some of the channels, depthwise convolutions for the rest, and two interactions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linearize.errors import LinearizeError
from linearize.layout import Layout
from linearize.mixers._arguments import VARIANTS, check_choice, check_number
from linearize.mixers._fitted import FittedMixer, flat
from linearize.mixers._tokens import Tokens, in_order
from linearize.mixers.base import AttentionShape
from linearize.ops.depthwise import depthwise_flops, depthwise_images
from linearize.ops.feature_maps import Features, elu_plus_one
from linearize.ops.linear_attention import dense_linear_weights, join, linear_attention, linear_attention_flops

SIDES = (3, 7)
# Channels of a head in variant=paper, in its later stages.
PUBLISHED_HEAD = 32


class CareMixer(FittedMixer):
    """CARE Transformer (Zhou et al., arXiv 2411.16170, CVPR 2025): linear attention for a third of the channels.

    The channels of the teacher's value x, [batch, heads, tokens, head_dim], are split in each head into thirds: one is
    mixed by linear attention of the teacher's rotated query and key with phi = elu + 1, [batch, heads, tokens,
    head_dim], the others by depthwise convolutions of the picture,

        p_i = [sum_j phi(q_i) phi(k_j) x_j / sum_j phi(q_i) phi(k_j), DW3x3(x)_i, DW7x7(x)_i],
        I(s) = s + W' DW3x3(gelu(W norm(s))),   f = I_2([x, I_1(p)]),   o = W_o f + b_o.

    where I_1 lets the parts meet, I_2 these and the memory x. Filters start as means, and W' as zero. Nothing of the
    teacher's attention fits phi and the filters: W_o is fitted to one batch. So is the mass by which o is joined to the
    text, which is exact; see `FittedMixer`. With text="state" the linear attention is that of all tokens, and the text
    is not convolved. The cost is linear in tokens, and that of attention a third of the linear mixer's.

    Where this differs from the paper, which replaces attention and MLP and carries the memory from block to block: here
    it is of this layer, and norms are layer norms, as batch norms would make pictures depend on one another.
    `variant=paper` has the published channels: the layer's input in four parts, memory, attention and two filters, with
    query and key a projection of the second, which is the value, in heads of 32 channels where they fit; text is a
    state.

    Args:
        shape: Sizes of the layer.
        reduction: How many times narrower the interactions are than what they act on.
        text: "exact" or "state".
        variant: "dit" or "paper".

    Raises:
        LinearizeError: An argument is none of its choices, or the channels cannot be split.
    """

    def __init__(self, shape: AttentionShape, *, reduction: int = 4, text: str = "exact", variant: str = "dit") -> None:
        check_number("care", "reduction", reduction, 1)
        check_choice("care", "variant", variant, VARIANTS)
        is_paper = variant == "paper"
        heads, each = (1, shape.hidden_size) if is_paper else (shape.num_heads, shape.head_dim)
        if each < 4:
            raise LinearizeError(
                f"mixer 'care' splits {each} channels into up to 4 parts; choose another mixer for this layer, such as "
                "linear"
            )
        memory = each // 4 if is_paper else 0
        attended = (each - memory) // 3
        narrow = (each - memory - attended) // 2
        mixed = heads * (each - memory)
        width = mixed + (memory if is_paper else mixed)
        super().__init__(shape, "care", num_features=width, text="state" if is_paper else text)
        self.is_paper = self.uses_hidden_states = is_paper
        self.sizes = [memory, attended, narrow, each - memory - attended - narrow]
        self.filters = nn.ParameterList(
            torch.full((heads * channels, side, side), side**-2.0)
            for channels, side in zip(self.sizes[2:], SIDES, strict=True)
        )
        self.among_parts = Interaction(mixed, max(1, mixed // reduction))
        self.with_memory = Interaction(width, max(1, width // reduction))
        if is_paper:
            self.query_key = nn.Linear(attended, 2 * attended)
            return
        # o is the token's own value and p, added up, before calibration.
        with torch.no_grad():
            self.read_out.weight.copy_(torch.eye(mixed).repeat(1, 2) / 2)
            self.read_out.bias.zero_()

    def token_features(self, tokens: Tokens, *, dense: bool) -> Tensor:
        """See `FittedMixer.token_features`."""
        served = slice(None) if self.text == "state" else tokens.image
        states = tokens.for_products(tokens.hidden_states[:, None]) if self.is_paper else tokens.product_value
        states = states[:, :, served]
        mask, layout = tokens.mask_of(served), tokens.context.layout
        if mask is not None:
            states = states.masked_fill(~mask[:, None, :, None], 0.0)
        memory, attended, *local = states.split(self.sizes, dim=-1)
        if self.is_paper:
            mixed = self._attend_published(attended, mask, dense)
        else:
            query, key = (tokens.for_products(elu_plus_one(rotated[:, :, served])) for rotated in tokens.rotated)
            mixed, memory = _attend(query, key, attended, mask, dense), states
        with_text = self.text == "state"
        convolved = [
            _on_pictures(some, weight.to(some.dtype), layout, with_text)
            for some, weight in zip(local, self.filters, strict=True)
        ]
        parts = self.among_parts(flat(torch.cat([mixed, *convolved], dim=-1)), layout, with_text)
        return self.with_memory(torch.cat([flat(memory), parts], dim=-1), layout, with_text)

    def flops(self, layout: Layout, batch: int = 1) -> int:
        """Linear attention, filters, both interactions, the read-out, and text."""
        served = layout.num_image_tokens if self.text == "exact" else layout.num_tokens
        attended = self.sizes[1]
        if self.is_paper:
            heads, each = _published_heads(attended)
            total = 2 * served * self.query_key.weight.numel()
        else:
            heads, each, total = self.shape.num_heads, self.shape.head_dim, 0
        total += heads * linear_attention_flops(served, served, each, each if self.is_paper else attended)
        for weight, side in zip(self.filters, SIDES, strict=True):
            total += depthwise_flops(layout, len(weight), side)
        total += sum(part.flops(layout, served) for part in (self.among_parts, self.with_memory))
        return batch * (total + 2 * served * self.read_out.weight.numel() + self.joining_flops(layout))

    def _attend_published(self, states: Tensor, mask: Tensor | None, dense: bool) -> Tensor:
        """The published attention on [batch, 1, tokens, channels], in heads of its own."""
        heads, _ = _published_heads(states.shape[-1])
        pair = F.linear(states, self.query_key.weight.to(states.dtype), self.query_key.bias.to(states.dtype))
        query, key, value = (
            some[:, 0].unflatten(-1, (heads, -1)).transpose(1, 2) for some in (*pair.chunk(2, dim=-1), states)
        )
        return flat(_attend(elu_plus_one(query), elu_plus_one(key), value, mask, dense))[:, None]


class Interaction(nn.Module):
    """s + W' DW3x3(gelu(W norm(s))) of [batch, tokens, channels]; the text is not convolved.

    Args:
        channels: Of s.
        hidden: Channels between W and W'.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.inner, self.outer = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
        self.filter = nn.Parameter(torch.zeros(hidden, 3, 3))
        with torch.no_grad():
            self.filter[:, 1, 1] = 1.0
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, states: Tensor, layout: Layout, with_text: bool) -> Tensor:
        """Computes in the type of the states."""
        norm, dtype = self.norm, states.dtype
        normed = F.layer_norm(states, norm.normalized_shape, norm.weight.to(dtype), norm.bias.to(dtype), norm.eps)
        hidden = F.gelu(F.linear(normed, self.inner.weight.to(dtype), self.inner.bias.to(dtype)))
        hidden = _on_pictures(hidden[:, None], self.filter.to(dtype), layout, with_text)[:, 0]
        return states + F.linear(hidden, self.outer.weight.to(dtype), self.outer.bias.to(dtype))

    def flops(self, layout: Layout, num_tokens: int) -> int:
        """Operations on so many tokens, those of the layout's pictures among them."""
        return 4 * num_tokens * self.inner.weight.numel() + depthwise_flops(layout, len(self.filter), 3)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dense: bool) -> Tensor:
    """Normalised linear attention of features [batch, heads, tokens, num_features]."""
    zero = query.new_zeros(())
    if not dense:
        return join(None, linear_attention(Features(query, zero), Features(key, zero), value, key_mask=mask))
    weights, _ = dense_linear_weights(Features(query, zero), Features(key, zero))
    if mask is not None:
        weights = weights.masked_fill(~mask[:, None, None], 0.0)
    total = weights.sum(dim=-1, keepdim=True)
    return weights @ value / total.masked_fill(total == 0, 1.0)


def _on_pictures(states: Tensor, weight: Tensor, layout: Layout, with_text: bool) -> Tensor:
    """Convolves image tokens of [batch, heads, tokens, channels] and leaves text, if it is there, as it is."""
    if not with_text:
        return depthwise_images(states, weight, None, layout)
    image = depthwise_images(states[:, :, layout.image_slice], weight, None, layout)
    return in_order(states[:, :, layout.text_slice], image, layout)


def _published_heads(channels: int) -> tuple[int, int]:
    """Heads, and the channels of each."""
    heads = channels // PUBLISHED_HEAD if channels % PUBLISHED_HEAD == 0 else 1
    return heads, channels // heads
