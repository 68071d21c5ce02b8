"""Gated scans in both directions with one gate in each head by Triton kernels, as operators compilers pass through."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from linearize.ops.scan_gradients import FLOOR, scan_gradients
from linearize.ops.scan_probe import failure
from linearize.ops.triton_launch import empty_token_major, num_processors, with_near_channels

# Tokens of a chunk, within which weights are explicit.
CHUNK = 64
# Programs of a kernel for each processor of the GPU, and the fewest chunks that are worth one.
PROGRAMS, FEWEST_CHUNKS = 4, 4
# Numbers of a state that a program holds, and features that it can take.
STATE = 128 * 64
MOST_FEATURES = 256 + 16
# Features beside a power of two that a program takes along.
TAIL = 16
# A chunk is as many tokens as the rows of four warps' products.
WARPS = 4
# Chunks under way at a time, with few and with many features; with more, a processor has no room for two programs.
TOTALS_STAGES, WALK_STAGES = 3, (3, 2)
FEW_FEATURES = 64
# Chunks of a program that sums gates, and numbers of one that carries states on.
CHUNKS_AT_ONCE, NUMBERS_AT_ONCE = 16, 1024


@torch.library.custom_op("linearize::head_scan", mutates_args=())
def head_scan(query: Tensor, key: Tensor, value: Tensor, forward_gate: Tensor, backward_gate: Tensor) -> Tensor:
    """See `bidirectional_gated_attention`, with gates [batch, heads, tokens, 1]; what it takes, `refusal` says.

    Tokens may lie in memory as they like. It has no second derivative.

    Returns:
        [batch, heads, tokens, channels], token-major in memory, as projections read it.
    """
    return _scan(query, key, value, forward_gate, backward_gate, None)[0]


@torch.library.custom_op("linearize::head_scan_with_rows", mutates_args=())
def head_scan_with_rows(
    query: Tensor, key: Tensor, value: Tensor, forward_gate: Tensor, backward_gate: Tensor, other: Tensor
) -> tuple[Tensor, Tensor]:
    """`head_scan`, and products of its directions with `other`, a tensor like the output; without a gradient.

    Returns:
        The output, and [2, batch, heads, tokens, 1] in float32: sums over channels of `other` and what each token sees
        of all earlier tokens, and of all later ones, without itself.
    """
    return _scan(query, key, value, forward_gate, backward_gate, other)


@head_scan.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Tensor) -> Tensor:
    return empty_token_major(value)


@head_scan_with_rows.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    return empty_token_major(value), value.new_empty(2, *value.shape[:3], 1, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
    return scan_gradients(head_scan, head_scan_with_rows, gradient, *ctx.saved_tensors)


head_scan.register_autograd(_backward, setup_context=_save)


@dataclass(frozen=True)
class Blocks:
    """How features and channels are cut.

    Attributes:
        features: A power of two, which each program has all of, and `low_features` more, 0 or `TAIL`.
        channels: A power of two, of which each of `num_blocks` programs has as many.
    """

    features: int
    low_features: int
    channels: int
    num_blocks: int


def blocks_of(num_features: int, num_channels: int) -> Blocks:
    """The fewest blocks of as few channels as hold all."""
    below = 1 << (num_features.bit_length() - 1)
    is_beside = 2 * TAIL <= below < num_features <= below + TAIL
    features, low_features = (below, TAIL) if is_beside else (_power_from(num_features), 0)
    channels = min(STATE // features, _power_from(num_channels))
    return Blocks(features, low_features, channels, -(-num_channels // channels))


def _power_from(size: int) -> int:
    """The smallest power of two that is no smaller, at least the 16 that tensor cores take."""
    return max(16, 1 << (size - 1).bit_length())


def _scan(
    query: Tensor, key: Tensor, value: Tensor, forward_gate: Tensor, backward_gate: Tensor, other: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The output, and the products of `head_scan_with_rows`, which are of no meaning without `other`."""
    query, key, value = (with_near_channels(states) for states in (query, key, value))
    beside = value if other is None else with_near_channels(other)
    output = empty_token_major(value)
    batch, num_heads, num_tokens, num_features = query.shape
    channels, lanes, num_chunks = value.shape[3], batch * num_heads, -(-num_tokens // CHUNK)
    blocks = blocks_of(num_features, channels)
    chunks_of_segment = _chunks_of_segment(num_chunks, lanes * blocks.num_blocks, query.device)
    num_segments = -(-num_chunks // chunks_of_segment)
    sums = value.new_empty(2, lanes, num_chunks, CHUNK, dtype=torch.float32)
    states, kept = (sums.new_empty(2, num_segments, lanes, *sizes) for sizes in ((num_features, channels), ()))
    rows = sums.new_empty(2, 0 if other is None else blocks.num_blocks, lanes, num_chunks * CHUNK)
    counts = (num_heads, num_tokens, num_chunks)
    units = _unit(query, key), _unit(value, output, beside)
    cut = _constants(num_features, channels, blocks, units)
    # Triton starts kernels on the current GPU, which need not be the tensors'.
    with torch.cuda.device_of(query):
        _launch_sums(forward_gate, backward_gate, sums, counts)
        if num_segments > 1:
            _launch_totals(key, value, sums, states, kept, (*counts, chunks_of_segment), blocks.num_blocks, cut)
        steps = (*_steps(units[0], query, key), *_steps(units[1], value, output, beside))
        given = (query, key, value, output, beside, sums, states, rows, *steps, *counts, chunks_of_segment)
        for back in (False, True):
            cases = {"BACK": back, "CARRIED": num_segments > 1, "ROWS": other is not None}
            kernel = _kernels().walk_kernel[blocks.num_blocks, lanes, num_segments]
            kernel(*given, **cut, **cases, num_stages=WALK_STAGES[blocks.features > FEW_FEATURES])
    if other is None:
        return output, rows
    found = rows.sum(dim=1).view(2, batch, num_heads, -1)[..., :num_tokens, None]
    return output, found.contiguous()


def _constants(num_features: int, channels: int, blocks: Blocks, units: tuple[int, int]) -> dict[str, int]:
    """What kernels that walk chunks are compiled for."""
    return {
        "F": num_features,
        "V": channels,
        "FB": blocks.features,
        "FT": blocks.low_features,
        "BV": blocks.channels,
        "C": CHUNK,
        "FEATURE_UNIT": units[0],
        "CHANNEL_UNIT": units[1],
        "num_warps": WARPS,
    }


def _launch_sums(forward_gate: Tensor, backward_gate: Tensor, sums: Tensor, counts: tuple[int, ...]) -> None:
    """Fills [2, lanes, chunks, CHUNK]."""
    _, lanes, num_chunks, _ = sums.shape
    _kernels().sums_kernel[-(-num_chunks // CHUNKS_AT_ONCE), lanes](
        *(forward_gate, backward_gate, sums, *_steps(1, forward_gate, backward_gate), *counts),
        FLOOR=FLOOR,
        C=CHUNK,
        M=CHUNKS_AT_ONCE,
    )


def _launch_totals(
    key: Tensor,
    value: Tensor,
    sums: Tensor,
    states: Tensor,
    kept: Tensor,
    counts: tuple[int, ...],
    num_blocks: int,
    cut: dict[str, int],
) -> None:
    """Fills the states that segments start from, [2, segments, lanes, num_features, channels]."""
    _, num_segments, lanes, *sizes = states.shape
    steps = (*_steps(cut["FEATURE_UNIT"], key), *_steps(cut["CHANNEL_UNIT"], value))
    kernel = _kernels().totals_kernel[num_blocks, lanes, num_segments]
    kernel(key, value, sums, states, kept, *steps, *counts, **cut, num_stages=TOTALS_STAGES)
    kernel = _kernels().carry_kernel[-(-math.prod(sizes) // NUMBERS_AT_ONCE), lanes, 2]
    kernel(states, kept, num_segments, SIZE=math.prod(sizes), M=NUMBERS_AT_ONCE)


def _kernels() -> ModuleType:
    """Imports triton, which only machines with a GPU have."""
    from linearize.ops import triton_scan

    return triton_scan


def _chunks_of_segment(num_chunks: int, programs: int, device: torch.device) -> int:
    """So many chunks that all segments of `programs` lanes and blocks together keep the GPU busy."""
    num_segments = min(PROGRAMS * num_processors(device) // programs, num_chunks // FEWEST_CHUNKS)
    return -(-num_chunks // max(1, num_segments))


def _steps(unit: int, *tensors: Tensor) -> tuple[int, ...]:
    """Strides of batch, heads and tokens, in units."""
    return tuple(step // unit for tensor in tensors for step in tensor.stride()[:3])


def _unit(*tensors: Tensor) -> int:
    """Of how many numbers all these strides are multiples: the eight that are read as one word, or one."""
    return 8 if all(step % 8 == 0 for step in _steps(1, *tensors)) else 1


def refusal(value: Tensor, num_features: int, gate_width: int) -> str | None:
    """Why the kernels cannot serve a call, in one clause, or None where they can.

    Args:
        value: [batch, heads, tokens, channels], or a stand-in with its type and device.
        num_features: Channels of query and key.
        gate_width: Gates of each head.
    """
    if gate_width != 1:
        return f"it takes one gate in each head, not {gate_width}"
    if value.device.type != "cuda":
        return f"it needs a GPU, and this is a {value.device.type}"
    if value.dtype != torch.bfloat16:
        return f"it computes in bfloat16, and query, key and value are {value.dtype}".replace("torch.", "")
    # In gradients, query, key and value change their places.
    if max(num_features, value.shape[3]) > MOST_FEATURES:
        return f"it takes at most {MOST_FEATURES} features and channels, not {max(num_features, value.shape[3])}"
    return _fails(value.device, value.shape[1], num_features, value.shape[3])


# To a compiler it is a constant.
@torch.compiler.assume_constant_result
def _fails(device: torch.device, num_heads: int, num_features: int, channels: int) -> str | None:
    return _failure(device, num_heads, num_features, channels)


@lru_cache(maxsize=64)
def _failure(device: torch.device, num_heads: int, num_features: int, channels: int) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "it needs the package triton"
    return failure(head_scan, device, num_heads, num_features, channels, 1)
