"""Starts the Hopper kernel of local attention: tensors as planes that the tensor memory accelerator reads."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from linearize.ops.block_tables import BLOCK, BlockTables

HEAD_DIMS = (64, 128)
_HALF = BLOCK // 2
# The ring of keys and values fills what shared memory the queries leave.
_STAGES = 2


@lru_cache(maxsize=16)
def has_hopper_kernel(device: torch.device) -> bool:
    """Whether this is a Hopper GPU and the installed triton has Gluon's operations for it."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    try:
        return importlib.util.find_spec("triton.experimental.gluon.language.nvidia.hopper") is not None
    except ModuleNotFoundError:
        return False


def takes(tensors: Sequence[Tensor], tables: BlockTables) -> bool:
    """Whether the kernel can compute a call: whole blocks, and tokens that lie in planes."""
    return tables.whole and tensors[0].shape[-1] in HEAD_DIMS and all(_plane(states) is not None for states in tensors)


def launch_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    partial: Tensor,
    partial_lse: Tensor,
    tables: BlockTables,
    region: str,
    window: int,
    scale: float,
) -> None:
    """See `gluon_kernels.forward_kernel`; `scale` is for powers of 2."""
    from linearize.ops.gluon_kernels import forward_kernel

    batch, num_heads, num_tokens, head_dim = query.shape
    planes = [_plane(states) for states in (query, key, value, output)]
    rows = (_HALF, BLOCK, BLOCK, _HALF)
    lanes, num_segments = batch * num_heads, len(tables.segments)
    forward_kernel[(num_segments * lanes,)](
        *(plane.descriptor(size) for plane, size in zip(planes, rows, strict=True) if plane is not None),
        lse,
        partial,
        partial_lse,
        tables.blocks,
        tables.segments,
        tables.entries,
        *(step for plane in planes if plane is not None for step in (plane.batch, plane.head, plane.channel)),
        num_heads,
        num_tokens,
        tables.num_text_segments,
        num_segments,
        lanes,
        window,
        scale,
        REGION=region,
        STAGES=_STAGES,
        D=head_dim,
        num_warps=4,
    )


@dataclass(frozen=True)
class _Plane:
    """[batch, heads, tokens, head_dim] as a matrix: where row and column of a batch and head start."""

    states: Tensor
    num_rows: int
    num_columns: int
    row_stride: int
    batch: int
    head: int
    channel: int

    def descriptor(self, num_rows: int) -> Any:
        """For boxes of `num_rows` tokens of one head."""
        from triton.experimental.gluon import language as gl
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        box = [num_rows, self.states.shape[-1]]
        element = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[self.states.dtype]
        layout = gl.NVMMASharedLayout.get_default_for(box, element)
        return TensorDescriptor(self.states, [self.num_rows, self.num_columns], [self.row_stride, 1], box, layout)


def _plane(states: Tensor) -> _Plane | None:
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
    return _Plane(states, num_rows, num_columns, row, by_batch // row, head, channel)
