"""What the Hopper kernel of local attention is made of: the ring of shared memory, masks, softmax, the way out."""

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

from linearize.ops.triton_blocks import FAR, WIDTH

# Numbers of fields, see `PairTables`.
ENTRY = gl.constexpr(6)
SEGMENT = gl.constexpr(11)
# Of the rings, which fill what shared memory the queries leave.
STAGES = gl.constexpr(2)
# Gluon is young: triton 3.9 gives these other names.
_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier
# By how many powers of 2 a weight may exceed 1 before the peak follows.
SLACK = gl.constexpr(8.0)
# Moves sixteen numbers, $16 to $31, and multiplies them by $32 to $47 unless $48 is 0.
_MOVES, _PRODUCTS = (
    " ".join(f"{name}.f32 ${i}, ${i + 16}{f', ${i + 32}' if name == 'mul' else ''};" for i in range(16))
    for name in ("mov", "mul")
)
_SHRINK = gl.constexpr(f"{{.reg .pred p; setp.eq.f32 p, $48, 0f00000000; {_MOVES} @p bra DONE; {_PRODUCTS} DONE: }}")
_SHRINK_OPERANDS = gl.constexpr(",".join(["=f"] * 16 + ["f"] * 48))
_PUBLIC = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@gluon.jit
def ring(at):
    """Stage of a step in the ring of shared memory, and the parity of its round."""
    return at % STAGES, (at // STAGES) & 1


@gluon.jit
def _rooms(buffer, like, COUNT: gl.constexpr, CHANNELS: gl.constexpr):
    """A stage as rooms of 64 tokens each, laid out like something else."""
    if _PUBLIC:
        return buffer.reinterpret(buffer.dtype, [COUNT, 64, CHANNELS], like.layout)
    else:
        return buffer._reinterpret(buffer.dtype, [COUNT, 64, CHANNELS], like.layout)


@gluon.jit
def _half_of(buffer, D: gl.constexpr):
    """The first half of a stage, [64, channels]: where the one unit of a step lies."""
    return _rooms(buffer, buffer, 2, D).index(0)


@gluon.jit
def copy_units(plane, own_ring, entries, begin, end, lone, place, D: gl.constexpr):
    """Fetches the keys, or the values, of all steps, as room for them becomes free: two units of 64 tokens each.

    The first step has one unit where `lone` is 1.
    """
    PARTS: gl.constexpr = D // 64
    rooms, full, empty = own_ring
    row, column = place
    # Shared memory holds 64 channels of all tokens, then the next 64.
    if lone:
        first = gl.load(entries + begin * ENTRY)
        mbarrier.expect(full.index(0), PARTS * plane.block_type.nbytes)
        room = _rooms(rooms.index(0), plane, 2 * PARTS, 64)
        for part in gl.static_range(PARTS):
            _load(plane, [row + first, column + part * 64], full.index(0), room.index(part))
    for i in range(begin + lone, end):
        stage, parity = ring(i - begin)
        first, second = gl.load(entries + i * ENTRY), gl.load(entries + i * ENTRY + 3)
        # The first round finds the ring empty.
        mbarrier.wait(empty.index(stage), parity ^ 1)
        mbarrier.expect(full.index(stage), 2 * PARTS * plane.block_type.nbytes)
        room = _rooms(rooms.index(stage), plane, 2 * PARTS, 64)
        for part in gl.static_range(PARTS):
            _load(plane, [row + first, column + part * 64], full.index(stage), room.index(2 * part))
            _load(plane, [row + second, column + part * 64], full.index(stage), room.index(2 * part + 1))


@gluon.jit
def copy_queries(query, queries, full, place):
    """Fetches both halves of a block of queries."""
    row, column = place
    mbarrier.expect(full, 2 * query.block_type.nbytes)
    _load(query, [row, column], full, queries.index(0))
    _load(query, [row + 64, column], full, queries.index(1))


@gluon.jit
def step_of(i, shared, half):
    """Place of a half's nth step in the list, whose steps from `shared` on belong to one half each, by turns.

    In a ring of two stages a half then stays with one stage, and no round of it is missed, which parities demand.
    """
    return gl.where(i < shared, i, 2 * i - shared + half)


@gluon.jit
def wait_for(full, at):
    """Waits until a step's keys, or values, are there; returns their stage."""
    stage, parity = ring(at)
    mbarrier.wait(full.index(stage), parity)
    return stage


@gluon.jit
def release(empty, stage, own):
    """Says that a stage may be filled again; a step of one half has but one reader, who speaks for both."""
    mbarrier.arrive(empty.index(stage))
    mbarrier.arrive(empty.index(stage), pred=own)


@gluon.jit
def _nearest(place, window, length):
    """First row or column of a query's neighborhood, which is shifted inward at the borders."""
    return gl.minimum(gl.maximum(place - window + 1, 0), length - gl.minimum(2 * window - 1, length))


@gluon.jit
def _beyond(down, room):
    """1 where the square of `down` is more than `room`, both of integers, and 0 elsewhere: one instruction."""
    down, room = gl.broadcast(down, room)
    return gl.inline_asm_elementwise(
        "{.reg .f32 t; neg.f32 t, $2; fma.rn.sat.f32 $0, $1, $1, t;}",
        "=f,f,f",
        [down, room],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def places_of(entry):
    """Top and left of the two units of a step."""
    return gl.load(entry + 1), gl.load(entry + 2), gl.load(entry + 4), gl.load(entry + 5)


@gluon.jit
def hide_unseen(scores, places, own, window, REGION: gl.constexpr, LAYOUT: gl.constexpr):
    """Scores, far below all others where the query does not see the key, [64, 128]; text, whose top is -1, is seen."""
    first_top, first_left, second_top, second_left = places
    own_top, own_left, height, width = own
    query_slot = gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT)), 1)
    key_slot = gl.expand_dims(gl.arange(0, 128, layout=gl.SliceLayout(0, LAYOUT)), 0)
    top = gl.where(key_slot < 64, first_top, second_top)
    left = gl.where(key_slot < 64, first_left, second_left)
    if REGION == "neighborhood":
        down = key_slot % 64 // WIDTH + top - _nearest(query_slot // WIDTH + own_top, window, height)
        right = key_slot % WIDTH + left - _nearest(query_slot % WIDTH + own_left, window, width)
        inside = (down >= 0) & (down < gl.minimum(2 * window - 1, height))
        inside = inside & (right >= 0) & (right < gl.minimum(2 * window - 1, width))
        return gl.where(inside | (top == -1), scores, -FAR)
    # Rows between query and key are nine different numbers in a thread, columns two, whatever the step. So this way 36
    # pairs of a row and a column are compared, and not all 64.
    rows = (query_slot // WIDTH - key_slot % 64 // WIDTH).to(gl.float32)
    columns = (query_slot % WIDTH - key_slot % WIDTH).to(gl.float32)
    down, right = rows - (top - own_top).to(gl.float32), columns - (left - own_left).to(gl.float32)
    reach = window * window * 1.0 - 1
    room = gl.where(key_slot < 64, gl.where(first_top == -1, FAR, reach), gl.where(second_top == -1, FAR, reach))
    return scores - FAR * _beyond(down, room - right * right)


@gluon.jit
def softmax_step(scores, peak, total, scale):
    """One step of the online softmax in base 2: weights, new peak and total, and by how much older results shrink.

    A peak stays while no score is far above it, so that older results seldom shrink: FlashAttention-4 does so, too.
    """
    highest = gl.max(scores, 1) * scale
    new_peak = gl.where(highest > peak + SLACK, highest, peak)
    weights = gl.exp2(scores * scale - gl.expand_dims(new_peak, 1))
    decay = gl.exp2(peak - new_peak)
    # A thread adds up its own columns; the sum over threads is taken once, at the end.
    older = total * gl.expand_dims(gl.convert_layout(decay, gl.SliceLayout(1, total.type.layout)), 1)
    return weights, new_peak, older + column_sums(weights), decay


@gluon.jit
def shrink(acc, decay):
    """Results times their rows' decay: a warp whose rows all keep theirs passes over it."""
    changes = gl.inline_asm_elementwise(
        "{.reg .pred p, q; setp.neu.f32 p, $2, 0f3F800000; setp.neu.or.f32 p, $3, 0f3F800000, p;"
        " vote.sync.any.pred q, p, -1; selp.f32 $0, 0f3F800000, 0f00000000, q; mov.f32 $1, $0;}",
        "=f,=f,f,f",
        [decay],
        dtype=gl.float32,
        is_pure=False,
        pack=2,
    )
    rows: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    decay, changes = gl.convert_layout(decay, rows), gl.convert_layout(changes, rows)
    acc, decay = gl.broadcast(acc, gl.expand_dims(decay, 1))
    acc, changes = gl.broadcast(acc, gl.expand_dims(changes, 1))
    return gl.inline_asm_elementwise(_SHRINK, _SHRINK_OPERANDS, [acc, decay, changes], gl.float32, False, 16)


@gluon.jit
def column_sums(states):
    """[64, columns] as [64, 8]: sums of the columns that lie in the same thread."""
    return gl.sum(states.reshape([64, states.shape[1] // 8, 8]), 1)


@gluon.jit
def lone_step(state, query, key_ring, value_ring, scale, D: gl.constexpr, SCORES: gl.constexpr, RESULT: gl.constexpr):
    """The first step, where it has one unit, which needs no mask."""
    acc, peak, total = state
    keys, key_full, key_empty = key_ring
    values, value_full, value_empty = value_ring
    HALF: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, HALF)
    wait_for(key_full, 0)
    blank = gl.zeros([64, 64], gl.float32, HALF)
    query = gl.convert_layout(query, gl.DotOperandLayout(0, HALF, 2))
    pending = warpgroup_mma(query, _half_of(keys.index(0), D).permute((1, 0)), blank, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[pending])
    mbarrier.arrive(key_empty.index(0))
    new, peak, sums, _ = softmax_step(scores, gl.convert_layout(peak, ROWS), column_sums(blank), scale)
    weights = gl.convert_layout(new.to(values.dtype), gl.DotOperandLayout(0, RESULT, 2))
    wait_for(value_full, 0)
    product = warpgroup_mma(weights, _half_of(values.index(0), D), acc, is_async=True)
    acc, weights = warpgroup_mma_wait(0, deps=[product, weights])
    mbarrier.arrive(value_empty.index(0))
    return acc, gl.convert_layout(peak, gl.SliceLayout(1, SCORES)), gl.convert_layout(sums, total.type.layout)


@gluon.jit
def write(acc, result, query, results, half, place, start, lane, lanes, num_tokens, row, column, D: gl.constexpr):
    """Writes output and log-sum-exp of a half: final, or a partial result in float32."""
    output, lse, partial_output, partial_lse = results
    slot = half * 64 + gl.arange(0, 64, layout=result.type.layout)
    if place < 0:
        gl.store(lse + lane.to(gl.int64) * num_tokens + start + slot, result)
        # The queries are used up, so their room serves the way out.
        query.store(acc.to(query.dtype))
        fence_async_shared()
        _barrier()
        _store(output, [row + start + half * 64, column], query)
        tma.store_wait(0)
    else:
        base = (place * lanes + lane).to(gl.int64) * 128
        gl.store(partial_lse + base + slot, result)
        token = half * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, acc.type.layout))
        channel = gl.arange(0, D, layout=gl.SliceLayout(0, acc.type.layout))
        slots = partial_output + base * D + gl.expand_dims(token, 1) * D + gl.expand_dims(channel, 0)
        gl.store(slots, acc)
