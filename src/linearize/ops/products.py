"""Matrix products over many tokens: in bf16 on a GPU where the inputs are, with sums in float32."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.ops.precision import has_narrow_products, widen

# Channels of which GPUs read whole words; the products of others take slow paths.
ALIGNMENT = 8


def for_products(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in one type: bf16 where all are and lie on a GPU, else float32 or wider."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    if not has_narrow_products(dtype, tensors[0].device.type):
        dtype = torch.promote_types(dtype, torch.float32)
    return tuple(tensor.to(dtype) for tensor in tensors)


def wide_matmul(first: Tensor, second: Tensor) -> Tensor:
    """The product [..., rows, columns] in float32 at least, of tensors with the same leading dimensions.

    bf16 on a GPU is multiplied as it is: only the sums are float32.
    """
    if first.dtype == second.dtype and has_narrow_products(first.dtype, first.device.type):
        return _WideMatmul.apply(first, second)
    return widen(first) @ widen(second)


def wide_product(first: Tensor, second: Tensor) -> Tensor:
    """`wide_matmul` of two tensors of one type, without a gradient."""
    if not has_narrow_products(first.dtype, first.device.type):
        return widen(first) @ widen(second)
    product = torch.bmm(first.flatten(0, -3), second.flatten(0, -3), out_dtype=torch.float32)
    return product.unflatten(0, first.shape[:-2])


def add_product(states: Tensor, first: Tensor, second: Tensor) -> None:
    """Adds a product [..., rows, columns] to a tensor in place, views included, without a gradient."""
    flat = states.view(-1, *states.shape[-2:])
    flat.baddbmm_(first.flatten(0, -3), second.flatten(0, -3))


class _WideMatmul(torch.autograd.Function):
    """bmm with an output wider than its inputs, which has no derivative of its own."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor) -> Tensor:
        """See `wide_matmul`."""
        ctx.save_for_backward(first, second)
        return wide_product(first, second)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        """Products of the type of the inputs."""
        first, second = ctx.saved_tensors
        gradient = gradients[0].to(first.dtype)
        return gradient @ second.transpose(-1, -2), first.transpose(-1, -2) @ gradient


def in_chunks(states: Tensor, size: int) -> Tensor:
    """[batch, heads, tokens, channels] to [batch, heads, chunks, size, channels], zeros where there is no token."""
    missing = -states.shape[2] % size
    return (F.pad(states, (0, 0, 0, missing)) if missing else states).unflatten(2, (-1, size))


def aligned(states: Tensor, alignment: int = ALIGNMENT) -> Tensor:
    """The tensor with zeros behind its channels, up to a multiple of the alignment."""
    missing = -states.shape[-1] % alignment
    return F.pad(states, (0, missing)) if missing else states


def with_ones(value: Tensor) -> Tensor:
    """[..., channels] with a column of ones behind, whose weighted sum is the mass, and zeros up to the alignment."""
    last = torch.arange(-(value.shape[-1] + 1) % ALIGNMENT + 1, device=value.device) == 0
    return torch.cat([value, last.to(value.dtype).expand(*value.shape[:-1], -1)], dim=-1)
