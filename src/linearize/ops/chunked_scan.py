"""Gated linear attention in both directions by batched matrix products: pairs within chunks, states between them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from linearize.ops.products import aligned, in_chunks, wide_matmul

# Tokens of a chunk: within it weights are explicit, between chunks states are carried on.
CHUNK = 128
# States that one matrix product carries on; more go through states of groups.
GROUP = 16
# Numbers that a group of heads may have in weights and states; from the second bound on, they are not kept for the
# gradient but computed again.
NUMBERS_AT_A_TIME, NUMBERS_TO_KEEP = 2**29, 2**22


def chunked(query: Tensor, key: Tensor, value: Tensor, forward_gate: Tensor, backward_gate: Tensor) -> Tensor:
    """See `bidirectional_gated_attention`; of a cost linear in tokens.

    Both directions share their matrix products, in the type of query, key and value; gates and states are float32 or
    wider. All exponents are sums of logarithmic gates over a stretch of tokens, so none is positive, whatever the
    gates. Of large inputs nothing but the arguments is kept for the gradient.
    """
    num_heads, num_tokens, num_features = query.shape[1:]
    numbers = query.shape[0] * num_tokens * (CHUNK + 2 * num_features * value.shape[-1] // CHUNK)
    arguments = (query, key, value, forward_gate, backward_gate)
    if num_heads * numbers <= NUMBERS_TO_KEEP:
        return _heads(*arguments)
    size = max(1, NUMBERS_AT_A_TIME // numbers)
    groups = zip(*(states.split(size, dim=1) for states in arguments), strict=True)
    outputs = [checkpoint(_heads, *group, use_reentrant=False, preserve_rng_state=False) for group in groups]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _heads(query: Tensor, key: Tensor, value: Tensor, forward_gate: Tensor, backward_gate: Tensor) -> Tensor:
    num_tokens, width, channels = query.shape[2], forward_gate.shape[-1], value.shape[-1]
    query, key, value, ahead, behind = (
        in_chunks(states, CHUNK) for states in (query, key, aligned(value), forward_gate, backward_gate)
    )
    # From the chunk's start: through the token's own gate, and up to it without.
    before, after = ahead.cumsum(dim=-2), shifted(behind).cumsum(dim=-2)
    ends = before[..., -1:, :], after[..., -1:, :] + behind[..., -1:, :]
    within = _within_chunks_of_heads if width == 1 else _within_chunks_of_channels
    output = within(query, key, value, before, after)
    # Through the states of all earlier and of all later chunks.
    output = _add_from_states(output, (query, before), (key, ends[0] - before), value, ends[0], reverse=False)
    output = _add_from_states(output, (query, ends[1] - after), (key, after), value, ends[1], reverse=True)
    return output.flatten(2, 3)[:, :, :num_tokens, :channels]


def shifted(states: Tensor) -> Tensor:
    """Each token's [..., tokens, channels] in the place of the next; zeros in the first."""
    return F.pad(states, (0, 0, 1, 0))[..., :-1, :]


def _within_chunks_of_heads(query: Tensor, key: Tensor, value: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Pairs of one chunk, [batch, heads, chunks, CHUNK, channels], with one gate for all features."""
    is_earlier = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=query.device).tril()
    decay = torch.where(is_earlier, before - before.transpose(-1, -2), after.transpose(-1, -2) - after).exp()
    return (query @ key.transpose(-1, -2) * decay.to(query.dtype)) @ value


def _within_chunks_of_channels(query: Tensor, key: Tensor, value: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """The same with gates of each feature, halving by halving.

    Tokens of the two halves of a block see one another through the gates between each of them and the middle: both
    products of gates, and each a factor of at most 1.
    """
    output = (query * key).sum(dim=-1, keepdim=True) * value
    half = CHUNK // 2
    while half:
        queries, keys, values, down, up = (
            states.unflatten(3, (-1, 2, half)) for states in (query, key, value, before, after)
        )
        (left_down, right_down), (left_up, right_up) = down.unbind(dim=-3), up.unbind(dim=-3)
        middle_down, middle_up = left_down[..., -1:, :], right_up[..., :1, :]
        reads = torch.stack([middle_up - left_up, right_down - middle_down], dim=-3).exp()
        writes = torch.stack([right_up - middle_up, middle_down - left_down], dim=-3).exp()
        weights = (queries * reads.to(query.dtype)) @ (keys.flip(-3) * writes.to(key.dtype)).transpose(-1, -2)
        output = output + (weights @ values.flip(-3)).flatten(3, 5)
        half //= 2
    return output


def _add_from_states(
    output: Tensor,
    reads: tuple[Tensor, Tensor],
    writes: tuple[Tensor, Tensor],
    value: Tensor,
    kept: Tensor,
    *,
    reverse: bool,
) -> Tensor:
    """Adds what chunks see of other chunks; queries and keys come with the logarithms of their factors."""
    keys = writes[0] * writes[1].exp().to(value.dtype)
    queries = reads[0] * reads[1].exp().to(value.dtype)
    states = carry_states(wide_matmul(keys.transpose(-1, -2), value), kept[..., 0, :], reverse=reverse)
    return output + queries @ states.to(value.dtype)


def carry_states(added: Tensor, kept: Tensor, *, reverse: bool) -> Tensor:
    """The state of all earlier, or in reverse of all later, chunks at every chunk.

    States are carried on by products with small matrices of decays, within groups of chunks, and between groups in
    the same way: as many calls as the logarithm of the chunks.

    Args:
        added: [batch, heads, chunks, num_features, channels], what each chunk adds to the state.
        kept: [batch, heads, chunks, num_features or 1], logarithm of what is left of a state behind each chunk.
        reverse: Whether states pass from the last chunk to the first.

    Returns:
        As `added`: at chunk c the sum over c' < c (c' > c) of what c' adds times what the chunks between leave.
    """
    shape, width = added.shape, kept.shape[-1]
    return _states(added.flatten(3).unflatten(3, (width, -1)), kept, reverse).reshape(shape)


def _states(added: Tensor, kept: Tensor, reverse: bool) -> Tensor:
    """`carry_states` on [batch, heads, chunks, width, numbers] and [batch, heads, chunks, width]."""
    num_chunks = kept.shape[2]
    size = min(GROUP, num_chunks)
    if missing := -num_chunks % size:
        added, kept = F.pad(added, (0, 0, 0, 0, 0, missing)), F.pad(kept, (0, 0, 0, missing))
    added, kept = added.unflatten(2, (-1, size)).transpose(-3, -2), kept.unflatten(2, (-1, size)).transpose(-1, -2)
    # [batch, heads, groups, width, size], in the order in which states pass over the chunks.
    through = (kept.flip(-1) if reverse else kept).cumsum(dim=-1)
    up_to = F.pad(through, (1, 0))[..., :-1]
    is_earlier = torch.ones(size, size, dtype=torch.bool, device=kept.device).tril(-1)
    weights = (up_to[..., :, None] - through[..., None, :]).masked_fill(~is_earlier, -torch.inf).exp()
    whole = through[..., -1:]
    to_end, from_start = (whole - through).exp()[..., None, :], up_to.exp()[..., None]
    if reverse:
        weights, to_end, from_start = weights.flip(-1, -2), to_end.flip(-1), from_start.flip(-2)
    if added.shape[2] == 1:
        return (weights @ added).transpose(-3, -2).flatten(2, 3)[:, :, :num_chunks]
    states, total = (torch.cat([weights, to_end], dim=-2) @ added).split([size, 1], dim=-2)
    carried = _states(total[..., 0, :], whole[..., 0], reverse)
    states = torch.addcmul(states, from_start, carried[..., None, :])
    return states.transpose(-3, -2).flatten(2, 3)[:, :, :num_chunks]
