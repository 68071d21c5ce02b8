"""What every launch of the Triton kernels of local attention needs: tables, strides, room for parts and their merge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from linearize.layout import TILE, Grid, Layout
from linearize.ops.block_tables import BLOCK, BlockTables, block_tables
from linearize.ops.hopper_local import serves
from linearize.ops.hopper_tables import PairTables, pair_tables
from linearize.ops.regions import REGIONS


@dataclass(frozen=True)
class Tiling:
    """How a kernel is cut: tokens of a unit of queries and of keys, warps and stages of a program."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


class Plan:
    """What calls of one shape and layout have in common: tables, sizes and launches."""

    def __init__(
        self,
        shape: tuple[int, ...],
        device: torch.device,
        num_text_tokens: int,
        text_first: bool,
        grids: tuple[int, ...],
        region: str,
        window: int,
    ) -> None:
        sides = zip(grids[::2], grids[1::2], strict=True)
        self.layout = Layout(num_text_tokens, tuple(Grid(*pair) for pair in sides), text_first, TILE)
        self.region, self.name = REGIONS[region](window), region
        self.batch, self.num_heads, self.num_tokens, self.head_dim = shape
        self.lanes = self.batch * self.num_heads
        self.device = device
        self.share = self.lanes / num_processors(device)
        self.on_hopper = serves(self.layout, region, self.head_dim, device)
        with torch.inference_mode(False):
            self.empty = torch.empty(0, dtype=torch.float32, device=device)

    def tables(self, size: int, other_size: int, transposed: bool = False) -> BlockTables:
        """Lists for units of `size` tokens."""
        return block_tables(
            self.layout,
            self.region,
            self.device,
            size=size,
            other_size=other_size,
            transposed=transposed,
            share=self.share,
        )

    def pair_tables(self) -> PairTables:
        """Lists for the Hopper kernel."""
        return pair_tables(self.layout, self.region, self.device, share=self.share)

    def partials(self, tables: BlockTables | PairTables, size: int, channels: int | None = None) -> Tensor:
        """Room for results of segments: [segments, lanes, size, channels], empty where no list is cut."""
        if tables.num_splits == 1:
            return self.empty
        shape = (tables.num_text_segments, self.lanes, size, self.head_dim if channels is None else channels)
        return self.empty.new_empty(shape)

    def forward_partials(self, tables: BlockTables | PairTables) -> tuple[Tensor, Tensor]:
        """Room for outputs and log-sum-exps of parts of lists."""
        return self.partials(tables, BLOCK), self.partials(tables, BLOCK, 1)

    def joined(self, total: Tensor) -> Tensor:
        """[text units, lanes, size, channels] as [batch, heads, text tokens, channels]."""
        tokens = total.transpose(0, 1).flatten(1, 2)[:, : self.layout.num_text_tokens]
        return tokens.unflatten(0, (self.batch, self.num_heads))

    def put_text(self, result: Tensor, total: Tensor) -> None:
        """Writes text's tokens of a result [batch, heads, tokens, channels]."""
        result[:, :, self.layout.text_slice] = self.joined(total).to(result.dtype)

    def delta(self, kernel: Any, output: Tensor, gradient: Tensor) -> Tensor:
        """Sum over channels of output x gradient, [batch, heads, tokens] in float32."""
        delta = torch.empty(output.shape[:3], dtype=torch.float32, device=self.device)
        size = 64
        strides = (*output.stride()[:3], *gradient.stride()[:3])
        kernel[-(-self.num_tokens // size), self.lanes](
            output, gradient, delta, *strides, self.num_heads, self.num_tokens, D=self.head_dim, M=size
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
        """Starts a program for every segment and lane, on the current GPU, which is the tensors'."""
        num_segments = len(tables.segments)
        sizes = (self.num_heads, self.num_tokens, tables.num_text_segments, num_segments, self.lanes)
        kernel[(num_segments * self.lanes,)](
            *tensors,
            tables.blocks,
            tables.segments,
            tables.entries,
            *(step for tensor in strided for step in tensor.stride()[:3]),
            *sizes,
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


plan_for = lru_cache(maxsize=64)(Plan)


def split_lists(partial: Tensor, tables: BlockTables | PairTables) -> Tensor:
    """[segments, ...] as [text units, splits, ...]."""
    return partial.unflatten(0, (-1, tables.num_splits))


def merge_parts(output: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """One softmax of several over parts of the keys: output [units, splits, lanes, size, channels], lse in base 2."""
    peak = lse.amax(dim=1, keepdim=True)
    weights = torch.exp2(lse - peak)
    total = weights.sum(dim=1)
    return (output * weights).sum(dim=1) / total, total.log2() + peak[:, 0]


def with_near_channels(states: Tensor) -> Tensor:
    """Channels of a token next to one another, as the kernels read them."""
    return states if states.stride(-1) == 1 else states.contiguous()


def empty_token_major(states: Tensor) -> Tensor:
    """An empty tensor of this shape, token-major in memory."""
    return torch.empty_permuted(states.shape, (0, 2, 1, 3), dtype=states.dtype, device=states.device)


@lru_cache(maxsize=16)
def num_processors(device: torch.device) -> int:
    """Of a GPU; elsewhere one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
