"""Where the tokens of an attention layer sit: text and image tokens, image grids, and the order of image tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from operator import index

import torch
from torch import Tensor

from linearize.errors import LinearizeError

# Height and width of a tile in tokens. 128 tokens are one block of GPU kernels; as a tile they lie closer together
# than in a row, so that a disc touches up to 3.5 times fewer blocks.
TILE = (16, 8)

# Text tokens; height, width and frames of each grid; whether text is first; the tile.
Numbers = tuple[int, tuple[tuple[int, int, int], ...], bool, tuple[int, int] | None]


@dataclass(frozen=True)
class Grid:
    """An image as the transformer sees it, in tokens."""

    height: int
    width: int
    frames: int = 1

    def __post_init__(self) -> None:
        if min(self.height, self.width, self.frames) < 1:
            raise LinearizeError(f"a token grid needs at least one token per side, got {self}; check the image size")

    def __str__(self) -> str:
        frames = f"{self.frames}x" if self.frames > 1 else ""
        return f"{frames}{self.height}x{self.width}"

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole grid."""
        return self.frames * self.height * self.width


@dataclass(frozen=True)
class Layout:
    """The tokens of one attention call.

    Attributes:
        num_text_tokens: Text tokens, all of them before (`text_first`) or all after the image tokens.
        grids: One or more images, one after another.
        text_first: Whether token 0 is text.
        tile: None when image tokens stand in raster order (row by row), else the height and width of the tiles in
            which they stand: tile by tile in raster order, and in raster order within a tile. Tiles are ragged at the
            right and lower border.
    """

    num_text_tokens: int
    grids: tuple[Grid, ...]
    text_first: bool = True
    tile: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not self.grids:
            raise LinearizeError(
                "mixers need to know where image tokens lie, but there is no grid; name each image's height and width "
                "in tokens, such as grids=(Grid(64, 64),)"
            )

    @property
    def num_image_tokens(self) -> int:
        """Tokens of all grids."""
        return sum(grid.num_tokens for grid in self.grids)

    @property
    def num_tokens(self) -> int:
        """Text and image tokens."""
        return self.num_text_tokens + self.num_image_tokens

    @property
    def text_slice(self) -> slice:
        """Where text tokens sit among all tokens."""
        return slice(0, self.num_text_tokens) if self.text_first else slice(self.num_image_tokens, self.num_tokens)

    @property
    def image_slice(self) -> slice:
        """Where image tokens sit among all tokens."""
        return slice(self.num_text_tokens, self.num_tokens) if self.text_first else slice(0, self.num_image_tokens)

    def with_tile(self, tile: tuple[int, int] | None) -> Layout:
        """The same tokens in another order."""
        return Layout(self.num_text_tokens, self.grids, self.text_first, tile)

    def raster_to_tile(self, device: torch.device | str = "cpu") -> Tensor:
        """Index [num_image_tokens] from raster order to this layout's: `tokens[index]`. Not to be written to."""
        return Layout(0, self.grids).index_to(self.tile, device)

    def tile_to_raster(self, device: torch.device | str = "cpu") -> Tensor:
        """Index [num_image_tokens] from this layout's order to raster order. Not to be written to."""
        return Layout(0, self.grids, tile=self.tile).index_to(None, device)

    def index_to(self, tile: tuple[int, int] | None, device: torch.device | str = "cpu") -> Tensor:
        """Index [num_tokens] from this layout's order to that of `with_tile(tile)`. Not to be written to."""
        return _constant_index(self.numbers(), tile, torch.device(device))

    def numbers(self) -> Numbers:
        """What `from_numbers` makes the same layout of."""
        # Under a compiler's dynamic shapes a size may be a symbol, which `index` settles.
        sizes = tuple((index(grid.height), index(grid.width), index(grid.frames)) for grid in self.grids)
        return index(self.num_text_tokens), sizes, self.text_first, self.tile

    @staticmethod
    def from_numbers(numbers: Numbers) -> Layout:
        """The layout that `numbers` told."""
        num_text_tokens, sizes, text_first, tile = numbers
        return Layout(num_text_tokens, tuple(Grid(*size) for size in sizes), text_first, tile)


def tile_spans(length: int, size: int) -> list[tuple[int, int]]:
    """The half-open intervals of at most `size` that cut `range(length)`; the last may be shorter."""
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _tiles_of(tokens: Tensor, grid: Grid, tile: tuple[int, int] | None) -> list[Tensor]:
    if tile is None:
        return [tokens.flatten()]
    return [
        tokens[frame, top:bottom, left:right].flatten()
        for frame in range(grid.frames)
        for top, bottom in tile_spans(grid.height, tile[0])
        for left, right in tile_spans(grid.width, tile[1])
    ]


# To a compiler the index is a constant, which it does not see built. It hands over numbers, as it knows no objects that
# came to be while it traced.
@torch.compiler.assume_constant_result
def _constant_index(numbers: Numbers, tile: tuple[int, int] | None, device: torch.device) -> Tensor:
    # What sampling needed first is used for training later.
    with torch.inference_mode(False):
        return _index_between(Layout.from_numbers(numbers), tile, device)


@lru_cache(maxsize=192)
def _index_between(layout: Layout, tile: tuple[int, int] | None, device: torch.device) -> Tensor:
    image = torch.argsort(_raster_to(layout.grids, layout.tile))[_raster_to(layout.grids, tile)]
    text = torch.arange(layout.num_text_tokens, device="cpu")
    if layout.text_first:
        return torch.cat([text, image + layout.num_text_tokens]).to(device)
    return torch.cat([image, text + layout.num_image_tokens]).to(device)


def _raster_to(grids: tuple[Grid, ...], tile: tuple[int, int] | None) -> Tensor:
    """Index [image tokens] from raster order to the order of a tile."""
    parts: list[Tensor] = []
    offset = 0
    for grid in grids:
        tokens = torch.arange(grid.num_tokens, device="cpu").view(grid.frames, grid.height, grid.width)
        parts.extend(part + offset for part in _tiles_of(tokens, grid, tile))
        offset += grid.num_tokens
    return torch.cat(parts)
