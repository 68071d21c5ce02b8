"""One attention layer: local attention by each of its backends against dense attention."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from linearize.benchmark.timing import measure
from linearize.errors import LinearizeError
from linearize.layout import TILE, Grid
from linearize.ops.disc import exact_pairs
from linearize.ops.halo_tables import visited_pairs
from linearize.ops.local_attention import local_attention
from linearize.ops.regions import Disc

# Largest relative error, |out - reference| / |reference| against float64, at which a speed may be reported.
PARITY = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
# Neither square nor cut evenly by any tile.
PROBE = Grid(19, 37)
DENSE_KERNELS: dict[str, dict[str, SDPBackend | None]] = {
    "cpu": {"dense": None},
    "cuda": {"dense_cudnn": SDPBackend.CUDNN_ATTENTION, "dense_flash": SDPBackend.FLASH_ATTENTION},
}
# (image query, image key) pairs that a backend computes.
VISITED: dict[str, Callable[[Grid, int], int]] = {
    "naive": lambda grid, window: grid.num_tokens**2,
    "halo": lambda grid, window: visited_pairs(grid, Disc(window)),
}


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of the measured layer and how often it is called.

    Attributes:
        num_heads: Heads.
        head_dim: Channels of a head.
        num_text_tokens: Text tokens beside the image's.
        batch: Pictures.
        dtype: Of query, key and value.
        device: Where.
        warmup: Calls before the clock starts.
        repeats: Timed calls.
    """

    num_heads: int
    head_dim: int
    num_text_tokens: int
    batch: int
    dtype: torch.dtype
    device: torch.device
    warmup: int
    repeats: int

    def tokens(self, grid: Grid, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Random query, key and value, [batch, heads, tokens, head_dim], that require gradients."""
        shape = (self.batch, self.num_heads, self.num_text_tokens + grid.num_tokens, self.head_dim)
        drawn = (torch.randn(shape, generator=generator).to(self.device, self.dtype) for _ in range(3))
        return tuple(states.requires_grad_() for states in drawn)


def attention_rows(
    sizes: LayerSizes, *, sides: list[int], windows: list[int], backends: list[str], passes: list[str], seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Measures every grid, window and backend, dense attention first.

    Args:
        sizes: The layer.
        sides: Sides of square grids in tokens.
        windows: Radii of the disc.
        backends: Of `local_attention`.
        passes: "forward" and "forward_backward".
        seed: Of the tokens.

    Yields:
        One row for each measurement, with `ratio_to_dense` against the first dense kernel of the same grid and pass.

    Raises:
        LinearizeError: A backend does not compute the disc's attention: its speed would mean nothing.
    """
    errors = {
        (backend, window): check_parity(sizes, window, backend, seed) for backend in backends for window in windows
    }
    for side in sides:
        grid = Grid(side, side)
        states = sizes.tokens(grid, torch.Generator().manual_seed(seed))
        for kind in passes:
            dense_seconds: float | None = None
            for name, kernel in DENSE_KERNELS[sizes.device.type].items():
                timing = _time(sizes, _dense_call(kernel), states, kind)
                dense_seconds = dense_seconds or timing["median_seconds"]
                row = {"kernel": name, "side": side, "pass": kind, "window": None}
                yield row | timing | {"ratio_to_dense": dense_seconds / timing["median_seconds"]}
            assert dense_seconds is not None
            for window in windows:
                for backend in backends:
                    timing = _time(sizes, _local_call(sizes, grid, window, backend), states, kind)
                    row = {"kernel": backend, "side": side, "pass": kind, "window": window}
                    row |= timing | {"ratio_to_dense": dense_seconds / timing["median_seconds"]}
                    yield row | _pairs(sizes, grid, window, backend, timing, errors[backend, window])


def check_parity(sizes: LayerSizes, window: int, backend: str, seed: int = 0) -> float:
    """Compares output and gradients with the naive form in float64 on a grid that no tile divides.

    Returns:
        The largest relative error of the output and the three gradients.

    Raises:
        LinearizeError: It is above what the dtype's rounding explains.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    states = sizes.tokens(PROBE, generator)
    weight = torch.randn(states[0].shape, generator=generator)
    found = _results(_local_call(sizes, PROBE, window, backend), states, weight.to(sizes.device, sizes.dtype))
    exact = tuple(state.detach().cpu().double().requires_grad_() for state in states)
    expected = _results(_local_call(sizes, PROBE, window, "naive"), exact, weight.to(sizes.dtype).double())
    error = max(((a.cpu().double() - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True))
    if not error <= PARITY[sizes.dtype]:
        raise LinearizeError(
            f"backend {backend} at window={window} in {sizes.dtype} is off by {error:.2g} from the definition (at most "
            f"{PARITY[sizes.dtype]:.0e} is rounding), so no speed of it is reported: use another of backends=[...]."
        )
    return error


def _results(call: Callable[..., Tensor], states: tuple[Tensor, ...], weight: Tensor) -> list[Tensor]:
    output = call(*states)
    return [output.detach(), *torch.autograd.grad(output, states, weight)]


def _dense_call(kernel: SDPBackend | None) -> Callable[..., Tensor]:
    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(kernel) if kernel is not None else contextlib.nullcontext():
            return scaled_dot_product_attention(query, key, value)

    return call


def _local_call(sizes: LayerSizes, grid: Grid, window: int, backend: str) -> Callable[..., Tensor]:
    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        options: dict[str, Any] = {"grid": grid, "window": window, "backend": backend, "tile": TILE}
        return local_attention(query, key, value, num_text_tokens=sizes.num_text_tokens, **options)

    return call


def _time(sizes: LayerSizes, call: Callable[..., Tensor], states: tuple[Tensor, ...], kind: str) -> dict[str, Any]:
    def forward() -> None:
        with torch.no_grad():
            call(*states)

    gradient = torch.ones_like(states[0])

    def forward_backward() -> None:
        torch.autograd.grad(call(*states), states, gradient)

    calls = {"forward": forward, "forward_backward": forward_backward}
    if kind not in calls:
        raise LinearizeError(f"passes names {kind!r}: choose from {', '.join(calls)}.")
    return measure(calls[kind], sizes.device, warmup=sizes.warmup, repeats=sizes.repeats).as_dict()


def _pairs(
    sizes: LayerSizes, grid: Grid, window: int, backend: str, timing: dict[str, Any], error: float
) -> dict[str, Any]:
    """Image pairs that the backend visits for each in the disc, and its time for each visited pair, text included."""
    text = sizes.num_text_tokens * (sizes.num_text_tokens + 2 * grid.num_tokens)
    exact, visited = exact_pairs(grid, window), VISITED[backend](grid, window)
    calls = sizes.batch * sizes.num_heads * (visited + text)
    return {
        "parity_error": error,
        "visited_over_exact": visited / exact,
        "picoseconds_per_visited_pair": timing["median_seconds"] * 1e12 / calls,
    }
