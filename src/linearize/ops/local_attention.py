"""Local attention behind one function; how it is computed is the table of `backends`."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor

from linearize.errors import LinearizeError, check_count
from linearize.layout import Grid, Layout
from linearize.ops.backends import BACKENDS, BackendReport, choose_backend, join_reports, warn_if_slow
from linearize.ops.dense_attention import match_heads
from linearize.ops.precision import as_under_autocast
from linearize.ops.regions import REGIONS, Region


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: Grid | tuple[Grid, ...],
    window: int | Sequence[int],
    num_text_tokens: int,
    text_first: bool = True,
    tile: tuple[int, int] | None = None,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    pooled_key: Tensor | None = None,
    pooled_value: Tensor | None = None,
    pooled_mask: Tensor | None = None,
    region: str = "disc",
    backend: str = "auto",
) -> Tensor:
    """Softmax attention in which an image token sees a region of image tokens: CLEAR's disc, or another of `REGIONS`.

    Text tokens see all tokens and are seen by all. Several grids lie on top of one
    another: an image token sees the region around its own row and column in each. A query none of whose keys is valid
    gets zeros.

    Args:
        query: [batch, heads, tokens, head_dim], rotated.
        key: [batch, key-value heads, tokens, head_dim], rotated.
        value: Same as key.
        grid: The image, or several, in tokens.
        window: Radius of the region in tokens, one for all heads or one for each.
        num_text_tokens: Text tokens among the tokens; may be 0.
        text_first: Whether they stand before the image tokens.
        tile: The order of image tokens, see `Layout`.
        scale: Softmax scale; None means head_dim ** -0.5.
        key_mask: [batch, tokens], True where a key is valid.
        pooled_key: [batch, key-value heads, pooled, head_dim] more keys, which all image queries see and no text
            query does.
        pooled_value: Their values.
        pooled_mask: [batch, pooled], True where valid.
        region: "disc": dy^2 + dx^2 < window^2, cut at the borders (CLEAR, arXiv 2412.16112); "tiles": all 16 x 8 tiles
            that the discs of the query's tile touch; "neighborhood": a square of 2 window - 1, shifted at the borders.
        backend: "auto", by device, dtype and shape (`explain_backend` tells which and why), or one of `BACKENDS`:
            "naive" on dense weights, "dense" where the disc covers the picture, "halo" of linear cost with nothing but
            PyTorch, "triton" in our own kernels, "flex" in FlexAttention, "natten" in NATTEN's for neighborhoods.

    Returns:
        [batch, heads, tokens, head_dim].

    Raises:
        LinearizeError: The window, the region or the backend does not exist, the backend cannot run the call on this
            machine, or tokens and grid disagree.
    """
    layout = Layout(num_text_tokens, (grid,) if isinstance(grid, Grid) else tuple(grid), text_first, tile)
    windows = _radii(window, query)
    _check(query, layout, windows, region)
    num_pooled = 0
    if (pooled_key is None) != (pooled_value is None):
        raise LinearizeError("pooled_key and pooled_value belong together; give both or neither")
    if pooled_key is not None and pooled_value is not None:
        num_pooled = index(pooled_key.shape[2])
        key, value = torch.cat([key, pooled_key], dim=2), torch.cat([value, pooled_value], dim=2)
        key_mask = _joined_mask(key_mask, pooled_mask, query.shape[2], num_pooled)
    query, key, value = as_under_autocast(query, key, value)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    call: dict[str, Any] = {"layout": layout, "key_mask": key_mask, "num_pooled": num_pooled}
    if len(set(windows)) == 1:
        return _attend(query, key, value, REGIONS[region](windows[0]), backend, scale, call)
    return _by_window(query, key, value, windows, region, backend, scale, call)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, region: Region, backend: str, scale: float, call: dict[str, Any]
) -> Tensor:
    report = choose_backend(backend, query, needs_grad=_needs_grad(query, key, value), region=region, **call)
    if backend == "auto":
        warn_if_slow(report, query.device)
    return BACKENDS[report.chosen].attend(query, key, value, scale=scale, region=region, **call)


def _by_window(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    windows: tuple[int, ...],
    region: str,
    backend: str,
    scale: float,
    call: dict[str, Any],
) -> Tensor:
    """One call for the heads of each radius."""
    key, value = match_heads(key, query), match_heads(value, query)
    groups = _heads_by_window(windows)
    outputs = [
        _attend(query[:, heads], key[:, heads], value[:, heads], REGIONS[region](window), backend, scale, call)
        for window, heads in groups.items()
    ]
    order = [head for heads in groups.values() for head in heads]
    return torch.cat(outputs, dim=1)[:, [order.index(head) for head in range(len(order))]]


def _radii(window: int | Sequence[int], query: Tensor) -> tuple[int, ...]:
    return tuple(window) if isinstance(window, Sequence) and not isinstance(window, str) else (window,) * query.shape[1]


def _heads_by_window(windows: tuple[int, ...]) -> dict[int, list[int]]:
    return {window: [head for head, own in enumerate(windows) if own == window] for window in dict.fromkeys(windows)}


def explain_backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: Grid | tuple[Grid, ...],
    window: int | Sequence[int],
    num_text_tokens: int,
    text_first: bool = True,
    tile: tuple[int, int] | None = None,
    key_mask: Tensor | None = None,
    pooled_key: Tensor | None = None,
    region: str = "disc",
    backend: str = "auto",
    **_: object,
) -> BackendReport:
    """Which backend `local_attention` would take for a call, and why not another that it prefers; computes nothing.

    Arguments and errors are those of `local_attention`. Heads of several radii are computed by one call for each; then
    the report names the backends, and the reasons, of all these calls.
    """
    layout = Layout(num_text_tokens, (grid,) if isinstance(grid, Grid) else tuple(grid), text_first, tile)
    windows = _radii(window, query)
    _check(query, layout, windows, region)
    query, key, value = as_under_autocast(query, key, value)
    call: dict[str, Any] = {"layout": layout, "key_mask": key_mask, "needs_grad": _needs_grad(query, key, value)}
    call["num_pooled"] = 0 if pooled_key is None else pooled_key.shape[2]
    return join_reports(
        [
            choose_backend(backend, query[:, : len(heads)], region=REGIONS[region](radius), **call)
            for radius, heads in _heads_by_window(windows).items()
        ]
    )


def _joined_mask(
    key_mask: Tensor | None, pooled_mask: Tensor | None, num_tokens: int, num_pooled: int
) -> Tensor | None:
    """One mask of tokens and pooled keys; where one has none, all of it is valid."""
    if key_mask is None and pooled_mask is None:
        return None
    given = key_mask if key_mask is not None else pooled_mask
    assert given is not None
    tokens = given.new_ones(len(given), num_tokens) if key_mask is None else key_mask
    pooled = given.new_ones(len(given), num_pooled) if pooled_mask is None else pooled_mask
    return torch.cat([tokens, pooled], dim=1)


def _needs_grad(*states: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in states)


def _check(query: Tensor, layout: Layout, windows: tuple[int, ...], region: str) -> None:
    for window in windows:
        check_count("window", window)
    if region not in REGIONS:
        raise LinearizeError(f"unknown region {region!r}, choose one of {', '.join(REGIONS)}")
    if len(windows) not in (1, query.shape[1]):
        raise LinearizeError(
            f"window names {len(windows)} radii for {query.shape[1]} heads; give one for each head, or one number"
        )
    if query.shape[2] != layout.num_tokens:
        grids = " + ".join(str(grid) for grid in layout.grids)
        raise LinearizeError(
            f"{query.shape[2]} tokens are not {layout.num_text_tokens} text tokens and a grid of {grids}"
        )
    if any(grid.frames > 1 for grid in layout.grids):
        raise LinearizeError(
            f"windows are defined on pictures, got {layout.grids[0].frames} frames; use a mixer for video"
        )
