"""Local attention by Triton kernels on tile-ordered tokens, as operators that compilers pass through."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from linearize.layout import TILE, Grid, Layout
from linearize.ops.block_tables import BLOCK, BlockTables, block_tables
from linearize.ops.dense_attention import match_heads
from linearize.ops.hopper_local import launch_forward, planes_for
from linearize.ops.regions import REGIONS, Region

DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (32, 64, 128)
_LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Tiling:
    """How a kernel is cut: tokens of a unit of queries and of keys, warps and stages of a program."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


# The Hopper kernel takes queries as this does, and keys by whole blocks.
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
    key, value = match_heads(key, query), match_heads(value, query)
    if layout.tile != TILE:
        index = layout.index_to(TILE, query.device)
        query, key, value = (states.index_select(2, index) for states in (query, key, value))
    grids = [side for grid in layout.grids for side in (grid.height, grid.width)]
    name = next(name for name, made in REGIONS.items() if made is type(region))
    output, _ = _attention(
        query, key, value, layout.num_text_tokens, layout.text_first, grids, name, region.window, float(scale)
    )
    if layout.tile != TILE:
        output = output.index_select(2, layout.with_tile(TILE).index_to(layout.tile, query.device))
    return output


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


@torch.library.custom_op("linearize::tile_attention", mutates_args=())
def _attention(
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
    call = _Call(query, num_text_tokens, text_first, grids, region, window)
    query, key, value = (_rows(states) for states in (query, key, value))
    output, lse = _like(query), query.new_empty(query.shape[:3], dtype=torch.float32)
    strided = (query, key, value, output)
    planes = planes_for(strided, call.layout)
    tables = call.tables(FORWARD.queries, FORWARD.keys if planes is None else BLOCK)
    results = (lse, call.partials(tables, FORWARD.queries), call.partials(tables, FORWARD.queries, 1))
    if planes is not None:
        launch_forward(planes, *results, tables, region, window, scale * _LOG2E)
    else:
        call.launch(_forward_kernel(), FORWARD, tables, (*strided, *results), strided, (scale * _LOG2E,))
    if tables.num_splits > 1:
        text, text_lse = _merge(*(_split(partial, tables) for partial in results[1:]))
        call.put_text(output, text)
        call.put_text(lse[..., None], text_lse)
    return output, lse


@_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _like(query), query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.custom_op("linearize::tile_attention_backward", mutates_args=())
def _attention_backward(
    gradient: Tensor,
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
    """Gradients of query, key and value."""
    call = _Call(query, num_text_tokens, text_first, grids, region, window)
    query, key, value, gradient = (_rows(states) for states in (query, key, value, gradient))
    delta = call.delta(output, gradient)
    query_gradient, key_gradient, value_gradient = _like(query), _like(key), _like(value)
    scales = (scale * _LOG2E, scale)

    tables = call.tables(QUERY_GRADIENT.queries, QUERY_GRADIENT.keys)
    partial = call.partials(tables, QUERY_GRADIENT.queries)
    given = (query, key, value, gradient, lse, delta)
    strided = (query, key, value, gradient, query_gradient)
    kernel = _backward_kernels().query_gradient_kernel
    call.launch(kernel, QUERY_GRADIENT, tables, (*given, query_gradient, partial), strided, scales)
    if tables.num_splits > 1:
        call.put_text(query_gradient, _split(partial, tables).sum(dim=1))

    tables = call.tables(KEY_GRADIENT.keys, KEY_GRADIENT.queries, transposed=True)
    partials = [call.partials(tables, KEY_GRADIENT.keys) for _ in range(2)]
    strided = (query, key, value, gradient, key_gradient)
    kernel = _backward_kernels().key_gradient_kernel
    call.launch(kernel, KEY_GRADIENT, tables, (*given, key_gradient, value_gradient, *partials), strided, scales)
    if tables.num_splits > 1:
        for result, partial in zip((key_gradient, value_gradient), partials, strict=True):
            call.put_text(result, _split(partial, tables).sum(dim=1))
    return query_gradient, key_gradient, value_gradient


@_attention_backward.register_fake
def _(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _like(query), _like(key), _like(value)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, *ctx.rest = inputs
    ctx.save_for_backward(query, key, value, *output)


def _backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_attention_backward(gradient, *ctx.saved_tensors, *ctx.rest), *(None for _ in ctx.rest)


_attention.register_autograd(_backward, setup_context=_save)


class _Call:
    """One call of the operators: its layout, tables and launches."""

    def __init__(
        self, query: Tensor, num_text_tokens: int, text_first: bool, grids: Sequence[int], region: str, window: int
    ) -> None:
        sides = zip(grids[::2], grids[1::2], strict=True)
        self.layout = Layout(num_text_tokens, tuple(Grid(*pair) for pair in sides), text_first, TILE)
        self.region, self.name = REGIONS[region](window), region
        self.batch, self.num_heads, self.num_tokens, self.head_dim = query.shape
        self.lanes = self.batch * self.num_heads
        self.device = query.device

    def tables(self, size: int, other_size: int, transposed: bool = False) -> BlockTables:
        """Lists for units of `size` tokens."""
        return block_tables(
            self.layout,
            self.region,
            self.device,
            size=size,
            other_size=other_size,
            transposed=transposed,
            share=self.lanes / _num_processors(self.device),
        )

    def partials(self, tables: BlockTables, size: int, channels: int | None = None) -> Tensor:
        """Room for results of segments: [segments, lanes, size, channels], empty where no list is cut."""
        num_partials = tables.num_text_segments if tables.num_splits > 1 else 0
        shape = (num_partials, self.lanes, size, self.head_dim if channels is None else channels)
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def joined(self, total: Tensor) -> Tensor:
        """[text units, lanes, size, channels] as [batch, heads, text tokens, channels]."""
        tokens = total.transpose(0, 1).flatten(1, 2)[:, : self.layout.num_text_tokens]
        return tokens.unflatten(0, (self.batch, self.num_heads))

    def put_text(self, result: Tensor, total: Tensor) -> None:
        """Writes text's tokens of a result [batch, heads, tokens, channels]."""
        result[:, :, self.layout.text_slice] = self.joined(total).to(result.dtype)

    def delta(self, output: Tensor, gradient: Tensor) -> Tensor:
        """Sum over channels of output x gradient, [batch, heads, tokens] in float32."""
        delta = torch.empty(output.shape[:3], dtype=torch.float32, device=self.device)
        size = 64
        _backward_kernels().delta_kernel[-(-self.num_tokens // size), self.lanes](
            output,
            gradient,
            delta,
            *output.stride()[:3],
            *gradient.stride()[:3],
            self.num_heads,
            self.num_tokens,
            D=self.head_dim,
            M=size,
        )
        return delta

    def launch(
        self,
        kernel: Any,
        tiling: Tiling,
        tables: BlockTables,
        tensors: Sequence[Tensor],
        strided: Sequence[Tensor],
        scales: Sequence[float],
    ) -> None:
        """Starts a program for every segment and lane."""
        num_segments = len(tables.segments)
        kernel[(num_segments * self.lanes,)](
            *tensors,
            tables.blocks,
            tables.segments,
            tables.entries,
            *(step for tensor in strided for step in tensor.stride()[:3]),
            self.num_heads,
            self.num_tokens,
            tables.num_text_segments,
            num_segments,
            self.lanes,
            self.region.window,
            *scales,
            REGION=self.name,
            WHOLE=tables.whole,
            D=self.head_dim,
            M=tiling.queries,
            N=tiling.keys,
            num_warps=tiling.num_warps,
            num_stages=tiling.num_stages,
        )


def _split(partial: Tensor, tables: BlockTables) -> Tensor:
    """[segments, ...] as [text units, splits, ...]."""
    return partial.unflatten(0, (-1, tables.num_splits))


def _merge(output: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """One softmax of several over parts of the keys: output [units, splits, lanes, size, channels], lse in base 2."""
    peak = lse.amax(dim=1, keepdim=True)
    weights = torch.exp2(lse - peak)
    total = weights.sum(dim=1)
    return (output * weights).sum(dim=1) / total, total.log2() + peak[:, 0]


def _rows(states: Tensor) -> Tensor:
    """Channels of a token next to one another, as the kernels read them."""
    return states if states.stride(-1) == 1 else states.contiguous()


def _like(states: Tensor) -> Tensor:
    """An empty tensor of this shape, token-major in memory."""
    return torch.empty_like(states.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


@lru_cache(maxsize=16)
def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


# These import triton, which only machines with a GPU have.


def _forward_kernel() -> Any:
    from linearize.ops.triton_forward import forward_kernel

    return forward_kernel


def _backward_kernels() -> ModuleType:
    from linearize.ops import triton_backward

    return triton_backward
