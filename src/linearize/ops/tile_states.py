"""A window of softmax and linear attention on all other tokens, under one normaliser, at linear cost by tile states."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from linearize.layout import Grid, Layout, tile_spans
from linearize.ops.disc import exact_pairs
from linearize.ops.linear_attention import LinearPart, SoftmaxPart, mask_keys, weigh

# Side of the tiles in tokens. Queries of a tile share what they gather: the tiles that their windows reach.
SIDE = 8
# Row and column of what is no token.
FAR = 1 << 20
# Gathered keys of one batch of tiles, which bounds the memory of what lies between inputs and outputs.
KEYS_PER_BATCH = 1 << 16


@dataclass(frozen=True)
class TileTables:
    """Where tiles have their tokens, and which tiles are near.

    Attributes:
        tokens: [tiles, SIDE^2] places of the tokens among image tokens; cut tiles repeat a token.
        is_token: [tiles, SIDE^2], False for repetitions.
        coordinates: [tiles, SIDE^2, 2] row and column of each token, far away for repetitions.
        near: [tiles, near tiles] the tiles that a window from the tile may reach; `num_tiles` stands for none.
        index: [num_image_tokens] where each image token is among tiles x SIDE^2.
    """

    tokens: Tensor
    is_token: Tensor
    coordinates: Tensor
    near: Tensor
    index: Tensor


def window_with_complement(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    features: tuple[Tensor, Tensor],
    *,
    layout: Layout,
    window: int,
    scale: float,
    key_mask: Tensor | None = None,
) -> tuple[SoftmaxPart, LinearPart]:
    """Softmax over the disc dy^2 + dx^2 < window^2, and linear attention over all image tokens outside of it.

    In the tiles that a tile's windows reach, pairs outside the disc have explicit weights phi(q) phi(k). All farther
    tiles are one state: the sum of all tiles' states minus those of the near ones. Nothing grows faster than tokens x
    window^2, and the subtraction takes place among states in the type of the inputs, which should be float32 at least.

    Args:
        query: [batch, heads, image tokens, head_dim], rotated.
        key: Same.
        value: Same.
        features: phi of query and key, [batch, heads, image tokens, num_features].
        layout: Where the tokens are. Several grids lie on top of one another.
        window: Radius of the disc in tokens.
        scale: Softmax scale.
        key_mask: [batch, image tokens], True where a key counts.

    Returns:
        Both parts of [batch, heads, image tokens, head_dim], to be joined; the linear one has log_scale 0.
    """
    tables = tile_tables(layout, window, query.device)
    tiles = [_in_tiles(states, tables) for states in (query, key, value)]
    mapped = _in_tiles(mask_keys(features[1], key_mask), tables) * tables.is_token[..., None]
    states = _states_of_far_tiles(mapped, tiles[2], tables)
    near, far = [], []
    for some in _batches(tables):
        inside = _inside(tables, some, window)
        near.append(_softmax(tiles, inside, tables, some, scale, key_mask))
        mapped_query, values = _in_tiles(features[0], tables, some), _near(tiles[2], tables, some)
        # Keys that do not count have no features.
        weights = (mapped_query @ _near(mapped, tables, some).transpose(-1, -2)).masked_fill(inside, 0.0)
        ones = torch.ones_like(values[..., :1])
        far.append(mapped_query @ states[:, :, some] + weights @ torch.cat([values, ones], dim=-1))
    sums = _from_tiles(far, tables)
    return _joined(near, tables), LinearPart(sums[..., :-1], sums[..., -1:], sums.new_zeros(()))


def window_softmax(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    layout: Layout,
    window: int,
    scale: float,
    key_mask: Tensor | None = None,
) -> SoftmaxPart:
    """The first part of `window_with_complement` alone."""
    tables = tile_tables(layout, window, query.device)
    tiles = [_in_tiles(states, tables) for states in (query, key, value)]
    parts = [_softmax(tiles, _inside(tables, some, window), tables, some, scale, key_mask) for some in _batches(tables)]
    return _joined(parts, tables)


def window_flops(layout: Layout, window: int, head_dim: int, num_features: int = 0) -> int:
    """Operations of `window_with_complement` in one head: without a complement where there are no features.

    Pairs inside the disc have softmax weights, the others of near tiles linear ones; states are added up and read.
    """
    inside = exact_pairs(layout.grids, window)
    if not num_features:
        return 4 * head_dim * inside
    tables = tile_tables(layout, window, torch.device("cpu"))
    sizes = torch.cat([tables.is_token.sum(dim=1), torch.zeros(1, dtype=torch.long)])
    visited = int((sizes[:-1] * sizes[tables.near].sum(dim=1)).sum())
    near = int((tables.near < len(tables.near)).sum())
    states = (4 * layout.num_image_tokens + near) * num_features * (head_dim + 1)
    return 4 * head_dim * inside + 2 * (num_features + head_dim + 1) * (visited - inside) + states


def _softmax(
    tiles: list[Tensor],
    inside: Tensor,
    tables: TileTables,
    some: slice,
    scale: float,
    key_mask: Tensor | None,
) -> SoftmaxPart:
    """Softmax over the disc for some tiles of queries, [batch, heads, tiles, SIDE^2, head_dim]."""
    query, key, value = tiles
    # Repetitions are far away from everything, and so never inside.
    seen = inside
    if key_mask is not None:
        valid = _in_tiles(key_mask[:, None, :, None], tables)
        seen = inside & _near(valid, tables, some).transpose(-1, -2)
    scores = query[:, :, some] @ _near(key, tables, some).transpose(-1, -2) * scale
    return weigh(scores, _near(value, tables, some), seen)


def _inside(tables: TileTables, some: slice, window: int) -> Tensor:
    """Which near keys lie in the disc of each query, [some tiles, SIDE^2, near keys]."""
    far = torch.full_like(tables.coordinates[:1], FAR)
    keys = torch.cat([tables.coordinates, far])[tables.near[some]].flatten(1, 2)
    away = tables.coordinates[some][:, :, None] - keys[:, None]
    return (away.square().sum(dim=-1) < window**2) & tables.is_token[some][:, :, None]


def _states_of_far_tiles(key: Tensor, value: Tensor, tables: TileTables) -> Tensor:
    """For each tile the state of all tiles that are not near, [batch, heads, tiles, num_features, head_dim + 1]."""
    states = key.transpose(-1, -2) @ torch.cat([value, torch.ones_like(value[..., :1])], dim=-1)
    padded = torch.cat([states, torch.zeros_like(states[:, :, :1])], dim=2)
    near = torch.zeros_like(states)
    for neighbour in tables.near.unbind(dim=1):
        near = near + padded[:, :, neighbour]
    # Where all tiles are near, what is left is nothing, and not what rounding leaves.
    is_all = (tables.near < len(tables.near)).sum(dim=1) == len(tables.near)
    return (states.sum(dim=2, keepdim=True) - near).masked_fill(is_all[:, None, None], 0.0)


def _in_tiles(states: Tensor, tables: TileTables, some: slice | None = None) -> Tensor:
    """[batch, heads, image tokens, channels] to [batch, heads, (some) tiles, SIDE^2, channels]."""
    return states[:, :, tables.tokens if some is None else tables.tokens[some]]


def _from_tiles(parts: list[Tensor], tables: TileTables) -> Tensor:
    """The inverse of `_in_tiles`, on batches of tiles."""
    return torch.cat(parts, dim=2).flatten(2, 3)[:, :, tables.index]


def _joined(parts: list[SoftmaxPart], tables: TileTables) -> SoftmaxPart:
    output, log_mass, largest = (_from_tiles(list(some), tables) for some in zip(*parts, strict=True))
    return SoftmaxPart(output, log_mass, largest)


def _near(states: Tensor, tables: TileTables, some: slice) -> Tensor:
    """[batch, heads, tiles, SIDE^2, channels] to [batch, heads, some tiles, near keys, channels]; zeros for no tile."""
    padded = torch.cat([states, torch.zeros_like(states[:, :, :1])], dim=2)
    return padded[:, :, tables.near[some]].flatten(3, 4)


def _batches(tables: TileTables) -> Iterator[slice]:
    size = max(1, KEYS_PER_BATCH // (tables.near.shape[1] * SIDE**2))
    return (slice(start, start + size) for start in range(0, len(tables.near), size))


@torch.compiler.disable
@lru_cache(maxsize=32)
def tile_tables(layout: Layout, window: int, device: torch.device) -> TileTables:
    """The tables of a layout, built once, outside inference mode: what sampling needed first is used for training."""
    with torch.inference_mode(False):
        tokens, valid, coordinates, corners = [], [], [], []
        offset = 0
        for grid in layout.grids:
            for top, bottom in tile_spans(grid.height, SIDE):
                for left, right in tile_spans(grid.width, SIDE):
                    places = torch.cartesian_prod(torch.arange(top, bottom), torch.arange(left, right))
                    missing = SIDE**2 - len(places)
                    rasters = offset + places[:, 0] * grid.width + places[:, 1]
                    tokens.append(torch.cat([rasters, rasters[:1].expand(missing)]))
                    valid.append(torch.arange(SIDE**2) < len(places))
                    coordinates.append(torch.cat([places, torch.full((missing, 2), FAR)]))
                    corners.append((top // SIDE, left // SIDE))
            offset += grid.num_tokens
        raster, is_token = torch.stack(tokens), torch.stack(valid)
        index = torch.empty(layout.num_image_tokens, dtype=torch.long)
        index[raster[is_token]] = torch.arange(is_token.numel()).view_as(is_token)[is_token]
        tables = TileTables(
            layout.tile_to_raster()[raster],
            is_token,
            torch.stack(coordinates),
            _near_tiles(layout.grids, corners, window),
            index[layout.raster_to_tile()],
        )
        return TileTables(*(table.to(device) for table in vars(tables).values()))


def _near_tiles(grids: tuple[Grid, ...], corners: list[tuple[int, int]], window: int) -> Tensor:
    """For each tile those, in all grids, that a window from it may reach, [tiles, near tiles]."""
    reach = -(-(window - 1) // SIDE)
    first, sizes = [0], [(-(-grid.height // SIDE), -(-grid.width // SIDE)) for grid in grids]
    for rows, columns in sizes[:-1]:
        first.append(first[-1] + rows * columns)
    spread = torch.arange(-reach, reach + 1)
    here = torch.tensor(corners)
    near = []
    for start, (rows, columns) in zip(first, sizes, strict=True):
        row = (here[:, 0, None] + spread)[:, :, None]
        column = (here[:, 1, None] + spread)[:, None]
        exists = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
        near.append(torch.where(exists, start + row * columns + column, len(corners)).flatten(1))
    return torch.cat(near, dim=1).sort(dim=1).values[:, : _most(near, len(corners))]


def _most(near: list[Tensor], num_tiles: int) -> int:
    """The largest number of near tiles that there are."""
    return int((torch.cat(near, dim=1) < num_tiles).sum(dim=1).max())
