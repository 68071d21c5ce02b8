"""Pairs of tokens within the chunks of a gated scan, and queries and keys with the gates up to their chunk's ends.

Tensors are [chunks, rows, size, ...], where rows are batch x heads. Gate l, [..., 2, width], stands between tokens
l - 1 and l, once for tokens that see earlier ones and once for those that see later ones. All exponents are differences
of running sums of logarithmic gates. What a query has of a sum between its own and its key's, the key has with the
other sign: gradients of running sums need not pass through the sums in between.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from linearize.ops.precision import widen
from linearize.ops.products import add_product

# Share of the range of exponents that gates within a block may take; the rest is for the features.
SHARE = 0.8


class Pairs(Protocol):
    """What a chunk's tokens see of one another, and how they stand to other chunks.

    Attributes:
        weights: [chunks, rows, size, size], q_i M_ij k_j of all pairs of a chunk, the diagonal once.
        queries: [chunks, rows, size, 2, num_features], with the gates from the chunk's start, and those to its end.
        keys: Same, with the gates to the chunk's end, and those from its start.
        kept: [chunks, rows, 2, width], the gates of whole chunks.
    """

    weights: Tensor
    queries: Tensor
    keys: Tensor
    kept: Tensor

    def __init__(self, query: Tensor, key: Tensor, *prepared: Tensor) -> None:
        """From [chunks, rows, size, num_features]."""

    @staticmethod
    def prepare(gates: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """What is made of gates, [chunks, rows, size, 2, width], for products in this type."""

    def gradients(self, of_weights: Tensor, of_queries: Tensor, of_keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of query, key, and the gates' running sums [chunks, rows, size, 2, width], `kept` being constant."""


class HeadPairs:
    """One gate in each head: weights are products of query and key, times a matrix of decays."""

    def __init__(self, query: Tensor, key: Tensor, *prepared: Tensor) -> None:
        self.query, self.key, (sums,) = query, key, prepared
        self.kept = sums[:, :, -1]
        rest = self.kept[:, :, None] - sums
        self.decay = _decay(sums[..., 0]).to(query.dtype)
        self.to_queries, self.to_keys = (_across(*each).exp().to(query.dtype) for each in ((sums, rest), (rest, sums)))
        self.weights = query @ key.transpose(-1, -2) * self.decay
        self.queries, self.keys = query[..., None, :] * self.to_queries, key[..., None, :] * self.to_keys

    @staticmethod
    def prepare(gates: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """See `Pairs.prepare`: running sums."""
        return (gates.cumsum(dim=2),)

    def gradients(self, of_weights: Tensor, of_queries: Tensor, of_keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Pairs.gradients`."""
        of_products = of_weights * self.decay
        of_query = _sum_of_sides(of_queries, self.to_queries)
        of_key = _sum_of_sides(of_keys, self.to_keys)
        add_product(of_query, of_products, self.key)
        add_product(of_key, of_products.transpose(-1, -2), self.query)
        of_exponents = of_weights * self.weights
        halves, wide = (of_exponents.tril(-1), of_exponents.triu(1)), self.kept.dtype
        rows, columns = (torch.stack([half.sum(dim=dim, dtype=wide) for half in halves], dim=-1) for dim in (-1, -2))
        to_ends = (of_queries * self.queries).sum(-1, dtype=wide) - (of_keys * self.keys).sum(-1, dtype=wide)
        return of_query, of_key, _turned((rows - columns + to_ends)[..., None])


def _decay(sums: Tensor) -> Tensor:
    """M of the pairs of each chunk, from running sums of one gate in each head, [chunks, rows, size, 2]."""
    ahead, behind = sums.unbind(dim=-1)
    is_earlier = torch.ones(sums.shape[2], sums.shape[2], dtype=torch.bool, device=sums.device).tril()
    down, up = ahead[..., :, None] - ahead[..., None, :], behind[..., None, :] - behind[..., :, None]
    return torch.where(is_earlier, down, up).exp()


class ChannelPairs:
    """Gates of each feature.

    Within blocks of a few tokens, weights are one product: queries have the gates between the block's middle and them,
    keys their inverse. For the numbers not to grow too large, gates have a floor: e^-9 in bf16, e^-18 in float32. Two
    neighbouring blocks see one another through the gates between each token and the border, all of them at most 1, and
    so do blocks of twice the size, up to the chunk.
    """

    def __init__(self, query: Tensor, key: Tensor, *prepared: Tensor) -> None:
        self.query, self.key, (self.kept, self.gate, before, behind) = query, key, prepared
        self.block = _block(query.dtype)
        parts = _parts(2 * query.shape[2] // self.block)
        both = (_across(before, behind), _across(behind, before))
        self.factors = list(zip(*(states.split(parts, dim=2) for states in both), strict=True))
        self.levels = [(query[..., None, :] * self.gate, key[..., None, :] / self.gate)]
        for to_queries, to_keys in self.factors:
            queries, keys = self.levels[-1]
            self.levels.append((_scaled(queries, to_queries), _scaled(keys, to_keys)))
        self.queries, self.keys = self.levels[-1]
        self.weights = self._weights()

    @staticmethod
    def prepare(gates: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """See `Pairs.prepare`: gates of chunks, from the middle of blocks, and between the levels' parts."""
        block = _block(dtype)
        gates = gates.clamp(min=_floor(dtype, block))
        sums = _in_blocks(gates, block).cumsum(dim=3)
        from_middle = _turned((sums - sums[:, :, :, block // 2 - 1, None]).flatten(2, 3))
        halves = _in_blocks(gates, block // 2).sum(dim=3)
        on_the_way = _on_the_way(halves.shape[2], halves.device, halves.dtype)
        paths = on_the_way.expand(*halves.shape[:2], -1, -1) @ halves.flatten(3)
        between = paths.unflatten(-1, halves.shape[3:]).exp().to(dtype)
        return halves.sum(dim=2), from_middle.exp().to(dtype), *between.chunk(2, dim=2)

    def gradients(self, of_weights: Tensor, of_queries: Tensor, of_keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Pairs.gradients`."""
        size, diagonal = of_weights.shape[-1], of_weights.diagonal(dim1=-2, dim2=-1)[..., None]
        of_weights = of_weights[:, :, None]
        (inside_queries, inside_keys), *levels = self.levels
        for (queries, keys), (to_queries, to_keys) in zip(levels[-2::-1], self.factors[:0:-1], strict=True):
            size //= 2
            of_queries, of_keys = _scaled(of_queries, to_queries), _scaled(of_keys, to_keys)
            (left, up), (down, right) = (half.split(size, dim=-1) for half in of_weights.split(size, dim=-2))
            seeing, seen = _facing(queries, keys, size), _facing(of_queries, of_keys, size)
            for of_pairs, (query, key), (of_query, of_key) in zip((down, up), seeing, seen, strict=True):
                add_product(of_query, of_pairs, key)
                add_product(of_key, of_pairs.transpose(-1, -2), query)
            of_weights = torch.stack([left, right], dim=3).flatten(2, 3)
        of_queries, of_keys = _scaled(of_queries, self.factors[0][0]), _scaled(of_keys, self.factors[0][1])
        for side, of_pairs in enumerate((of_weights.tril(-1), of_weights.triu(1))):
            query, key, of_query, of_key = (
                _in_blocks(states, size)[..., side, :] for states in (inside_queries, inside_keys, of_queries, of_keys)
            )
            add_product(of_query, of_pairs, key)
            add_product(of_key, of_pairs.transpose(-1, -2), query)
        of_sums = _turned(widen(of_queries) * inside_queries - widen(of_keys) * inside_keys)
        # A token sees itself through no gate: among the others, it would leave its rounding in the gates' gradients.
        of_query = _sum_of_sides(of_queries, self.gate).addcmul_(self.key, diagonal)
        of_key = _sum_of_sides(of_keys, self.gate.reciprocal()).addcmul_(self.query, diagonal)
        return of_query, of_key, of_sums

    def _weights(self) -> Tensor:
        size = self.block
        queries, keys = (_in_blocks(states, size) for states in self.levels[0])
        down, up = (queries[..., side, :] @ keys[..., side, :].transpose(-1, -2) for side in range(2))
        weights = down.tril() + up.triu(1)
        for level in self.levels[1:-1]:
            down, up = (query @ key.transpose(-1, -2) for query, key in _facing(*level, size))
            left, right = weights.unflatten(2, (-1, 2)).unbind(dim=3)
            weights = torch.cat([torch.cat([left, up], dim=-1), torch.cat([down, right], dim=-1)], dim=-2)
            size *= 2
        return weights[:, :, 0]


def _across(first: Tensor, second: Tensor) -> Tensor:
    """[..., 2, width] whose first side is that of the first tensor, and whose second is that of the second."""
    return torch.stack([first[..., 0, :], second[..., 1, :]], dim=-2)


def _turned(sums: Tensor) -> Tensor:
    """The tensor, written over: in the second of two sides queries have less of the sums than keys."""
    sums[..., 1, :].neg_()
    return sums


def _sum_of_sides(states: Tensor, factors: Tensor) -> Tensor:
    """The sum of both sides, [..., 2, num_features], each times its factors."""
    return torch.addcmul(states[..., 0, :] * factors[..., 0, :], states[..., 1, :], factors[..., 1, :])


def _block(dtype: torch.dtype) -> int:
    """Tokens of a block: with 16, the floor is below what bf16 tells from nothing, and would not be for float32."""
    return 8 if dtype == torch.float32 else 16


def _floor(dtype: torch.dtype, block: int) -> float:
    """Of logarithmic gates, so that products over half a block, and their inverses, leave room for the features."""
    return -SHARE * math.log(torch.finfo(dtype).max) / (block // 2)


def _scaled(states: Tensor, factors: Tensor) -> Tensor:
    """Each part of the tokens, [chunks, rows, tokens, 2, num_features], times its factor [chunks, rows, parts, ...]."""
    return (states.unflatten(2, (factors.shape[2], -1)) * factors[:, :, :, None]).flatten(2, 3)


def _in_blocks(states: Tensor, size: int) -> Tensor:
    return states.unflatten(2, (-1, size))


def _facing(queries: Tensor, keys: Tensor, size: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Of two neighbouring blocks the later queries and earlier keys, then the earlier queries and later keys."""
    queries, keys = (_in_blocks(states, size).unflatten(2, (-1, 2)) for states in (queries, keys))
    ahead = queries[:, :, :, 1, :, 0], keys[:, :, :, 0, :, 0]
    return ahead, (queries[:, :, :, 0, :, 1], keys[:, :, :, 1, :, 1])


def _parts(num_halves: int) -> list[int]:
    """Parts of a chunk that have a factor of their own: blocks, then blocks, pairs of blocks and so on of two."""
    parts = [num_halves // 2]
    size = 2
    while size < num_halves:
        parts.append(num_halves // size)
        size *= 2
    return parts


# To a compiler it is a constant.
@torch.compiler.assume_constant_result
def _on_the_way(num_halves: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return _ways(num_halves, device, dtype)


@lru_cache(maxsize=16)
def _ways(num_halves: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """1 where a half of a block is on the way, [2 x all parts, halves], first to what is before, then behind.

    Of a block, the first half is before its middle, and the second behind; of two parts, all of the first is before the
    second, and all of the second behind the first.
    """
    with torch.inference_mode(False):
        halves = torch.eye(num_halves, dtype=dtype, device="cpu")
        before, behind = [halves[::2]], [halves[1::2]]
        for parts in _parts(num_halves)[1:]:
            whole = halves.unflatten(0, (parts, -1)).sum(dim=1)
            none = torch.zeros_like(whole[::2])
            before.append(torch.stack([none, whole[::2]], dim=1).flatten(0, 1))
            behind.append(torch.stack([whole[1::2], none], dim=1).flatten(0, 1))
        return torch.cat([*before, *behind]).to(device)
