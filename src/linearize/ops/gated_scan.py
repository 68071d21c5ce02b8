"""Gated linear attention in both directions: every token sees all tokens, those farther away through more gates."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.errors import LinearizeError
from linearize.ops import fla_scan, head_scan
from linearize.ops.chunked_scan import CHUNK, chunked
from linearize.ops.precision import widen
from linearize.ops.products import for_products


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
        backend: "chunked", of a cost linear in tokens; "triton", the same by GPU kernels, for one gate in each head;
            "fla", the same by those of a library; "recurrent", token by token; "dense", on [tokens x tokens] weights;
            or "auto": in bf16 on a GPU the first of triton and fla that works there, else chunked.

    Returns:
        [batch, heads, tokens, channels]: where query, key and value are bf16 on a GPU, products are, and so is this;
        else float32 at least. Gates and states are float32 at least.

    Raises:
        LinearizeError: There is no such backend, or it cannot serve this call.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise LinearizeError(f"unknown backend {backend!r}, choose one of auto, {', '.join(BACKENDS)}")
    if backward_gate is None:
        backward_gate = F.pad(forward_gate, (0, 0, 0, 1))[:, :, 1:]
    query, key, value = for_products(query, key, value)
    gates = widen(forward_gate), widen(backward_gate)
    if backend == "auto" or backend in REFUSALS:
        backend = _choose(backend, value, query.shape[-1], forward_gate.shape[-1])
    return BACKENDS[backend](query, key, value, *gates)


def _choose(backend: str, value: Tensor, num_features: int, gate_width: int) -> str:
    """The backend asked for or, where the caller left it open, the first kernels that work, and chunked without any.

    A GPU that could compute in bf16 and on which kernels do not work is told once.
    """
    if backend != "auto":
        reason = REFUSALS[backend](value, num_features, gate_width)
        if reason is not None:
            raise LinearizeError(f"backend {backend} cannot serve this call, as {reason}; choose chunked or auto")
        return backend
    refused = []
    for name in KERNELS[gate_width == 1]:
        reason = REFUSALS[name](value, num_features, gate_width)
        if reason is None:
            break
        refused.append(f"not {name}: {reason}")
    else:
        name = "chunked"
    if refused and value.device.type == "cuda" and value.dtype == torch.bfloat16:
        _tell(name, "; ".join(refused))
    return name


# A compiler calls it while it traces.
@torch.compiler.assume_constant_result
def _tell(name: str, refused: str) -> None:
    warnings.warn(f"gated scans are computed by {name} on this GPU ({refused})", stacklevel=4)


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


def _recur(query: Tensor, key: Tensor, value: Tensor, gate: Tensor) -> Tensor:
    state = query.new_zeros(*query.shape[:2], query.shape[-1], value.shape[-1])
    outputs = []
    for token in range(query.shape[2]):
        state = gate[:, :, token, :, None].exp() * state + key[:, :, token, :, None] * value[:, :, token, None]
        outputs.append((query[:, :, token, None] @ state)[:, :, 0])
    return torch.stack(outputs, dim=2)


BACKENDS: dict[str, Callable[..., Tensor]] = {
    "chunked": chunked,
    "triton": head_scan.head_scan,
    "fla": fla_scan.fla,
    "recurrent": recurrent,
    "dense": dense,
}
# Why kernels cannot serve a call.
REFUSALS: dict[str, Callable[[Tensor, int, int], str | None]] = {
    "triton": head_scan.refusal,
    "fla": fla_scan.refusal,
}
# Those that `auto` asks, one after another, for a gate in each head, and for other gates.
KERNELS = {True: ("triton", "fla"), False: ("fla",)}


def gated_attention_flops(num_tokens: int, num_features: int, channels: int) -> int:
    """Operations of the chunked form in one head: in either direction states, their reading, and pairs of chunks."""
    return 2 * (4 * num_tokens * num_features * channels + num_tokens * CHUNK * (num_features + channels))
