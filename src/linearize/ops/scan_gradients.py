"""Gradients of gated scans with one gate in each head, by scans of the same kind and products of states."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.ops.chunk_states import carry_states
from linearize.ops.chunked_scan import shifted
from linearize.ops.products import aligned, in_chunks, wide_matmul

# Tokens between places at which the gates' gradients are known by the states there.
ANCHOR = 256
# Logarithmic gates below are as closed as this one, which leaves 2e-22 of a token; larger sums would lose their digits.
FLOOR = -50.0
# Query, key, value and both gates to what `bidirectional_gated_attention` returns.
Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
# The same and another tensor, like the output, to the output and, [2, batch, heads, tokens, 1], the products of that
# tensor and of what tokens see of earlier, and of later ones: both with, or both without themselves.
ScanWithRows = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def scan_gradients(
    scan: Scan,
    scan_with_rows: ScanWithRows,
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    forward_gate: Tensor,
    backward_gate: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of query, key, value and gates, from that of the output.

    dq reads k with the weights do_i v_j, dk and dv read q and do with M^T. With P_ij = (q_i k_j) M_ij (do_i v_j), the
    gradient of log G_l is the sum of P_ij over j < l <= i, which is what rows from l on have of P more than columns.
    """
    # Of M^T, in which tokens and directions change over.
    turned = shifted(backward_gate), F.pad(forward_gate, (0, 0, 0, 1))[:, :, 1:]
    of_query, rows = scan_with_rows(gradient, value, key, forward_gate, backward_gate, query)
    of_key, columns = scan_with_rows(value, gradient, query, *turned, key)
    of_value = scan(key, query, gradient, *turned)
    of_forward = gate_gradient(rows[0] - columns[1], query, key, value, gradient, forward_gate)
    of_backward = gate_gradient(columns[0] - rows[1], key, query, gradient, value, turned[0])
    return of_query, of_key, of_value, of_forward, F.pad(of_backward, (0, 0, 0, 1))[:, :, 1:]


def gate_gradient(excess: Tensor, query: Tensor, key: Tensor, value: Tensor, gradient: Tensor, gate: Tensor) -> Tensor:
    """The gradient of the gate of one direction, [batch, heads, tokens, 1].

    Sums over all later tokens would gather the rounding of as many. They are taken up to the next of some places, at
    which the gradient is the product of the states of the earlier and of the later tokens.

    Args:
        excess: [batch, heads, tokens, 1], what the row of each token has of P more than its column.
        query: [batch, heads, tokens, num_features].
        key: Same.
        value: [batch, heads, tokens, channels].
        gradient: Of the output, same.
        gate: [batch, heads, tokens, 1], logarithm.
    """
    num_tokens = query.shape[2]
    excess, query, key, value, gradient, gate = (
        in_chunks(states, ANCHOR) for states in (excess, query, key, aligned(value), aligned(gradient), gate)
    )
    before = gate.clamp(min=FLOOR).cumsum(dim=-2)
    end = before[..., -1:, :]
    earlier = wide_matmul((key * (end - before).exp().to(key.dtype)).transpose(-1, -2), value)
    later = wide_matmul((query * before.exp().to(query.dtype)).transpose(-1, -2), gradient)
    before_it, behind_it = _carried(earlier, later, end[..., 0, :])
    at_start = (before_it * (later + end.exp() * behind_it)).sum(dim=(-2, -1))
    at_end = F.pad(at_start, (0, 1))[..., 1:]
    inside = excess.flip(-2).cumsum(dim=-2).flip(-2)
    return (inside + at_end[..., None, None]).flatten(2, 3)[:, :, :num_tokens]


def _carried(earlier: Tensor, later: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """The states of all earlier and of all later chunks, [batch, heads, chunks, ...], at every chunk."""
    both, kept = (torch.stack(sides, dim=3).movedim(2, 0) for sides in ((earlier, later), (kept, kept)))
    carried = carry_states(both.flatten(1, 2), kept.flatten(1, 2))
    before_it, behind_it = carried.unflatten(1, earlier.shape[:2]).movedim(0, 2).unbind(dim=3)
    return before_it, behind_it
