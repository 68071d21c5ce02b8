"""Four groups of channels, each convolved and scanned in its own direction."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linearize.layout import Layout
from linearize.ops.depthwise import depthwise_flops, depthwise_images
from linearize.ops.scan_order import cross_scan
from linearize.ops.selective_scan import selective_scan, selective_scan_flops

GROUPS = 4
# First and last step at the start; half of a state is left after ln 2 / step tokens. Mamba's are the first; with the
# second the scenes teacher's layers start nearer.
PUBLISHED_STEPS, NEAR_STEPS = (1e-3, 0.1), (0.1, 3.0)


class GroupScans(nn.Module):
    """u = DW3x3(x), h_t = e^(-step_t e^a) h_(t-1) + step_t B_t u_t, y_t = C_t h_t + D u_t in each group.

    step_t = softplus(W' W u_t + b), B_t = W u_t and C_t = W u_t, the last two one number for a group. The groups are
    scanned row by row, column by column, and the same ways backwards.

    Args:
        channels: Channels of a group.
        published: Start as Mamba does; otherwise from the identity for DW3x3, W' = 0, and B and C with 1 added.
    """

    def __init__(self, channels: int, *, published: bool) -> None:
        super().__init__()
        self.published, self.rank = published, math.ceil(channels / 16)
        self.filter = nn.Parameter(torch.zeros(GROUPS * channels, 3, 3))
        self.project = nn.Parameter(torch.zeros(GROUPS, channels, self.rank + 2))
        self.step_weight = nn.Parameter(torch.zeros(GROUPS, self.rank, channels))
        self.step_bias = nn.Parameter(_step_bias(channels, *(PUBLISHED_STEPS if published else NEAR_STEPS)))
        self.log_rate = nn.Parameter(torch.zeros(GROUPS, 1, channels))
        self.skip = nn.Parameter(torch.ones(GROUPS, 1, channels))
        with torch.no_grad():
            if published:
                self.filter.uniform_(-1 / 3, 1 / 3)
                self.project.uniform_(-(channels**-0.5), channels**-0.5)
                self.step_weight.uniform_(-(self.rank**-0.5), self.rank**-0.5)
            else:
                self.filter[:, 1, 1] = 1.0
                self.project[..., : self.rank].uniform_(-(channels**-0.5), channels**-0.5)

    def forward(self, inputs: Tensor, layout: Layout, *, with_text: bool, dense: bool) -> Tensor:
        """Scans x, [batch, 4, tokens, channels], in float32 at least: image tokens, or all tokens `with_text`.

        Args:
            inputs: Zero where a token does not count.
            layout: Where the tokens are.
            with_text: Whether the text is there; it is scanned before and after the picture, and not convolved.
            dense: Whether to compute the definition, on weights of all pairs of tokens.

        Returns:
            y, same as inputs.
        """
        weight = self.filter.to(inputs.dtype)
        if with_text:
            image = depthwise_images(inputs[:, :, layout.image_slice], weight, None, layout)
            text = inputs[:, :, layout.text_slice]
            convolved = torch.cat([text, image] if layout.text_first else [image, text], dim=2)
        else:
            convolved = depthwise_images(inputs, weight, None, layout)
        if self.published:
            convolved = F.silu(convolved)
        order, back = cross_scan(layout, with_text, inputs.device)
        states = _taken(convolved, order)
        low, write, read = (states @ self.project.to(states.dtype)).split([self.rank, 1, 1], dim=-1)
        if not self.published:
            write, read = write + 1, read + 1
        step = F.softplus(low @ self.step_weight.to(states.dtype) + self.step_bias.to(states.dtype))
        rate, backend = self.log_rate.to(states.dtype).exp(), "dense" if dense else "auto"
        scanned = selective_scan(states, step, rate, write, read, backend=backend)
        return _taken(scanned + self.skip.to(states.dtype) * states, back)

    def flops(self, layout: Layout, *, with_text: bool) -> int:
        """Operations of one call on one picture."""
        length = layout.num_image_tokens + 2 * layout.num_text_tokens * with_text
        channels = GROUPS * self.skip.shape[-1]
        projections = 2 * length * (self.project.numel() + self.step_weight.numel())
        return depthwise_flops(layout, channels, 3) + projections + selective_scan_flops(length, channels)


def _taken(states: Tensor, index: Tensor) -> Tensor:
    """From [batch, groups, tokens, channels] the tokens [groups, length] of each group."""
    first = torch.arange(len(index), device=index.device)[:, None] * states.shape[2]
    return states.flatten(1, 2).index_select(1, (first + index).flatten()).unflatten(1, index.shape)


def _step_bias(channels: int, least: float, most: float) -> Tensor:
    """Biases [4, 1, channels] after which softplus gives steps spread evenly in logarithm.

    Channels follow the golden ratio, so that those beside one another, which one head has, spread as evenly.
    """
    place = torch.arange(channels) * ((math.sqrt(5) - 1) / 2) % 1
    step = least * (most / least) ** place
    return torch.log(torch.expm1(step)).expand(GROUPS, 1, channels).clone()
