"""One attention layer: local attention by each of its backends against dense attention."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from linearize.benchmark.parity import PROBE, WHOLE_PROBE, check_errors
from linearize.benchmark.timing import fitting, measure
from linearize.benchmark.visited import exact_pairs, takes_hopper, visited_pairs
from linearize.errors import LinearizeError, check_names
from linearize.layout import TILE, Grid, Layout
from linearize.ops.backends import BACKENDS
from linearize.ops.local_attention import explain_backend, local_attention
from linearize.ops.parity import largest_error
from linearize.ops.regions import REGIONS

DENSE_KERNELS: dict[str, dict[str, SDPBackend | None]] = {
    "cpu": {"dense": None},
    "cuda": {"dense_cudnn": SDPBackend.CUDNN_ATTENTION, "dense_flash": SDPBackend.FLASH_ATTENTION},
}
# Peers that are a backend in an order of tokens other than tiles: CLEAR runs FlexAttention in raster order, on discs.
PEERS: dict[str, tuple[str, tuple[int, int] | None]] = {"clear_raster_flex": ("flex", None)}
# Operations for each pair and channel: two products forward, and five more backward.
_OPERATIONS = {"forward": 4, "forward_backward": 14}


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
        region: Of `REGIONS`: which image tokens an image token sees.
    """

    num_heads: int
    head_dim: int
    num_text_tokens: int
    batch: int
    dtype: torch.dtype
    device: torch.device
    warmup: int
    repeats: int
    region: str = "disc"

    def tokens(self, grid: Grid, seed: int) -> tuple[Tensor, ...]:
        """Random query, key and value that require gradients: [batch, heads, tokens, head_dim], token-major in memory.

        This is how the projections of a layer write them.
        """
        shape = (self.batch, self.num_text_tokens + grid.num_tokens, self.num_heads, self.head_dim)
        generator = torch.Generator(self.device).manual_seed(seed)
        options: dict[str, Any] = {"generator": generator, "device": self.device, "dtype": self.dtype}
        return tuple(torch.randn(shape, **options).transpose(1, 2).requires_grad_() for _ in range(3))


def attention_rows(
    sizes: LayerSizes, *, sides: list[int], windows: list[int], backends: list[str], passes: list[str], seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Measures every grid, window and backend, dense attention first.

    Args:
        sizes: The layer.
        sides: Sides of square grids in tokens.
        windows: Radii of the region.
        backends: Of `local_attention`, or of `PEERS`.
        passes: "forward" and "forward_backward".
        seed: Of the tokens.

    Yields:
        One row for each measurement, with `ratio_to_dense` against the first dense kernel of the same grid and pass,
        whose time is `dense_seconds`, or with `error`: why the machine does not run it, or that it does not compute the
        region's attention.

    Raises:
        LinearizeError: A pass, backend or region is unknown, or no backend runs any of it on this machine.
    """
    check_names("attention.passes", passes, _OPERATIONS)
    check_names("attention.backends", backends, ("auto", *BACKENDS, *PEERS))
    check_names("attention.region", [sizes.region], REGIONS)
    calls = itertools.product(sides, windows, backends, passes)
    refusals = [_refusal(sizes, Grid(side, side), window, name, kind) for side, window, name, kind in calls]
    if refusals and all(refusals):
        raise LinearizeError(f"None of attention.backends=[{', '.join(backends)}] runs here: {refusals[0]}")
    checked: dict[tuple[str, int], dict[str, Any]] = {}
    for side in sides:
        grid = Grid(side, side)
        for kind in passes:
            dense_seconds: float | None = None
            subject: dict[str, Any] = {"side": side, "pass": kind, "region": None, "window": None, "batch": sizes.batch}
            for name, kernel in DENSE_KERNELS[sizes.device.type].items():
                row: dict[str, Any] = {"kernel": name, **subject}
                row |= _time(sizes, _dense_call(kernel), grid, kind, seed)
                dense_seconds = dense_seconds or row.get("median_seconds")
                yield row | _dense_rate(sizes, grid, row) | _ratio(dense_seconds, row)
            for window in windows:
                for name in backends:
                    row = {"kernel": name, **subject, "region": sizes.region, "window": window}
                    reason = _refusal(sizes, grid, window, name, kind)
                    if reason is None and (name, window) not in checked:
                        checked[name, window] = _checked(sizes, window, name, seed)
                    row |= checked[name, window] if reason is None else {"error": reason}
                    if "error" not in row:
                        row |= _time(sizes, _local_call(sizes, grid, window, name), grid, kind, seed)
                    if "error" not in row:
                        row |= _ratio(dense_seconds, row) | _pairs(sizes, grid, window, name, row)
                    yield row


def _checked(sizes: LayerSizes, window: int, backend: str, seed: int) -> dict[str, Any]:
    try:
        return fitting(
            lambda: {"parity_error": check_parity(sizes, window, backend, seed)},
            sizes.device,
            "fewer heads or pictures",
        )
    except LinearizeError as error:
        return {"error": str(error)}


def check_parity(sizes: LayerSizes, window: int, backend: str, seed: int = 0) -> float:
    """Compares output and gradients with the naive form in float64, on a grid that no tile divides and one that all do.

    Where the backend has no gradients, the output alone is compared.

    Returns:
        The largest relative error of the output and the three gradients.

    Raises:
        LinearizeError: It is above what the dtype's rounding explains.
    """
    errors = (_error(sizes, probe, window, backend, seed) for probe in (PROBE, WHOLE_PROBE))
    subject = f"backend {backend} at window={window}"
    return check_errors(errors, sizes.dtype, subject, "use another of backends=[...]")


def _error(sizes: LayerSizes, grid: Grid, window: int, backend: str, seed: int) -> float:
    states = sizes.tokens(grid, seed + 1)
    weight = sizes.tokens(grid, seed + 2)[0].detach()
    with_gradients = _refusal(sizes, grid, window, backend, "forward_backward") is None
    found = _results(_local_call(sizes, grid, window, backend), states, weight, with_gradients)
    exact = tuple(state.detach().double().requires_grad_() for state in states)
    naive = _local_call(sizes, grid, window, "naive", tile=PEERS.get(backend, (backend, TILE))[1])
    expected = _results(naive, exact, weight.double(), with_gradients)
    return largest_error(found, expected)


def _results(
    call: Callable[..., Tensor], states: tuple[Tensor, ...], weight: Tensor, with_gradients: bool
) -> list[Tensor]:
    if not with_gradients:
        with torch.no_grad():
            return [call(*states)]
    output = call(*states)
    return [output.detach(), *torch.autograd.grad(output, states, weight)]


def _refusal(sizes: LayerSizes, grid: Grid, window: int, name: str, kind: str) -> str | None:
    """Why a backend does not compute a pass here, or None."""
    if name in PEERS and sizes.region != "disc":
        return f"{name} knows the region 'disc' alone, not {sizes.region!r}: set attention.region=disc"
    shape = (sizes.batch, sizes.num_heads, sizes.num_text_tokens + grid.num_tokens, sizes.head_dim)
    states = torch.empty((), dtype=sizes.dtype, device=sizes.device).expand(shape).requires_grad_(kind != "forward")
    with torch.set_grad_enabled(kind != "forward"):
        try:
            explain_backend(states, states, states, **_options(sizes, grid, window, name))
        except LinearizeError as error:
            return str(error)
    return None


def _dense_call(kernel: SDPBackend | None) -> Callable[..., Tensor]:
    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(kernel) if kernel is not None else contextlib.nullcontext():
            return scaled_dot_product_attention(query, key, value)

    return call


def _options(sizes: LayerSizes, grid: Grid, window: int, name: str) -> dict[str, Any]:
    backend, tile = PEERS.get(name, (name, TILE))
    return {
        "grid": grid,
        "window": window,
        "region": sizes.region,
        "backend": backend,
        "tile": tile,
        "num_text_tokens": sizes.num_text_tokens,
    }


def _local_call(sizes: LayerSizes, grid: Grid, window: int, name: str, **changed: Any) -> Callable[..., Tensor]:
    options = _options(sizes, grid, window, name) | changed

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return local_attention(query, key, value, **options)

    return call


def _time(sizes: LayerSizes, call: Callable[..., Tensor], grid: Grid, kind: str, seed: int) -> dict[str, Any]:
    def measured() -> dict[str, Any]:
        states = sizes.tokens(grid, seed)
        gradient = torch.ones_like(states[0])

        def forward() -> None:
            with torch.no_grad():
                call(*states)

        def forward_backward() -> None:
            torch.autograd.grad(call(*states), states, gradient)

        timed = {"forward": forward, "forward_backward": forward_backward}[kind]
        timing = measure(timed, sizes.device, warmup=sizes.warmup, repeats=sizes.repeats, graphed=True)
        return timing.as_dict()

    # What does not fit may be the tokens themselves.
    return fitting(measured, sizes.device, "smaller attention.sides, or fewer heads or pictures")


def _ratio(dense_seconds: float | None, row: dict[str, Any]) -> dict[str, Any]:
    seconds = row.get("median_seconds")
    return {
        "dense_seconds": dense_seconds,
        "ratio_to_dense": dense_seconds / seconds if dense_seconds and seconds else None,
    }


def _dense_rate(sizes: LayerSizes, grid: Grid, row: dict[str, Any]) -> dict[str, Any]:
    tokens = sizes.num_text_tokens + grid.num_tokens
    return {"tflops_exact": _tflops(sizes, row, tokens**2)}


def _pairs(sizes: LayerSizes, grid: Grid, window: int, name: str, row: dict[str, Any]) -> dict[str, Any]:
    """Pairs of an image query and a key that are visited for each that is exact, and rates with text queries added."""
    backend, tile = PEERS.get(name, (name, TILE))
    layout, region = Layout(sizes.num_text_tokens, (grid,), tile=tile), REGIONS[sizes.region](window)
    text = layout.num_text_tokens * layout.num_tokens
    exact = exact_pairs(layout, region)
    visited = visited_pairs(backend, layout, region, sizes.head_dim, sizes.device)
    found: dict[str, Any] = {"tflops_exact": _tflops(sizes, row, exact + text)}
    if backend == "triton":
        found["hopper"] = takes_hopper(layout, region, sizes.head_dim, sizes.device)
    if visited is None:
        return found
    found |= {"visited_over_exact": visited / exact, "tflops_visited": _tflops(sizes, row, visited + text)}
    if "median_seconds" in row:
        pairs = sizes.batch * sizes.num_heads * (visited + text)
        found["picoseconds_per_visited_pair"] = row["median_seconds"] * 1e12 / pairs
    return found


def _tflops(sizes: LayerSizes, row: dict[str, Any], pairs: int) -> float | None:
    if "median_seconds" not in row:
        return None
    operations = _OPERATIONS[row["pass"]] * sizes.batch * sizes.num_heads * sizes.head_dim * pairs
    return operations / row["median_seconds"] / 1e12
