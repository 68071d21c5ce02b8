"""Where the tokens of an attention layer sit: text and image tokens, image grids, and the order of image tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from linearize.errors import LinearizeError

# Height and width of a tile in tokens. 128 tokens are one block of GPU kernels; as a tile they lie closer together
# than in a row, so that a disc touches up to 3.5 times fewer blocks.
TILE = (8, 16)


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
        return replace(self, tile=tile)

    def raster_to_tile(self, device: torch.device | str = "cpu") -> Tensor:
        """Index [num_image_tokens] from raster order to this layout's: `tokens[index]`. Not to be written to."""
        return _raster_to_tile(self.grids, self.tile, torch.device(device))

    def tile_to_raster(self, device: torch.device | str = "cpu") -> Tensor:
        """Index [num_image_tokens] from this layout's order to raster order. Not to be written to."""
        return _tile_to_raster(self.grids, self.tile, torch.device(device))

    def index_to(self, tile: tuple[int, int] | None, device: torch.device | str = "cpu") -> Tensor:
        """Index [num_tokens] from this layout's order to that of `with_tile(tile)`. Not to be written to."""
        return _index_between(self, tile, torch.device(device))


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


# The tables are built outside inference mode, as one that is first made while sampling is used for training later, and
# outside compilers, which would unroll them.


@torch.compiler.disable
@lru_cache(maxsize=64)
def _raster_to_tile(grids: tuple[Grid, ...], tile: tuple[int, int] | None, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        parts: list[Tensor] = []
        offset = 0
        for grid in grids:
            tokens = torch.arange(grid.num_tokens, device="cpu").view(grid.frames, grid.height, grid.width)
            parts.extend(part + offset for part in _tiles_of(tokens, grid, tile))
            offset += grid.num_tokens
        return torch.cat(parts).to(device)


@torch.compiler.disable
@lru_cache(maxsize=64)
def _tile_to_raster(grids: tuple[Grid, ...], tile: tuple[int, int] | None, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.argsort(_raster_to_tile(grids, tile, torch.device("cpu"))).to(device)


@torch.compiler.disable
@lru_cache(maxsize=64)
def _index_between(layout: Layout, tile: tuple[int, int] | None, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        image = layout.tile_to_raster()[layout.with_tile(tile).raster_to_tile()]
        text = torch.arange(layout.num_text_tokens, device="cpu")
        if layout.text_first:
            return torch.cat([text, image + layout.num_text_tokens]).to(device)
        return torch.cat([image, text + layout.num_image_tokens]).to(device)
