"""What mixers with gates share: their projection, which starts open, and scans along rows and columns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linearize.mixers._joint import JointMixer
from linearize.mixers._tokens import FeaturePair, Tokens
from linearize.ops.gated_scan import bidirectional_gated_attention, dense_decay, gated_attention_flops
from linearize.ops.linear_attention import LinearPart, mask_keys
from linearize.ops.products import with_ones
from linearize.ops.scan_order import from_scan_order, in_scan_order, scan_order

DIRECTIONS = {"rows": ("rows",), "rows_and_columns": ("rows", "columns")}
GATES = ("head", "channel")
# GLA's and LAWCAT's log gate is logsigmoid(x) / 16. With this bias half of a token is left after 2700 further ones; the
# papers' 0 would leave it after 16, and the layer would be local from the start.
TEMPERATURE = 16.0
OPEN = 5.5


class LogGates(nn.Module):
    """Log gates logsigmoid(W2 W1 x + b) / temperature, from W2 = 0 and b that leaves them open.

    Args:
        hidden_size: Channels of x.
        num_gates: Gates of each head: forward and backward, for rows and perhaps columns.
        num_heads: Heads.
        width: Gates per channel of the features, or 1 for one in each head.
        rank: Channels between W1 and W2; 0 means one matrix.
        bias: Start of b.
        temperature: Divides the logarithm.
    """

    def __init__(
        self,
        hidden_size: int,
        num_gates: int,
        num_heads: int,
        width: int,
        *,
        rank: int = 16,
        bias: float = OPEN,
        temperature: float = TEMPERATURE,
    ) -> None:
        super().__init__()
        self.sizes, self.temperature = (num_gates, num_heads, width), temperature
        self.inner = nn.Linear(hidden_size, rank, bias=False) if rank else None
        self.outer = nn.Linear(rank or hidden_size, num_gates * num_heads * width)
        nn.init.zeros_(self.outer.weight)
        nn.init.constant_(self.outer.bias, bias)

    def logits(self, states: Tensor) -> Tensor:
        """What the sigmoid is taken of, [num_gates, batch, heads, tokens, width], of [batch, tokens, hidden_size]."""
        if self.inner is not None:
            states = F.linear(states, self.inner.weight.to(states.dtype))
        projected = F.linear(states, self.outer.weight.to(states.dtype), self.outer.bias.to(states.dtype))
        return projected.unflatten(-1, self.sizes).permute(2, 0, 3, 1, 4)

    def forward(self, states: Tensor) -> Tensor:
        """The gates, as `logits`."""
        return F.logsigmoid(self.logits(states)) / self.temperature

    def flops(self, num_tokens: int) -> int:
        """Operations of the projections."""
        weights = self.outer.weight.numel() + (0 if self.inner is None else self.inner.weight.numel())
        return 2 * num_tokens * weights


def both_ways(gates: Tensor) -> list[tuple[Tensor, Tensor | None]]:
    """Gates of `LogGates` as `GatedMixer.log_gates` gives them: forward and backward for each direction."""
    each = gates.unbind(0)
    return list(zip(each[::2], each[1::2], strict=True))


class GatedMixer(JointMixer):
    """Base of mixers whose image tokens mix by scans with gates, along rows or rows and columns.

    A token sees another through the product of the gates on the way, forward or backward; the scans of rows and
    columns are averaged. Text has no place on the way: its state is added once, without gates.

    Attributes:
        directions: Of "rows" and "columns" those that are scanned.
    """

    directions: tuple[str, ...] = ("rows",)

    def log_gates(self, tokens: Tokens) -> list[tuple[Tensor, Tensor | None]]:
        """For each direction the forward and backward log gates of image tokens, [batch, heads, image tokens, width].

        None for the backward gate makes the decay symmetric.
        """
        raise NotImplementedError

    def mix_images(self, pair: FeaturePair, tokens: Tokens) -> LinearPart:
        """See `JointMixer.mix_images`."""
        mask, value = tokens.mask_of(tokens.image), tokens.product_value[:, :, tokens.image]
        head_dim, log_scale = value.shape[-1], pair.query.log_scale + pair.key.log_scale
        ahead, behind = zip(*self.log_gates(tokens), strict=True)
        gates = self._scans(ahead, tokens), None if behind[0] is None else self._scans(behind, tokens)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            each = ((states,) * len(self.directions) for states in (query, mask_keys(key, mask), value))
            query, key, value = (self._scans(states, tokens) for states in each)
            return self._mean_of_scans(bidirectional_gated_attention(query, key, value, *gates), tokens)

        if pair.rotated is None:
            sums = attend(pair.query.values, pair.key.values, with_ones(value))
            return LinearPart(sums[..., :head_dim], sums[..., head_dim, None], log_scale)
        mass = attend(pair.query.values, pair.key.values, torch.ones_like(value[..., :1]))
        return LinearPart(attend(*pair.rotated, value), mass, log_scale)

    def _scans(self, states: Sequence[Tensor], tokens: Tokens) -> Tensor:
        """Image tokens of each direction as it scans them, beside one another: [directions x batch, heads, ...]."""
        layout = tokens.context.layout
        each = [in_scan_order(one, layout, direction) for one, direction in zip(states, self.directions, strict=True)]
        return each[0] if len(each) == 1 else torch.cat(each)

    def _mean_of_scans(self, states: Tensor, tokens: Tokens) -> Tensor:
        """The mean over directions, in the layout's order."""
        layout, each = tokens.context.layout, states.chunk(len(self.directions))
        first, *others = (from_scan_order(one, layout, way) for one, way in zip(each, self.directions, strict=True))
        return sum(others, first) / len(each) if others else first

    def dense_images(self, pair: FeaturePair, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """See `JointMixer.dense_images`."""
        decays = []
        for direction, (ahead, behind) in zip(self.directions, self.log_gates(tokens), strict=True):
            order, back = scan_order(tokens.context.layout, direction, ahead.device)
            ahead = ahead[:, :, order]
            behind = F.pad(ahead, (0, 0, 0, 1))[:, :, 1:] if behind is None else behind[:, :, order]
            decays.append(dense_decay(ahead, behind)[:, :, back][:, :, :, back])
        decay = torch.stack(decays).mean(dim=0)
        factor = (pair.query.log_scale + pair.key.log_scale).exp()
        decay = decay.expand(*decay.shape[:-1], pair.query.values.shape[-1])

        def weights(query: Tensor, key: Tensor) -> Tensor:
            return torch.einsum("bhic,bhjc,bhijc->bhij", query, key, decay) * factor

        mass = weights(pair.query.values, pair.key.values)
        return (mass if pair.rotated is None else weights(*pair.rotated)), mass

    def scan_flops(self, num_tokens: int, num_features: int) -> int:
        """Operations of the scans in one head."""
        return len(self.directions) * gated_attention_flops(num_tokens, num_features, self.shape.head_dim + 1)
