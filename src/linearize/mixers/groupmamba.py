"""GroupMamba: groups of channels, each scanned in one direction, with modulation across the groups."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linearize.errors import LinearizeError
from linearize.layout import Layout
from linearize.mixers._arguments import VARIANTS, check_choice
from linearize.mixers._fitted import FittedMixer, flat
from linearize.mixers._group_scans import GROUPS, GroupScans
from linearize.mixers._tokens import Tokens
from linearize.mixers.base import AttentionShape

# Where SiLU is 1.
OPEN = 1.2784645
# Channels of the modulation across groups are as many times fewer.
REDUCTION = 16


class GroupmambaMixer(FittedMixer):
    """GroupMamba (Shaker et al., arXiv 2407.13772, CVPR 2025): groups of channels are scanned in four directions.

    The channels of the teacher's value x, [batch, tokens, channels], go to 4 groups in turns, [batch, 4, tokens,
    channels / 4], so that each head has all of them. One is scanned row by row, one column by column, and one each the
    same way backwards, with a state of one number for each channel:

        u = DW3x3(x),   step_t = softplus(W' W u_t + b),   B_t, C_t = W u_t + 1,
        h_t = e^(-step_t e^a) h_(t-1) + step_t B_t u_t,   y_t = C_t h_t + D u_t,
        f = y silu(W_z q + b_z) 2 sigmoid(W_2 relu(W_1 mean_t x_t)),   o = W_o f + b_o,

    where q is the teacher's query, of the same channels, and W_1, W_2 and W_o are across groups. At first DW3x3 is the
    identity, steps are spread from 0.1 to 3, and B, C, D and both factors of y are 1. Nothing of the teacher's weights
    on tokens is inherited: W_o is fitted to one batch. So is the mass by which o is joined to the text, which is exact;
    see `FittedMixer`. With text="state" the text is scanned before and after the picture. The cost is linear in tokens.

    `variant=paper` is the published formula of the layer's input x, with contiguous groups and Mamba's start:

        x' = norm(x),   u, z = W_in x',   u = silu(DW3x3(u)),   B_t, C_t = W u_t,   y as above,
        f = norm(s x' sigmoid(W_2 relu(W_1 mean_t x'_t)) W_out (norm(y) silu(z))),

    where f is a product with x' and both norms of all channels are one, as in the code; the paper adds its input. The
    published layer has no text; here it is a state.

    Args:
        shape: Sizes of the layer.
        text: "exact" or "state".
        variant: "dit" or "paper".

    Raises:
        LinearizeError: An argument is none of its choices, or the channels are no multiple of 4.
    """

    def __init__(self, shape: AttentionShape, *, text: str = "exact", variant: str = "dit") -> None:
        check_choice("groupmamba", "variant", variant, VARIANTS)
        is_paper = variant == "paper"
        width = shape.hidden_size if is_paper else shape.num_heads * shape.head_dim
        if width % GROUPS:
            raise LinearizeError(
                f"mixer 'groupmamba' cuts the channels into {GROUPS} groups, but the layer has {width} of them; choose "
                "another mixer for it, such as gla or linear"
            )
        super().__init__(shape, "groupmamba", num_features=width, text="state" if is_paper else text)
        self.is_paper, channels = is_paper, width // GROUPS
        self.uses_hidden_states = is_paper
        self.scans = GroupScans(channels, published=is_paper)
        self.squeeze = nn.Linear(width, max(1, width // REDUCTION))
        self.excite = nn.Linear(self.squeeze.out_features, width)
        if is_paper:
            self.norm, self.scale = nn.LayerNorm(width), nn.Parameter(torch.ones(()))
            self.inner = nn.Parameter(torch.empty(GROUPS, channels, 2 * channels).uniform_(-1, 1) * channels**-0.5)
            self.scan_weight = nn.Parameter(torch.ones(GROUPS, 1, channels))
            self.scan_bias = nn.Parameter(torch.zeros(GROUPS, 1, channels))
            self.outer = nn.Parameter(torch.empty(GROUPS, channels, channels).uniform_(-1, 1) * channels**-0.5)
            return
        self.gate = nn.Parameter(torch.zeros(GROUPS, channels, channels))
        self.gate_bias = nn.Parameter(torch.full((GROUPS, 1, channels), OPEN))
        nn.init.zeros_(self.excite.weight)
        nn.init.zeros_(self.excite.bias)
        nn.init.eye_(self.read_out.weight)
        nn.init.zeros_(self.read_out.bias)

    def token_features(self, tokens: Tokens, *, dense: bool) -> Tensor:
        """See `FittedMixer.token_features`."""
        served = slice(None) if self.text == "state" else tokens.image
        states = self._inputs(tokens)[:, served]
        mask = tokens.mask_of(served)
        if mask is not None:
            states = states.masked_fill(~mask[..., None], 0.0)
        layout, with_text = tokens.context.layout, self.text == "state"
        factor = self._modulation(states, mask)
        if not self.is_paper:
            scanned = self.scans(_in_turns(states), layout, with_text=with_text, dense=dense)
            query = _in_turns(flat(tokens.query)[:, served])
            gate = F.silu(query @ self.gate.to(query.dtype) + self.gate_bias.to(query.dtype))
            return (scanned * gate).permute(0, 2, 3, 1).flatten(2) * (2 * factor)
        grouped = states.unflatten(-1, (GROUPS, -1)).transpose(1, 2)
        inputs, gate = (grouped @ self.inner.to(states.dtype)).chunk(2, dim=-1)
        scanned = F.layer_norm(self.scans(inputs, layout, with_text=with_text, dense=dense), inputs.shape[-1:])
        normed = scanned * self.scan_weight.to(states.dtype) + self.scan_bias.to(states.dtype)
        output = ((normed * F.silu(gate)) @ self.outer.to(states.dtype)).transpose(1, 2).flatten(2)
        return self._norm(output * self.scale.to(states.dtype) * states * factor)

    def flops(self, layout: Layout, batch: int = 1) -> int:
        """Scans, the matrices of groups, the read-out, the modulation, and text."""
        exact = self.text == "exact"
        served = layout.num_image_tokens if exact else layout.num_tokens
        matrices = [self.inner, self.outer] if self.is_paper else [self.gate]
        total = 2 * served * sum(matrix.numel() for matrix in (*matrices, self.read_out.weight))
        total += self.scans.flops(layout, with_text=not exact) + 4 * self.squeeze.weight.numel()
        return batch * (total + self.joining_flops(layout))

    def _inputs(self, tokens: Tokens) -> Tensor:
        """The x of all tokens, [batch, tokens, channels]: the teacher's values, or the layer's normed input."""
        return self._norm(tokens.hidden_states) if self.is_paper else flat(tokens.value)

    def _norm(self, states: Tensor) -> Tensor:
        weight, bias = self.norm.weight.to(states.dtype), self.norm.bias.to(states.dtype)
        return F.layer_norm(states, states.shape[-1:], weight, bias, self.norm.eps)

    def _modulation(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """A factor of each channel, [batch, 1, channels], of the mean of the tokens that count."""
        counts = states.shape[1] if mask is None else mask.sum(dim=1).clamp(min=1)[:, None, None]
        squeezed, dtype = states.sum(dim=1, keepdim=True) / counts, states.dtype
        squeezed = F.relu(F.linear(squeezed, self.squeeze.weight.to(dtype), self.squeeze.bias.to(dtype)))
        return F.linear(squeezed, self.excite.weight.to(dtype), self.excite.bias.to(dtype)).sigmoid()


def _in_turns(states: Tensor) -> Tensor:
    """[batch, tokens, channels] to [batch, 4, tokens, channels / 4]: one channel after another to the next group."""
    return states.unflatten(-1, (-1, GROUPS)).permute(0, 3, 1, 2)
