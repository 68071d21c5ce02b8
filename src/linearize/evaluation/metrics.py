"""The numbers of an evaluation, each from plain tensors; torchmetrics where it has them."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio
from torchmetrics.image.fid import FrechetInceptionDistance

# The standard normal's 97.5 % quantile: a two-sided 95 % interval.
_NORMAL_QUANTILE = 1.959963984540054
# Given to equal pictures, whose ratio is infinite; JSON knows no infinity.
MAX_PSNR = 100.0


def wilson_interval(num_correct: int, num_samples: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson 1927, eq. 4), which stays inside [0, 1] for few samples too.

    Raises:
        ValueError: there is no sample, or more are correct than there are.
    """
    if not 0 <= num_correct <= num_samples or num_samples == 0:
        raise ValueError(f"{num_correct} correct of {num_samples} is no proportion")
    share = num_correct / num_samples
    squared = _NORMAL_QUANTILE**2 / num_samples
    center = (share + squared / 2) / (1 + squared)
    half_width = math.sqrt(share * (1 - share) * squared + squared**2 / 4) / (1 + squared)
    return max(0.0, center - half_width), min(1.0, center + half_width)


def proportion(correct: Tensor) -> dict[str, Any]:
    """The share of true entries of a bool tensor [samples], its size and its 95 % interval."""
    num_correct, num_samples = int(correct.sum()), correct.numel()
    interval = wilson_interval(num_correct, num_samples)
    return {"value": num_correct / num_samples, "n": num_samples, "interval": list(interval)}


def mean_psnr(images: Tensor, references: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, of each picture and then averaged.

    Args:
        images: [batch, 3, height, width] in [0, 1].
        references: The same shape and range.

    Returns:
        The mean; a picture that equals its reference counts `MAX_PSNR`.
    """
    ratios = peak_signal_noise_ratio(images, references, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return float(ratios.clamp(max=MAX_PSNR).mean())


def relative_velocity_error(student: Tensor, teacher: Tensor) -> Tensor:
    """|v_student - v_teacher|^2 / |v_teacher|^2 of each sample, summed in float32 or wider.

    Args:
        student: Velocity [batch, ...].
        teacher: Velocity [batch, ...].

    Returns:
        [batch].
    """
    dtype = torch.promote_types(teacher.dtype, torch.float32)
    student, teacher = student.to(dtype).flatten(1), teacher.to(dtype).flatten(1)
    return (student - teacher).square().sum(1) / teacher.square().sum(1)


class GivenFeatures(nn.Module):
    """Stands where torchmetrics expects a network: the features were computed before."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        """The features as they are."""
        return features


def gaussian_distance(features: Tensor, references: Tensor) -> float:
    """Fréchet distance of two Gaussians fitted to features, |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), in float64.

    Args:
        features: [samples, num_features], at least two samples.
        references: [reference_samples, num_features], at least two samples.
    """
    metric = FrechetInceptionDistance(feature=GivenFeatures(features.shape[1]), normalize=True).set_dtype(torch.float64)
    metric.update(references.double().cpu(), real=True)
    metric.update(features.double().cpu(), real=False)
    return max(0.0, float(metric.compute()))


def frechet_distance(features: Tensor, references: Tensor) -> float | None:
    """`gaussian_distance`, or None where either set has fewer than four samples a feature: too few for a covariance."""
    if min(len(features), len(references)) < 4 * features.shape[1]:
        return None
    return gaussian_distance(features, references)
