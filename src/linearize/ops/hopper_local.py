"""Starts the Hopper kernel of local attention: tensors as planes that the tensor memory accelerator reads."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from linearize.layout import TILE, Layout
from linearize.ops.block_tables import BLOCK
from linearize.ops.hopper_tables import UNIT, PairTables, pair_tables
from linearize.ops.naive import naive_with_mass
from linearize.ops.parity import WHOLE_GRID, largest_error
from linearize.ops.regions import REGIONS

HEAD_DIMS = (64, 128)
PROBE, PROBE_WINDOW = Layout(BLOCK, (WHOLE_GRID,), tile=TILE), 6
# Of bf16, relative to the norm of all results: a few times what is expected.
ROUNDING = 1e-2
# Channels that shared memory holds next to one another: 128 bytes.
_SWIZZLED = 64


def serves(layout: Layout, region: str, head_dim: int, device: torch.device) -> bool:
    """Whether the kernel takes a layout: whole blocks on a Hopper GPU, and neighborhoods in one image."""
    sides = [(grid.height % TILE[0], grid.width % TILE[1]) for grid in layout.grids]
    whole = layout.num_text_tokens % BLOCK == 0 and not any(map(any, sides))
    if not whole or head_dim not in HEAD_DIMS or (region == "neighborhood" and len(layout.grids) > 1):
        return False
    return _works(device, head_dim, region)


def planes_for(tensors: Sequence[Tensor]) -> list[Plane] | None:
    """Tensors [batch, heads, tokens, head_dim] as the kernel reads them, or None where it cannot."""
    planes = [_plane(states) for states in tensors]
    found = [plane for plane in planes if plane is not None]
    return found if len(found) == len(planes) else None


@lru_cache(maxsize=16)
def _works(device: torch.device, head_dim: int, region: str) -> bool:
    """Whether this is a Hopper GPU on which the kernel, written in a language that still changes, is right."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    fault = _fault(device, head_dim, region)
    if fault is not None:
        warnings.warn(
            f"the Hopper kernel of local attention is not used, as {fault}; the portable one is", stacklevel=2
        )
    return fault is None


def _fault(device: torch.device, head_dim: int, region: str) -> str | None:
    """Why the kernel is of no use here: it is compiled, and compared with the definition on a small picture."""
    rule = REGIONS[region](PROBE_WINDOW)
    shape, generator = (3, 1, 1, PROBE.num_tokens, head_dim), torch.Generator(device).manual_seed(0)
    query, key, value = torch.randn(shape, generator=generator, device=device).bfloat16()
    output, lse, empty = torch.empty_like(query), query.new_empty(query.shape[:3]).float(), query.new_empty(0).float()
    tables, scale = pair_tables(PROBE, rule, device), head_dim**-0.5
    planes = planes_for((query, key, value, output)) or []
    try:
        with torch.cuda.device_of(query):
            launch_forward(planes, lse, empty, empty, tables, region, PROBE_WINDOW, scale * math.log2(math.e))
    # Which errors another version of the compiler raises is not known.
    except Exception as error:
        return f"it does not run with this triton ({type(error).__name__})"
    wide = (states.double() for states in (query, key, value))
    expected, log_mass = naive_with_mass(*wide, layout=PROBE, region=rule, scale=scale)
    off_by = largest_error((output, lse), (expected, log_mass[..., 0] * math.log2(math.e)))
    return None if off_by <= ROUNDING else "its numbers are wrong with this triton"


def launch_forward(
    planes: Sequence[Plane],
    lse: Tensor,
    partial: Tensor,
    partial_lse: Tensor,
    tables: PairTables,
    region: str,
    window: int,
    scale: float,
) -> None:
    """See `gluon_kernels.forward_kernel`; on the current GPU, which is the tensors'.

    Planes are those of query, key, value and output, and `scale` is for powers of 2.
    """
    from linearize.ops.gluon_kernels import forward_kernel

    batch, num_heads, num_tokens, head_dim = planes[0].states.shape
    lanes, num_segments = batch * num_heads, len(tables.segments)
    forward_kernel[(num_segments * lanes,)](
        planes[0].descriptor(head_dim),
        planes[1].descriptor(_SWIZZLED),
        planes[2].descriptor(_SWIZZLED),
        planes[3].descriptor(head_dim),
        lse,
        partial,
        partial_lse,
        tables.segments,
        tables.entries,
        *(step for plane in planes for step in (plane.batch, plane.head, plane.channel)),
        num_heads,
        num_tokens,
        tables.num_text_segments,
        num_segments,
        lanes,
        window,
        scale,
        REGION=region,
        D=head_dim,
        num_warps=4,
    )


@dataclass(frozen=True)
class Plane:
    """[batch, heads, tokens, head_dim] as a matrix: where row and column of a batch and head start."""

    states: Tensor
    num_rows: int
    num_columns: int
    row_stride: int
    batch: int
    head: int
    channel: int

    def descriptor(self, num_channels: int) -> Any:
        """For boxes of half a block's tokens and of `num_channels`."""
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        box = [UNIT, num_channels]
        layout = _shared_layout(*box, self.states.dtype)
        return TensorDescriptor(self.states, [self.num_rows, self.num_columns], [self.row_stride, 1], box, layout)


@lru_cache(maxsize=64)
def _shared_layout(num_rows: int, num_columns: int, dtype: torch.dtype) -> Any:
    from triton.experimental.gluon import language as gl

    element = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[dtype]
    return gl.NVMMASharedLayout.get_default_for([num_rows, num_columns], element)


def _plane(states: Tensor) -> Plane | None:
    """The plane of a tensor in which heads lie in columns (token-major) or in rows (head-major), or None."""
    batch, num_heads, num_tokens, head_dim = states.shape
    by_batch, by_head, row, last = states.stride()
    by_batch = 0 if batch == 1 else by_batch
    if last != 1 or states.data_ptr() % 16 or row * states.element_size() % 16 or row < head_dim or by_batch % row:
        return None
    in_columns = by_head * (num_heads - 1) + head_dim <= row
    if not in_columns and by_head % row:
        return None
    head, channel = (0, by_head) if in_columns else (by_head // row, 0)
    num_rows = (batch - 1) * (by_batch // row) + (num_heads - 1) * head + num_tokens
    num_columns = (num_heads - 1) * channel + head_dim
    return Plane(states, num_rows, num_columns, row, by_batch // row, head, channel)
