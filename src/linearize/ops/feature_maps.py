"""Feature maps: non-negative features whose inner product stands for exp(scale q k)."""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linearize.errors import LinearizeError

FLOOR = 1e-6


class Features(NamedTuple):
    """Features as stored, and the logarithm of what they are to be multiplied by.

    Attributes:
        values: [batch, heads, tokens, num_features].
        log_scale: Broadcasts to [batch, heads, tokens, 1].
    """

    values: Tensor
    log_scale: Tensor


def elu_plus_one(states: Tensor) -> Tensor:
    """elu(x) + 1 (Katharopoulos et al., arXiv 2006.16236; LinFusion, arXiv 2409.02097)."""
    return F.elu(states) + 1


def floored_relu(states: Tensor) -> Tensor:
    """relu(x) + 1e-6 (LiT, arXiv 2501.12976)."""
    return F.relu(states) + FLOOR


def focus(states: Tensor, power: float, dim: int | tuple[int, ...] = -1) -> Tensor:
    """|x| x^p / |x^p| for x >= 0: sharper directions, the same length (FLatten, arXiv 2308.00442).

    Args:
        states: [batch, heads, tokens, channels], above 0.
        power: 1 changes nothing.
        dim: What the lengths are taken over: -1 in each head, (1, -1) over the whole width.
    """
    sharp = states**power
    before, after = (torch.linalg.vector_norm(tensor, dim=dim, keepdim=True) for tensor in (states, sharp))
    return sharp * (before / after)


def hedgehog(states: Tensor, weight: Tensor) -> Tensor:
    """[softmax(xW), softmax(-xW)] (Hedgehog, arXiv 2402.04347); weight [heads, head_dim, width]."""
    projected = states @ weight
    return torch.cat([projected.softmax(dim=-1), (-projected).softmax(dim=-1)], dim=-1)


def signed_powers(states: Tensor, power: Tensor) -> Tensor:
    """[relu(x)^p, relu(-x)^p] (PolaFormer, arXiv 2501.15061); power broadcasts to the states."""
    return _SignedPowers.apply(states, power)


def swap_signs(features: Tensor) -> Tensor:
    """The two halves of `signed_powers` changed over."""
    return torch.cat(features.chunk(2, dim=-1)[::-1], dim=-1)


def safe_exponential(states: Tensor, over_tokens: bool, key_mask: Tensor | None = None) -> Features:
    """exp(x) as numbers of at most 1 and the logarithm of their common factor.

    Queries have a factor for each token, keys one for each head, as the sum over keys needs a common one.

    Args:
        states: [batch, heads, tokens, channels]; halves of either sign share the factor, as they are summed.
        over_tokens: Whether all tokens share the factor (keys).
        key_mask: [batch, tokens], True for keys that count.
    """
    seen = states.detach()
    if key_mask is not None:
        seen = seen.masked_fill(~key_mask[:, None, :, None], -torch.inf)
    largest = seen.amax(dim=(-2, -1) if over_tokens else -1, keepdim=True)
    largest = largest.masked_fill(largest.isinf(), 0.0)
    exponents = states - largest
    if key_mask is not None:
        # Masked keys may be larger; they only have to stay finite.
        exponents = exponents.clamp(max=0.0)
    return Features(exponents.exp(), largest)


class _SignedPowers(torch.autograd.Function):
    """See `signed_powers`. Keeps nothing but its inputs, and gradients are finite at 0, where 0 log 0 would not be."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, power: Tensor) -> Tensor:
        """[..., channels] to [..., 2 channels]."""
        ctx.save_for_backward(states, power)
        is_half = torch.stack([states > 0, states < 0], dim=-2)
        return torch.where(is_half, (states.abs() ** power)[..., None, :], 0.0).flatten(-2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        """Of the half that x is in: p |x|^(p - 1) sign(x) and |x|^p log |x|, times its gradient."""
        states, power = ctx.saved_tensors
        first, second = gradients[0].chunk(2, dim=-1)
        size = states.abs()
        # |x|^(p - 1), with the sign of x; p is above 1.
        slope = torch.where(states > 0, first, -second) * size ** (power - 1)
        of_power = (slope * torch.xlogy(states, size)).sum_to_size(power.shape)
        return slope * power, of_power


class FeatureMap(nn.Module):
    """A feature map of one attention layer with its parameters.

    Attributes:
        num_parts: Blocks of channels that rotate by the same angles.
        num_features: Channels of the result.
        log_mean_product: Logarithm of the mean product of two features at the start, for independent unit normals.
    """

    num_parts: ClassVar[int] = 1
    num_features: int
    log_mean_product: float

    def forward(self, states: Tensor, *, is_key: bool, key_mask: Tensor | None = None) -> Features:
        """Maps [batch, heads, tokens, head_dim] to features of non-negative numbers.

        Args:
            states: Query or key.
            is_key: Whether a factor has to be common to all tokens.
            key_mask: [batch, tokens], True for keys that count.
        """
        return Features(self.map(states), states.new_zeros(()))

    def map(self, states: Tensor) -> Tensor:
        """The features, for maps without a common factor."""
        raise NotImplementedError

    def flops(self, num_tokens: int) -> int:
        """Operations of the map's own products in one head, of which most maps have none."""
        return 0


class EluMap(FeatureMap):
    """elu(x) + 1."""

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_features, self.log_mean_product = head_dim, math.log(1.346 * head_dim)

    def map(self, states: Tensor) -> Tensor:
        """See `FeatureMap.map`."""
        return elu_plus_one(states)


class ReluMap(FeatureMap):
    """relu(x) + 1e-6."""

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_features, self.log_mean_product = head_dim, math.log(head_dim / (2 * math.pi))

    def map(self, states: Tensor) -> Tensor:
        """See `FeatureMap.map`."""
        return floored_relu(states)


class SoftmaxMap(FeatureMap):
    """Softmax over channels (SLA, arXiv 2509.24006)."""

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_features, self.log_mean_product = head_dim, -math.log(head_dim)

    def map(self, states: Tensor) -> Tensor:
        """See `FeatureMap.map`."""
        return states.softmax(dim=-1)


class FocusedMap(FeatureMap):
    """Focused linear attention with a learned width of each channel; lengths in each head, as in the paper.

    FLatten's code takes the lengths over the whole width, before it splits heads: `whole_width=True`.
    """

    def __init__(self, num_heads: int, head_dim: int, *, power: float = 3.0, whole_width: bool = False) -> None:
        super().__init__()
        self.power, self.whole_width = power, whole_width
        self.num_features, self.log_mean_product = head_dim, math.log(0.11 * head_dim)
        self.width = nn.Parameter(torch.zeros(num_heads, 1, head_dim))

    def map(self, states: Tensor) -> Tensor:
        """See `FeatureMap.map`."""
        return focus(
            floored_relu(states) / F.softplus(self.width.to(states.dtype)),
            self.power,
            dim=(1, -1) if self.whole_width else -1,
        )


class HedgehogMap(FeatureMap):
    """[softmax(xW), softmax(-xW)] with W of each head, which starts as the identity."""

    num_parts = 2

    def __init__(self, num_heads: int, head_dim: int, *, width: int | None = None) -> None:
        super().__init__()
        width = head_dim if width is None else width
        self.num_features, self.log_mean_product = 2 * width, math.log(2 / width)
        self.weight = nn.Parameter(torch.eye(head_dim, width).repeat(num_heads, 1, 1))

    def map(self, states: Tensor) -> Tensor:
        """See `FeatureMap.map`."""
        return hedgehog(states, self.weight.to(states.dtype))

    def flops(self, num_tokens: int) -> int:
        """See `FeatureMap.flops`."""
        return 2 * num_tokens * self.weight[0].numel()


class PolarMap(FeatureMap):
    """PolaFormer's [relu(x)^p, relu(-x)^p] with a width and a power 1 < p < 5 of each channel; p starts at 3."""

    num_parts = 2

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_features, self.log_mean_product = 2 * head_dim, math.log(11.5 * head_dim)
        self.width = nn.Parameter(torch.zeros(num_heads, 1, head_dim))
        self.power = nn.Parameter(torch.zeros(num_heads, 1, head_dim))

    def map(self, states: Tensor) -> Tensor:
        """See `FeatureMap.map`."""
        power = 1 + 4 * self.power.to(states.dtype).sigmoid()
        return signed_powers(states * F.softplus(self.width.to(states.dtype)).reciprocal(), power)


class ExponentialMap(FeatureMap):
    """[exp(xW), exp(-xW)] with W of each head, which starts as the identity (Hedgehog; Lizard, arXiv 2507.09025)."""

    num_parts = 2

    def __init__(self, num_heads: int, head_dim: int, *, width: int | None = None) -> None:
        super().__init__()
        width = head_dim if width is None else width
        self.num_features, self.log_mean_product = 2 * width, math.log(2 * width) + 1
        self.weight = nn.Parameter(torch.eye(head_dim, width).repeat(num_heads, 1, 1))

    def forward(self, states: Tensor, *, is_key: bool, key_mask: Tensor | None = None) -> Features:
        """See `FeatureMap.forward`."""
        projected = states @ self.weight.to(states.dtype)
        return safe_exponential(torch.cat([projected, -projected], dim=-1), is_key, key_mask)

    def flops(self, num_tokens: int) -> int:
        """See `FeatureMap.flops`."""
        return 2 * num_tokens * self.weight[0].numel()


FEATURE_MAPS: dict[str, type[FeatureMap]] = {
    "elu": EluMap,
    "relu": ReluMap,
    "softmax": SoftmaxMap,
    "focused": FocusedMap,
    "hedgehog": HedgehogMap,
    "polar": PolarMap,
    "exponential": ExponentialMap,
}


def build_feature_map(name: str, num_heads: int, head_dim: int, **arguments: Any) -> FeatureMap:
    """A feature map by name.

    Raises:
        LinearizeError: There is none of that name.
    """
    if name not in FEATURE_MAPS:
        raise LinearizeError(f"unknown feature_map {name!r}, choose one of {', '.join(FEATURE_MAPS)}")
    return FEATURE_MAPS[name](num_heads, head_dim, **arguments)
