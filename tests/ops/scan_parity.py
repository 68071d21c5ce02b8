"""Compares the Triton kernels of gated scans with the definition: run on a GPU, or by Triton's interpreter.

    TRITON_INTERPRET=1 python tests/ops/scan_parity.py

Checks the operators, and prints one line for each case: name, then the relative errors of output and gradients.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from linearize.ops import head_scan
from linearize.ops.gated_scan import dense


class Case(NamedTuple):
    """Sizes of a scan.

    Attributes:
        num_tokens: Tokens.
        num_features: Channels of query and key.
        channels: Of the value.
        closed: Whether some gates let nothing through.
        head_major: Whether tokens of a head are next to one another in memory.
        batch: How often there are two heads.
    """

    num_tokens: int
    num_features: int
    channels: int
    closed: bool = False
    head_major: bool = False
    batch: int = 1


CASES = {
    "one chunk": Case(37, 16, 16, batch=3),
    "whole chunks": Case(128, 32, 32),
    "ragged": Case(200, 48, 32),
    "mass beside values": Case(150, 32, 33),
    "aligned mass": Case(150, 64, 72, head_major=True),
    "mass alone": Case(130, 32, 1),
    "blocks of channels": Case(70, 128, 136),
    "closed gates": Case(150, 32, 32, closed=True),
}
# Those that are compared once more with segments of one chunk.
SINGLE_CHUNKS = ("ragged", "blocks of channels")


def parity(case: Case, *, dtype: torch.dtype, device: str, openness: float = 2.0) -> list[float]:
    """Relative errors of the output and of all gradients against float64 on the same numbers."""
    generator = torch.Generator().manual_seed(0)
    sizes = (case.num_features, case.num_features, case.channels, case.channels, 1, 1)
    drawn = [torch.randn(case.batch, case.num_tokens, 2, size, generator=generator) for size in sizes]
    query, key, value, weight, *gates = (states.transpose(1, 2) for states in drawn)
    gates = [F.logsigmoid(gate + openness) for gate in gates]
    if case.closed:
        gates = [gate.masked_fill(torch.rand(gate.shape, generator=generator) < 0.1, -1e4) for gate in gates]
    narrow = [states.to(device, dtype) for states in (query, key, value, weight)]
    if case.head_major:
        narrow = [states.contiguous() for states in narrow]
    *states, weight = narrow
    leaves = [leaf.detach().requires_grad_() for leaf in (*states, *(gate.to(device) for gate in gates))]
    exact = [leaf.detach().cpu().double().requires_grad_() for leaf in leaves]
    outputs = head_scan.head_scan(*leaves), dense(*exact)
    found = [outputs[0], *torch.autograd.grad(outputs[0], leaves, weight)]
    expected = [outputs[1], *torch.autograd.grad(outputs[1], exact, weight.cpu().double())]
    return [((a.detach().cpu().double() - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)]


def check_operators(device: str, dtype: torch.dtype) -> None:
    """Asks PyTorch's own checks: schemas, fake kernels, gradients, and graphs that compilers trace."""
    states = [torch.randn(1, 20, 2, 16, device=device, dtype=dtype).transpose(1, 2) for _ in range(3)]
    gates = [-torch.rand(1, 2, 20, 1, device=device) for _ in range(2)]
    torch.library.opcheck(head_scan.head_scan, tuple(leaf.requires_grad_() for leaf in (*states, *gates)))
    plain = [leaf.detach() for leaf in (*states, *gates)]
    torch.library.opcheck(head_scan.head_scan_with_rows, (*plain, plain[2]))


def interpreted() -> Iterator[tuple[str, list[float]]]:
    """Every case on the CPU, in segments of half of the chunks, and then of one."""
    head_scan.FEWEST_CHUNKS = 1
    for name, case in CASES.items():
        yield name, parity(case, dtype=torch.float32, device="cpu")
    head_scan.PROGRAMS = 1000
    for name in SINGLE_CHUNKS:
        yield f"{name}, single chunks", parity(CASES[name], dtype=torch.float32, device="cpu")


if __name__ == "__main__":
    check_operators("cpu", torch.float32)
    for case, errors in interpreted():
        print(case, *errors, sep="\t")
