import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from linearize.evaluation.metrics import (
    MAX_PSNR,
    frechet_distance,
    mean_psnr,
    proportion,
    relative_velocity_error,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("num_correct", "num_samples", "expected"),
    [
        # 8 of 10: 0.4902, 0.9433 (Agresti and Coull 1998's score interval, computed by hand from eq. 4 of Wilson 1927).
        (8, 10, (0.4901625, 0.9433178)),
        (0, 10, (0.0, 0.2775328)),
        (10, 10, (0.7224672, 1.0)),
    ],
)
def test_wilson_interval_has_its_known_values(num_correct, num_samples, expected):
    assert wilson_interval(num_correct, num_samples) == pytest.approx(expected, abs=1e-6)


@given(st.integers(1, 5000), st.floats(0, 1))
def test_wilson_interval_solves_its_equation_and_holds_the_share(num_samples, fraction):
    num_correct = round(fraction * num_samples)
    share = num_correct / num_samples
    low, high = wilson_interval(num_correct, num_samples)
    assert 0 <= low <= share + 1e-12 and share - 1e-12 <= high <= 1
    for bound in (low, high):
        # Both ends are where the share is 1.96 standard errors of the bound away.
        assert (share - bound) ** 2 == pytest.approx(1.959963984540054**2 * bound * (1 - bound) / num_samples, abs=1e-9)


@pytest.mark.parametrize(("num_correct", "num_samples"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_interval_refuses_what_is_no_proportion(num_correct, num_samples):
    with pytest.raises(ValueError, match="no proportion"):
        wilson_interval(num_correct, num_samples)


def test_proportion_counts():
    counted = proportion(torch.tensor([True, False, True, True]))
    assert (counted["value"], counted["n"]) == (0.75, 4)
    assert counted["interval"] == list(wilson_interval(3, 4))


def test_psnr_is_the_mean_of_each_picture():
    references = torch.full((3, 3, 5, 7), 0.25, dtype=torch.float64)
    images = references.clone()
    images[0] += 0.1
    images[1] -= 0.01
    # 20 dB, 40 dB and an equal picture.
    assert mean_psnr(images, references) == pytest.approx((20 + 40 + MAX_PSNR) / 3, abs=1e-6)


def test_velocity_error_is_zero_for_equal_velocities_and_known_for_others():
    teacher = torch.tensor([[[[3.0, 4.0]]], [[[0.0, 2.0]]]], dtype=torch.float64)
    student = torch.tensor([[[[3.0, 3.0]]], [[[1.0, 0.0]]]], dtype=torch.float64)
    assert torch.equal(relative_velocity_error(teacher, teacher), torch.zeros(2, dtype=torch.float64))
    assert relative_velocity_error(student, teacher).tolist() == pytest.approx([1 / 25, 5 / 4], abs=1e-15)


def test_velocity_error_of_half_precision_is_summed_in_float32():
    teacher = torch.full((1, 4, 64, 64), 300.0, dtype=torch.float16)
    assert relative_velocity_error(teacher * 0, teacher).item() == 1.0


def _samples_with(mean: torch.Tensor, deviations: torch.Tensor, num_samples: int) -> torch.Tensor:
    """Samples whose mean and unbiased covariance are exactly `mean` and diag(deviations^2)."""
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(num_samples, len(mean), generator=generator, dtype=torch.float64)
    samples -= samples.mean(0)
    orthonormal, _ = torch.linalg.qr(samples)
    return orthonormal * math.sqrt(num_samples - 1) * deviations + mean


def test_frechet_distance_of_diagonal_gaussians_has_its_closed_form():
    first_mean, second_mean = torch.tensor([0.0, 1.0, -2.0]).double(), torch.tensor([0.5, 1.0, 1.0]).double()
    first, second = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([3.0, 2.0, 1.0]).double()
    # Commuting covariances: |m1 - m2|^2 + |s1 - s2|^2.
    expected = (first_mean - second_mean).square().sum() + (first - second).square().sum()
    distance = frechet_distance(_samples_with(first_mean, first, 40), _samples_with(second_mean, second, 30))
    assert distance == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_distance_of_rotated_gaussians_matches_the_symmetric_square_root():
    generator = torch.Generator().manual_seed(1)
    first, second = (
        torch.randn(50, 4, 4, generator=generator, dtype=torch.float64).flatten(1)[:, :4] for _ in range(2)
    )
    second = second @ torch.randn(4, 4, generator=generator, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(first.T.cov())
    root = vectors @ values.sqrt().diag() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second.T.cov() @ root).clamp(min=0).sqrt().sum()
    expected = (
        (first.mean(0) - second.mean(0)).square().sum() + first.T.cov().trace() + second.T.cov().trace() - 2 * cross
    )
    assert frechet_distance(first, second) == pytest.approx(expected.item(), rel=1e-9)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_is_null_where_samples_are_few():
    features = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(features, features) is not None
    assert frechet_distance(features[:15], features) is None
    assert frechet_distance(features, features[:15]) is None
