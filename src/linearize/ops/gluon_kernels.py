"""The forward kernel of local attention for Hopper GPUs, in Triton's Gluon: copies and products run side by side.

The schedule is FlashAttention-3's (Shah et al., arXiv 2407.08608, section 3): one warp fetches keys and values by the
tensor memory accelerator into a ring in shared memory; two warpgroups take 64 queries each, and while the product of
the last weights with the values runs, the exponentials of the next scores are worked out. Lists, masks and results are
those of `triton_forward.forward_kernel`, for layouts whose blocks are all whole.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from linearize.ops.triton_blocks import BLOCK_FIELDS, ENTRY_FIELDS, FAR, SEGMENT_FIELDS, WIDTH

# Gluon is young: triton 3.9 gives these other names.
_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit
def _copy(
    query,
    key,
    value,
    queries,
    keys,
    values,
    query_full,
    key_full,
    key_empty,
    value_full,
    value_empty,
    entries,
    begin,
    end,
    query_row,
    query_column,
    key_row,
    key_column,
    value_row,
    value_column,
    STAGES: gl.constexpr,
):
    """Fetches the queries, then the keys and values of all entries, as room for them becomes free."""
    mbarrier.expect(query_full, 2 * query.block_type.nbytes)
    _load(query, [query_row, query_column], query_full, queries.index(0))
    _load(query, [query_row + 64, query_column], query_full, queries.index(1))
    for i in range(begin, end):
        stage = (i - begin) % STAGES
        # Barriers count rounds of the ring; the first round finds it empty.
        free = (((i - begin) // STAGES) & 1) ^ 1
        start = gl.load(entries + i * ENTRY_FIELDS + 1)
        mbarrier.wait(key_empty.index(stage), free)
        mbarrier.expect(key_full.index(stage), key.block_type.nbytes)
        _load(key, [key_row + start, key_column], key_full.index(stage), keys.index(stage))
        mbarrier.wait(value_empty.index(stage), free)
        mbarrier.expect(value_full.index(stage), value.block_type.nbytes)
        _load(value, [value_row + start, value_column], value_full.index(stage), values.index(stage))


@gluon.jit
def _nearest(place, window, length):
    """First row or column of a query's neighborhood, which is shifted inward at the borders."""
    return gl.minimum(gl.maximum(place - window + 1, 0), length - gl.minimum(2 * window - 1, length))


@gluon.jit
def _hide(scores, blocks, entry, own_top, own_left, window, REGION: gl.constexpr, LAYOUT: gl.constexpr):
    """Scores, far below all others where the query does not see the key, [64, 128]."""
    top, left = gl.load(entry + 2), gl.load(entry + 3)
    query_slot = gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT)), 1)
    key_slot = gl.expand_dims(gl.arange(0, 128, layout=gl.SliceLayout(0, LAYOUT)), 0)
    if REGION == "neighborhood":
        at = blocks + gl.load(entry) * BLOCK_FIELDS
        height, width = gl.load(at + 7), gl.load(at + 8)
        down = key_slot // WIDTH + top - _nearest(query_slot // WIDTH + own_top, window, height)
        right = key_slot % WIDTH + left - _nearest(query_slot % WIDTH + own_left, window, width)
        inside = (down >= 0) & (down < gl.minimum(2 * window - 1, height))
        sees = inside & (right >= 0) & (right < gl.minimum(2 * window - 1, width))
        return gl.where(sees, scores, -FAR)
    down = (query_slot // WIDTH + (own_top - top) - key_slot // WIDTH).to(gl.float32)
    right = (query_slot % WIDTH + (own_left - left) - key_slot % WIDTH).to(gl.float32)
    # One term depends on rows alone and one on columns, so each is shared by many pairs.
    room = (window * window).to(gl.float32) - 0.5 - down * down
    return gl.minimum(scores, room * FAR - right * right * FAR)


@gluon.jit
def _softmax(scores, peak, total, scale):
    """One step of the online softmax in base 2: weights, new peak and total, and by how much older results shrink."""
    new_peak = gl.maximum(peak, gl.max(scores, 1) * scale)
    weights = gl.exp2(scores * scale - gl.expand_dims(new_peak, 1))
    decay = gl.exp2(peak - new_peak)
    return weights, new_peak, total * decay + gl.sum(weights, 1), decay


@gluon.jit
def _steps(
    acc,
    weights,
    peak,
    total,
    query,
    keys,
    values,
    key_full,
    key_empty,
    value_full,
    value_empty,
    blocks,
    entries,
    begin,
    end,
    first,
    last,
    own_top,
    own_left,
    window,
    scale,
    MASKED: gl.constexpr,
    REGION: gl.constexpr,
    STAGES: gl.constexpr,
    SCORES: gl.constexpr,
    WEIGHTS: gl.constexpr,
):
    """Scores of entries [first, last), and the products of the weights one entry behind."""
    for i in range(first, last):
        stage = (i - begin) % STAGES
        older, older_phase = (i - 1 - begin) % STAGES, ((i - 1 - begin) // STAGES) & 1
        blank = gl.zeros([64, 128], gl.float32, SCORES)
        pending = warpgroup_mma(query, keys.index(stage).permute((1, 0)), blank, use_acc=False, is_async=True)
        mbarrier.wait(value_full.index(older), older_phase)
        product = warpgroup_mma(weights, values.index(older), acc, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[pending])
        mbarrier.arrive(key_empty.index(stage))
        if MASKED:
            scores = _hide(scores, blocks, entries + i * ENTRY_FIELDS, own_top, own_left, window, REGION, SCORES)
        new, peak, total, decay = _softmax(scores, peak, total, scale)
        new = gl.convert_layout(new.to(values.dtype), WEIGHTS)
        mbarrier.wait(key_full.index((i + 1 - begin) % STAGES), ((i + 1 - begin) // STAGES) & 1, pred=i + 1 < end)
        # What is to run beside the product is named here, or the compiler moves it behind the wait.
        acc, weights, new, total, decay = warpgroup_mma_wait(0, deps=[product, weights, new, total, decay])
        mbarrier.arrive(value_empty.index(older))
        acc = acc * gl.expand_dims(gl.convert_layout(decay, gl.SliceLayout(1, acc.type.layout)), 1)
        weights = new
    return acc, weights, peak, total


@gluon.jit
def _consume(
    half,
    output,
    lse,
    partial_output,
    partial_lse,
    queries,
    keys,
    values,
    query_full,
    key_full,
    key_empty,
    value_full,
    value_empty,
    blocks,
    entries,
    begin,
    masked,
    end,
    place,
    start,
    own_top,
    own_left,
    lane,
    lanes,
    num_tokens,
    output_row,
    output_column,
    window,
    scale,
    REGION: gl.constexpr,
    STAGES: gl.constexpr,
    D: gl.constexpr,
):
    """Attention of 64 queries over all entries of a list."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, RESULT, 2)
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    query = queries.index(half)
    own_top += half * (64 // WIDTH)
    # Far below any score, and far above what `_hide` makes of one.
    peak = gl.full([64], -1e8, gl.float32, ROWS)
    total = gl.zeros([64], gl.float32, ROWS)
    acc = gl.zeros([64, D], gl.float32, RESULT)

    mbarrier.wait(query_full, 0)
    mbarrier.wait(key_full.index(0), 0)
    blank = gl.zeros([64, 128], gl.float32, SCORES)
    pending = warpgroup_mma(query, keys.index(0).permute((1, 0)), blank, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[pending])
    mbarrier.arrive(key_empty.index(0))
    if begin >= masked:
        scores = _hide(scores, blocks, entries + begin * ENTRY_FIELDS, own_top, own_left, window, REGION, SCORES)
    new, peak, total, _ = _softmax(scores, peak, total, scale)
    weights = gl.convert_layout(new.to(values.dtype), WEIGHTS)
    mbarrier.wait(key_full.index(1 % STAGES), 1 // STAGES, pred=begin + 1 < end)
    acc, weights, peak, total = _steps(
        acc, weights, peak, total, query, keys, values, key_full, key_empty, value_full, value_empty, blocks, entries,
        begin, end, begin + 1, masked, own_top, own_left, window, scale, False, REGION, STAGES, SCORES, WEIGHTS,
    )  # fmt: skip
    acc, weights, peak, total = _steps(
        acc, weights, peak, total, query, keys, values, key_full, key_empty, value_full, value_empty, blocks, entries,
        begin, end, gl.maximum(begin + 1, masked), end, own_top, own_left, window, scale, True, REGION, STAGES, SCORES,
        WEIGHTS,
    )  # fmt: skip
    last = end - 1 - begin
    mbarrier.wait(value_full.index(last % STAGES), (last // STAGES) & 1)
    product = warpgroup_mma(weights, values.index(last % STAGES), acc, is_async=True)
    acc, weights = warpgroup_mma_wait(0, deps=[product, weights])

    acc = acc / gl.expand_dims(gl.convert_layout(total, gl.SliceLayout(1, RESULT)), 1)
    result = peak + gl.log2(total)
    slot = half * 64 + gl.arange(0, 64, layout=ROWS)
    if place < 0:
        gl.store(lse + lane.to(gl.int64) * num_tokens + start + slot, result)
        # The queries are used up, so their room serves the way out.
        query.store(acc.to(query.dtype))
        fence_async_shared()
        _barrier()
        _store(output, [output_row + start + half * 64, output_column], query)
        tma.store_wait(0)
    else:
        base = (place * lanes + lane).to(gl.int64) * 128
        gl.store(partial_lse + base + slot, result)
        row = half * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, RESULT))
        channel = gl.arange(0, D, layout=gl.SliceLayout(0, RESULT))
        at = partial_output + base * D + gl.expand_dims(row, 1) * D + gl.expand_dims(channel, 0)
        gl.store(at, acc)


@gluon.jit
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
    STAGES: gl.constexpr,
    D: gl.constexpr,
):
    """See `triton_forward.forward_kernel`; tensors are descriptors of planes, [rows, columns].

    Token t of a batch and head is in row batch * query_batch + head * query_head + t, from column head * query_channel.
    """
    program = gl.program_id(0)
    is_text = program < num_text_segments * lanes
    nth = gl.where(is_text, program, program - num_text_segments * lanes)
    length = gl.where(is_text, num_text_segments, num_segments - num_text_segments)
    at = segments + (gl.where(is_text, 0, num_text_segments) + nth % length) * SEGMENT_FIELDS
    lane = nth // length
    batch, head = lane // num_heads, lane % num_heads
    unit, begin, masked, end, place = gl.load(at), gl.load(at + 1), gl.load(at + 2), gl.load(at + 3), gl.load(at + 4)
    block = blocks + unit * BLOCK_FIELDS
    start, top, left = gl.load(block), gl.load(block + 1), gl.load(block + 2)

    queries = gl.allocate_shared_memory(query.dtype, [2, 64, D], query.layout)
    keys = gl.allocate_shared_memory(key.dtype, [STAGES, 128, D], key.layout)
    values = gl.allocate_shared_memory(value.dtype, [STAGES, 128, D], value.layout)
    query_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    key_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    key_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    value_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    value_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(query_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(key_full.index(i), count=1)
        mbarrier.init(value_full.index(i), count=1)
        mbarrier.init(key_empty.index(i), count=2)
        mbarrier.init(value_empty.index(i), count=2)
    fence_async_shared()

    output_row = batch * output_batch + head * output_head
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    0, output, lse, partial_output, partial_lse, queries, keys, values, query_full, key_full, key_empty,
                    value_full, value_empty, blocks, entries, begin, masked, end, place, start, top, left, lane, lanes,
                    num_tokens, output_row, head * output_channel, window, scale, REGION, STAGES, D,
                ),
            ),
            (
                _consume,
                (
                    1, output, lse, partial_output, partial_lse, queries, keys, values, query_full, key_full, key_empty,
                    value_full, value_empty, blocks, entries, begin, masked, end, place, start, top, left, lane, lanes,
                    num_tokens, output_row, head * output_channel, window, scale, REGION, STAGES, D,
                ),
            ),
            (
                _copy,
                (
                    query, key, value, queries, keys, values, query_full, key_full, key_empty, value_full, value_empty,
                    entries, begin, end, batch * query_batch + head * query_head + start, head * query_channel,
                    batch * key_batch + head * key_head, head * key_channel, batch * value_batch + head * value_head,
                    head * value_channel, STAGES,
                ),
            ),
        ],
        worker_num_warps=[4, 1],
        worker_num_regs=[240, 24],
    )  # fmt: skip
