"""What mixers with a window share: the window itself, and the switch that turns either branch off."""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.mixers._arguments import check_choice, check_number
from linearize.mixers._tokens import Tokens
from linearize.ops.disc import coordinates
from linearize.ops.linear_attention import SoftmaxPart
from linearize.ops.local_attention import local_attention
from linearize.ops.local_softmax import local_softmax
from linearize.ops.tile_states import window_softmax

BRANCHES = ("both", "linear", "window")


def check_window(mixer: str, window: int, branches: str) -> None:
    """Checks the arguments that all mixers with a window have.

    Raises:
        LinearizeError: The window is no radius, or there are no such branches.
    """
    check_number(mixer, "window", window, 1)
    check_choice(mixer, "branches", branches, BRANCHES)


def has_log_scale(branches: str, text: str) -> bool:
    """Whether linear attention is joined to softmax: that of the window, or alone to that of exact text."""
    return branches == "both" or (branches == "linear" and text == "exact")


def window_attention(tokens: Tokens, window: int, backend: str = "auto") -> Tensor:
    """Softmax over the disc and the text, and for text over everything: [batch, heads, tokens, head_dim]."""
    layout = tokens.context.layout
    return local_attention(
        *tokens.given_rotated,
        grid=layout.grids,
        window=window,
        num_text_tokens=layout.num_text_tokens,
        text_first=layout.text_first,
        tile=layout.tile,
        scale=tokens.context.scale,
        key_mask=tokens.context.key_mask,
        backend=backend,
    )


def text_and_window(tokens: Tokens, window: int) -> SoftmaxPart | None:
    """What image tokens see by softmax over the text and the disc, rotated; None where no kernel serves them."""
    context = tokens.context
    return local_softmax(
        *tokens.given_rotated, layout=context.layout, window=window, scale=context.scale, key_mask=context.key_mask
    )


def window_alone(query: Tensor, key: Tensor, tokens: Tokens, window: int, *, keep_largest: bool = False) -> SoftmaxPart:
    """`window_softmax` of what image tokens see of the disc, with such queries and keys of all tokens."""
    context, image = tokens.context, tokens.image
    states = (some[:, :, image] for some in (query, key, tokens.product_value))
    mask = tokens.mask_of(image)
    return window_softmax(
        *states,
        layout=context.layout,
        window=window,
        scale=context.scale,
        key_mask=mask,
        keep_largest=keep_largest,
    )


def inside_window(tokens: Tokens, window: int) -> Tensor:
    """[tokens, tokens], True for two image tokens of which one lies in the disc around the other."""
    num_tokens, device = tokens.query.shape[2], tokens.query.device
    places = coordinates(tokens.context.layout).to(device)
    inside = torch.zeros(num_tokens, num_tokens, dtype=torch.bool, device=device)
    inside[tokens.image, tokens.image] = (places[:, None] - places).square().sum(dim=-1) < window**2
    return inside


def over_largest(part: SoftmaxPart) -> SoftmaxPart:
    """The part with the published hybrids' e^-max, which meets the window alone: its mass over its largest weight.

    Without its largest scores it stays as it is.
    """
    return part if part.largest is None else part._replace(log_mass=part.log_mass - _finite(part.largest))


def scores_over_largest(scores: Tensor, seen: Tensor) -> Tensor:
    """The definition of `over_largest`: scores [batch, heads, tokens, tokens] less the largest seen of each row."""
    return scores - _finite(scores.masked_fill(~seen, -torch.inf).amax(dim=-1, keepdim=True))


def _finite(largest: Tensor) -> Tensor:
    """The largest score, or 0 where no key is seen."""
    return largest.masked_fill(largest.isinf(), 0.0)
