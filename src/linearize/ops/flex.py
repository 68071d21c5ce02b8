"""Local attention in FlexAttention (Dong et al., 2024, arXiv 2412.05496), compiled once for each kind of call."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from functools import lru_cache
from types import FunctionType

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from linearize.layout import Layout
from linearize.ops.flex_mask import BLOCK, block_mask
from linearize.ops.regions import Region

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (16, 256)
# Kernels address numbers by 32-bit offsets up to torch 2.13.
OFFSETS = 2**31


def flex_local_attention(
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
    """Attention within a region by FlexAttention; `halo_attention` tells the arguments, `refusal` what it takes.

    The order of tokens is the layout's own: tiles touch fewest blocks, and in raster order this is what CLEAR runs.

    Returns:
        [batch, heads, tokens, head_dim].
    """
    states = (_addressable(query), _addressable(key), _addressable(value))
    kind = (layout, region, num_pooled, query.device)
    if torch.compiler.is_compiling():
        return _attend(*states, block_mask(*kind, key_mask), scale)
    mask = _fixed_mask(*kind) if key_mask is None else block_mask(*kind, key_mask)
    needs_grad = any(tensor.requires_grad for tensor in states)
    call = _compiled(*kind, tuple(query.shape), key.shape[1], query.dtype, key_mask is None, needs_grad)
    return call(*states, mask, scale)


def refusal(query: Tensor, *, layout: Layout, num_pooled: int, needs_grad: bool, **_: object) -> str | None:
    """Why FlexAttention cannot compute a call here, in one clause, or None."""
    machine = _machine_refusal(query.device)
    if machine is not None:
        return machine
    if needs_grad and query.device.type == "cpu":
        return "it has no gradients on a CPU"
    if query.dtype not in DTYPES:
        return f"it takes bfloat16, float16 and float32, not {str(query.dtype).removeprefix('torch.')}"
    if not HEAD_DIMS[0] <= query.shape[-1] <= HEAD_DIMS[1]:
        return f"it takes heads of {HEAD_DIMS[0]} to {HEAD_DIMS[1]} channels, not {query.shape[-1]}"
    if layout.num_tokens < BLOCK:
        return f"it takes {BLOCK} tokens or more, not {layout.num_tokens}"
    numbers = query.numel() // layout.num_tokens * (layout.num_tokens + num_pooled)
    return None if numbers < OFFSETS else f"it takes fewer than 2^31 numbers, not {numbers}: use smaller batches"


def _machine_refusal(device: torch.device) -> str | None:
    """Uncompiled, FlexAttention would weigh all pairs of tokens: where nothing compiles it, it does not run."""
    if torch._dynamo.config.disable:
        return "torch.compile is switched off"
    if device.type == "cpu":
        if shutil.which(os.environ.get("CXX", "g++")) is None or not torch.cpu._is_avx2_supported():
            return "on a CPU it needs AVX2 and g++"
        return None
    if device.type != "cuda":
        return f"it runs on CUDA and on CPUs, not on {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "it needs the package triton"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or newer"
    return None


def _addressable(states: Tensor) -> Tensor:
    """The same numbers where 32-bit offsets reach them, and without a claim to gradients where none are asked for."""
    if sum((size - 1) * stride for size, stride in zip(states.shape, states.stride(), strict=True)) >= OFFSETS:
        states = states.contiguous()
    return states if torch.is_grad_enabled() else states.detach()


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float) -> Tensor:
    # ROWS_GUARANTEED_SAFE would give NaN: the kernel takes masked blocks first, in which a query may see nothing yet.
    return flex_attention(query, key, value, block_mask=mask, scale=scale, enable_gqa=key.shape[1] != query.shape[1])


_fixed_mask = lru_cache(maxsize=32)(block_mask)


@lru_cache(maxsize=128)
def _compiled(*kind: object) -> Callable[..., Tensor]:
    """`_attend`, compiled for one kind of call.

    A compiler gives up on a code object after some recompilations, and FlexAttention then silently weighs all pairs of
    tokens. So each kind of call has a code object of its own, and whatever would still not compile is an error.
    """
    function = FunctionType(_attend.__code__.replace(), globals(), _attend.__name__)
    return torch.compile(function, fullgraph=True, dynamic=False)
