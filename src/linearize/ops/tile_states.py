"""A window of softmax and linear attention on all other tokens, under one normaliser, at linear cost by tile states."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from linearize.layout import Layout
from linearize.ops.disc import exact_pairs
from linearize.ops.fused_complement import fused_complement, serves
from linearize.ops.linear_attention import LinearPart, SoftmaxPart, mask_keys, numerator_and_mass, weigh
from linearize.ops.local_softmax import local_softmax
from linearize.ops.products import for_products, wide_matmul, with_ones
from linearize.ops.tile_tables import FAR, SIDE, TileTables, tile_tables

# Numbers in what a batch of tiles gathers and weighs, which bounds the memory between inputs and outputs.
NUMBERS_AT_A_TIME = 1 << 29


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
    inside = window_softmax(query, key, value, layout=layout, window=window, scale=scale, key_mask=key_mask)
    return inside, window_complement(features, value, layout=layout, window=window, key_mask=key_mask)


def window_softmax(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    layout: Layout,
    window: int,
    scale: float,
    key_mask: Tensor | None = None,
    keep_largest: bool = False,
) -> SoftmaxPart:
    """The first part of `window_with_complement`: in kernels where they serve, else on tiles that windows reach.

    Products are bf16 on a GPU where the inputs are, with scores and sums in float32. The largest score of each query is
    there if it is asked for; kernels do not tell it.
    """
    if not keep_largest:
        images = Layout(0, layout.grids, tile=layout.tile)
        part = local_softmax(query, key, value, layout=images, window=window, scale=scale, key_mask=key_mask)
        if part is not None:
            return part
    tables = tile_tables(layout, window, query.device)
    queries, keys, values = (_in_tiles(states, tables) for states in for_products(query, key, value))
    neighbours = [_with_none(states) for states in (keys, values, _valid(key_mask, tables))]

    def attend(some: slice) -> tuple[Tensor, ...]:
        near_keys, near_values, valid = (_near(states, tables, some) for states in neighbours)
        scores = wide_matmul(queries[:, :, some], near_keys.transpose(-1, -2)) * scale
        # What is no token is far away from everything, and so never inside.
        part = weigh(scores, near_values, _inside(tables, some, window) & valid.transpose(-1, -2))
        assert part.largest is not None
        return part.output, part.log_mass, part.largest

    batches = _batches(tables, queries)
    if len(batches) == 1:
        parts = [attend(batches[0])]
    else:
        # Of several batches only the outputs are kept for the gradient.
        parts = [checkpoint(attend, some, use_reentrant=False, preserve_rng_state=False) for some in batches]
    return SoftmaxPart(*(_out_of_tiles(torch.cat(some, dim=2), tables) for some in zip(*parts, strict=True)))


def window_complement(
    features: tuple[Tensor, Tensor], value: Tensor, *, layout: Layout, window: int, key_mask: Tensor | None = None
) -> LinearPart:
    """The second part of `window_with_complement`, in kernels where they serve.

    In the tiles that a tile's windows reach, pairs outside the disc have explicit weights phi(q) phi(k). All farther
    tiles are one state, a sum over rows and columns of tiles: nothing is subtracted. Nothing grows faster than tokens x
    window^2. Products are bf16 on a GPU where the inputs are, with sums in float32.
    """
    query, key, value = for_products(*features, value)
    key, channels = mask_keys(key, key_mask), value.shape[-1]
    if serves(query, value):
        numerator, mass = fused_complement(query, key, value, layout=layout, window=window)
        return LinearPart(numerator, mass, mass.new_zeros(()))
    tables = tile_tables(layout, window, value.device)
    tiles = (_in_tiles(states, tables) for states in (query, key, with_ones(value)))
    sums = _out_of_tiles(_Complement.apply(*tiles, tables, window), tables)
    return LinearPart(*numerator_and_mass(sums, channels), sums.new_zeros(()))


class _Complement(torch.autograd.Function):
    """o_i = sum_j (q_i^T k_j) v_j over all j outside of the disc around i.

    As i is outside of the disc around j just then, each gradient is a sum of the same kind: dq_i = sum_j (g_i^T v_j)
    k_j, dk_j = sum_i (v_j^T g_i) q_i and dv_j = sum_i (k_j^T q_i) g_i for a gradient g. Weights are not kept for it.
    """

    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor, value: Tensor, tables: TileTables, window: int) -> Tensor:
        """Sums for tiles [batch, heads, tiles, SIDE^2, channels], zeros where there is no token."""
        context.save_for_backward(query, key, value)
        context.where = tables, window
        return _sum_outside(query, key, value, tables, window)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """See the class."""
        query, key, value = context.saved_tensors
        (gradient,) = gradients
        triples = (gradient, value, key), (value, gradient, query), (key, query, gradient)
        return *(_sum_outside(*triple, *context.where) for triple in triples), None, None


def _sum_outside(query: Tensor, key: Tensor, value: Tensor, tables: TileTables, window: int) -> Tensor:
    """See `_Complement`."""
    state = wide_matmul(key.transpose(-1, -2), value).to(value.dtype)
    far = states_of_far_tiles(state, tables)
    keys, values = _with_none(key), _with_none(value)
    sums = []
    for some in _batches(tables, query):
        weights = query[:, :, some] @ _near(keys, tables, some).transpose(-1, -2)
        weights = weights.masked_fill_(_inside(tables, some, window), 0.0)
        sums.append(query[:, :, some] @ far[:, :, some] + weights @ _near(values, tables, some))
    return torch.cat(sums, dim=2)


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


def _valid(key_mask: Tensor | None, tables: TileTables) -> Tensor:
    """Which keys count, [batch or 1, 1, tiles, SIDE^2, 1]."""
    if key_mask is None:
        return tables.is_token[None, None, ..., None]
    return _in_tiles(key_mask[:, None, :, None], tables)


def _batches(tables: TileTables, queries: Tensor) -> list[slice]:
    """Tiles that are computed at once: as many in each batch, but for the last."""
    of_a_tile = queries[:, :, 0, :, 0].numel() * tables.near.shape[1] * (SIDE**2 + 3 * queries.shape[-1])
    num_tiles = len(tables.near)
    size = math.ceil(num_tiles / math.ceil(of_a_tile * num_tiles / NUMBERS_AT_A_TIME))
    return [slice(start, start + size) for start in range(0, num_tiles, size)]


def _inside(tables: TileTables, some: slice, window: int) -> Tensor:
    """Which near keys lie in the disc of each query, [some tiles, SIDE^2, near keys]."""
    far = torch.full_like(tables.coordinates[:1], FAR)
    keys = torch.cat([tables.coordinates, far])[tables.near[some]].flatten(1, 2)
    away = tables.coordinates[some][:, :, None] - keys[:, None]
    return (away.square().sum(dim=-1) < window**2) & tables.is_token[some][:, :, None]


def states_of_far_tiles(states: Tensor, tables: TileTables) -> Tensor:
    """For each tile the sum of the states of all tiles that are not near.

    These are all in rows of tiles that are out of reach, and in the other rows those in columns that are. Sums over
    rows, and over columns, are products with matrices of zeros and ones.

    Args:
        states: [batch, heads, tiles, num_features, channels].
        tables: Which tiles are near.
    """
    parts = states.flatten(3).split([rows * columns for rows, columns in tables.sides], dim=2)
    maps = [part.unflatten(2, sides) for part, sides in zip(parts, tables.sides, strict=True)]
    sums = []
    for rows, columns in tables.sides:
        far = []
        for part, (key_rows, key_columns) in zip(maps, tables.sides, strict=True):
            near_rows, near_columns = (
                _reaches(*sizes, tables.reach, states) for sizes in ((rows, key_rows), (columns, key_columns))
            )
            beside = _sum_over_rows(near_rows, (1 - near_columns) @ part)
            far.append(beside + _sum_over_rows(1 - near_rows, part.sum(dim=3, keepdim=True)))
        sums.append(sum(far[1:], far[0]).flatten(2, 3))
    return torch.cat(sums, dim=2).unflatten(3, states.shape[3:])


def _reaches(num_queries: int, num_keys: int, reach: int, like: Tensor) -> Tensor:
    """1 where a row (or column) of tiles is within reach of another, [queries, keys]."""
    query, key = (torch.arange(size, device=like.device) for size in (num_queries, num_keys))
    return ((query[:, None] - key).abs() <= reach).to(like.dtype)


def _sum_over_rows(weights: Tensor, maps: Tensor) -> Tensor:
    """[sums, rows] times maps [batch, heads, rows, columns, numbers]."""
    return (weights @ maps.flatten(3)).unflatten(3, maps.shape[3:])


def _in_tiles(states: Tensor, tables: TileTables) -> Tensor:
    """[batch, heads, image tokens, channels] to [batch, heads, tiles, SIDE^2, channels], zeros where no token is."""
    places = states.new_zeros(*states.shape[:2], tables.is_token.numel(), states.shape[-1])
    return places.index_copy(2, tables.index, states).unflatten(2, tables.is_token.shape)


def _out_of_tiles(states: Tensor, tables: TileTables) -> Tensor:
    """The inverse of `_in_tiles`."""
    return states.flatten(2, 3).index_select(2, tables.index)


def _with_none(states: Tensor) -> Tensor:
    """Tiles, and behind them one of zeros for no tile."""
    return torch.cat([states, torch.zeros_like(states[:, :, :1])], dim=2)


def _near(states: Tensor, tables: TileTables, some: slice) -> Tensor:
    """What `_with_none` returns to [batch, heads, some tiles, near keys, channels]."""
    near, (batch, heads, num_tiles) = tables.near[some], states.shape[:3]
    # As rows of one matrix: GPUs copy whole rows, and not number by number.
    first = torch.arange(0, batch * heads * num_tiles, num_tiles, device=near.device)
    rows = states.reshape(batch * heads * num_tiles, -1).index_select(0, (first[:, None] + near.flatten()).flatten())
    return rows.view(batch, heads, len(near), -1, states.shape[-1])
