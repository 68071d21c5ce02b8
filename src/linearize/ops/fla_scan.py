"""Gated scans by the chunk kernels of flash-linear-attention (the `fla` extra), forward and backward."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.extras import missing_sentence
from linearize.ops.chunk_states import carry_states
from linearize.ops.chunked_scan import chunked, shifted
from linearize.ops.precision import widen
from linearize.ops.products import aligned, in_chunks, wide_matmul

# Query, key, value and logarithmic gate, [batch, tokens, heads, ...], to sum_{j <= i} (q_i M_ij k_j) v_j.
Scan = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
# The kernels want channels in multiples of it.
ALIGNMENT = 16
# Tokens between places at which the gates' gradients are known by the states there.
ANCHOR = 256
# Tokens on which the kernels are compared with the portable form, which is also when they choose their blocks.
PROBE = 4096
# Largest relative error that rounding to bf16 explains.
TOLERANCE = 2e-2
_log = logging.getLogger(__name__)


def scan_heads(query: Tensor, key: Tensor, value: Tensor, gate: Tensor) -> Tensor:
    """Fla's scan with one gate in each head, [batch, tokens, heads, 1]."""
    from fla.ops.simple_gla import chunk_simple_gla

    return chunk_simple_gla(query, key, value, gate[..., 0], scale=1.0)[0]


def scan_channels(query: Tensor, key: Tensor, value: Tensor, gate: Tensor) -> Tensor:
    """Fla's scan with gates of each feature."""
    from fla.ops.gla import chunk_gla

    return chunk_gla(query, key, value, gate, scale=1.0)[0]


# A compiler would break its graph at each kernel.
@torch.compiler.disable
def fla(query: Tensor, key: Tensor, value: Tensor, forward_gate: Tensor, backward_gate: Tensor) -> Tensor:
    """See `bidirectional_gated_attention`; bf16 on a GPU, see `refusal`."""
    arguments = (query, key, value, forward_gate, backward_gate)
    if forward_gate.shape[-1] == 1:
        return ScanOfHeads.apply(scan_heads, *arguments)
    ahead, behind = both_ways(scan_channels, *arguments)
    return ahead + behind - (query * key).sum(dim=-1, keepdim=True) * value


def both_ways(
    scan: Scan, query: Tensor, key: Tensor, value: Tensor, forward_gate: Tensor, backward_gate: Tensor
) -> tuple[Tensor, Tensor]:
    """The scan from the first and that from the last token, each with the diagonal: [batch, heads, tokens, channels].

    Both are one call on twice the batch: the kernels that carry states on have little else to do at a time.
    """
    whole = [aligned(states, ALIGNMENT) for states in (query, key, value)]
    gates = [gate if gate.shape[-1] == 1 else aligned(gate, ALIGNMENT) for gate in (forward_gate, backward_gate)]
    pairs = [(states, states) for states in whole] + [(gates[0], gates[1])]
    turned = ((ahead.transpose(1, 2), behind.transpose(1, 2).flip(1)) for ahead, behind in pairs)
    found = scan(*(torch.cat(directions) for directions in turned))
    ahead, behind = found[..., : value.shape[-1]].transpose(1, 2).chunk(2)
    return ahead, behind.flip(2)


class ScanOfHeads(torch.autograd.Function):
    """Both scans with one gate in each head, whose gradients are scans of the same kind: no other kernel is needed.

    fla's own backward kernel of such gates refuses Hopper GPUs with Triton 3.4 to 3.7.0, which miscompile it.

    dq reads k with the weights do_i v_j, dk and dv read q and do with M^T. With P_ij = (q_i k_j) M_ij (do_i v_j), the
    gradient of log G_l is the sum of P_ij over j < l <= i, which is what rows from l on have of P more than columns.
    """

    @staticmethod
    def forward(
        ctx: Any, scan: Scan, query: Tensor, key: Tensor, value: Tensor, forward_gate: Tensor, backward_gate: Tensor
    ) -> Tensor:
        """Both directions, with the diagonal once."""
        ctx.save_for_backward(query, key, value, forward_gate, backward_gate)
        ctx.scan = scan
        return _without_twice(both_ways(scan, query, key, value, forward_gate, backward_gate), query, key, value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """See the class."""
        query, key, value, forward_gate, backward_gate = ctx.saved_tensors
        gradient = gradients[0].to(value.dtype)
        gates = forward_gate, backward_gate
        # Of M^T, in which tokens and directions change over.
        turned = shifted(backward_gate), F.pad(forward_gate, (0, 0, 0, 1))[:, :, 1:]
        of_query = both_ways(ctx.scan, gradient, value, key, *gates)
        of_key = both_ways(ctx.scan, value, gradient, query, *turned)
        of_value = both_ways(ctx.scan, key, query, gradient, *turned)
        rows, columns = [_dot(query, some) for some in of_query], [_dot(key, some) for some in of_key]
        of_forward = gate_gradient(rows[0] - columns[1], query, key, value, gradient, forward_gate)
        of_backward = gate_gradient(columns[0] - rows[1], key, query, gradient, value, turned[0])
        return (
            None,
            _without_twice(of_query, gradient, value, key),
            _without_twice(of_key, value, gradient, query),
            _without_twice(of_value, key, query, gradient),
            of_forward,
            F.pad(of_backward, (0, 0, 0, 1))[:, :, 1:],
        )


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
    before = gate.cumsum(dim=-2)
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


def _dot(first: Tensor, second: Tensor) -> Tensor:
    return (widen(first) * widen(second)).sum(dim=-1, keepdim=True)


def _without_twice(directions: tuple[Tensor, Tensor], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The sum of both directions with the diagonal counted once."""
    return directions[0] + directions[1] - (query * key).sum(dim=-1, keepdim=True) * value


def refusal(value: Tensor, num_features: int, gate_width: int) -> str | None:
    """Why fla's kernels cannot serve a call, in one clause, or None where they can.

    Args:
        value: [batch, heads, tokens, channels], or a stand-in with its type and device.
        num_features: Channels of query and key.
        gate_width: Gates of each head.
    """
    if value.device.type != "cuda":
        return f"it needs a GPU, and this is a {value.device.type}"
    if value.dtype != torch.bfloat16:
        return f"it computes in bfloat16, and query, key and value are {value.dtype}".replace("torch.", "")
    return _fails(value.device, value.shape[1], num_features, value.shape[3], gate_width)


# To a compiler it is a constant.
@torch.compiler.assume_constant_result
def _fails(device: torch.device, num_heads: int, num_features: int, channels: int, gate_width: int) -> str | None:
    return _failure(device, num_heads, num_features, channels, gate_width)


@lru_cache(maxsize=64)
def _failure(device: torch.device, num_heads: int, num_features: int, channels: int, gate_width: int) -> str | None:
    """Why the kernels fail on this GPU: run once, forward and backward, they are compared with the portable form."""
    if importlib.util.find_spec("fla") is None:
        return missing_sentence("it", ["fla"]).rstrip(".")
    _log.info("fla's kernels are compiled and tried for %d heads of %d x %d; once", num_heads, num_features, channels)
    with torch.inference_mode(False), torch.enable_grad():
        leaves = _probe(device, num_heads, num_features, channels, gate_width)
        try:
            found = _results(fla, leaves)
        # Triton raises errors of many kinds, none of which should end a run that can do without.
        except Exception as error:
            return f"its kernels fail on this GPU ({type(error).__name__}: {str(error).splitlines()[0]})"
        expected = _results(chunked, [leaf.detach().float().requires_grad_() for leaf in leaves])
    off = max(((a.float() - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True))
    return None if off <= TOLERANCE else f"its kernels are off by {off:.2g} from the definition on this GPU"


def _probe(device: torch.device, num_heads: int, num_features: int, channels: int, gate_width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(width: int) -> Tensor:
        return torch.randn(1, num_heads, PROBE - 7, width, generator=generator)

    query, key, value = (draw(width).to(device, torch.bfloat16) for width in (num_features, num_features, channels))
    gates = (F.logsigmoid(draw(gate_width) + 5).to(device) for _ in range(2))
    return [states.requires_grad_() for states in (query, key, value, *gates)]


def _results(compute: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    output = compute(*leaves)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(output.shape, generator=generator).to(output.device, output.dtype)
    return [output.detach(), *torch.autograd.grad(output, leaves, weight)]
