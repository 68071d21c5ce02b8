"""What linear mixers are made of, one by one: gated scans, linear attention, the complement of a window."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.benchmark.parity import PROBE, WHOLE_PROBE, check_errors
from linearize.benchmark.timing import fitting, measure
from linearize.errors import LinearizeError, check_names
from linearize.extras import require
from linearize.layout import TILE, Grid, Layout
from linearize.ops.disc import coordinates
from linearize.ops.feature_maps import Features
from linearize.ops.fla_scan import scan_channels, scan_heads
from linearize.ops.gated_scan import bidirectional_gated_attention, gated_attention_flops
from linearize.ops.linear_attention import dense_join, join, linear_attention, linear_attention_flops
from linearize.ops.parity import largest_error
from linearize.ops.tile_states import window_flops, window_with_complement

# Few, as the definition takes [tokens x tokens] numbers.
PROBE_HEADS = 2
# A logarithmic gate that lets nothing through.
CLOSED = -1e4


class Leaves(NamedTuple):
    """Inputs of an operation: positive features of query and key, value, and logarithmic gates of both directions."""

    query: Tensor
    key: Tensor
    value: Tensor
    ahead: Tensor
    behind: Tensor


@dataclass(frozen=True)
class ScanSizes:
    """Sizes of the measured layer and how often it is called.

    Attributes:
        num_heads: Heads.
        head_dim: Channels of a head, and features of query and key.
        batch: Pictures.
        window: Radius of the disc whose complement is measured, in tokens.
        dtype: Of query, key and value; gates are float32.
        device: Where.
        warmup: Calls before the clock starts.
        repeats: Timed calls.
    """

    num_heads: int
    head_dim: int
    batch: int
    window: int
    dtype: torch.dtype
    device: torch.device
    warmup: int
    repeats: int

    def draw(self, grid: Grid, gate_width: int, seed: int) -> Leaves:
        """Random inputs that require gradients, [batch, heads, tokens, ...], token-major in memory as in a layer.

        Gates are as open as mixers start.
        """
        generator = torch.Generator(self.device).manual_seed(seed)

        def normal(width: int) -> Tensor:
            shape = (self.batch, grid.num_tokens, self.num_heads, width)
            return torch.randn(shape, device=self.device, generator=generator).transpose(1, 2)

        narrow = [normal(self.head_dim).to(self.dtype) for _ in range(3)]
        gates = [F.logsigmoid(normal(gate_width) + 5.5) / 16 for _ in range(2)]
        states = (narrow[0].abs(), narrow[1].abs(), narrow[2], *gates)
        return Leaves(*(one.requires_grad_() for one in states))


@dataclass(frozen=True)
class Operation:
    """One thing that is measured.

    Attributes:
        compute: From leaves, layout and window to [batch, heads, tokens, head_dim].
        define: The same by its definition, in float64.
        flops: Operations of one head, from layout, window and head_dim.
        gates: "head", "channel" or "none": the gates that it reads.
        token_major: Whether leaves, and the output, are [batch, tokens, heads, ...], as the kernel wants them.
        probes: Grids on which it is compared with its definition.
    """

    compute: Callable[[Leaves, Layout, int], Tensor]
    define: Callable[[Leaves, Layout, int], Tensor]
    flops: Callable[[Layout, int, int], int]
    gates: str = "none"
    token_major: bool = False
    probes: tuple[Grid, ...] = (PROBE,)


def scan_rows(
    sizes: ScanSizes, *, sides: list[int], kernels: list[str], passes: list[str], seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Measures every grid and operation.

    Args:
        sizes: The layer.
        sides: Sides of square grids in tokens.
        kernels: Of `OPERATIONS`.
        passes: "forward" and "forward_backward".
        seed: Of the tokens.

    Yields:
        One row for each measurement, with operations and necessary bytes per second of the forward pass; or with
        `error` where a kernel fails.

    Raises:
        LinearizeError: A kernel or pass is unknown, or a result is not the definition's.
    """
    check_names("scans.kernels", kernels, OPERATIONS)
    check_names("scans.passes", passes, ("forward", "forward_backward"))
    if any("fla" in name.split("_") for name in kernels):
        require("fla", purpose="a kernel of flash-linear-attention in scans.kernels")
    checked = {(name, kind): _checked(sizes, name, kind, seed) for name in kernels for kind in passes}
    for side in sides:
        for name in kernels:
            for kind in passes:
                row = {"kernel": name, "side": side, "pass": kind, "window": None, "batch": sizes.batch}
                row |= checked[name, kind]
                if name == COMPLEMENT:
                    row["window"] = sizes.window
                yield row if "error" in row else row | _time(sizes, name, kind, side, seed)


def _checked(sizes: ScanSizes, name: str, kind: str, seed: int) -> dict[str, Any]:
    """The parity error of a kernel, or why it does not run."""
    try:
        return {"parity_error": check_parity(sizes, name, kind, seed)}
    except LinearizeError:
        raise
    # Triton raises errors of many kinds, and a kernel that fails is a row that says so.
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}


def check_parity(sizes: ScanSizes, name: str, kind: str, seed: int = 0) -> float:
    """Compares the output, and for forward_backward the gradients, with the definition in float64 on each probe.

    Raises:
        LinearizeError: The error is above what the dtype's rounding explains.
    """
    operation, sizes = OPERATIONS[name], replace(sizes, num_heads=PROBE_HEADS)
    errors = (_error(sizes, operation, probe, kind, seed) for probe in operation.probes)
    return check_errors(errors, sizes.dtype, f"kernel {name}", "leave it out of kernels=[...]")


def _error(sizes: ScanSizes, operation: Operation, probe: Grid, kind: str, seed: int) -> float:
    layout = Layout(0, (probe,), tile=TILE)
    leaves = sizes.draw(probe, _gate_width(sizes, operation), seed + 1)
    exact = Leaves(*(leaf.detach().cpu().double().requires_grad_() for leaf in leaves))
    if operation.token_major:
        leaves = _token_major(leaves)
    found, expected = operation.compute(leaves, layout, sizes.window), operation.define(exact, layout, sizes.window)
    pairs = [(found.transpose(1, 2) if operation.token_major else found, expected)]
    if kind == "forward_backward":
        weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(seed))
        theirs = torch.autograd.grad(expected, exact, weight.to(found.dtype).double(), allow_unused=True)
        weight = weight.transpose(1, 2) if operation.token_major else weight
        ours = torch.autograd.grad(found, leaves, weight.to(found.device, found.dtype), allow_unused=True)
        turned = (grad.transpose(1, 2) if grad is not None and operation.token_major else grad for grad in ours)
        pairs += [pair for pair in zip(turned, theirs, strict=True) if pair[0] is not None]
    return largest_error(*zip(*((ours.detach(), theirs.detach()) for ours, theirs in pairs), strict=True))


def _time(sizes: ScanSizes, name: str, kind: str, side: int, seed: int) -> dict[str, Any]:
    operation, grid = OPERATIONS[name], Grid(side, side)
    layout = Layout(0, (grid,), tile=TILE)

    def measured() -> dict[str, Any]:
        leaves = sizes.draw(grid, _gate_width(sizes, operation), seed)
        if operation.token_major:
            leaves = _token_major(leaves)

        def forward() -> Tensor:
            return operation.compute(leaves, layout, sizes.window)

        def forward_backward() -> None:
            output = forward()
            torch.autograd.grad(output, leaves, torch.ones_like(output), allow_unused=True)

        with torch.set_grad_enabled(kind == "forward_backward"):
            call = forward_backward if kind == "forward_backward" else forward
            timing = measure(call, sizes.device, warmup=sizes.warmup, repeats=sizes.repeats, graphed=True).as_dict()
        return timing if kind == "forward_backward" else timing | rates(leaves, timing["median_seconds"])

    def rates(leaves: Leaves, seconds: float) -> dict[str, Any]:
        flops = operation.flops(layout, sizes.window, sizes.head_dim) * sizes.batch * sizes.num_heads
        read = leaves[:3] if operation.gates == "none" else leaves
        moved = sum(leaf.numel() * leaf.element_size() for leaf in (*read, leaves.value))
        return {"tflops_per_second": flops / seconds / 1e12, "gb_per_second": moved / seconds / 1e9}

    return fitting(measured, sizes.device, "smaller scans.sides, or fewer heads or pictures")


def _gate_width(sizes: ScanSizes, operation: Operation) -> int:
    return sizes.head_dim if operation.gates == "channel" else 1


def _token_major(leaves: Leaves) -> Leaves:
    return Leaves(*(leaf.detach().transpose(1, 2).contiguous().requires_grad_() for leaf in leaves))


def _scan(backend: str) -> Callable[[Leaves, Layout, int], Tensor]:
    return lambda leaves, layout, window: bidirectional_gated_attention(*leaves, backend=backend)


def _one_direction(leaves: Leaves, layout: Layout, window: int) -> Tensor:
    closed = leaves.behind * 0 + CLOSED
    return bidirectional_gated_attention(*leaves[:4], closed, backend="recurrent")


def _fla(scan: Callable[..., Tensor]) -> Callable[[Leaves, Layout, int], Tensor]:
    return lambda leaves, layout, window: scan(*leaves[:4])


def _linear(leaves: Leaves, layout: Layout, window: int) -> Tensor:
    none = leaves.value.new_zeros(())
    return join(None, linear_attention(Features(leaves.query, none), Features(leaves.key, none), leaves.value))


def _dense_linear(leaves: Leaves, layout: Layout, window: int) -> Tensor:
    weights = leaves.query @ leaves.key.transpose(-1, -2)
    return weights @ leaves.value / weights.sum(dim=-1, keepdim=True)


def _complement(leaves: Leaves, layout: Layout, window: int) -> Tensor:
    query, key, value = leaves[:3]
    parts = window_with_complement(
        query, key, value, (query, key), layout=layout, window=window, scale=query.shape[-1] ** -0.5
    )
    return join(*parts)


def _dense_complement(leaves: Leaves, layout: Layout, window: int) -> Tensor:
    places = coordinates(layout)
    inside = (places[:, None] - places).square().sum(dim=-1) < window**2
    scores = leaves.query @ leaves.key.transpose(-1, -2)
    weights = scores.masked_fill(inside, 0.0)
    return dense_join(scores * leaves.query.shape[-1] ** -0.5, inside, (weights, weights), leaves.value)


def _scan_flops(layout: Layout, window: int, head_dim: int) -> int:
    return gated_attention_flops(layout.num_image_tokens, head_dim, head_dim)


def _linear_flops(layout: Layout, window: int, head_dim: int) -> int:
    return linear_attention_flops(layout.num_image_tokens, layout.num_image_tokens, head_dim, head_dim)


def _complement_flops(layout: Layout, window: int, head_dim: int) -> int:
    return window_flops(layout, window, head_dim, head_dim)


COMPLEMENT = "window_with_complement"
OPERATIONS = {
    "fla_simple_gla": Operation(
        _fla(scan_heads), _one_direction, lambda *sizes: _scan_flops(*sizes) // 2, "head", token_major=True
    ),
    "fla_gla": Operation(
        _fla(scan_channels), _one_direction, lambda *sizes: _scan_flops(*sizes) // 2, "channel", token_major=True
    ),
    "heads_by_triton": Operation(_scan("triton"), _scan("recurrent"), _scan_flops, "head"),
    "heads_by_fla": Operation(_scan("fla"), _scan("recurrent"), _scan_flops, "head"),
    "heads_chunked": Operation(_scan("chunked"), _scan("recurrent"), _scan_flops, "head"),
    "channels_by_fla": Operation(_scan("fla"), _scan("recurrent"), _scan_flops, "channel"),
    "channels_chunked": Operation(_scan("chunked"), _scan("recurrent"), _scan_flops, "channel"),
    "linear_attention": Operation(_linear, _dense_linear, _linear_flops),
    COMPLEMENT: Operation(_complement, _dense_complement, _complement_flops, probes=(PROBE, WHOLE_PROBE)),
}
