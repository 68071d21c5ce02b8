"""The portable forward kernel of local attention: online softmax over lists of blocks.

FlashAttention-2's recurrence (Dao, arXiv 2307.08691, algorithm 1) over the lists of `block_tables`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.ops.triton_blocks import entry_at, hide_unseen, load_rows, tokens_of, unit_at, work_of_program


@triton.jit
def _attend(
    acc,
    peak,
    total,
    query,
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
    """Adds the keys of entries [begin, end) to a running softmax in base 2."""
    channel = tl.arange(0, D)
    for i in tl.range(begin, end):
        other, start, top, left = entry_at(entries, i)
        token, exists = tokens_of(blocks, other, start, N, WHOLE or not MASKED)
        key_at = key_base + token[None, :] * key_token + channel[:, None]
        guarded: tl.constexpr = MASKED and not WHOLE
        key = tl.load(key_at, mask=exists[None, :], other=0.0) if guarded else tl.load(key_at)
        value = load_rows(value_base, token, value_token, exists, D, guarded)
        scores = tl.dot(query, key)
        if MASKED:
            scores = hide_unseen(
                scores, blocks, other, own_top, own_left, top, left, exists, window, M, N, REGION, WHOLE
            )
        new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - new_peak[:, None])
        decay = tl.exp2(peak - new_peak)
        total = total * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None]
        acc = tl.dot(weights.to(value.dtype), value, acc)
        peak = new_peak
    return acc, peak, total


@triton.jit
def forward_kernel(
    query,
    key,
    value,
    output,
    lse,
    partial_output,
    partial_lse,
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
    output_batch,
    output_head,
    output_token,
    num_heads,
    num_tokens,
    num_text_segments,
    num_segments,
    lanes,
    window,
    scale,
    REGION: tl.constexpr,
    WHOLE: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """Output and log-sum-exp (base 2) of one segment: final, or a partial result in float32."""
    unit, begin, masked, end, place, lane = work_of_program(num_text_segments, num_segments, segments, lanes)
    batch, head = (lane // num_heads).to(tl.int64), (lane % num_heads).to(tl.int64)
    key += batch * key_batch + head * key_head
    value += batch * value_batch + head * value_head
    start, top, left = unit_at(blocks, unit, M)
    token, exists = tokens_of(blocks, unit, start, M, WHOLE)
    channel = tl.arange(0, D)
    query += batch * query_batch + head * query_head
    states = load_rows(query, token, query_token, exists, D, not WHOLE)
    # Far below any score, and far above those that are hidden.
    peak = tl.full([M], -1e8, tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    acc, peak, total = _attend(
        acc, peak, total, states, key, value, key_token, value_token, blocks, entries, begin, masked, top,
        left, window, scale, False, REGION, WHOLE, D, M, N,
    )  # fmt: skip
    acc, peak, total = _attend(
        acc, peak, total, states, key, value, key_token, value_token, blocks, entries, masked, end, top, left,
        window, scale, True, REGION, WHOLE, D, M, N,
    )  # fmt: skip
    acc = acc / total[:, None]
    result = peak + tl.log2(total)
    if place < 0:
        output_at = (
            output + batch * output_batch + head * output_head + token[:, None] * output_token + channel[None, :]
        )
        tl.store(output_at, acc.to(output.dtype.element_ty), mask=exists[:, None])
        tl.store(lse + lane.to(tl.int64) * num_tokens + token, result, mask=exists)
    else:
        slot = (place * lanes + lane).to(tl.int64) * M + tl.arange(0, M)
        tl.store(partial_output + slot[:, None] * D + channel[None, :], acc)
        tl.store(partial_lse + slot, result)
