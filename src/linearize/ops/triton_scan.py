"""Kernels of gated scans in both directions with one gate in each head.

The tokens of a lane, which is a head of one of the batch, are cut into segments, and segments into chunks of C tokens.
One kernel walks the chunks of each segment and finds what it adds to the states of both directions; the next carries
these states from segment to segment; then every segment is walked again, first forward, then backward, with the state
[features x channels] in registers: no state of a chunk is ever written.

Features are FB, and FT behind them (0 or 16); a block of channels is BV. Exponents are differences of the gates' sums
within a chunk, to base 2, of what is later less what is earlier on the way: none is positive. Strides of query and key
are in FEATURE_UNITs, those of value and output in CHANNEL_UNITs, by which the compiler knows that it may read whole
words.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.ops.triton_scan_blocks import load_state, load_tile, store_states, store_tile

# Numbers for whose values no kernel is compiled anew.
_COUNTS = ["num_heads", "num_tokens", "num_chunks", "chunks_of_segment"]


@triton.jit(do_not_specialize=_COUNTS)
def sums_kernel(
    ahead,
    behind,
    sums,
    ahead_batch,
    ahead_head,
    ahead_token,
    behind_batch,
    behind_head,
    behind_token,
    num_heads,
    num_tokens,
    num_chunks,
    FLOOR: tl.constexpr,
    C: tl.constexpr,
    M: tl.constexpr,
):
    """Sums of log gates from each chunk's first token on, and from its last one back: [2, lanes, chunks x C].

    Gates below FLOOR, next to nothing, count as that, so that differences of sums behind them keep their digits.
    """
    lane = tl.program_id(1).to(tl.int64)
    batch, head = lane // num_heads, lane % num_heads
    chunk, place = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, C)
    ahead += batch * ahead_batch + head * ahead_head
    behind += batch * behind_batch + head * behind_head
    sums += lane * num_chunks * C
    token = chunk[:, None] * C + place[None, :]
    _sum_gates(ahead, sums, token, ahead_token, num_tokens, num_chunks * C, FLOOR)
    sums += tl.num_programs(1).to(tl.int64) * num_chunks * C
    token = chunk[:, None] * C + (C - 1 - place)[None, :]
    _sum_gates(behind, sums, token, behind_token, num_tokens, num_chunks * C, FLOOR)


@triton.jit
def _sum_gates(gates, sums, token, step, num_tokens, num_places, FLOOR: tl.constexpr):
    """Writes sums of each row of tokens from the first on; in places without a token they stay what they are."""
    found = tl.load(gates + token.to(tl.int64) * step, mask=token < num_tokens, other=0.0).to(tl.float32)
    scale: tl.constexpr = 1.4426950408889634
    tl.store(sums + token, tl.cumsum(tl.maximum(found, FLOOR) * scale, 1), mask=token < num_places)


@triton.jit(do_not_specialize=_COUNTS)
def totals_kernel(
    key,
    value,
    sums,
    states,
    kept,
    key_batch,
    key_head,
    key_step,
    value_batch,
    value_head,
    value_step,
    num_heads,
    num_tokens,
    num_chunks,
    chunks_of_segment,
    F: tl.constexpr,
    V: tl.constexpr,
    FB: tl.constexpr,
    FT: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    FEATURE_UNIT: tl.constexpr,
    CHANNEL_UNIT: tl.constexpr,
):
    """What a segment adds to the states behind and before it, and in `kept`, [2, segments, lanes], what it leaves."""
    lane, segment, num_lanes = tl.program_id(1), tl.program_id(2), tl.num_programs(1)
    batch, head = (lane // num_heads).to(tl.int64), (lane % num_heads).to(tl.int64)
    key += (batch * key_batch + head * key_head) * FEATURE_UNIT
    value += (batch * value_batch + head * value_head) * CHANNEL_UNIT
    key_token, value_token = key_step * FEATURE_UNIT, value_step * CHANNEL_UNIT
    ahead_sums = sums + lane.to(tl.int64) * num_chunks * C
    behind_sums = ahead_sums + num_lanes.to(tl.int64) * num_chunks * C
    place, features = tl.arange(0, C), tl.arange(0, FB)
    channels = tl.program_id(0) * BV + tl.arange(0, BV)
    ahead_state, behind_state = tl.zeros((FB, BV), tl.float32), tl.zeros((FB, BV), tl.float32)
    if FT:
        last_features = FB + tl.arange(0, FT)
        ahead_low, behind_low = tl.zeros((FT, BV), tl.float32), tl.zeros((FT, BV), tl.float32)
    first = segment * chunks_of_segment
    ahead_kept, behind_kept = 0.0, 0.0
    for chunk in range(first, tl.minimum(first + chunks_of_segment, num_chunks)):
        start = chunk * C
        k = load_tile(key, start, key_token, place, features, num_tokens, F)
        v = load_tile(value, start, value_token, place, channels, num_tokens, V)
        end = tl.load(ahead_sums + start + C - 1)
        begin = tl.load(behind_sums + start)
        to_end = tl.exp2(end - tl.load(ahead_sums + start + place))
        to_begin = tl.exp2(behind_kept + (begin - tl.load(behind_sums + start + place)))
        ahead_v, behind_v = (v * to_end[:, None]).to(k.dtype), (v * to_begin[:, None]).to(k.dtype)
        kept_now = tl.exp2(end)
        ahead_state = tl.dot(tl.trans(k), ahead_v, ahead_state * kept_now, input_precision="ieee")
        behind_state = tl.dot(tl.trans(k), behind_v, behind_state, input_precision="ieee")
        if FT:
            low = load_tile(key, start, key_token, place, last_features, num_tokens, F)
            ahead_low = tl.dot(tl.trans(low), ahead_v, ahead_low * kept_now, input_precision="ieee")
            behind_low = tl.dot(tl.trans(low), behind_v, behind_low, input_precision="ieee")
        ahead_kept += end
        behind_kept += begin
    store_states(states, features, channels, ahead_state, behind_state, F, V)
    if FT:
        store_states(states, last_features, channels, ahead_low, behind_low, F, V)
    # Every block of channels finds the same.
    tl.store(kept + segment * num_lanes + lane, ahead_kept)
    tl.store(kept + (tl.num_programs(2) + segment) * num_lanes + lane, behind_kept)


@triton.jit(do_not_specialize=["num_segments"])
def carry_kernel(states, kept, num_segments, SIZE: tl.constexpr, M: tl.constexpr):
    """In place of what segments add, the state of all earlier ones (first half) or all later ones (second half)."""
    lane, direction, num_lanes = tl.program_id(1), tl.program_id(2), tl.num_programs(1)
    number = tl.program_id(0) * M + tl.arange(0, M)
    state = tl.zeros((M,), tl.float32)
    for step in range(num_segments):
        segment = tl.where(direction == 1, num_segments - 1 - step, step)
        place = (direction * num_segments + segment) * num_lanes + lane
        at = states + place.to(tl.int64) * SIZE + number
        added = tl.load(at, mask=number < SIZE, other=0.0)
        tl.store(at, state, mask=number < SIZE)
        state = state * tl.exp2(tl.load(kept + place)) + added


@triton.jit(do_not_specialize=_COUNTS)
def walk_kernel(
    query,
    key,
    value,
    output,
    other,
    sums,
    states,
    rows,
    query_batch,
    query_head,
    query_step,
    key_batch,
    key_head,
    key_step,
    value_batch,
    value_head,
    value_step,
    output_batch,
    output_head,
    output_step,
    other_batch,
    other_head,
    other_step,
    num_heads,
    num_tokens,
    num_chunks,
    chunks_of_segment,
    F: tl.constexpr,
    V: tl.constexpr,
    FB: tl.constexpr,
    FT: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    FEATURE_UNIT: tl.constexpr,
    CHANNEL_UNIT: tl.constexpr,
    BACK: tl.constexpr,
    CARRIED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Forward, what tokens see of earlier chunks and of their own; backward, BACK, adds what they see of later chunks.

    With ROWS, `rows`, [2, blocks of channels, lanes, chunks x C], are products of `other` and of what each token sees
    of all earlier and of all later ones, without itself.
    """
    lane, segment, num_lanes = tl.program_id(1), tl.program_id(2), tl.num_programs(1)
    batch, head = (lane // num_heads).to(tl.int64), (lane % num_heads).to(tl.int64)
    query += (batch * query_batch + head * query_head) * FEATURE_UNIT
    key += (batch * key_batch + head * key_head) * FEATURE_UNIT
    value += (batch * value_batch + head * value_head) * CHANNEL_UNIT
    output += (batch * output_batch + head * output_head) * CHANNEL_UNIT
    query_token, key_token = query_step * FEATURE_UNIT, key_step * FEATURE_UNIT
    value_token, output_token = value_step * CHANNEL_UNIT, output_step * CHANNEL_UNIT
    size = num_lanes.to(tl.int64) * num_chunks * C
    ahead_sums = sums + lane.to(tl.int64) * num_chunks * C
    behind_sums = ahead_sums + size
    if ROWS:
        other += (batch * other_batch + head * other_head) * CHANNEL_UNIT
        other_token = other_step * CHANNEL_UNIT
        ahead_rows = rows + tl.program_id(0) * size + lane.to(tl.int64) * num_chunks * C
        behind_rows = ahead_rows + tl.num_programs(0) * size
    place, features = tl.arange(0, C), tl.arange(0, FB)
    channels = tl.program_id(0) * BV + tl.arange(0, BV)
    direction: tl.constexpr = 1 if BACK else 0
    state = load_state(states, direction, features, channels, F, V, CARRIED)
    if FT:
        last_features = FB + tl.arange(0, FT)
        low_state = load_state(states, direction, last_features, channels, F, V, CARRIED)
    first = segment * chunks_of_segment
    count = tl.minimum(chunks_of_segment, num_chunks - first)
    for step in range(count):
        start = (first + (count - 1 - step if BACK else step)) * C
        q = load_tile(query, start, query_token, place, features, num_tokens, F)
        k = load_tile(key, start, key_token, place, features, num_tokens, F)
        v = load_tile(value, start, value_token, place, channels, num_tokens, V)
        if BACK:
            # Read early, as the products that it is added to take a while.
            ahead_result = load_tile(output, start, output_token, place, channels, num_tokens, V)
            whole = tl.load(behind_sums + start)
            own = tl.load(behind_sums + start + place)
        else:
            whole = tl.load(ahead_sums + start + C - 1)
            own = tl.load(ahead_sums + start + place)
        if FT:
            low_query = load_tile(query, start, query_token, place, last_features, num_tokens, F)
            low_key = load_tile(key, start, key_token, place, last_features, num_tokens, F)
        if ROWS:
            others = load_tile(other, start, other_token, place, channels, num_tokens, V)
        if not BACK:
            behind = tl.load(behind_sums + start + place)
            weights = tl.dot(q, tl.trans(k), input_precision="ieee")
            if FT:
                weights = tl.dot(low_query, tl.trans(low_key), weights, input_precision="ieee")
            # Of the two differences, that of the direction from which a token is not seen is the positive one.
            weights *= tl.exp2(tl.minimum(own[:, None] - own[None, :], behind[:, None] - behind[None, :]))
            if ROWS:
                pairs = weights * tl.dot(others, tl.trans(v), input_precision="ieee")
                seen = tl.sum(tl.where(place[:, None] > place[None, :], pairs, 0.0), 1)
                seen_behind = tl.sum(tl.where(place[:, None] < place[None, :], pairs, 0.0), 1)
                tl.store(behind_rows + start + place, seen_behind)
            weights = weights.to(v.dtype)
        elif ROWS:
            seen = tl.load(behind_rows + start + place)
        result = tl.dot(q, state.to(q.dtype), input_precision="ieee")
        if FT:
            result = tl.dot(low_query, low_state.to(q.dtype), result, input_precision="ieee")
        result *= tl.exp2(own)[:, None]
        if ROWS:
            seen += tl.sum(result * others, 1)
            tl.store((behind_rows if BACK else ahead_rows) + start + place, seen)
        if BACK:
            result += ahead_result.to(tl.float32)
        else:
            result = tl.dot(weights, v, result, input_precision="ieee")
        store_tile(output, start, output_token, place, channels, num_tokens, result, V)
        kept, to_whole = tl.exp2(whole), tl.exp2(whole - own)
        v = (v * to_whole[:, None]).to(k.dtype)
        state = tl.dot(tl.trans(k), v, state * kept, input_precision="ieee")
        if FT:
            low_state = tl.dot(tl.trans(low_key), v, low_state * kept, input_precision="ieee")
