"""Noise and noise levels that depend on the seed and on what is drawn, never on which process draws it."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from linearize.errors import LinearizeError


def seeded_generator(*key: int | str) -> torch.Generator:
    """Returns a CPU generator whose stream is a function of `key` alone: equal keys, equal numbers, on any machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


class SigmaSampler(Protocol):
    """Draws the noise level of one sample."""

    def __call__(self, generator: torch.Generator) -> float:
        """Returns sigma in [0, 1]."""
        ...


@dataclass(frozen=True)
class Uniform:
    """Sigma uniform on [0, 1), as CLEAR trains (arXiv 2412.16112, released code)."""

    def __call__(self, generator: torch.Generator) -> float:
        """Returns sigma in [0, 1)."""
        return torch.rand((), generator=generator).item()


@dataclass(frozen=True)
class LogitNormal:
    """Sigma whose logit is normal: the middle noise levels more often (SD3, arXiv 2403.03206, section 3.1)."""

    mean: float = 0.0
    std: float = 1.0

    def __call__(self, generator: torch.Generator) -> float:
        """Returns sigma in (0, 1)."""
        return torch.sigmoid(self.mean + self.std * torch.randn((), generator=generator)).item()


@dataclass(frozen=True)
class Shifted:
    """Uniform sigma moved to shift sigma / (1 + (shift - 1) sigma) (SD3, arXiv 2403.03206, section 5.3.2)."""

    shift: float = 3.0

    def __post_init__(self) -> None:
        if not isinstance(self.shift, int | float) or not self.shift > 0:
            raise LinearizeError(f"sigma.shift={self.shift} moves no noise level: give a number above 0.")

    def __call__(self, generator: torch.Generator) -> float:
        """Returns sigma in [0, 1)."""
        sigma = torch.rand((), generator=generator).item()
        return self.shift * sigma / (1 + (self.shift - 1) * sigma)


def draw_noise(latents: Tensor, keys: Sequence[tuple[int | str, ...]], sampler: SigmaSampler) -> tuple[Tensor, Tensor]:
    """Draws noise and a noise level for each sample of a batch.

    Args:
        latents: [batch, channels, height, width]; gives shape and device.
        keys: One per sample; whatever tells this draw from all others (seed, step, micro step, sample index).
        sampler: The distribution of sigma.

    Returns:
        The noise, like latents in float32, and sigma [batch] in float32.
    """
    generators = [seeded_generator(*key) for key in keys]
    sigma = torch.tensor([sampler(generator) for generator in generators])
    noise = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators])
    return noise.to(latents.device), sigma.to(latents.device)


def add_noise(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Returns (1 - sigma) latents + sigma noise, [batch, channels, height, width]."""
    sigma = sigma.view(-1, 1, 1, 1)
    return (1 - sigma) * latents + sigma * noise


def even_sigma(index: int) -> float:
    """A noise level of a sample: multiples of the golden ratio fill (0, 1) evenly for any run of indices."""
    return 0.02 + 0.96 * ((index + 0.5) * 0.6180339887498949 % 1.0)
