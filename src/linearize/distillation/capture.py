"""Looks into the attention layers of a forward pass, only while asked to, and holds nothing afterwards."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from linearize.layout import Layout
from linearize.mixers import MixerContext


@dataclass(frozen=True)
class AttentionOutputs:
    """What a mixer returned, [batch, heads, tokens, head_dim], and the order of its tokens."""

    output: Tensor
    layout: Layout

    def in_raster_order(self) -> Tensor:
        """[batch, tokens, channels], image tokens in raster order."""
        return in_raster_order(self.output.transpose(1, 2).flatten(2), self.layout)


@dataclass(frozen=True)
class SiteCall:
    """One call of a site: what it was given and what it returned."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    output: Tensor


class SiteCapture:
    """Records attention outputs, and whole calls, of chosen sites.

    Hooks stay on the modules, so that compiled blocks contain them, but they record only inside `recording()`. Gradient
    checkpointing recomputes in the backward pass, outside of it, and therefore stores nothing a second time. Hooks
    compute nothing either: an operation that is not repeated in the recomputation would break it.

    Args:
        sites: All sites of one transformer by name.
        attention: Names whose mixer's output is recorded.
        calls: Names whose call is recorded, inputs and output.
    """

    def __init__(self, sites: Mapping[str, nn.Module], attention: set[str], calls: set[str]) -> None:
        self._attention: dict[str, AttentionOutputs] | None = None
        self._calls: dict[str, SiteCall] | None = None
        for name in attention:
            sites[name].mixer.register_forward_hook(self._attention_hook(name))  # type: ignore[union-attr, operator]
        for name in calls:
            sites[name].register_forward_hook(self._call_hook(name), with_kwargs=True)

    @contextlib.contextmanager
    def recording(self) -> Iterator[tuple[dict[str, AttentionOutputs], dict[str, SiteCall]]]:
        """Within the block, forward passes fill what it yields: attention outputs by site, and calls by site."""
        self._attention, self._calls = {}, {}
        try:
            yield self._attention, self._calls
        finally:
            self._attention = self._calls = None

    def _attention_hook(self, name: str) -> Any:
        @torch.compiler.disable
        def hook(module: nn.Module, arguments: tuple, output: Tensor) -> None:
            if self._attention is not None:
                context = arguments[-1]
                assert isinstance(context, MixerContext)
                self._attention[name] = AttentionOutputs(output, context.layout)

        return hook

    def _call_hook(self, name: str) -> Any:
        @torch.compiler.disable
        def hook(module: nn.Module, arguments: tuple, keywords: dict[str, Any], output: Any) -> None:
            if self._calls is not None:
                self._calls[name] = SiteCall(arguments, dict(keywords), join_outputs(output))

        return hook


def in_raster_order(tokens: Tensor, layout: Layout) -> Tensor:
    """Puts image tokens of [batch, tokens, channels] back into raster order; text tokens stay where they are."""
    if layout.tile is None:
        return tokens
    return tokens[:, layout.index_to(None, tokens.device)]


def join_outputs(output: Any) -> Tensor:
    """A site's output as one tensor [batch, tokens, channels]; a layer with two streams returns both."""
    return torch.cat(list(output), dim=1) if isinstance(output, tuple | list) else output
