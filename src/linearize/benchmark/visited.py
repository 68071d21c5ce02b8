"""How many pairs of an image query and a key each kernel computes, text keys included."""

from __future__ import annotations

from collections.abc import Callable

import torch

from linearize.layout import Layout
from linearize.ops.block_tables import BLOCK, block_tables
from linearize.ops.flex_mask import BLOCK as FLEX_BLOCK
from linearize.ops.flex_mask import block_mask
from linearize.ops.halo_tables import seen_pairs
from linearize.ops.halo_tables import visited_pairs as halo_pairs
from linearize.ops.hopper_local import serves
from linearize.ops.hopper_tables import UNIT, pair_tables
from linearize.ops.regions import Region, region_name
from linearize.ops.triton_local import FORWARD

_CPU = torch.device("cpu")


def exact_pairs(layout: Layout, region: Region) -> int:
    """Pairs that the definition has: what an image query sees of the image, and all text."""
    return seen_pairs(layout.grids, region) + layout.num_image_tokens * layout.num_text_tokens


def visited_pairs(backend: str, layout: Layout, region: Region, head_dim: int, device: torch.device) -> int | None:
    """Pairs that a backend of `local_attention` computes; None where nothing here counts them."""
    if backend == "triton" and takes_hopper(layout, region, head_dim, device):
        return _hopper(layout, region)
    return VISITED[backend](layout, region) if backend in VISITED else None


def takes_hopper(layout: Layout, region: Region, head_dim: int, device: torch.device) -> bool:
    """Whether the backend "triton" computes the forward pass by its Hopper kernel, and not by the portable one."""
    return serves(layout, region_name(region), head_dim, device)


def _all(layout: Layout, region: Region) -> int:
    return layout.num_image_tokens * layout.num_tokens


def _halo(layout: Layout, region: Region) -> int:
    return halo_pairs(layout.grids, region) + layout.num_image_tokens * layout.num_text_tokens


def _flex(layout: Layout, region: Region) -> int:
    """Blocks of 128 consecutive tokens."""
    mask = block_mask(layout, region, 0, _CPU)
    assert mask.full_kv_num_blocks is not None
    blocks = (mask.kv_num_blocks + mask.full_kv_num_blocks)[0, 0].long()
    is_image = torch.zeros(len(blocks) * FLEX_BLOCK, dtype=torch.int64)
    is_image[layout.image_slice] = 1
    return int((is_image.view(-1, FLEX_BLOCK).sum(dim=1) * blocks).sum()) * FLEX_BLOCK


def _triton(layout: Layout, region: Region) -> int:
    """What the portable forward kernel takes."""
    tables = block_tables(layout, region, _CPU, size=FORWARD.queries, other_size=FORWARD.keys)
    unit, first, _, last, _ = tables.segments.long().T
    _, _, _, height, width, _, is_image, *_ = tables.blocks.long().T
    queries = (height * width * is_image)[unit]
    return int((queries * (last - first)).sum()) * FORWARD.keys


def _hopper(layout: Layout, region: Region) -> int:
    """Steps of 128 keys, or one of 64, that each half of a block of queries takes."""
    tables = pair_tables(layout, region, _CPU)
    begin, _, shared, end, *_, lone = tables.segments[tables.num_text_segments :].long().T
    return int(((2 * (shared - begin) + end - shared) * BLOCK - 2 * lone * UNIT).sum()) * UNIT


VISITED: dict[str, Callable[[Layout, Region], int]] = {
    "naive": _all,
    "dense": _all,
    "halo": _halo,
    "flex": _flex,
    "triton": _triton,
}
