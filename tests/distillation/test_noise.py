import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from linearize.distillation.noise import LogitNormal, Shifted, Uniform, add_noise, draw_noise, seeded_generator

SAMPLERS = [Uniform(), LogitNormal(mean=0.5, std=0.8), Shifted(shift=3.0)]


def test_noise_does_not_depend_on_who_draws_it() -> None:
    latents = torch.zeros(4, 3, 6, 10)
    keys = [(0, 17, 0, index) for index in (5, 3, 9, 3_000)]
    noise, sigma = draw_noise(latents, keys, Uniform())
    halves = [draw_noise(latents[rank::2], keys[rank::2], Uniform()) for rank in range(2)]
    for rank, (part, part_sigma) in enumerate(halves):
        assert torch.equal(part, noise[rank::2])
        assert torch.equal(part_sigma, sigma[rank::2])


def test_every_part_of_the_key_changes_the_noise() -> None:
    keys = [(0, 1, 0, 2), (1, 1, 0, 2), (0, 2, 0, 2), (0, 1, 1, 2), (0, 1, 0, 3), ("validation", 2)]
    noise, sigma = draw_noise(torch.zeros(len(keys), 2, 4, 6), keys, Uniform())
    assert len({tuple(sample.flatten().tolist()) for sample in noise}) == len(keys)
    assert len(set(sigma.tolist())) == len(keys)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: type(sampler).__name__)
def test_sigma_has_its_distribution(sampler: Uniform | LogitNormal | Shifted) -> None:
    generator = seeded_generator("distribution")
    drawn = torch.tensor([sampler(generator) for _ in range(4000)], dtype=torch.float64)
    uniform = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    expected = {
        Uniform: uniform,
        LogitNormal: torch.sigmoid(0.5 + 0.8 * torch.special.ndtri(uniform)),
        Shifted: 3 * uniform / (1 + 2 * uniform),
    }[type(sampler)]
    assert drawn.min() >= 0 and drawn.max() <= 1
    # Kolmogorov-Smirnov distance in the sampler's own quantiles; 1.95 / sqrt(n) is exceeded once in a thousand draws.
    ranks = torch.searchsorted(expected, drawn.sort().values).double() / 4000
    assert (ranks - uniform).abs().max() < 1.95 / 4000**0.5


@settings(max_examples=25, deadline=None)
@given(sigma=st.floats(0, 1), seed=st.integers(0, 99))
def test_add_noise_interpolates_and_its_velocity_is_the_target(sigma: float, seed: int) -> None:
    generator = seeded_generator(seed)
    latents, noise = torch.randn(2, 1, 2, 4, 6, generator=generator, dtype=torch.float64)
    at, step = torch.tensor([sigma], dtype=torch.float64), 1e-3
    slope = (add_noise(latents, noise, at + step) - add_noise(latents, noise, at)) / step
    torch.testing.assert_close(slope, noise - latents, atol=1e-9, rtol=1e-9)
