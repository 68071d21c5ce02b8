"""Linear attention whose weights carry a factor of the offset between two tokens, by Fourier transforms."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from linearize.layout import Layout
from linearize.ops.constant_tables import layout_table
from linearize.ops.disc import coordinates
from linearize.ops.scan_order import reordered

# Longest side of the pictures that are transformed by matrix products: beyond, they are too many operations.
LONGEST_SIDE = 64
# Products of features and channels that are in memory at a time.
NUMBERS_AT_A_TIME = 100_000_000


class OffsetTables(NamedTuple):
    """Where image tokens are, and the offsets between them.

    Attributes:
        places: Row and column of every image token, [num_image_tokens, 2].
        offsets: All offsets in rows and columns, [2 height - 1, 2 width - 1, 2], on a canvas that holds every grid.
        order: The token at each place of the canvas in raster order, [height * width], where each has exactly one.
    """

    places: Tensor
    offsets: Tensor
    order: Tensor | None


@layout_table
@lru_cache(maxsize=64)
def offset_tables(layout: Layout, device: torch.device) -> OffsetTables:
    """The tables of a layout."""
    height, width = canvas(layout)
    sides = (torch.arange(1 - side, side, device="cpu") for side in (height, width))
    offsets = torch.stack(torch.meshgrid(*sides, indexing="ij"), dim=-1)
    is_filled_once = layout.num_image_tokens == layout.grids[0].num_tokens == height * width
    order = layout.tile_to_raster(device) if is_filled_once else None
    return OffsetTables(coordinates(layout).to(device), offsets.to(device), order)


def canvas(layout: Layout) -> tuple[int, int]:
    """Height and width that hold every grid."""
    return max(grid.height for grid in layout.grids), max(grid.width for grid in layout.grids)


def weigh_by_offset(
    query: Tensor, key: Tensor, value: Tensor, factor: Tensor, places: Tensor, order: Tensor | None = None
) -> Tensor:
    """sum_j factor[place_j - place_i] (query_i^T key_j) value_j, as one convolution of the picture per feature.

    The factor of all pairs is a block-Toeplitz matrix, so that each product of a feature of the key and a channel of
    the value is convolved with it on a canvas: at tokens log(tokens) cost by fast Fourier transforms, and on sides of
    up to LONGEST_SIDE by matrix products, which are tokens (height + width) operations and quicker. Several tokens may
    share a place, as those of grids that lie on top of one another do. Some features are transformed at a time, and
    again in the backward pass, which bounds the memory.

    Args:
        query: Features [batch, heads, tokens, num_features].
        key: Same.
        value: [batch, heads, tokens, channels].
        factor: [heads, 2 height - 1, 2 width - 1], of the offsets from (1 - height, 1 - width) on, key less query.
        places: Row and column of every token, [tokens, 2], below height and width.
        order: The token at each place, [height * width], where each place has exactly one.

    Returns:
        [batch, heads, tokens, channels].
    """
    height, width = (factor.shape[1] + 1) // 2, (factor.shape[2] + 1) // 2
    kernel, convolve = _by_products(factor) if max(height, width) <= LONGEST_SIDE else _by_transforms(factor)
    index = places[:, 0] * width + places[:, 1]
    if order is not None:
        query, key, value = (reordered(states, order, index) for states in (query, key, value))

    def some_features(query: Tensor, key: Tensor, value: Tensor, kernel: Tensor) -> Tensor:
        products = key[..., None] * value[..., None, :]
        if order is None:
            zeros = products.new_zeros(*products.shape[:2], height * width, *products.shape[3:])
            products = zeros.index_add(2, index, products)
        seen = convolve(products.flatten(3).unflatten(2, (height, width)), kernel).flatten(2, 3)
        seen = seen if order is not None else seen.index_select(2, index)
        return (query[..., None] * seen.unflatten(3, (-1, value.shape[-1]))).sum(dim=3)

    num_features = query.shape[-1]
    num_parts = min(num_features, math.ceil(num_features * value.numel() / NUMBERS_AT_A_TIME))
    size = math.ceil(num_features / num_parts)
    total = torch.zeros_like(value)
    for queries, keys in zip(query.split(size, dim=-1), key.split(size, dim=-1), strict=True):
        total = total + checkpoint(
            some_features, queries, keys, value, kernel, use_reentrant=False, preserve_rng_state=False
        )
    return total if order is None else reordered(total, index, order)


def weigh_by_offset_naive(query: Tensor, key: Tensor, value: Tensor, factor: Tensor, places: Tensor) -> Tensor:
    """The same on dense weights."""
    middle = torch.tensor(factor.shape[1:]) // 2
    offset = (places[None] - places[:, None] + middle).to(factor.device)
    return torch.matmul(torch.matmul(query, key.transpose(-1, -2)) * factor[:, offset[..., 0], offset[..., 1]], value)


def convolution_flops(height: int, width: int) -> int:
    """Operations of the convolution of one product of a feature and a channel."""
    if max(height, width) <= LONGEST_SIDE:
        return 8 * height * width * (height + width)
    size = smooth_length(2 * height - 1) * smooth_length(2 * width - 1)
    # A real transform, one back, and the product between.
    return int(2 * 2.5 * size * max(size - 1, 1).bit_length() + 3 * size)


def smooth_length(least: int) -> int:
    """The smallest even number from `least` on without prime factors above 5: transforms of it are fast."""
    length = least + least % 2
    while _without_small_factors(length) > 1:
        length += 2
    return length


Convolve = Callable[[Tensor, Tensor], Tensor]


def _by_products(factor: Tensor) -> tuple[Tensor, Convolve]:
    """A kernel, and how a picture [batch, heads, height, width, products] is convolved with it by matrix products.

    Columns of the picture are transformed, and each frequency's row of them is multiplied by a Toeplitz matrix. With
    angles t_f = 2 pi f / (2 height - 1),

        F_f(d) = c_f sum_e factor(e, d) exp(-i t_f e),   seen(y, x) = Re sum_f exp(-i t_f y) sum_x' F_f(x' - x) X_f(x'),

    where X_f(x') = sum_y' exp(i t_f y') picture(y', x'), f < height, c_0 = 1 / (2 height - 1) and c_f = 2 c_0. Real and
    imaginary parts are rows of their own.
    """
    height, width = (factor.shape[1] + 1) // 2, (factor.shape[2] + 1) // 2
    cosine, sine = _waves(torch.arange(height, device=factor.device), height, factor.dtype)
    waves = torch.stack([cosine, sine], dim=1).flatten(0, 1)
    cosine, sine = _waves(torch.arange(1 - height, height, device=factor.device), height, factor.dtype)
    share = torch.full_like(cosine[:, :1], 2 / (2 * height - 1))
    share[0] /= 2
    # Rows of a Toeplitz matrix start one further to the left each.
    real, imaginary = (torch.matmul(wave * share, factor).unfold(-1, width, 1).flip(2) for wave in (cosine, -sine))
    kernel = torch.cat([torch.cat([real, -imaginary], dim=-1), torch.cat([imaginary, real], dim=-1)], dim=-2)

    def convolve(picture: Tensor, kernel: Tensor) -> Tensor:
        # Of as many dimensions as the picture, as `matmul` copies it otherwise.
        forth = waves.expand(*picture.shape[:2], *waves.shape)
        spectrum = torch.matmul(forth, picture.flatten(3)).view(*picture.shape[:2], height, 2 * width, -1)
        mixed = torch.matmul(kernel, spectrum).view(*picture.shape[:2], 2 * height, -1)
        return torch.matmul(forth.transpose(-1, -2), mixed).view(picture.shape)

    return kernel, convolve


def _waves(places: Tensor, height: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of 2 pi f place / (2 height - 1), [height, places]."""
    period = 2 * height - 1
    turns = (torch.arange(height, device=places.device)[:, None] * places % period).double() / period
    angles = 2 * math.pi * turns
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _by_transforms(factor: Tensor) -> tuple[Tensor, Convolve]:
    """The same by fast Fourier transforms."""
    height, width = (factor.shape[1] + 1) // 2, (factor.shape[2] + 1) // 2
    # Larger than the longest offset, so that nothing comes round at the other side.
    size = (smooth_length(2 * height - 1), smooth_length(2 * width - 1))

    def convolve(picture: Tensor, kernel: Tensor) -> Tensor:
        transformed = torch.fft.rfft2(picture.movedim(-1, 2), s=size) * kernel
        return torch.fft.irfft2(transformed, s=size)[..., :height, :width].movedim(2, -1)

    return torch.fft.rfft2(_around_zero(factor, size))[:, None], convolve


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
