"""Gated linear attention in both directions by batched matrix products: pairs within chunks, states between them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from linearize.ops.chunk_pairs import ChannelPairs, HeadPairs, Pairs
from linearize.ops.chunk_states import BOTH_WAYS, BOTH_WAYS_BACK, carry_states
from linearize.ops.precision import without_autocast
from linearize.ops.products import add_product, aligned, wide_product

# Tokens of a chunk: within it weights are explicit, between chunks states are carried on.
CHUNK = 64
# Numbers that a group of heads may have in its queries; its intermediate tensors have some forty times as many. A CPU's
# allocator keeps what is small and maps what is large anew, which takes longer than the products.
NUMBERS_AT_A_TIME, NUMBERS_ON_A_CPU = 2**27, 2**20


def chunked(query: Tensor, key: Tensor, value: Tensor, forward_gate: Tensor, backward_gate: Tensor) -> Tensor:
    """See `bidirectional_gated_attention`; of a cost linear in tokens.

    Both directions share their matrix products, in the type of query, key and value; gates and states are float32 or
    wider. Gates of each feature that let so little through that the products' type does not tell it from nothing, e^-9
    for bf16, count as just that. For the gradient, which has no derivative of its own, nothing is kept that is larger
    than the arguments.
    """
    arguments = (query, key, aligned(value), forward_gate, backward_gate)
    numbers = NUMBERS_ON_A_CPU if query.device.type == "cpu" else NUMBERS_AT_A_TIME
    size = max(1, numbers // max(1, query[:, 0].numel()))
    groups = zip(*(states.split(size, dim=1) for states in arguments), strict=True)
    outputs = [_Scan.apply(*group) for group in groups]
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1))[..., : value.shape[-1]]


class _Chunks:
    """Value, pairs and states of chunks, [chunks, batch x heads, ...], from their query, key and prepared gates."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, *prepared: Tensor) -> None:
        self.value, self.pairs = value, _pairs(prepared[0].shape[-1])(query, key, *prepared)
        self.queries, self.keys = self.pairs.queries.flatten(3), self.pairs.keys.flatten(3)
        self.states = self.carry(self.keys, value, BOTH_WAYS)

    def carry(self, keys: Tensor, values: Tensor, reverse: tuple[bool, bool]) -> Tensor:
        """States of both sides, [chunks, rows, 2, num_features, channels], in float32 at least."""
        added = wide_product(keys.transpose(-1, -2), values)
        return carry_states(added.unflatten(2, (2, -1)), self.pairs.kept, reverse)

    def output(self) -> Tensor:
        """What the chunks' tokens see."""
        output = self.pairs.weights @ self.value
        add_product(output, self.queries, _for_products(self.states, self.value))
        return output

    def gradients(self, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of query, key, value and gates. The states' gradients are states that are carried on the other way."""
        of_states = self.carry(self.queries, gradient, BOTH_WAYS_BACK)
        states, added = _for_products(self.states, gradient), _for_products(of_states, gradient)
        of_value = self.pairs.weights.transpose(-1, -2) @ gradient
        add_product(of_value, self.keys, added)
        of_query, of_key, of_sums = self.pairs.gradients(
            gradient @ self.value.transpose(-1, -2),
            (gradient @ states.transpose(-1, -2)).view_as(self.pairs.queries),
            (self.value @ added.transpose(-1, -2)).view_as(self.pairs.keys),
        )
        of_gates = _sums_from_behind(of_sums).add_(self._of_kept(of_states)[:, :, None])
        return of_query, of_key, of_value, of_gates

    def _of_kept(self, of_states: Tensor) -> Tensor:
        """Of each chunk's sum of gates, [chunks, rows, 2, width], which is what states have behind, or before it."""
        ahead, behind = self.states[1:, :, 0] * of_states[:-1, :, 0], self.states[:-1, :, 1] * of_states[1:, :, 1]
        each = torch.stack([side.sum(dim=-1) for side in (ahead, behind)], dim=2)
        total = each if self.pairs.kept.shape[-1] > 1 else each.sum(dim=-1, keepdim=True)
        return F.pad(total, (0, 0, 0, 0, 0, 0, 0, 1))


class _Scan(torch.autograd.Function):
    """Keeps chunks of query, key, value and gates for the gradient, and computes all else again."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, forward_gate: Tensor, backward_gate: Tensor
    ) -> Tensor:
        """[batch, heads, tokens, channels]."""
        gates = torch.stack([_in_chunks(gate) for gate in (forward_gate, shifted(backward_gate))], dim=-2)
        prepared = _pairs(gates.shape[-1]).prepare(gates, query.dtype)
        kept = [*(_in_chunks(states).contiguous() for states in (query, key, value)), *prepared]
        ctx.save_for_backward(*kept)
        ctx.sizes = query.shape[:3]
        return _from_chunks(_Chunks(*kept).output(), *ctx.sizes)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        """By the products and states that `_Chunks.gradients` tells."""
        chunks = _Chunks(*ctx.saved_tensors)
        gradient = _in_chunks(gradients[0].to(chunks.value.dtype)).contiguous()
        *of_states, of_gates = chunks.gradients(gradient)
        each = [_from_chunks(states, *ctx.sizes) for states in (*of_states, *of_gates.unbind(dim=-2))]
        return *each[:4], F.pad(each[4], (0, 0, 0, 1))[:, :, 1:]


def _pairs(gate_width: int) -> type[Pairs]:
    return HeadPairs if gate_width == 1 else ChannelPairs


def shifted(states: Tensor) -> Tensor:
    """Each token's [..., tokens, channels] in the place of the next; zeros in the first."""
    return F.pad(states, (0, 0, 1, 0))[..., :-1, :]


def _in_chunks(states: Tensor) -> Tensor:
    """[batch, heads, tokens, channels] to [chunks, batch x heads, CHUNK, channels], zeros where there is no token."""
    missing = -states.shape[2] % CHUNK
    padded = F.pad(states, (0, 0, 0, missing)) if missing else states
    return padded.unflatten(2, (-1, CHUNK)).flatten(0, 1).transpose(0, 1)


def _from_chunks(states: Tensor, batch: int, heads: int, num_tokens: int) -> Tensor:
    """[chunks, batch x heads, CHUNK, channels] to [batch, heads, tokens, channels]."""
    return states.transpose(0, 1).flatten(1, 2).unflatten(0, (batch, heads))[:, :, :num_tokens]


def _for_products(states: Tensor, like: Tensor) -> Tensor:
    """States of both sides, [chunks, rows, 2 x num_features, channels], as products take them."""
    return states.to(like.dtype, memory_format=torch.contiguous_format).flatten(2, 3)


def _sums_from_behind(states: Tensor) -> Tensor:
    """Sums from each token of a chunk to the last, in float32 at least: a product, as sums that are turned are slow."""
    size = states.shape[2]
    is_behind = torch.ones(size, size, dtype=states.dtype, device=states.device).triu()
    return wide_product(is_behind.expand(*states.shape[:2], size, size), states.flatten(3)).view(states.shape)
