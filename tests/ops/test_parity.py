"""What tells wrong kernels from right ones tells NaN, too."""

import math

import pytest
import torch

from linearize.ops.chunked_scan import chunked
from linearize.ops.parity import largest_error
from linearize.ops.scan_probe import failure


@pytest.mark.parametrize("place", range(3))
def test_a_number_that_is_none_is_an_error_wherever_it_is(place):
    expected = [torch.randn(4, 5, dtype=torch.float64) for _ in range(3)]
    found = [one.float() for one in expected]
    assert largest_error(found, expected) < 1e-7
    found[place][1, 2] = math.nan
    assert not largest_error(found, expected) <= 1e9


def test_errors_are_relative_and_zeros_are_equal():
    ones, zeros = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    assert largest_error([ones * 1.5, zeros], [ones, zeros]) == pytest.approx(0.5)
    assert largest_error([ones, ones.bfloat16()], [ones, zeros]) > 1e9


def wrong_gradient(query, key, value, *gates):
    """The right output, and NaN for the gradient of the key alone."""
    return chunked(query, key, value, *gates) + (key[..., :1] * 0).abs().sqrt()


@pytest.mark.parametrize(("scan", "reason"), [(chunked, None), (wrong_gradient, "its kernels are off by nan from the")])
def test_a_scan_whose_gradients_are_no_numbers_fails_its_probe(scan, reason):
    def wide(*leaves):
        return scan(*(leaf.float() for leaf in leaves))

    found = failure(wide, torch.device("cpu"), 1, 8, 8, 1)
    assert found == reason or found.startswith(reason)
