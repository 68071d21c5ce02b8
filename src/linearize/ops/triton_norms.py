"""Kernels of norms and what follows them: each number is read once and written once."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _normed_and_rotated(
    states, weight, at, exists, cosine, sine, eps, D: tl.constexpr, M: tl.constexpr, DTYPE: tl.constexpr
):
    channel = tl.arange(0, D)
    heads = tl.load(states + at[:, None] + channel[None, :], mask=exists[:, None], other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(heads * heads, 1) / D + eps)
    heads = heads * scale[:, None] * tl.load(weight + channel)[None, :].to(tl.float32)
    # Rounded between the two, as the separate operations do.
    heads = heads.to(DTYPE).to(tl.float32)
    first, second = tl.split(tl.reshape(heads, (M, D // 2, 2)))
    turned = tl.reshape(tl.join(-second, first), (M, D))
    return (heads * cosine + turned * sine).to(DTYPE)


@triton.jit
def norm_modulate_kernel(
    states,
    scale,
    shift,
    out,
    states_batch,
    states_token,
    scale_batch,
    shift_batch,
    out_batch,
    first_token,
    eps,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token a program; a stream's tokens come to lie from `first_token` of the output on."""
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    exists = channel < C
    at = batch * states_batch + token * states_token + channel
    row = tl.load(states + at, mask=exists, other=0.0).to(tl.float32)
    row = tl.where(exists, row - tl.sum(row, 0) / C, 0.0)
    row = row * tl.rsqrt(tl.sum(row * row, 0) / C + eps)
    factor = 1.0 + tl.load(scale + batch * scale_batch + channel, mask=exists, other=0.0).to(tl.float32)
    row = row * factor + tl.load(shift + batch * shift_batch + channel, mask=exists, other=0.0).to(tl.float32)
    at = batch * out_batch + (first_token + token) * C + channel
    tl.store(out + at, row.to(out.dtype.element_ty), mask=exists)


@triton.jit
def _heads_of_program(cosine, sine, num_tokens, first_token, H: tl.constexpr, D: tl.constexpr, M: tl.constexpr):
    """Batch, token and head of a program's rows, whether there is one, its cosine and sine, and where it is joined."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    token = row // H
    exists = token < num_tokens
    token, head = token.to(tl.int64), row % H
    channel = tl.arange(0, D)[None, :]
    table_at = ((first_token + token) * D)[:, None] + channel
    cos = tl.load(cosine + table_at, mask=exists[:, None], other=0.0)
    sin = tl.load(sine + table_at, mask=exists[:, None], other=0.0)
    joined_at = ((first_token + token) * (H * D) + head * D)[:, None] + channel
    return tl.program_id(1).to(tl.int64), token, head, exists, cos, sin, joined_at


@triton.jit
def norm_rotate_kernel(
    query,
    key,
    query_weight,
    key_weight,
    cosine,
    sine,
    query_out,
    key_out,
    query_batch,
    query_token,
    key_batch,
    key_token,
    out_batch,
    num_tokens,
    first_token,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
):
    """M heads a program; the tokens of a stream lie one after another, from `first_token` of the outputs on."""
    batch, token, head, exists, cos, sin, joined_at = _heads_of_program(cosine, sine, num_tokens, first_token, H, D, M)
    query_out += batch * out_batch
    key_out += batch * out_batch
    dtype: tl.constexpr = query_out.dtype.element_ty
    at = batch * query_batch + token * query_token + head * D
    result = _normed_and_rotated(query, query_weight, at, exists, cos, sin, eps, D, M, dtype)
    tl.store(query_out + joined_at, result, mask=exists[:, None])
    at = batch * key_batch + token * key_token + head * D
    result = _normed_and_rotated(key, key_weight, at, exists, cos, sin, eps, D, M, dtype)
    tl.store(key_out + joined_at, result, mask=exists[:, None])


@triton.jit
def _gradient(gradient, states, weight, gradient_at, at, exists, cosine, sine, eps, D: tl.constexpr, M: tl.constexpr):
    channel = tl.arange(0, D)
    slope = tl.load(gradient + gradient_at, mask=exists[:, None], other=0.0).to(tl.float32)
    first, second = tl.split(tl.reshape(slope * sine, (M, D // 2, 2)))
    slope = slope * cosine + tl.reshape(tl.join(second, -first), (M, D))
    slope = slope * tl.load(weight + channel)[None, :].to(tl.float32)
    heads = tl.load(states + at[:, None] + channel[None, :], mask=exists[:, None], other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(heads * heads, 1) / D + eps)
    heads = heads * scale[:, None]
    return (slope - heads * (tl.sum(heads * slope, 1) / D)[:, None]) * scale[:, None]


@triton.jit
def norm_rotate_gradient_kernel(
    query_gradient,
    key_gradient,
    query,
    key,
    query_weight,
    key_weight,
    cosine,
    sine,
    query_out,
    key_out,
    query_batch,
    query_token,
    key_batch,
    key_token,
    gradient_batch,
    num_tokens,
    first_token,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
):
    """The gradients of a stream's query and key before norm and rotation, as `norm_rotate_kernel` goes through them."""
    batch, token, head, exists, cos, sin, joined_at = _heads_of_program(cosine, sine, num_tokens, first_token, H, D, M)
    query_gradient += batch * gradient_batch
    key_gradient += batch * gradient_batch
    out_at = ((batch * num_tokens + token) * (H * D) + head * D)[:, None] + tl.arange(0, D)[None, :]
    at = batch * query_batch + token * query_token + head * D
    result = _gradient(query_gradient, query, query_weight, joined_at, at, exists, cos, sin, eps, D, M)
    tl.store(query_out + out_at, result.to(query_out.dtype.element_ty), mask=exists[:, None])
    at = batch * key_batch + token * key_token + head * D
    result = _gradient(key_gradient, key, key_weight, joined_at, at, exists, cos, sin, eps, D, M)
    tl.store(key_out + out_at, result.to(key_out.dtype.element_ty), mask=exists[:, None])
