"""Local attention by Triton kernels on tile-ordered tokens, as operators that compilers pass through."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd.function import once_differentiable

from linearize.layout import TILE, Layout
from linearize.ops.block_tables import BLOCK, BlockTables
from linearize.ops.dense_attention import match_heads
from linearize.ops.hopper_local import launch_forward, planes_for
from linearize.ops.hopper_tables import PairTables
from linearize.ops.regions import Region, region_name
from linearize.ops.triton_launch import (
    Tiling,
    empty_token_major,
    merge_parts,
    plan_for,
    split_lists,
    with_near_channels,
)

DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (32, 64, 128)
_LOG2E = math.log2(math.e)


# The Hopper kernel takes queries as this does, and keys as `PairTables` says.
FORWARD = Tiling(BLOCK, 64, 4, 2)
QUERY_GRADIENT = Tiling(64, 64, 4, 2)
KEY_GRADIENT = Tiling(64, 64, 4, 2)


def triton_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    layout: Layout,
    region: Region,
    scale: float,
    key_mask: Tensor | None = None,
    num_pooled: int = 0,
) -> Tensor:
    """Attention within a region in one kernel; see `halo_attention` for the arguments, `refusal` for what it takes.

    Tokens may lie in memory as they like. Tokens that are not in tiles are brought into tiles and back.

    Returns:
        [batch, heads, tokens, head_dim], token-major in memory, as projections read it.
    """
    return _in_tiles(query, key, value, layout, region, scale)[0]


def triton_attention_with_mass(
    query: Tensor, key: Tensor, value: Tensor, *, layout: Layout, region: Region, scale: float
) -> tuple[Tensor, Tensor]:
    """`triton_attention`, and log sum_j exp(s_ij), [batch, heads, tokens, 1] in float32; both are differentiable."""
    output, lse = _in_tiles(query, key, value, layout, region, scale)
    return output, lse[..., None] / _LOG2E


def _in_tiles(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, region: Region, scale: float
) -> tuple[Tensor, Tensor]:
    """Results of the operator in the order of the layout."""
    key, value = match_heads(key, query), match_heads(value, query)
    if layout.tile != TILE:
        index = layout.index_to(TILE, query.device)
        query, key, value = (states.index_select(2, index) for states in (query, key, value))
    grids = [side for grid in layout.grids for side in (grid.height, grid.width)]
    name = region_name(region)
    output, lse = _attention(
        query, key, value, layout.num_text_tokens, layout.text_first, grids, name, region.window, float(scale)
    )
    if layout.tile != TILE:
        index = layout.with_tile(TILE).index_to(layout.tile, query.device)
        output, lse = output.index_select(2, index), lse.index_select(2, index)
    return output, lse


def refusal(query: Tensor, *, key_mask: Tensor | None = None, num_pooled: int = 0, **_: object) -> str | None:
    """Why the kernels cannot compute a call, in one clause, or None."""
    if importlib.util.find_spec("triton") is None:
        return "it needs the package triton"
    if query.device.type != "cuda":
        return "it needs a GPU"
    if torch.cuda.get_device_capability(query.device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or newer"
    if query.dtype not in DTYPES:
        return f"it takes bfloat16 and float16, not {str(query.dtype).removeprefix('torch.')}"
    if query.shape[-1] not in HEAD_DIMS:
        return f"it takes heads of {', '.join(map(str, HEAD_DIMS))} channels, not {query.shape[-1]}"
    if key_mask is not None:
        return "it takes no mask of valid keys"
    return "it takes no pooled keys" if num_pooled else None


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_text_tokens: int,
    text_first: bool,
    grids: Sequence[int],
    region: str,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output [batch, heads, tokens, head_dim] and log-sum-exp in base 2, [batch, heads, tokens]."""
    # Triton starts kernels on the current GPU, which need not be the tensors'.
    with torch.cuda.device_of(query):
        plan = plan_for(query.shape, query.device, num_text_tokens, text_first, tuple(grids), region, window)
        query, key, value = (with_near_channels(states) for states in (query, key, value))
        output, lse = empty_token_major(query), query.new_empty(query.shape[:3], dtype=torch.float32)
        strided = (query, key, value, output)
        tables: BlockTables | PairTables
        if plan.on_hopper and (planes := planes_for(strided)):
            tables = pairs = plan.pair_tables()
            results = lse, *plan.forward_partials(pairs)
            launch_forward(planes, *results, pairs, region, window, scale * _LOG2E)
        else:
            tables = blocks = plan.tables(FORWARD.queries, FORWARD.keys)
            results = lse, *plan.forward_partials(blocks)
            plan.launch(_forward_kernel(), FORWARD, blocks, (*strided, *results), strided, (scale * _LOG2E,))
        if tables.num_splits > 1:
            text, text_lse = merge_parts(*(split_lists(partial, tables) for partial in results[1:]))
            plan.put_text(output, text)
            plan.put_text(lse[..., None], text_lse)
    return output, lse


def _backward(
    gradient: Tensor,
    lse_gradient: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    num_text_tokens: int,
    text_first: bool,
    grids: Sequence[int],
    region: str,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, from those of output and, where it was of use, log-sum-exp."""
    with torch.cuda.device_of(query):
        plan = plan_for(query.shape, query.device, num_text_tokens, text_first, tuple(grids), region, window)
        query, key, value, gradient = (with_near_channels(states) for states in (query, key, value, gradient))
        # The gradient of a score is weight (gradient value^T - delta), and the log-sum-exp's is weight / ln 2.
        delta = plan.delta(_backward_kernels().delta_kernel, output, gradient)
        if lse_gradient is not None:
            delta = delta.sub_(lse_gradient, alpha=_LOG2E)
        query_gradient, key_gradient, value_gradient = (empty_token_major(states) for states in (query, key, value))
        scales = (scale * _LOG2E, scale)

        tables = plan.tables(QUERY_GRADIENT.queries, QUERY_GRADIENT.keys)
        partial = plan.partials(tables, QUERY_GRADIENT.queries)
        given = (query, key, value, gradient, lse, delta)
        strided = (query, key, value, gradient, query_gradient)
        kernel = _backward_kernels().query_gradient_kernel
        plan.launch(kernel, QUERY_GRADIENT, tables, (*given, query_gradient, partial), strided, scales)
        if tables.num_splits > 1:
            plan.put_text(query_gradient, split_lists(partial, tables).sum(dim=1))

        tables = plan.tables(KEY_GRADIENT.keys, KEY_GRADIENT.queries, transposed=True)
        partials = [plan.partials(tables, KEY_GRADIENT.keys) for _ in range(2)]
        strided = (query, key, value, gradient, key_gradient)
        kernel = _backward_kernels().key_gradient_kernel
        plan.launch(kernel, KEY_GRADIENT, tables, (*given, key_gradient, value_gradient, *partials), strided, scales)
        if tables.num_splits > 1:
            for result, partial in zip((key_gradient, value_gradient), partials, strict=True):
                plan.put_text(result, split_lists(partial, tables).sum(dim=1))
    return query_gradient, key_gradient, value_gradient


class _Differentiable(torch.autograd.Function):
    """The operator with its gradient; a result of no use has none, which is not filled with zeros."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            output, lse = _attention(query, key, value, *rest)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.set_materialize_grads(False)
        ctx.rest = rest
        return output, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, lse_gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        gradient = torch.zeros_like(output) if gradient is None else gradient
        gradients = _attention_backward(gradient, lse_gradient, query, key, value, output, lse, *ctx.rest)
        return *gradients, *(None for _ in ctx.rest)


_LIBRARY = torch.library.Library("linearize", "FRAGMENT")


def _operator(name: str, function: Callable[..., Any]) -> OpOverload:
    """An operator, for a call of which `torch.library.custom_op` would take three times as long."""
    schema = torch.library.infer_schema(function, mutates_args=())
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, torch.compiler.disable(function), "CompositeExplicitAutograd")
    return cast(OpOverload, getattr(torch.ops.linearize, name).default)


_attention = _operator("tile_attention", _forward)
_attention_backward = _operator("tile_attention_backward", _backward)
_LIBRARY.impl("tile_attention", _Differentiable.apply, "Autograd")


@torch.library.register_fake("linearize::tile_attention", lib=_LIBRARY)
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_token_major(query), query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.register_fake("linearize::tile_attention_backward", lib=_LIBRARY)
def _(gradient: Tensor, lse_gradient: Tensor | None, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(empty_token_major(states) for states in inputs[:3])


# These import triton, which only machines with a GPU have.


def _forward_kernel() -> Any:
    from linearize.ops.triton_forward import forward_kernel

    return forward_kernel


def _backward_kernels() -> ModuleType:
    from linearize.ops import triton_backward

    return triton_backward
