"""Linear attention on all tokens outside of a disc by Triton kernels, as operators that compilers pass through."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from operator import index
from typing import Any

import torch
from torch import Tensor

from linearize.layout import Grid, Layout
from linearize.ops.block_tables import BLOCK
from linearize.ops.complement_tables import STRIP, ComplementTables, complement_tables
from linearize.ops.precision import without_autocast
from linearize.ops.triton_launch import Tiling, empty_token_major, with_near_channels
from linearize.ops.triton_local import refusal

TILING = Tiling(BLOCK, 64, 4, 2)
# Numbers of a state in one program, and the fewest blocks of one row, where they are added up.
_NUMBERS, _FEWEST_BLOCKS = 128, 16
_STATE_WARPS = 8


def fused_complement(
    query: Tensor, key: Tensor, value: Tensor, *, layout: Layout, window: int
) -> tuple[Tensor, Tensor]:
    """sum_j (q_i^T k_j) v_j over all j outside of the disc around i, and the same of ones; see `serves`.

    Far blocks of 128 tokens come in as sums of states. Nothing is subtracted, and there are no atomics: each gradient
    is a sum of the same kind in the same kernel. Tokens in tiles of `TILE` that are all whole are read where they lie.

    Args:
        query: Features [batch, heads, image tokens, num_features].
        key: Same.
        value: [batch, heads, image tokens, head_dim].
        layout: Where the image tokens are.
        window: Radius of the disc in tokens.

    Returns:
        [batch, heads, image tokens, head_dim], and [batch, heads, image tokens, 1] in float32.
    """
    _, sizes, _, tile = layout.numbers()
    sides = [side for height, width, _ in sizes for side in (height, width)]
    numerator, mass = _complement(query, key, value, sides, list(tile or ()), window)
    return numerator, mass[..., None]


def serves(query: Tensor, value: Tensor) -> bool:
    """Whether the kernels take features [..., num_features] and values [..., head_dim]."""
    return _constant_answer(index(query.shape[-1]), index(value.shape[-1]), query.dtype, value.dtype, query.device)


# To a compiler this is a constant, which it does not see looked up.
@torch.compiler.assume_constant_result
def _constant_answer(
    num_features: int, head_dim: int, dtype: torch.dtype, value_dtype: torch.dtype, device: torch.device
) -> bool:
    return dtype == value_dtype == torch.bfloat16 and _takes(num_features, device) and _takes(head_dim, device)


@lru_cache(maxsize=64)
def _takes(num_channels: int, device: torch.device) -> bool:
    states = torch.empty((), dtype=torch.bfloat16, device=device)
    return refusal(states.expand(1, 1, 1, num_channels)) is None


@torch.library.custom_op("linearize::window_complement", mutates_args=())
def _complement(
    query: Tensor, key: Tensor, value: Tensor, sides: Sequence[int], tile: Sequence[int], window: int
) -> tuple[Tensor, Tensor]:
    """Sums, and the mass [batch, heads, image tokens]."""
    blocks = _Blocks(query, sides, tile, window)
    queries, keys, values = (blocks.spread(states) for states in (query, key, value))
    far = blocks.far_states(keys, values)
    mass = blocks.empty_numbers()
    numerator = blocks.sums("output", queries, keys, values, far, like=value, mass=mass)
    return numerator, blocks.gather(mass[..., None])[..., 0]


@_complement.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _like(value), query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.custom_op("linearize::window_complement_backward", mutates_args=())
def _complement_backward(
    gradient: Tensor,
    mass_gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sides: Sequence[int],
    tile: Sequence[int],
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value.

    As i is outside of the disc around j just then, for gradients g of the sums and b of the mass dq_i = sum_j (g_i^T
    v_j + b_i) k_j, dk_j = sum_i (v_j^T g_i + b_i) q_i and dv_j = sum_i (k_j^T q_i) g_i.
    """
    blocks = _Blocks(query, sides, tile, window)
    queries, keys, values, slopes = (blocks.spread(states) for states in (query, key, value, gradient))
    bias = blocks.spread(mass_gradient[..., None]).contiguous()
    far = blocks.far_states(keys, values)
    query_gradient = blocks.sums("query", slopes, values, keys, far, like=query, bias=bias)
    far = blocks.far_states(queries, slopes, bias)
    key_gradient = blocks.sums("key", values, slopes, queries, far, like=key, bias=bias)
    value_gradient = blocks.sums("value", keys, queries, slopes, far, like=value)
    return query_gradient, key_gradient, value_gradient


@_complement_backward.register_fake
def _(gradient: Tensor, mass_gradient: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(_like(states) for states in inputs[:3])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *states, ctx.sides, ctx.tile, ctx.window = inputs
    ctx.save_for_backward(*states)


def _backward(ctx: Any, gradient: Tensor, mass_gradient: Tensor) -> tuple[Any, ...]:
    gradients = _complement_backward(gradient, mass_gradient, *ctx.saved_tensors, ctx.sides, ctx.tile, ctx.window)
    return *gradients, None, None, None


_complement.register_autograd(_backward, setup_context=_save)


class _Blocks:
    """The blocks of one layout, in which tensors [batch, heads, image tokens, channels] have a slot for each token."""

    def __init__(self, like: Tensor, sides: Sequence[int], tile: Sequence[int], window: int) -> None:
        grids = tuple(Grid(*pair) for pair in zip(sides[::2], sides[1::2], strict=True))
        layout = Layout(0, grids, tile=(tile[0], tile[1]) if tile else None)
        self.tables = complement_tables(layout, window, TILING.keys, like.device)
        self.batch, self.num_heads = like.shape[:2]
        self.num_slots, self.window, self.device = self.tables.num_blocks * BLOCK, window, like.device

    def spread(self, states: Tensor) -> Tensor:
        """Tokens in slots with near channels, zeros where there is no token."""
        if self.tables.place is None:
            return with_near_channels(states)
        slots = states.new_zeros(*states.shape[:2], self.num_slots, states.shape[-1])
        return slots.index_copy_(2, self.tables.place, states)

    def gather(self, slots: Tensor) -> Tensor:
        """The inverse of `spread`."""
        return slots if self.tables.place is None else slots.index_select(2, self.tables.place)

    def empty_numbers(self) -> Tensor:
        """Room for one number in float32 for each slot."""
        return torch.empty(self.batch, self.num_heads, self.num_slots, dtype=torch.float32, device=self.device)

    def far_states(self, key: Tensor, value: Tensor, weight: Tensor | None = None) -> Tensor:
        """For each block sum_j k_j v_j^T and sum_j a_j k_j over its far blocks, with weights a of 1 unless given.

        Args:
            key: [batch, heads, slots, features], as is the value.
            value: Likewise.
            weight: [batch, heads, slots, 1] in float32.

        Returns:
            [batch x heads, blocks, features x channels + features].
        """
        from linearize.ops.triton_complement import far_kernel, states_kernel

        tables, features, channels = self.tables, key.shape[-1], value.shape[-1]
        size, lanes = features * channels + features, self.batch * self.num_heads
        states = key.new_empty(lanes, tables.num_blocks, size)
        # Triton starts kernels on the current GPU, which need not be the tensors'.
        with torch.cuda.device_of(key):
            states_kernel[tables.num_blocks, lanes](
                *(key, value, key if weight is None else weight, states),
                *(*key.stride()[:3], *value.stride()[:3]),
                *(self.num_heads, tables.num_blocks),
                WEIGHTED=weight is not None,
                F=features,
                C=channels,
                M=BLOCK,
                num_warps=_STATE_WARPS,
            )
            beyond, far = _beyond(states, tables), torch.empty_like(states)
            widest = max(columns for _, columns in tables.sides)
            columns = min(max(1 << (widest - 1).bit_length(), _FEWEST_BLOCKS), STRIP)
            num_rows = len(tables.rows)
            far_kernel[-(-size // _NUMBERS), num_rows * -(-widest // columns), lanes](
                *(states, beyond, far, tables.rows, tables.strips),
                *(num_rows, tables.num_blocks, tables.reach),
                SIZE=size,
                QUERIES=columns,
                KEYS=columns,
                N=_NUMBERS,
            )
        return far

    def sums(
        self,
        result: str,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        far: Tensor,
        *,
        like: Tensor,
        bias: Tensor | None = None,
        mass: Tensor | None = None,
    ) -> Tensor:
        """See `triton_complement.outside_kernel`; for tokens, not slots, in the order in memory of another tensor."""
        from linearize.ops.triton_complement import outside_kernel

        tables, tokens = self.tables, _like(like)
        output = tokens if tables.place is None else value.new_empty(*value.shape[:2], self.num_slots, value.shape[-1])
        strided = (query, key, value, output)
        with torch.cuda.device_of(query):
            outside_kernel[(self.batch * self.num_heads * tables.num_blocks,)](
                *(query, key, value, far if bias is None else bias, far, output, far if mass is None else mass),
                *(tables.lists, tables.entries),
                *(step for states in strided for step in states.stride()[:3]),
                *(self.num_heads, tables.num_blocks, self.window),
                RESULT=result,
                F=query.shape[-1],
                C=value.shape[-1],
                M=TILING.queries,
                N=TILING.keys,
                num_warps=TILING.num_warps,
                num_stages=TILING.num_stages,
            )
        return tokens if tables.place is None else torch.index_select(output, 2, tables.place, out=tokens)


@without_autocast
def _beyond(states: Tensor, tables: ComplementTables) -> Tensor:
    """For each row of blocks the sum of the states of all rows out of its reach, in float32."""
    grids = states.split([rows * columns for rows, columns in tables.sides], dim=1)
    sums = [
        part.unflatten(1, sides).sum(dim=2, dtype=torch.float32)
        for part, sides in zip(grids, tables.sides, strict=True)
    ]
    return tables.far_rows @ torch.cat(sums, dim=1)


def _like(states: Tensor) -> Tensor:
    """An empty tensor of this shape with near channels, token-major in memory where the other is."""
    if states.stride(1) < states.stride(2):
        return empty_token_major(states)
    return states.new_empty(states.shape)
