"""Gated linear attention in both directions: every token sees all tokens, those farther away through more gates."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.errors import LinearizeError
from linearize.ops.precision import widen

# Tokens of a chunk: within it weights are explicit, between chunks a state is carried on.
CHUNK = 64


def bidirectional_gated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    forward_gate: Tensor,
    backward_gate: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """sum_j (sum_c q_ic k_jc M_ijc) v_j over all tokens, where M is the product of the gates on the way.

    With gates G of the forward and G' of the backward scan, M_ij is prod_{l=j+1..i} G_l for j < i, 1 for j = i, and
    prod_{l=i..j-1} G'_l for j > i. The diagonal counts once. By default G'_l = G_{l+1}, which makes M symmetric, and
    the layer equivariant to reversing the tokens.

    Args:
        query: Features [batch, heads, tokens, num_features].
        key: Same.
        value: [batch, heads, tokens, channels].
        forward_gate: log G, at most 0: [batch, heads, tokens, num_features], or [batch, heads, tokens, 1] for one
            gate in each head.
        backward_gate: log G', same.
        backend: "chunked", of a cost linear in tokens; "recurrent", token by token; "dense", on [tokens x tokens]
            weights; or "auto".

    Returns:
        [batch, heads, tokens, channels], in float32 at least.

    Raises:
        LinearizeError: There is no such backend.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise LinearizeError(f"unknown backend {backend!r}, choose one of auto, {', '.join(BACKENDS)}")
    if backward_gate is None:
        backward_gate = F.pad(forward_gate, (0, 0, 0, 1))[:, :, 1:]
    tensors = (widen(tensor) for tensor in (query, key, value, forward_gate, backward_gate))
    return BACKENDS["chunked" if backend == "auto" else backend](*tensors)


def dense_decay(forward_gate: Tensor, backward_gate: Tensor) -> Tensor:
    """M, [batch, heads, tokens, tokens, num_features or 1], of gates as `bidirectional_gated_attention` takes them."""
    before = forward_gate.cumsum(dim=2)
    after = F.pad(backward_gate, (0, 0, 1, 0))[:, :, :-1].cumsum(dim=2)
    order = torch.arange(forward_gate.shape[2], device=forward_gate.device)
    is_earlier = (order[None] <= order[:, None])[..., None]
    # The exponent of the other half is positive, and would overflow.
    down = (before[:, :, :, None] - before[:, :, None]).clamp(max=0.0)
    up = (after[:, :, None] - after[:, :, :, None]).clamp(max=0.0)
    return torch.where(is_earlier, down, up).exp()


def dense(query: Tensor, key: Tensor, value: Tensor, forward_gate: Tensor, backward_gate: Tensor) -> Tensor:
    """The definition."""
    decay = dense_decay(forward_gate, backward_gate)
    return torch.einsum("bhic,bhjc,bhijc->bhij", query, key, decay.expand(*decay.shape[:-1], query.shape[-1])) @ value


def recurrent(query: Tensor, key: Tensor, value: Tensor, forward_gate: Tensor, backward_gate: Tensor) -> Tensor:
    """Two states carried on token by token, S_i = G_i S_{i-1} + k_i v_i^T, the second from the last token on."""
    ahead = _recur(query, key, value, forward_gate)
    behind = _recur(*(tensor.flip(2) for tensor in (query, key, value, backward_gate))).flip(2)
    return ahead + behind - (query * key).sum(dim=-1, keepdim=True) * value


def chunked(query: Tensor, key: Tensor, value: Tensor, forward_gate: Tensor, backward_gate: Tensor) -> Tensor:
    """Explicit weights within chunks and states between them.

    All exponents are sums of logarithmic gates over a stretch of tokens, so none is positive, whatever the gates.
    """
    ahead = _earlier_tokens(query, key, value, forward_gate)
    behind = _earlier_tokens(*(tensor.flip(2) for tensor in (query, key, value, backward_gate))).flip(2)
    return ahead + behind + (query * key).sum(dim=-1, keepdim=True) * value


def _recur(query: Tensor, key: Tensor, value: Tensor, gate: Tensor) -> Tensor:
    state = query.new_zeros(*query.shape[:2], query.shape[-1], value.shape[-1])
    outputs = []
    for token in range(query.shape[2]):
        state = gate[:, :, token, :, None].exp() * state + key[:, :, token, :, None] * value[:, :, token, None]
        outputs.append((query[:, :, token, None] @ state)[:, :, 0])
    return torch.stack(outputs, dim=2)


def _earlier_tokens(query: Tensor, key: Tensor, value: Tensor, gate: Tensor) -> Tensor:
    """What every token reads from those before it, itself excluded: [batch, heads, tokens, channels]."""
    num_tokens = query.shape[2]
    tensors = (F.pad(tensor, (0, 0, 0, -num_tokens % CHUNK)) for tensor in (query, key, value, gate))
    query, key, value, gate = (tensor.unflatten(2, (-1, CHUNK)) for tensor in tensors)
    decay = gate.cumsum(dim=-2)
    output = _within_chunks(query, key, value, decay) + _between_chunks(query, key, value, decay)
    return output.flatten(2, 3)[:, :, :num_tokens]


def _within_chunks(query: Tensor, key: Tensor, value: Tensor, decay: Tensor) -> Tensor:
    """Pairs of one chunk, [batch, heads, chunks, CHUNK, channels], halving by halving.

    A token of the right half of a block reads those of the left half through the last one of these: the decay from
    there to the query and that from the key to there are both products of gates, and each a factor of at most 1.
    """
    output = torch.zeros_like(value)
    half = CHUNK // 2
    while half:
        blocks = [tensor.unflatten(3, (-1, 2, half)) for tensor in (query, key, value, decay)]
        queries, keys, values, decays = blocks
        middle = decays[..., 0, -1:, :]
        weights = (queries[..., 1, :, :] * (decays[..., 1, :, :] - middle).exp()) @ (
            keys[..., 0, :, :] * (middle - decays[..., 0, :, :]).exp()
        ).transpose(-1, -2)
        read = weights @ values[..., 0, :, :]
        output = output + torch.stack([torch.zeros_like(read), read], dim=-3).flatten(3, 5)
        half //= 2
    return output


def _between_chunks(query: Tensor, key: Tensor, value: Tensor, decay: Tensor) -> Tensor:
    """Pairs of different chunks, through a state [batch, heads, num_features, channels] at the start of each."""
    whole = decay[..., -1:, :]
    added = (key * (whole - decay).exp()).transpose(-1, -2) @ value
    kept = whole.transpose(-1, -2).exp()
    states = [torch.zeros_like(added[:, :, 0])]
    for chunk in range(added.shape[2] - 1):
        states.append(kept[:, :, chunk] * states[-1] + added[:, :, chunk])
    return (query * decay.exp()) @ torch.stack(states, dim=2)


BACKENDS: dict[str, Callable[..., Tensor]] = {"chunked": chunked, "recurrent": recurrent, "dense": dense}


def gated_attention_flops(num_tokens: int, num_features: int, channels: int) -> int:
    """Operations of the chunked form in one head: in either direction states, their reading, and pairs of chunks."""
    return 2 * (4 * num_tokens * num_features * channels + num_tokens * CHUNK * (num_features + channels))
