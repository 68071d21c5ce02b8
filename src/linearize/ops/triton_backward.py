"""The backward kernels of local attention: gradients of queries over lists of keys, and of keys over lists of queries.

FlashAttention-2's recurrence (Dao, arXiv 2307.08691, algorithm 2) over the lists of `block_tables`, without atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.ops.triton_blocks import (
    entry_at,
    hide_unseen,
    load_rows,
    score_limit,
    tokens_of,
    unit_at,
    work_of_program,
)


@triton.jit
def delta_kernel(
    output,
    gradient,
    delta,
    output_batch,
    output_head,
    output_token,
    gradient_batch,
    gradient_head,
    gradient_token,
    num_heads,
    num_tokens,
    D: tl.constexpr,
    M: tl.constexpr,
):
    """Sum over channels of output x gradient, [batch x heads, tokens]."""
    lane = tl.program_id(1)
    batch, head = (lane // num_heads).to(tl.int64), (lane % num_heads).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    exists = token < num_tokens
    output += batch * output_batch + head * output_head
    gradient += batch * gradient_batch + head * gradient_head
    states = load_rows(output, token, output_token, exists, D, True)
    slopes = load_rows(gradient, token, gradient_token, exists, D, True)
    products = states.to(tl.float32) * slopes.to(tl.float32)
    tl.store(delta + lane.to(tl.int64) * num_tokens + token, tl.sum(products, 1), mask=exists)


@triton.jit
def _query_slopes(
    acc,
    query,
    gradient,
    lse,
    delta,
    key_base,
    value_base,
    key_token,
    value_token,
    blocks,
    entries,
    begin,
    end,
    own_top,
    own_left,
    window,
    scale,
    MASKED: tl.constexpr,
    REGION: tl.constexpr,
    WHOLE: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """Adds the share of keys in entries [begin, end) to the gradient of queries."""
    for i in tl.range(begin, end):
        other, start, top, left = entry_at(entries, i)
        token, exists = tokens_of(blocks, other, start, N, WHOLE or not MASKED)
        key = load_rows(key_base, token, key_token, exists, D, MASKED and not WHOLE)
        value = load_rows(value_base, token, value_token, exists, D, MASKED and not WHOLE)
        scores = tl.dot(query, tl.trans(key))
        if MASKED:
            scores = hide_unseen(
                scores, blocks, other, own_top, own_left, top, left, exists, window, M, N, REGION, WHOLE
            )
        weights = tl.exp2(scores * scale - lse[:, None])
        slopes = weights * (tl.dot(gradient, tl.trans(value)) - delta[:, None])
        acc = tl.dot(slopes.to(key.dtype), key, acc)
    return acc


@triton.jit
def query_gradient_kernel(
    query,
    key,
    value,
    gradient,
    lse,
    delta,
    query_gradient,
    partial_gradient,
    blocks,
    segments,
    entries,
    query_batch,
    query_head,
    query_token,
    key_batch,
    key_head,
    key_token,
    value_batch,
    value_head,
    value_token,
    gradient_batch,
    gradient_head,
    gradient_token,
    result_batch,
    result_head,
    result_token,
    num_heads,
    num_tokens,
    num_text_segments,
    num_segments,
    lanes,
    window,
    scale,
    softmax_scale,
    REGION: tl.constexpr,
    WHOLE: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """Gradient of the queries of one segment."""
    unit, begin, masked, end, place, lane = work_of_program(num_text_segments, num_segments, segments, lanes)
    batch, head = (lane // num_heads).to(tl.int64), (lane % num_heads).to(tl.int64)
    key += batch * key_batch + head * key_head
    value += batch * value_batch + head * value_head
    start, top, left = unit_at(blocks, unit, M)
    token, exists = tokens_of(blocks, unit, start, M, WHOLE)
    channel = tl.arange(0, D)
    query += batch * query_batch + head * query_head
    gradient += batch * gradient_batch + head * gradient_head
    states = load_rows(query, token, query_token, exists, D, True)
    slopes = load_rows(gradient, token, gradient_token, exists, D, True)
    row_lse = tl.load(lse + lane.to(tl.int64) * num_tokens + token, mask=exists, other=float("inf"))
    row_delta = tl.load(delta + lane.to(tl.int64) * num_tokens + token, mask=exists, other=0.0)
    acc = tl.zeros([M, D], tl.float32)
    acc = _query_slopes(
        acc, states, slopes, row_lse, row_delta, key, value, key_token, value_token, blocks, entries, begin, masked,
        top, left, window, scale, False, REGION, WHOLE, D, M, N,
    )  # fmt: skip
    acc = _query_slopes(
        acc, states, slopes, row_lse, row_delta, key, value, key_token, value_token, blocks, entries, masked, end,
        top, left, window, scale, True, REGION, WHOLE, D, M, N,
    )  # fmt: skip
    acc *= softmax_scale
    if place < 0:
        result_at = query_gradient + batch * result_batch + head * result_head
        result_at += token[:, None] * result_token + channel[None, :]
        tl.store(result_at, acc.to(query_gradient.dtype.element_ty), mask=exists[:, None])
    else:
        slot = (place * lanes + lane).to(tl.int64) * M + tl.arange(0, M)
        tl.store(partial_gradient + slot[:, None] * D + channel[None, :], acc)


@triton.jit
def _key_slopes(
    key_acc,
    value_acc,
    key,
    value,
    query_base,
    gradient_base,
    lse,
    delta,
    query_token,
    gradient_token,
    blocks,
    entries,
    begin,
    end,
    unit,
    own_top,
    own_left,
    window,
    scale,
    MASKED: tl.constexpr,
    REGION: tl.constexpr,
    WHOLE: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """Adds the share of queries in entries [begin, end) to the gradients of keys and values; all is [keys, queries]."""
    for i in tl.range(begin, end):
        other, start, top, left = entry_at(entries, i)
        token, exists = tokens_of(blocks, other, start, M, WHOLE or not MASKED)
        query = load_rows(query_base, token, query_token, exists, D, MASKED and not WHOLE)
        gradient = load_rows(gradient_base, token, gradient_token, exists, D, MASKED and not WHOLE)
        if MASKED and not WHOLE:
            column_lse = tl.load(lse + token, mask=exists, other=float("inf"))
            column_delta = tl.load(delta + token, mask=exists, other=0.0)
        else:
            column_lse, column_delta = tl.load(lse + token), tl.load(delta + token)
        scores = tl.dot(key, tl.trans(query))
        if MASKED:
            limit = score_limit(blocks, unit, top, left, own_top, own_left, window, M, N, REGION, True)
            scores = tl.minimum(scores, limit)
        weights = tl.exp2(scores * scale - column_lse[None, :])
        value_acc = tl.dot(weights.to(gradient.dtype), gradient, value_acc)
        slopes = weights * (tl.dot(value, tl.trans(gradient)) - column_delta[None, :])
        key_acc = tl.dot(slopes.to(query.dtype), query, key_acc)
    return key_acc, value_acc


@triton.jit
def key_gradient_kernel(
    query,
    key,
    value,
    gradient,
    lse,
    delta,
    key_gradient,
    value_gradient,
    partial_key,
    partial_value,
    blocks,
    segments,
    entries,
    query_batch,
    query_head,
    query_token,
    key_batch,
    key_head,
    key_token,
    value_batch,
    value_head,
    value_token,
    gradient_batch,
    gradient_head,
    gradient_token,
    result_batch,
    result_head,
    result_token,
    num_heads,
    num_tokens,
    num_text_segments,
    num_segments,
    lanes,
    window,
    scale,
    softmax_scale,
    REGION: tl.constexpr,
    WHOLE: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """Gradients of the keys and values of one segment, whose list holds queries."""
    unit, begin, masked, end, place, lane = work_of_program(num_text_segments, num_segments, segments, lanes)
    batch, head = (lane // num_heads).to(tl.int64), (lane % num_heads).to(tl.int64)
    query += batch * query_batch + head * query_head
    gradient += batch * gradient_batch + head * gradient_head
    lse += lane.to(tl.int64) * num_tokens
    delta += lane.to(tl.int64) * num_tokens
    start, top, left = unit_at(blocks, unit, N)
    token, exists = tokens_of(blocks, unit, start, N, WHOLE)
    channel = tl.arange(0, D)
    key += batch * key_batch + head * key_head
    value += batch * value_batch + head * value_head
    keys = load_rows(key, token, key_token, exists, D, True)
    values = load_rows(value, token, value_token, exists, D, True)
    key_acc = tl.zeros([N, D], tl.float32)
    value_acc = tl.zeros([N, D], tl.float32)
    key_acc, value_acc = _key_slopes(
        key_acc, value_acc, keys, values, query, gradient, lse, delta, query_token, gradient_token, blocks, entries,
        begin, masked, unit, top, left, window, scale, False, REGION, WHOLE, D, M, N,
    )  # fmt: skip
    key_acc, value_acc = _key_slopes(
        key_acc, value_acc, keys, values, query, gradient, lse, delta, query_token, gradient_token, blocks, entries,
        masked, end, unit, top, left, window, scale, True, REGION, WHOLE, D, M, N,
    )  # fmt: skip
    key_acc *= softmax_scale
    if place < 0:
        offset = batch * result_batch + head * result_head + token[:, None] * result_token + channel[None, :]
        tl.store(key_gradient + offset, key_acc.to(key_gradient.dtype.element_ty), mask=exists[:, None])
        tl.store(value_gradient + offset, value_acc.to(value_gradient.dtype.element_ty), mask=exists[:, None])
    else:
        slot = (place * lanes + lane).to(tl.int64) * N + tl.arange(0, N)
        tl.store(partial_key + slot[:, None] * D + channel[None, :], key_acc)
        tl.store(partial_value + slot[:, None] * D + channel[None, :], value_acc)
