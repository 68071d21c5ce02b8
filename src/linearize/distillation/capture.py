"""Looks into the attention layers of a forward pass, only while asked to, and holds nothing afterwards."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from linearize.backbones.recording import Recorder


@dataclass(frozen=True)
class SiteCall:
    """One call of a site: its arguments by name, and what it returned as one tensor [batch, tokens, channels]."""

    keywords: dict[str, Any]
    output: Tensor


class SiteCapture:
    """Records attention outputs, and whole calls, of chosen sites, by the recorders that it puts into them.

    What a block computes must not change between its forward pass and its recomputation in the backward pass, so the
    recorders go on recording after `recording()`, until the transformer's next call; whoever recomputes a block clears
    them (`activations.py`).

    Args:
        transformer: The transformer.
        sites: Its sites by name, in the order of the forward pass.
        attention: Names whose attention output is recorded.
        calls: Names whose call is recorded.
    """

    def __init__(
        self, transformer: nn.Module, sites: Mapping[str, nn.Module], attention: set[str], calls: set[str]
    ) -> None:
        self._attention, self._calls = attention, calls
        self._recorders = {name: Recorder() for name in sites if name in attention | calls}
        self._is_recording = False
        for name, recorder in self._recorders.items():
            sites[name].recorder = recorder  # type: ignore[assignment]
        transformer.register_forward_pre_hook(self._set_flags)

    @contextlib.contextmanager
    def recording(self) -> Iterator[tuple[dict[str, Tensor], dict[str, SiteCall]]]:
        """What forward passes within the block leave, filled when the block ends.

        Yields:
            Attention outputs by site, [batch, tokens, channels] before the output projection, and calls by site, both
            in the order in which tokens travel through the transformer.
        """
        attention: dict[str, Tensor] = {}
        calls: dict[str, SiteCall] = {}
        self._is_recording = True
        self._set_flags()
        try:
            yield attention, calls
        finally:
            self._is_recording = False
            for name, recorder in self._recorders.items():
                if recorder.attention is not None:
                    attention[name] = recorder.attention
                if recorder.call is not None:
                    keywords, returned = recorder.call
                    calls[name] = SiteCall(keywords, join_outputs(returned))
                recorder.clear()

    def _set_flags(self, *_: Any) -> None:
        for name, recorder in self._recorders.items():
            recorder.keeps_attention = self._is_recording and name in self._attention
            recorder.keeps_call = self._is_recording and name in self._calls


def join_outputs(output: Any) -> Tensor:
    """A site's output as one tensor [batch, tokens, channels]; a layer with two streams returns both."""
    return torch.cat(list(output), dim=1) if isinstance(output, tuple | list) else output
