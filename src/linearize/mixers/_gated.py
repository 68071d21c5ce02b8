"""What mixers with gates share: their projection, which starts open, and scans along rows and columns."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linearize.mixers._joint import JointMixer
from linearize.mixers._tokens import FeaturePair, Tokens
from linearize.ops.gated_scan import bidirectional_gated_attention, dense_decay, gated_attention_flops
from linearize.ops.linear_attention import LinearPart, mask_keys
from linearize.ops.scan_order import scan_order

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

    def logits(self, states: Tensor) -> list[Tensor]:
        """What the sigmoid is taken of, from [batch, tokens, hidden_size]: as `forward`."""
        if self.inner is not None:
            states = F.linear(states, self.inner.weight.to(states.dtype))
        projected = F.linear(states, self.outer.weight.to(states.dtype), self.outer.bias.to(states.dtype))
        return list(projected.unflatten(-1, self.sizes).permute(2, 0, 3, 1, 4).unbind(0))

    def forward(self, states: Tensor) -> list[Tensor]:
        """Each gate, [batch, heads, tokens, width], from [batch, tokens, hidden_size]."""
        return [F.logsigmoid(logits) / self.temperature for logits in self.logits(states)]

    def flops(self, num_tokens: int) -> int:
        """Operations of the projections."""
        weights = self.outer.weight.numel() + (0 if self.inner is None else self.inner.weight.numel())
        return 2 * num_tokens * weights


def both_ways(gates: list[Tensor]) -> list[tuple[Tensor, Tensor | None]]:
    """Gates of `LogGates` as `GatedMixer.log_gates` gives them: forward and backward for each direction."""
    return list(zip(gates[::2], gates[1::2], strict=True))


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
        ones = torch.ones_like(value[..., :1])
        if pair.rotated is None:
            scans = [(pair.query.values, pair.key.values, torch.cat([value, ones], dim=-1))]
        else:
            scans = [(*pair.rotated, value), (pair.query.values, pair.key.values, ones)]
        outputs = []
        for direction, (ahead, behind) in zip(self.directions, self.log_gates(tokens), strict=True):
            order, back = scan_order(tokens.context.layout, direction, value.device)
            ahead, behind = ahead[:, :, order], None if behind is None else behind[:, :, order]
            sums = [
                bidirectional_gated_attention(
                    query[:, :, order], mask_keys(key, mask)[:, :, order], some[:, :, order], ahead, behind
                )
                for query, key, some in scans
            ]
            outputs.append(torch.cat(sums, dim=-1)[:, :, back])
        total = torch.stack(outputs).mean(dim=0)
        return LinearPart(total[..., :-1], total[..., -1:], pair.query.log_scale + pair.key.log_scale)

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
