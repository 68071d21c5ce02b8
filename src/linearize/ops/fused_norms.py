"""Norms and what follows them, each in one kernel on a GPU, with streams of tokens joined."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Heads of a program.
_ROWS = 16


@torch.library.custom_op("linearize::norm_rotate", mutates_args=())
def norm_rotate(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    query_weights: Sequence[Tensor],
    key_weights: Sequence[Tensor],
    cosine: Tensor,
    sine: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """What RMS norm, concatenation of the streams, and rotation of neighbouring channels return one after another.

    It has gradients of queries and keys alone.

    Args:
        queries: Of one or more streams of tokens, each [batch, tokens, heads, head_dim] with near channels and heads.
        keys: Same.
        query_weights: Of the norm of each stream, [head_dim].
        key_weights: Same.
        cosine: [tokens of all streams, head_dim] in float32, each angle twice.
        sine: Same.
        eps: Of the norm.

    Returns:
        Query and key, [batch, tokens of all streams, heads, head_dim].
    """
    from linearize.ops.triton_norms import norm_rotate_kernel

    results = _empty(queries), _empty(queries)
    first = 0
    for query, key, *weights in zip(queries, keys, query_weights, key_weights, strict=True):
        _launch(norm_rotate_kernel, (query, key, *weights, cosine, sine, *results), query, key, results[0], first, eps)
        first += query.shape[1]
    return results


@torch.library.custom_op("linearize::norm_modulate", mutates_args=())
def norm_modulate(streams: Sequence[Tensor], scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) (1 + scale) + shift of the tokens of one or more streams, one after another; without gradients.

    Args:
        streams: Each [batch, tokens, channels] with near channels.
        scale: [batch, channels], likewise.
        shift: Same.
        eps: Of the norm, which has no parameters.

    Returns:
        [batch, tokens of all streams, channels].
    """
    from linearize.ops.triton_norms import norm_modulate_kernel

    result = _empty(streams)
    batch, _, num_channels = result.shape
    first = 0
    for states in streams:
        if states.shape[1]:
            with torch.cuda.device_of(states):
                norm_modulate_kernel[states.shape[1], batch](
                    *(states, scale, shift, result),
                    *(states.stride(0), states.stride(1), scale.stride(0), shift.stride(0), result.stride(0)),
                    *(first, eps),
                    C=num_channels,
                    BLOCK=1 << (num_channels - 1).bit_length(),
                )
        first += states.shape[1]
    return result


@norm_modulate.register_fake
def _(streams: Sequence[Tensor], *_: object) -> Tensor:
    return _empty(streams)


@norm_rotate.register_fake
def _(queries: Sequence[Tensor], *_: object) -> tuple[Tensor, Tensor]:
    return _empty(queries), _empty(queries)


@torch.library.custom_op("linearize::norm_rotate_backward", mutates_args=())
def _norm_rotate_backward(
    query_gradient: Tensor,
    key_gradient: Tensor,
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    query_weights: Sequence[Tensor],
    key_weights: Sequence[Tensor],
    cosine: Tensor,
    sine: Tensor,
    eps: float,
) -> list[Tensor]:
    """Gradients of the queries, then of the keys."""
    from linearize.ops.triton_norms import norm_rotate_gradient_kernel

    gradients = query_gradient.contiguous(), key_gradient.contiguous()
    results = [_like(states) for states in (*queries, *keys)]
    first = 0
    for number, (query, key) in enumerate(zip(queries, keys, strict=True)):
        given = (*gradients, query, key, query_weights[number], key_weights[number], cosine, sine)
        tensors = (*given, results[number], results[len(queries) + number])
        _launch(norm_rotate_gradient_kernel, tensors, query, key, gradients[0], first, eps)
        first += query.shape[1]
    return results


@_norm_rotate_backward.register_fake
def _(
    query_gradient: Tensor, key_gradient: Tensor, queries: Sequence[Tensor], keys: Sequence[Tensor], *_: object
) -> list[Tensor]:
    return [_like(states) for states in (*queries, *keys)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *streams, cosine, sine, ctx.eps = inputs
    ctx.num_streams = len(streams[0])
    ctx.save_for_backward(*(states for group in streams for states in group), cosine, sine)


def _backward(ctx: Any, query_gradient: Tensor, key_gradient: Tensor) -> tuple[Any, ...]:
    *saved, cosine, sine = ctx.saved_tensors
    count = ctx.num_streams
    streams = [saved[start : start + count] for start in range(0, 4 * count, count)]
    results = _norm_rotate_backward(query_gradient, key_gradient, *streams, cosine, sine, ctx.eps)
    return results[:count], results[count:], [None] * count, [None] * count, None, None, None


norm_rotate.register_autograd(_backward, setup_context=_save)


def _launch(
    kernel: Any, tensors: Sequence[Tensor], query: Tensor, key: Tensor, joined: Tensor, first: int, eps: float
) -> None:
    """Starts programs for all heads of a stream, which lies in the joined tokens from `first` on."""
    batch, num_tokens, num_heads, head_dim = query.shape
    if not num_tokens:
        return
    # Triton starts kernels on the current GPU, which need not be the tensors'.
    with torch.cuda.device_of(query):
        kernel[-(-num_tokens * num_heads // _ROWS), batch](
            *tensors,
            *(query.stride(0), query.stride(1), key.stride(0), key.stride(1), joined.stride(0)),
            *(num_tokens, first, eps),
            H=num_heads,
            D=head_dim,
            M=_ROWS,
        )


def _like(states: Tensor) -> Tensor:
    return torch.empty_like(states, memory_format=torch.contiguous_format)


def _empty(streams: Sequence[Tensor]) -> Tensor:
    batch, _, *rest = streams[0].shape
    return streams[0].new_empty(batch, sum(stream.shape[1] for stream in streams), *rest)
