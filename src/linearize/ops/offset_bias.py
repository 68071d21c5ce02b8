"""Linear attention whose weights carry a factor of the offset between two tokens, by fast Fourier transforms."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from linearize.layout import Layout
from linearize.ops.disc import coordinates


@torch.compiler.disable
@lru_cache(maxsize=64)
def offset_tables(layout: Layout, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of every image token, [num_image_tokens, 2], and all offsets between them.

    The offsets, [2 height - 1, 2 width - 1, 2] in rows and columns, are those of a canvas that holds every grid. Not to
    be written to, and built outside inference mode, as what sampling needed first is used for training later.
    """
    with torch.inference_mode(False):
        height, width = canvas(layout)
        sides = (torch.arange(1 - side, side, device="cpu") for side in (height, width))
        offsets = torch.stack(torch.meshgrid(*sides, indexing="ij"), dim=-1)
        return coordinates(layout).to(device), offsets.to(device)


def canvas(layout: Layout) -> tuple[int, int]:
    """Height and width that hold every grid."""
    return max(grid.height for grid in layout.grids), max(grid.width for grid in layout.grids)


def weigh_by_offset(query: Tensor, key: Tensor, value: Tensor, factor: Tensor, places: Tensor) -> Tensor:
    """sum_j factor[place_j - place_i] (query_i^T key_j) value_j, as one convolution of the picture per feature.

    The factor of all pairs is a block-Toeplitz matrix, so that each product of a feature of the key and a channel of
    the value is convolved with it on a canvas, at tokens log(tokens) cost. Several tokens may share a place, as those
    of grids that lie on top of one another do. One feature is transformed at a time, and again in the backward pass:
    that takes memory for num_features times fewer canvases than all at once.

    Args:
        query: Features [batch, heads, tokens, num_features].
        key: Same.
        value: [batch, heads, tokens, channels].
        factor: [heads, 2 height - 1, 2 width - 1], of the offsets from (1 - height, 1 - width) on, key less query.
        places: Row and column of every token, [tokens, 2], below height and width.

    Returns:
        [batch, heads, tokens, channels].
    """
    height, width = (factor.shape[1] + 1) // 2, (factor.shape[2] + 1) // 2
    # Larger than the longest offset, so that nothing comes round at the other side.
    size = (smooth_length(2 * height - 1), smooth_length(2 * width - 1))
    spectrum = torch.fft.rfft2(_around_zero(factor, size))[None, :, None]
    index = places[:, 0] * width + places[:, 1]

    def one_feature(query: Tensor, key: Tensor, value: Tensor, spectrum: Tensor) -> Tensor:
        weighted = (key * value).transpose(-1, -2)
        canvas = weighted.new_zeros(*weighted.shape[:3], height * width).index_add(3, index, weighted)
        transformed = torch.fft.rfft2(canvas.unflatten(3, (height, width)), s=size) * spectrum
        seen = torch.fft.irfft2(transformed, s=size)[..., :height, :width].flatten(3)
        return query * seen[..., index].transpose(-1, -2)

    total = torch.zeros_like(value)
    for one_query, one_key in zip(query.split(1, dim=-1), key.split(1, dim=-1), strict=True):
        total = total + checkpoint(one_feature, one_query, one_key, value, spectrum, use_reentrant=False)
    return total


def weigh_by_offset_naive(query: Tensor, key: Tensor, value: Tensor, factor: Tensor, places: Tensor) -> Tensor:
    """The same on dense weights."""
    middle = torch.tensor(factor.shape[1:]) // 2
    offset = (places[None] - places[:, None] + middle).to(factor.device)
    return torch.matmul(torch.matmul(query, key.transpose(-1, -2)) * factor[:, offset[..., 0], offset[..., 1]], value)


def smooth_length(least: int) -> int:
    """The smallest even number from `least` on without prime factors above 5: transforms of it are fast."""
    length = least + least % 2
    while _without_small_factors(length) > 1:
        length += 2
    return length


def fourier_flops(height: int, width: int) -> int:
    """Operations of one real transform and one back, and the product between, of a picture of height x width."""
    size = smooth_length(2 * height - 1) * smooth_length(2 * width - 1)
    return int(2 * 2.5 * size * max(size - 1, 1).bit_length() + 3 * size)


def _without_small_factors(number: int) -> int:
    for factor in (2, 3, 5):
        while number % factor == 0:
            number //= factor
    return number


def _around_zero(factor: Tensor, size: tuple[int, int]) -> Tensor:
    """The kernel of the convolution on a canvas of that size: what a query takes from a key at -offset."""
    kernel = torch.flip(factor, dims=(1, 2))
    kernel = torch.nn.functional.pad(kernel, (0, size[1] - kernel.shape[2], 0, size[0] - kernel.shape[1]))
    return torch.roll(kernel, shifts=(-(factor.shape[1] // 2), -(factor.shape[2] // 2)), dims=(1, 2))
