"""Compares the Triton kernels with the definition, forward and backward: run on a GPU, or by Triton's interpreter.

    TRITON_INTERPRET=1 python tests/ops/triton_parity.py

Checks the operators, and prints one line for each case: name, then the relative errors of output, logarithmic mass and
the gradients of query, key and value.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from linearize.layout import TILE, Grid, Layout
from linearize.ops import block_tables, triton_launch, triton_local
from linearize.ops.naive import naive_with_mass
from linearize.ops.parity import WHOLE_GRID
from linearize.ops.regions import REGIONS
from linearize.ops.triton_local import _attention, _attention_backward, triton_attention_with_mass

# grids, text tokens, text first, order, region, window; ragged and whole tiles, none and several images
CASES = {
    "ragged": ((Grid(9, 37),), 5, True, TILE, "disc", 5),
    "whole": ((Grid(16, 32),), 128, True, TILE, "disc", 6),
    "two images": ((Grid(11, 20), Grid(7, 17)), 0, True, TILE, "neighborhood", 3),
    "text last": ((Grid(9, 37),), 130, False, TILE, "tiles", 3),
    "raster": ((Grid(10, 21),), 7, True, None, "disc", 4),
    "itself": ((Grid(16, 32),), 128, True, TILE, "disc", 1),
    "whole neighborhood": ((Grid(16, 32),), 0, True, TILE, "neighborhood", 4),
    "two whole images": ((Grid(16, 24), Grid(32, 8)), 256, False, TILE, "disc", 5),
}
# Those that are compared once more with text's lists in parts: whole and ragged tiles and text.
IN_PARTS = ("whole", "text last")
# Whole tiles with others on all sides: the Hopper kernel's lists have a unit of text in a step that is masked.
INNER_CASES = {
    f"inner {region} {window}": ((WHOLE_GRID,), 128, True, TILE, region, window)
    for region, window in (("disc", 2), ("disc", 8), ("disc", 16), ("neighborhood", 3), ("neighborhood", 9))
}


def parity(
    name: str, *, heads: int, head_dim: int, dtype: torch.dtype, device: str, batch: int = 1, growth: float = 1.0
) -> list[float]:
    """Relative errors of output, mass and gradients against float64 on the same numbers.

    The keys grow from the first token to the last, by `growth` in all.
    """
    grids, num_text_tokens, text_first, tile, region, window = (CASES | INNER_CASES)[name]
    layout = Layout(num_text_tokens, grids, text_first, tile)
    call = {"layout": layout, "region": REGIONS[region](window), "scale": head_dim**-0.5}
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(batch, layout.num_tokens, heads, head_dim, generator=generator) for _ in range(4)]
    drawn[1] *= torch.linspace(1, growth, layout.num_tokens)[:, None, None]
    query, key, value, weight = (states.to(device, dtype).transpose(1, 2) for states in drawn)
    slope = torch.rand(batch, heads, layout.num_tokens, 1, generator=generator)
    results = []
    for attend, convert in ((triton_attention_with_mass, lambda x: x), (naive_with_mass, lambda x: x.cpu().double())):
        states = [convert(tensor).detach().requires_grad_() for tensor in (query, key, value)]
        output, log_mass = attend(*states, **call)
        total = (output * convert(weight)).sum() + (log_mass * slope.to(log_mass)).sum()
        results.append([output.detach(), log_mass.detach(), *torch.autograd.grad(total, states)])
    return [((a.cpu().double() - b).norm() / b.norm()).item() for a, b in zip(*results, strict=True)]


def parity_in_parts(name: str, **sizes: Any) -> list[float]:
    """`parity` with text's lists in parts, as where a GPU has many processors for each head."""
    cut: list[int] = []

    def split_lists(partial: Tensor, tables: Any) -> Tensor:
        cut.append(tables.num_splits)
        return triton_launch.split_lists(partial, tables)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_tables, "_SHORTEST", 2)
        patch.setattr(triton_launch, "num_processors", lambda device: 1000)
        patch.setattr(triton_local, "split_lists", split_lists)
        errors = parity(name, **sizes)
    # Output and mass, and the gradients of query, key and value.
    assert len(cut) == 5 and min(cut) > 1
    return errors


def check_operators(device: str, dtype: torch.dtype, head_dim: int) -> None:
    """Asks PyTorch's own checks: schemas, fake kernels, gradients, and graphs that compilers trace."""
    states = [torch.randn(1, 133, 1, head_dim, device=device, dtype=dtype).transpose(1, 2) for _ in range(3)]
    rest = (5, True, [16, 8], "disc", 4, 0.125)
    torch.library.opcheck(_attention, (*(tensor.requires_grad_() for tensor in states), *rest))
    with torch.no_grad():
        output, lse = _attention(*states, *rest)
    saved = [*(tensor.detach() for tensor in states), output, lse]
    for of_lse in (lse, None):
        torch.library.opcheck(_attention_backward, (output, of_lse, *saved, *rest))


def interpreted() -> Iterator[tuple[str, list[float]]]:
    """Every case on the CPU, and text's lists in parts."""
    for name in CASES:
        yield name, parity(name, heads=1, head_dim=16, dtype=torch.float32, device="cpu")
    for name in IN_PARTS:
        yield f"{name} in parts", parity_in_parts(name, heads=2, head_dim=16, dtype=torch.float32, device="cpu")


if __name__ == "__main__":
    check_operators("cpu", torch.float32, 16)
    for case, errors in interpreted():
        print(case, *errors, sep="\t")
