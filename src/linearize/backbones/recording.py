"""What a site leaves of its last call for whoever watches it, while the same compiled code serves every layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Recorder:
    """Stands in a site's `recorder` and is written by its forward; a hook would break a compiled block in two.

    A compiler guards the two flags and the type of this object, never which layer it belongs to.

    Attributes:
        keeps_attention: The site is to leave its attention output in `attention`.
        keeps_call: It is to leave its arguments, by name, and what it returned in `call`.
        attention: [batch, tokens, channels] before the output projection, in the order in which tokens travel.
        call: The arguments and what was returned.
    """

    keeps_attention: bool = False
    keeps_call: bool = False
    attention: Tensor | None = field(default=None, repr=False)
    call: tuple[dict[str, Any], Any] | None = field(default=None, repr=False)

    def record(self, attention: Tensor, keywords: dict[str, Any], returned: Any) -> None:
        """Keeps what the flags ask for."""
        if self.keeps_attention:
            self.attention = attention
        if self.keeps_call:
            self.call = (keywords, returned)

    def clear(self) -> None:
        """Lets go of all tensors."""
        self.attention = self.call = None
