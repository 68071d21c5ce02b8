"""The forward kernel of local attention for Hopper GPUs, in Triton's Gluon: copies and products run side by side.

The schedule is FlashAttention-3's (Shah et al., arXiv 2407.08608, section 3): two warps fetch keys and values by the
tensor memory accelerator into rings in shared memory; two warpgroups take 64 queries each, and while the product of
the last weights with the values runs, the exponentials of the next scores are worked out. The lists are `PairTables`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from linearize.ops.gluon_blocks import (
    ENTRY,
    SEGMENT,
    STAGES,
    column_sums,
    copy_queries,
    copy_units,
    hide_unseen,
    lone_step,
    places_of,
    release,
    shrink,
    softmax_step,
    step_of,
    wait_for,
    write,
)
from linearize.ops.triton_blocks import WIDTH


@gluon.jit
def _scores(query, keys, stage, LAYOUT: gl.constexpr):
    """Starts the product of queries with the keys in a stage."""
    blank = gl.zeros([64, 128], gl.float32, LAYOUT)
    return warpgroup_mma(query, keys.index(stage).permute((1, 0)), blank, use_acc=False, is_async=True)


@gluon.jit
def _steps(
    state,
    query,
    key_ring,
    value_ring,
    entries,
    steps,
    first,
    last,
    half,
    own,
    window,
    scale,
    MASKED: gl.constexpr,
    OWN: gl.constexpr,
    REGION: gl.constexpr,
    SCORES: gl.constexpr,
    WEIGHTS: gl.constexpr,
):
    """Scores of steps [first, last), and the products of the weights one step behind.

    `steps` are the first of the list, the first of one half alone, and the one behind this half's last; `own` is the
    top and left of the half's queries, and the height and width of their grid.
    """
    acc, weights, peak, total = state
    begin, shared, stop = steps
    values, value_full, value_empty = value_ring
    keys, key_full, key_empty = key_ring
    for i in range(first, last):
        at, older, ahead = step_of(i, shared, half), step_of(i - 1, shared, half), step_of(i + 1, shared, half)
        stage = (at - begin) % STAGES
        if MASKED:
            # Loaded before they are needed: it takes as long as a product.
            places = places_of(entries + at * ENTRY)
        pending = _scores(query, keys, stage, SCORES)
        older_stage = wait_for(value_full, older - begin)
        product = warpgroup_mma(weights, values.index(older_stage), acc, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[pending])
        if OWN:
            mbarrier.arrive(key_empty.index(stage), count=2)
        else:
            mbarrier.arrive(key_empty.index(stage))
        if MASKED:
            scores = hide_unseen(scores, places, own, window, REGION, SCORES)
        new, peak, total, decay = softmax_step(scores, peak, total, scale)
        new = gl.convert_layout(new.to(values.dtype), WEIGHTS)
        wait_for(key_full, gl.where(i + 1 < stop, ahead, at) - begin)
        # What is to run beside the product is named here, or the compiler moves it behind the wait.
        acc, weights, new, total, decay = warpgroup_mma_wait(0, deps=[product, weights, new, total, decay])
        if OWN:
            release(value_empty, older_stage, older >= shared)
        else:
            mbarrier.arrive(value_empty.index(older_stage))
        acc, weights = shrink(acc, decay), new
    return acc, weights, peak, total


@gluon.jit
def _consume(
    half,
    results,
    queries,
    query_full,
    key_ring,
    value_ring,
    entries,
    bounds,
    own,
    place,
    start,
    lane,
    lanes,
    num_tokens,
    row,
    column,
    window,
    scale,
    REGION: gl.constexpr,
    D: gl.constexpr,
):
    """Attention of 64 queries over all steps that are both halves' or its own."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, RESULT, 2)
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    query = queries.index(half)
    HELD: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
    values, value_full = value_ring[0], value_ring[1]
    keys, key_full, key_empty = key_ring
    begin, masked, shared, end, lone = bounds
    stop = shared + (end - shared) // 2
    top, left, height, width = own
    own = (top + half * (64 // WIDTH), left, height, width)
    # Far below any score, and far above what `hide_unseen` makes of one.
    peak = gl.full([64], -1e8, gl.float32, ROWS)
    total = column_sums(gl.zeros([64, 128], gl.float32, SCORES))
    acc = gl.zeros([64, D], gl.float32, RESULT)

    mbarrier.wait(query_full, 0)
    held = query.load(HELD)
    if lone:
        acc, peak, total = lone_step((acc, peak, total), held, key_ring, value_ring, scale, D, SCORES, RESULT)
    first = begin + lone
    at = step_of(first, shared, half)
    stage = wait_for(key_full, at - begin)
    scores = warpgroup_mma_wait(0, deps=[_scores(held, keys, stage, SCORES)])
    release(key_empty, stage, at >= shared)
    if first >= masked:
        scores = hide_unseen(scores, places_of(entries + at * ENTRY), own, window, REGION, SCORES)
    new, peak, total, decay = softmax_step(scores, peak, total, scale)
    acc, weights = shrink(acc, decay), gl.convert_layout(new.to(values.dtype), WEIGHTS)
    first += 1
    ahead = gl.where(first < stop, step_of(first, shared, half), at)
    wait_for(key_full, ahead - begin)
    state, steps = (acc, weights, peak, total), (begin, shared, stop)
    state = _steps(
        state, held, key_ring, value_ring, entries, steps, first, masked, half, own, window, scale,
        False, False, REGION, SCORES, WEIGHTS,
    )  # fmt: skip
    state = _steps(
        state, held, key_ring, value_ring, entries, steps, gl.maximum(first, masked), shared, half, own, window, scale,
        True, False, REGION, SCORES, WEIGHTS,
    )  # fmt: skip
    state = _steps(
        state, held, key_ring, value_ring, entries, steps, gl.maximum(first, shared), stop, half, own, window, scale,
        True, True, REGION, SCORES, WEIGHTS,
    )  # fmt: skip
    acc, weights, peak, total = state
    stage = wait_for(value_full, step_of(stop - 1, shared, half) - begin)
    product = warpgroup_mma(weights, values.index(stage), acc, is_async=True)
    acc, weights = warpgroup_mma_wait(0, deps=[product, weights])
    total = gl.convert_layout(gl.sum(total, 1), ROWS)
    acc = acc * gl.expand_dims(gl.convert_layout(1.0 / total, gl.SliceLayout(1, RESULT)), 1)
    result = peak + gl.log2(total)
    write(acc, result, query, results, half, place, start, lane, lanes, num_tokens, row, column, D)


@gluon.jit
def _copy_keys(query, key, queries, query_full, key_ring, entries, begin, end, lone, query_at, key_at, D: gl.constexpr):
    """Fetches the queries, then keys. Values have a warp of their own, as a half that waits for keys frees none."""
    copy_queries(query, queries, query_full, query_at)
    copy_units(key, key_ring, entries, begin, end, lone, key_at, D)


@gluon.jit
def _ring_of(query, D: gl.constexpr):
    """Shared memory of a ring, and barriers that tell a stage is full (by its copy), and empty (by both halves)."""
    rooms = gl.allocate_shared_memory(query.dtype, [STAGES, 128, D], query.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    return rooms, full, empty


@gluon.jit
def forward_kernel(
    query,
    key,
    value,
    output,
    lse,
    partial_output,
    partial_lse,
    segments,
    entries,
    query_batch,
    query_head,
    query_channel,
    key_batch,
    key_head,
    key_channel,
    value_batch,
    value_head,
    value_channel,
    output_batch,
    output_head,
    output_channel,
    num_heads,
    num_tokens,
    num_text_segments,
    num_segments,
    lanes,
    window,
    scale,
    REGION: gl.constexpr,
    D: gl.constexpr,
):
    """See `triton_forward.forward_kernel`; tensors are descriptors of planes, [rows, columns].

    Token t of a batch and head is in row batch * query_batch + head * query_head + t, from column head * query_channel.
    """
    program = gl.program_id(0)
    is_text = program < num_text_segments * lanes
    nth = gl.where(is_text, program, program - num_text_segments * lanes)
    length = gl.where(is_text, num_text_segments, num_segments - num_text_segments)
    at = segments + (gl.where(is_text, 0, num_text_segments) + nth % length) * SEGMENT
    lane = nth // length
    batch, head = lane // num_heads, lane % num_heads
    begin, masked, shared, end = gl.load(at), gl.load(at + 1), gl.load(at + 2), gl.load(at + 3)
    place, start = gl.load(at + 4), gl.load(at + 5)
    own = (gl.load(at + 6), gl.load(at + 7), gl.load(at + 8), gl.load(at + 9))
    lone = gl.load(at + 10)

    queries = gl.allocate_shared_memory(query.dtype, [2, 64, D], query.layout)
    query_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(query_full, count=1)
    key_ring, value_ring = _ring_of(query, D), _ring_of(query, D)
    fence_async_shared()

    results, bounds = (output, lse, partial_output, partial_lse), (begin, masked, shared, end, lone)
    query_at = (batch * query_batch + head * query_head + start, head * query_channel)
    key_at = (batch * key_batch + head * key_head, head * key_channel)
    value_at = (batch * value_batch + head * value_head, head * value_channel)
    row, column = batch * output_batch + head * output_head, head * output_channel
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    0, results, queries, query_full, key_ring, value_ring, entries, bounds, own, place, start, lane,
                    lanes, num_tokens, row, column, window, scale, REGION, D,
                ),
            ),
            (
                _consume,
                (
                    1, results, queries, query_full, key_ring, value_ring, entries, bounds, own, place, start, lane,
                    lanes, num_tokens, row, column, window, scale, REGION, D,
                ),
            ),
            (_copy_keys, (query, key, queries, query_full, key_ring, entries, begin, end, lone, query_at, key_at, D)),
            (copy_units, (value, value_ring, entries, begin, end, lone, value_at, D)),
        ],
        worker_num_warps=[4, 1, 1],
        worker_num_regs=[232, 40, 40],
    )  # fmt: skip
