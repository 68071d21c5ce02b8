"""Recurrences with a state of one number for each channel: chunked = recurrent = dense, and four orders of scans."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from linearize.errors import LinearizeError
from linearize.layout import TILE, Grid, Layout
from linearize.ops.least_squares import ridge
from linearize.ops.scan_order import cross_scan
from linearize.ops.selective_scan import CHUNK, linear_recurrence, selective_scan


@settings(deadline=None, max_examples=25)
@given(
    num_tokens=st.sampled_from([1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 37, CHUNK**2 + 3]),
    strength=st.sampled_from([0.0, 1e-3, 1.0, 300.0]),
    seed=st.integers(0, 99),
)
def test_all_forms_and_their_gradients_are_one(num_tokens, strength, seed):
    generator = torch.Generator().manual_seed(seed)
    log_decay = -strength * torch.rand(2, num_tokens, 3, dtype=torch.float64, generator=generator)
    inputs = torch.randn(2, num_tokens, 3, dtype=torch.float64, generator=generator)
    leaves = [log_decay.requires_grad_(), inputs.requires_grad_()]
    results = []
    for backend in ("auto", "recurrent", "dense"):
        states = linear_recurrence(*leaves, backend=backend)
        results.append((states, *torch.autograd.grad(states.sin().sum(), leaves)))
    for other in results[1:]:
        for ours, theirs in zip(results[0], other, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_without_decay_it_is_a_cumulative_sum_and_with_all_decay_the_input():
    inputs = torch.randn(1, 50, 4, dtype=torch.float64)
    torch.testing.assert_close(linear_recurrence(torch.zeros_like(inputs), inputs), inputs.cumsum(dim=-2))
    torch.testing.assert_close(linear_recurrence(torch.full_like(inputs, -1e4), inputs), inputs)


def test_first_and_second_derivatives():
    log_decay = -torch.rand(1, CHUNK + 2, 1, dtype=torch.float64)
    leaves = (log_decay.requires_grad_(), torch.randn(1, CHUNK + 2, 1, dtype=torch.float64, requires_grad=True))
    assert torch.autograd.gradcheck(linear_recurrence, leaves)
    assert torch.autograd.gradgradcheck(linear_recurrence, leaves)


def test_the_selective_scan_is_its_recurrence():
    inputs, step = torch.randn(2, 9, 4, dtype=torch.float64), torch.rand(2, 9, 4, dtype=torch.float64)
    write, read = torch.randn(2, 9, 1, dtype=torch.float64), torch.randn(2, 9, 1, dtype=torch.float64)
    rate, state = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64), torch.zeros(2, 4, dtype=torch.float64)
    expected = []
    for t in range(9):
        state = (-step[:, t] * rate).exp() * state + step[:, t] * write[:, t] * inputs[:, t]
        expected.append(read[:, t] * state)
    torch.testing.assert_close(selective_scan(inputs, step, rate, write, read), torch.stack(expected, dim=1))


@pytest.mark.parametrize("tile", [None, TILE])
@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("with_text", [True, False])
def test_scans_go_four_ways_and_come_back(tile, text_first, with_text):
    layout = Layout(3, (Grid(9, 17), Grid(2, 5)), text_first, tile)
    order, back = cross_scan(layout, with_text, torch.device("cpu"))
    num_tokens = layout.num_tokens if with_text else layout.num_image_tokens
    group = torch.arange(4)[:, None]
    states = torch.arange(num_tokens).expand(4, -1)
    assert torch.equal(states[group, order][group, back], states)


def test_the_four_ways_of_a_picture_that_is_no_square():
    order, _ = cross_scan(Layout(0, (Grid(2, 3),)), False, torch.device("cpu"))
    rows, columns = [0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5]
    assert order.tolist() == [rows, columns, rows[::-1], columns[::-1]]
    with_text, _ = cross_scan(Layout(2, (Grid(1, 2),)), True, torch.device("cpu"))
    assert with_text[2].tolist() == [0, 1, 3, 2, 0, 1]


def test_gradients_through_the_scans_are_right_where_height_is_not_width():
    layout = Layout(1, (Grid(3, 4),))
    order, back = cross_scan(layout, True, torch.device("cpu"))
    group = torch.arange(4)[:, None]

    def scan(states):
        scanned = linear_recurrence(torch.full_like(states[:, group, order], -0.3), states[:, group, order])
        return scanned[:, group, back]

    assert torch.autograd.gradcheck(scan, torch.randn(1, 4, 13, 1, dtype=torch.float64, requires_grad=True))


def test_ridge_finds_the_weights_that_made_the_rows_and_ignores_dead_features():
    rows, weight = torch.randn(200, 5, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    torch.testing.assert_close(ridge(rows, rows @ weight, 1e-12), weight)
    rows[:, 3] = 0
    assert ridge(rows, rows @ weight, 1e-9)[3].abs().max() == 0
    assert ridge(torch.zeros(7, 3), torch.ones(7, 1), 0.1).abs().max() == 0


def test_an_unknown_backend_is_told():
    with pytest.raises(LinearizeError, match="unknown backend 'fast', choose one of auto, chunked, recurrent, dense"):
        linear_recurrence(torch.zeros(1, 1), torch.zeros(1, 1), backend="fast")
