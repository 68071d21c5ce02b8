"""Compares the kernels of the complement of a disc with the definition: run on a GPU, or by Triton's interpreter.

    TRITON_INTERPRET=1 python tests/ops/complement_parity.py

Checks the operators, and prints one line for each case: name, then the relative errors of sums, mass and the gradients
of query, key and value.
"""

import torch
from torch import Tensor

from linearize.layout import TILE, Grid, Layout
from linearize.ops.disc import coordinates
from linearize.ops.fused_complement import _complement, _complement_backward, fused_complement

# grids, order, window; ragged and whole tiles, one and several images, in tiles and in rows, more blocks than a strip
CASES = {
    "whole": ((Grid(16, 32),), TILE, 4),
    "ragged": ((Grid(17, 26),), TILE, 3),
    "two images": ((Grid(35, 17), Grid(5, 26)), None, 4),
    "itself": ((Grid(16, 24),), None, 1),
    "two whole images": ((Grid(16, 24), Grid(32, 8)), TILE, 3),
    "wide": ((Grid(1, 521),), None, 4),
}


def naive(query: Tensor, key: Tensor, value: Tensor, *, layout: Layout, window: int) -> tuple[Tensor, Tensor]:
    """The definition."""
    places = coordinates(layout)
    inside = (places[:, None] - places).square().sum(dim=-1) < window**2
    weights = (query @ key.transpose(-1, -2)).masked_fill(inside, 0.0)
    return weights @ value, weights.sum(dim=-1, keepdim=True)


def parity(
    name: str, *, num_features: int, head_dim: int, dtype: torch.dtype, device: str, batch: int = 1
) -> list[float]:
    """Relative errors of sums, mass and gradients against float64 on the same numbers."""
    grids, tile, window = CASES[name]
    layout = Layout(0, grids, tile=tile)
    generator = torch.Generator().manual_seed(0)
    tokens, channels = (batch, layout.num_image_tokens, 2), (num_features, num_features, head_dim, head_dim)
    drawn = [torch.rand(*tokens, size, generator=generator) for size in channels]
    query, key, value, weight = (states.to(device, dtype).transpose(1, 2) for states in drawn)
    # One tensor is head-major in memory, the others token-major.
    query, slope = query.contiguous(), torch.randn(batch, 2, tokens[1], 1, generator=generator)
    results = []
    for compute, convert in ((fused_complement, lambda x: x), (naive, lambda x: x.cpu().double())):
        states = [convert(tensor).detach().requires_grad_() for tensor in (query, key, value)]
        sums, mass = compute(*states, layout=layout, window=window)
        total = (sums * (convert(weight) - 0.5)).sum() + (mass * slope.to(mass)).sum()
        results.append([sums.detach(), mass.detach(), *torch.autograd.grad(total, states)])
    return [((a.cpu().double() - b).norm() / b.norm()).item() for a, b in zip(*results, strict=True)]


def check_operators(device: str, dtype: torch.dtype, channels: int) -> None:
    """Asks PyTorch's own checks: schemas, fake kernels, gradients, and graphs that compilers trace."""
    for sides, tile in (([9, 13], []), ([16, 16], list(TILE))):
        states = [
            torch.rand(1, sides[0] * sides[1], 1, channels, device=device, dtype=dtype).transpose(1, 2)
            for _ in range(4)
        ]
        rest = (sides, tile, 4)
        torch.library.opcheck(_complement, (*(tensor.requires_grad_() for tensor in states[:3]), *rest))
        saved = [tensor.detach() for tensor in states]
        mass_gradient = torch.rand(saved[0].shape[:3], device=device)
        torch.library.opcheck(_complement_backward, (saved[3], mass_gradient, *saved[:3], *rest))


if __name__ == "__main__":
    check_operators("cpu", torch.float32, 16)
    for case in CASES:
        errors = parity(case, num_features=16, head_dim=32, dtype=torch.float32, device="cpu")
        print(case, *errors, sep="\t")
