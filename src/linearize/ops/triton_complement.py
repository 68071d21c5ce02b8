"""Kernels for sums over all tokens outside of a disc: states of blocks, their far sums, and pairs of near blocks."""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.ops.triton_blocks import WIDTH


@triton.jit
def _rows_at(base, first, step, SIZE: tl.constexpr, D: tl.constexpr):
    """Where the channels of `SIZE` slots from `first` on lie, [slots, channels]."""
    return base + first.to(tl.int64) * step + tl.arange(0, SIZE)[:, None] * step + tl.arange(0, D)[None, :]


@triton.jit
def states_kernel(
    key,
    value,
    weight,
    states,
    key_batch,
    key_head,
    key_slot,
    value_batch,
    value_head,
    value_slot,
    num_heads,
    num_blocks,
    WEIGHTED: tl.constexpr,
    F: tl.constexpr,
    C: tl.constexpr,
    M: tl.constexpr,
):
    """Of each block sum_j k_j v_j^T, and behind it sum_j a_j k_j, where the weights a are ones if there are none."""
    block, lane = tl.program_id(0), tl.program_id(1)
    batch, head = (lane // num_heads).to(tl.int64), (lane % num_heads).to(tl.int64)
    keys = tl.load(_rows_at(key + batch * key_batch + head * key_head, block * M, key_slot, M, F))
    values = tl.load(_rows_at(value + batch * value_batch + head * value_head, block * M, value_slot, M, C))
    place = lane.to(tl.int64) * num_blocks + block
    states += place * (F * C + F)
    feature = tl.arange(0, F)
    state = tl.dot(tl.trans(keys), values)
    tl.store(states + feature[:, None] * C + tl.arange(0, C)[None, :], state.to(states.dtype.element_ty))
    wide = keys.to(tl.float32)
    if WEIGHTED:
        wide *= tl.load(weight + place * M + tl.arange(0, M))[:, None]
    tl.store(states + F * C + feature, tl.sum(wide, 0).to(states.dtype.element_ty))


@triton.jit
def far_kernel(
    states,
    beyond,
    far,
    rows,
    strips,
    num_rows,
    num_blocks,
    reach,
    SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    N: tl.constexpr,
):
    """For each block the sum of the states of all far blocks: of rows beyond reach, and beside it in near rows.

    A program has N of the numbers of a state, for up to QUERIES blocks of one row.
    """
    number = tl.program_id(0) * N + tl.arange(0, N)
    row, lane = tl.program_id(1) % num_rows, tl.program_id(2).to(tl.int64)
    column = tl.program_id(1) // num_rows * QUERIES + tl.arange(0, QUERIES)
    counts = number < SIZE
    at = rows + row * 4
    first, num_columns, begin, end = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    states += lane * num_blocks * SIZE
    acc = tl.zeros([QUERIES, N], tl.float32)
    tl.assume(begin < end)
    for i in tl.range(begin, end):
        block, left, key_columns = tl.load(strips + i * 3), tl.load(strips + i * 3 + 1), tl.load(strips + i * 3 + 2)
        key_column = left + tl.arange(0, KEYS)
        state_at = states + (block + tl.arange(0, KEYS)).to(tl.int64)[:, None] * SIZE + number[None, :]
        state = tl.load(state_at, mask=(key_column < key_columns)[:, None] & counts[None, :], other=0.0)
        beside = tl.abs(column[:, None] - key_column[None, :]) > reach
        acc = tl.dot(beside.to(state.dtype), state, acc)
    acc += tl.load(beyond + (lane * num_rows + row) * SIZE + number, mask=counts, other=0.0)[None, :]
    far_at = far + (lane * num_blocks + first + column)[:, None] * SIZE + number[None, :]
    tl.store(far_at, acc.to(far.dtype.element_ty), mask=(column < num_columns)[:, None] & counts[None, :])


@triton.jit
def outside_kernel(
    query,
    key,
    value,
    bias,
    far,
    output,
    mass,
    lists,
    entries,
    query_batch,
    query_head,
    query_slot,
    key_batch,
    key_head,
    key_slot,
    value_batch,
    value_head,
    value_slot,
    output_batch,
    output_head,
    output_slot,
    num_heads,
    num_blocks,
    window,
    RESULT: tl.constexpr,
    F: tl.constexpr,
    C: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """sum_j w_ij v_j over all j outside of the disc around i, for a block of queries; w_ij = q_i^T k_j.

    What it is of decides about the rest. The "output" has its mass sum_j w_ij. In the gradient of "query", w_ij has
    b_i added to it, and b_j in that of "key": the gradient b of the mass. That of "value" has nothing beside it. Far
    states are the transposed ones where a product over channels of the value leads to one of features.
    """
    TRANSPOSED: tl.constexpr = RESULT == "query" or RESULT == "key"
    block, lane = tl.program_id(0) % num_blocks, tl.program_id(0) // num_blocks
    batch, head = (lane // num_heads).to(tl.int64), (lane % num_heads).to(tl.int64)
    place = lane.to(tl.int64) * num_blocks
    key += batch * key_batch + head * key_head
    value += batch * value_batch + head * value_head
    bias += place * M
    queries = tl.load(_rows_at(query + batch * query_batch + head * query_head, block * M, query_slot, M, F))
    slot = block * M + tl.arange(0, M)
    feature, channel = tl.arange(0, F), tl.arange(0, C)
    far += (place + block) * (F * C + (C if TRANSPOSED else F))
    own = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, C], tl.float32)
    if RESULT == "output":
        own = tl.sum(queries.to(tl.float32) * tl.load(far + F * C + feature).to(tl.float32)[None, :], 1)
    if RESULT == "query":
        own = tl.load(bias + slot)
        acc += own[:, None] * tl.load(far + F * C + channel).to(tl.float32)[None, :]
    if RESULT == "key":
        acc += tl.load(far + F * C + channel).to(tl.float32)[None, :]
    own_slot, other_slot = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    begin, end = tl.load(lists + block * 2), tl.load(lists + block * 2 + 1)
    # No list is empty. A path around the loop would make the products in it wait for one another.
    tl.assume(begin < end)
    for i in tl.range(begin, end):
        first, down, right = tl.load(entries + i * 3), tl.load(entries + i * 3 + 1), tl.load(entries + i * 3 + 2)
        keys = tl.load(_rows_at(key, first, key_slot, N, F))
        values = tl.load(_rows_at(value, first, value_slot, N, C))
        weights = tl.dot(queries, tl.trans(keys))
        if RESULT == "query":
            weights += own[:, None]
        if RESULT == "key":
            weights += tl.load(bias + first + tl.arange(0, N))[None, :]
        # One term depends on rows alone and one on columns, so each is shared by many pairs.
        below = (own_slot // WIDTH - other_slot // WIDTH - down).to(tl.float32)
        beside = (own_slot % WIDTH - other_slot % WIDTH - right).to(tl.float32)
        weights = tl.where(beside * beside < window * window - below * below, 0.0, weights)
        if RESULT == "output":
            own += tl.sum(weights, 1)
        acc = tl.dot(weights.to(values.dtype), values, acc)
    # What is far comes last, as its state then takes the room of the keys and values.
    if TRANSPOSED:
        state = tl.load(far + channel[None, :] * F + feature[:, None])
    else:
        state = tl.load(far + feature[:, None] * C + channel[None, :])
    acc = tl.dot(queries, state, acc)
    if RESULT == "output":
        tl.store(mass + place * M + slot, own)
    output_at = _rows_at(output + batch * output_batch + head * output_head, block * M, output_slot, M, C)
    tl.store(output_at, acc.to(output.dtype.element_ty))
