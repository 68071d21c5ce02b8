"""The table of ways to compute local attention, and which of them `auto` takes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from operator import index
from typing import Any, Protocol

import torch
from torch import Tensor

from linearize.errors import LinearizeError
from linearize.layout import Layout
from linearize.ops import flex, natten, triton_local
from linearize.ops.constant_tables import constant_table
from linearize.ops.disc import disc_covers
from linearize.ops.halo import halo_attention
from linearize.ops.naive import full_attention, naive_attention
from linearize.ops.regions import Region


class Refusal(Protocol):
    """Says in one clause why a backend cannot run a call on this machine, or None where it can.

    It is asked once for each kind of call, with stand-ins that have shape, dtype and device, and no numbers.
    """

    def __call__(
        self,
        query: Tensor,
        *,
        layout: Layout,
        region: Region,
        key_mask: Tensor | None,
        num_pooled: int,
        needs_grad: bool,
    ) -> str | None:
        """See the class."""


@dataclass(frozen=True)
class Backend:
    """One way to compute local attention.

    Attributes:
        attend: Takes what `halo_attention` takes and returns what it returns.
        refusal: Why a call is not for this backend.
    """

    attend: Callable[..., Tensor]
    refusal: Refusal


def _never(query: Tensor, **_: Any) -> str | None:
    return None


def _not_covered(
    query: Tensor, *, layout: Layout, region: Region, key_mask: Tensor | None, num_pooled: int, **_: Any
) -> str | None:
    if key_mask is not None or num_pooled:
        return "it takes neither a key mask nor pooled keys"
    if not disc_covers(layout.grids, region.window):
        return f"window={region.window} does not cover the whole picture"
    return None


BACKENDS: dict[str, Backend] = {
    "naive": Backend(naive_attention, _never),
    "dense": Backend(full_attention, _not_covered),
    "halo": Backend(halo_attention, _never),
    "flex": Backend(flex.flex_local_attention, flex.refusal),
    "natten": Backend(natten.natten_attention, natten.refusal),
    "triton": Backend(triton_local.triton_attention, triton_local.refusal),
}
# What `auto` asks, by type of device; the first that does not refuse serves, and the last one never refuses.
PREFERENCE = {"cuda": ("dense", "triton", "flex", "halo")}
ELSEWHERE = ("dense", "halo")


@dataclass(frozen=True)
class BackendReport:
    """Which backend serves a call, and why the others that were asked do not.

    Attributes:
        chosen: A name of `BACKENDS`; of several calls those of all, joined by "and".
        refused: Reasons by the name of the backend, in the order in which they were asked.
    """

    chosen: str
    refused: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return "; ".join([self.chosen, *(f"not {name}: {reason}" for name, reason in self.refused.items())])


def join_reports(reports: Sequence[BackendReport]) -> BackendReport:
    """What is told of several calls: each backend and each reason once."""
    chosen = dict.fromkeys(report.chosen for report in reports)
    reasons: dict[str, dict[str, None]] = {}
    for report in reports:
        for name, reason in report.refused.items():
            reasons.setdefault(name, {})[reason] = None
    return BackendReport(" and ".join(chosen), {name: " and ".join(each) for name, each in reasons.items()})


def choose_backend(
    backend: str,
    query: Tensor,
    *,
    layout: Layout,
    region: Region,
    key_mask: Tensor | None,
    num_pooled: int,
    needs_grad: bool,
) -> BackendReport:
    """The backend that serves a call.

    Args:
        backend: "auto" or a name of `BACKENDS`.
        query: [batch, heads, tokens, head_dim].
        layout: Where the tokens are.
        region: Which image tokens an image token sees.
        key_mask: [batch, tokens + num_pooled], or None.
        num_pooled: Keys behind the tokens.
        needs_grad: Whether gradients will be asked for.

    Raises:
        LinearizeError: There is no such backend, or it cannot run the call.
    """
    shape = tuple(index(size) for size in query.shape)
    return _choose(
        layout, region, backend, shape, query.dtype, query.device, key_mask is not None, num_pooled, needs_grad
    )


@constant_table
@lru_cache(maxsize=256)
def _choose(
    layout: Layout,
    region: Region,
    backend: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    masked: bool,
    num_pooled: int,
    needs_grad: bool,
) -> BackendReport:
    query = torch.empty((), dtype=dtype, device=device).expand(shape)
    key_mask = torch.ones((), dtype=torch.bool, device=device).expand(shape[0], shape[2] + num_pooled)
    call: dict[str, Any] = {"layout": layout, "region": region, "num_pooled": num_pooled, "needs_grad": needs_grad}
    call["key_mask"] = key_mask if masked else None
    if backend == "auto":
        return _first_that_serves(query, call)
    if backend not in BACKENDS:
        raise LinearizeError(f"unknown backend {backend!r}, choose one of auto, {', '.join(BACKENDS)}")
    reason = BACKENDS[backend].refusal(query, **call)
    if reason is not None:
        others = [name for name, other in BACKENDS.items() if other.refusal(query, **call) is None]
        raise LinearizeError(f"backend={backend!r} cannot run this call: {reason}; choose auto, {', '.join(others)}")
    return BackendReport(backend)


def _first_that_serves(query: Tensor, call: dict[str, Any]) -> BackendReport:
    refused: dict[str, str] = {}
    for name in PREFERENCE.get(query.device.type, ELSEWHERE):
        reason = BACKENDS[name].refusal(query, **call)
        if reason is None:
            break
        refused[name] = reason
    return BackendReport(name, refused)


def warn_if_slow(report: BackendReport, device: torch.device) -> None:
    """Says once per reason that a GPU computes local attention without a kernel for it."""
    if device.type == "cuda" and report.chosen == "halo":
        _warn_slow(tuple(report.refused.items()))


# Compilers break here, as they do at the halo path itself.
@torch.compiler.disable
@lru_cache(maxsize=64)
def _warn_slow(refused: tuple[tuple[str, str], ...]) -> None:
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refused if name != "dense")
    warnings.warn(f"local attention takes its slow path on this GPU, as no kernel serves it ({reasons})", stacklevel=3)
