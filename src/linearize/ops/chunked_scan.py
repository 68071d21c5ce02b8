"""Gated linear attention in both directions by batched matrix products: pairs within chunks, states between them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.ops.chunk_pairs import ChannelPairs, HeadPairs, Pairs
from linearize.ops.chunk_states import BOTH_WAYS, BOTH_WAYS_BACK, carry_states
from linearize.ops.products import aligned, wide_product

# Tokens of a chunk: within it weights are explicit, between chunks states are carried on.
CHUNK = 64
# Numbers that a group of heads may have in its queries.
NUMBERS_AT_A_TIME = 2**28


def chunked(query: Tensor, key: Tensor, value: Tensor, forward_gate: Tensor, backward_gate: Tensor) -> Tensor:
    """See `bidirectional_gated_attention`; of a cost linear in tokens.

    Both directions share their matrix products, in the type of query, key and value; gates and states are float32 or
    wider. Gates that let so little through that the products' type does not tell it from nothing, e^-9 for bf16, count
    as just that. Nothing but the arguments is kept for the gradient, which has no derivative of its own.
    """
    arguments = (query, key, aligned(value), forward_gate, backward_gate)
    size = max(1, NUMBERS_AT_A_TIME // max(1, query[:, 0].numel()))
    groups = zip(*(states.split(size, dim=1) for states in arguments), strict=True)
    outputs = [_Scan.apply(*group) for group in groups]
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1))[..., : value.shape[-1]]


class _Chunks:
    """Value, pairs and states of chunks, [chunks, batch x heads, ...]."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, forward_gate: Tensor, backward_gate: Tensor) -> None:
        query, key, self.value = (_in_chunks(states).contiguous() for states in (query, key, value))
        gates = torch.stack([_in_chunks(gate) for gate in (forward_gate, shifted(backward_gate))], dim=-2)
        pairs = HeadPairs if gates.shape[-1] == 1 else ChannelPairs
        self.pairs: Pairs = pairs(query, key, gates)
        self.queries, self.keys = self.pairs.queries.flatten(3), self.pairs.keys.flatten(3)
        self.states = self.carry(self.keys, self.value, BOTH_WAYS)

    def carry(self, keys: Tensor, values: Tensor, reverse: tuple[bool, bool]) -> Tensor:
        """States of both sides, [chunks, rows, 2, num_features, channels], in float32 at least."""
        added = wide_product(keys.transpose(-1, -2), values)
        return carry_states(added.unflatten(2, (2, -1)), self.pairs.kept, reverse)

    def gradient_of_kept(self, of_added: Tensor) -> Tensor:
        """Of each chunk's sum of gates, [chunks, rows, 2, width], which is what states have behind, or before it."""
        ahead, behind = self.states[1:, :, 0] * of_added[:-1, :, 0], self.states[:-1, :, 1] * of_added[1:, :, 1]
        each = torch.stack([side.sum(dim=-1) for side in (ahead, behind)], dim=2)
        total = each if self.pairs.kept.shape[-1] > 1 else each.sum(dim=-1, keepdim=True)
        return F.pad(total, (0, 0, 0, 0, 0, 0, 0, 1))


class _Scan(torch.autograd.Function):
    """Computes all but its arguments again for the gradient, which is made of the same products and states."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, forward_gate: Tensor, backward_gate: Tensor
    ) -> Tensor:
        """[batch, heads, tokens, channels]."""
        ctx.save_for_backward(query, key, value, forward_gate, backward_gate)
        chunks = _Chunks(query, key, value, forward_gate, backward_gate)
        output = chunks.pairs.weights @ chunks.value + chunks.queries @ _for_products(chunks.states, value)
        return _from_chunks(output, value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        """The states' gradients are states that are carried on in the other direction."""
        query, key, value, forward_gate, backward_gate = ctx.saved_tensors
        chunks = _Chunks(query, key, value, forward_gate, backward_gate)
        gradient = _in_chunks(gradients[0].to(value.dtype)).contiguous()
        of_added = chunks.carry(chunks.queries, gradient, BOTH_WAYS_BACK)
        states, added = _for_products(chunks.states, value), _for_products(of_added, value)
        of_value = chunks.pairs.weights.transpose(-1, -2) @ gradient + chunks.keys @ added
        of_query, of_key, of_sums = chunks.pairs.gradients(
            gradient @ chunks.value.transpose(-1, -2),
            (gradient @ states.transpose(-1, -2)).view_as(chunks.pairs.queries),
            (chunks.value @ added.transpose(-1, -2)).view_as(chunks.pairs.keys),
        )
        of_gates = _sums_from_behind(of_sums) + chunks.gradient_of_kept(of_added)[:, :, None]
        of_forward, of_backward = (_from_chunks(of_gate, forward_gate) for of_gate in of_gates.unbind(dim=-2))
        return (
            _from_chunks(of_query, query),
            _from_chunks(of_key, key),
            _from_chunks(of_value, value),
            of_forward,
            F.pad(of_backward, (0, 0, 0, 1))[:, :, 1:],
        )


def shifted(states: Tensor) -> Tensor:
    """Each token's [..., tokens, channels] in the place of the next; zeros in the first."""
    return F.pad(states, (0, 0, 1, 0))[..., :-1, :]


def _in_chunks(states: Tensor) -> Tensor:
    """[batch, heads, tokens, channels] to [chunks, batch x heads, CHUNK, channels], zeros where there is no token."""
    missing = -states.shape[2] % CHUNK
    padded = F.pad(states, (0, 0, 0, missing)) if missing else states
    return padded.unflatten(2, (-1, CHUNK)).flatten(0, 1).transpose(0, 1)


def _from_chunks(states: Tensor, like: Tensor) -> Tensor:
    """[chunks, batch x heads, CHUNK, channels] to [batch, heads, tokens, channels], in the type of such a tensor."""
    batch, heads, num_tokens = like.shape[:3]
    whole = states.unflatten(1, (batch, heads)).movedim(0, 2).flatten(2, 3)
    return whole[:, :, :num_tokens].to(like.dtype)


def _for_products(states: Tensor, like: Tensor) -> Tensor:
    """States of both sides, [chunks, rows, 2 x num_features, channels], as products take them."""
    return states.to(like.dtype, memory_format=torch.contiguous_format).flatten(2, 3)


def _sums_from_behind(states: Tensor) -> Tensor:
    """Sums from each token of a chunk to the last, by a product: twice the speed of a sum that is turned twice."""
    size = states.shape[2]
    is_behind = torch.ones(size, size, dtype=states.dtype, device=states.device).triu()
    return (is_behind.expand(*states.shape[:2], size, size) @ states.flatten(3)).view_as(states)
