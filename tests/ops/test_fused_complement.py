"""The kernels of the complement of a disc compute its definition, forward and backward."""

import pytest
import torch

from linearize.layout import TILE, Grid, Layout
from linearize.ops.fused_complement import serves
from linearize.ops.tile_states import window_complement
from ops.complement_parity import CASES, check_operators, parity
from ops.interpreted import errors_of, needs_interpreter


@needs_interpreter
def test_kernels_by_the_interpreter_are_exact_in_float32():
    found = errors_of("complement_parity.py")
    assert list(found) == list(CASES)
    for name, errors in found.items():
        assert len(errors) == 5 and all(error < 2e-6 for error in errors), name


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("num_features", "head_dim"), [(128, 128), (32, 64), (128, 32)])
def test_kernels_on_a_gpu_are_as_exact_as_bf16(name, num_features, head_dim):
    errors = parity(name, num_features=num_features, head_dim=head_dim, dtype=torch.bfloat16, device="cuda", batch=2)
    assert all(error < 1e-2 for error in errors)


@pytest.mark.gpu
def test_operators_satisfy_torchs_own_checks():
    check_operators("cuda", torch.bfloat16, 64)


@pytest.mark.gpu
@pytest.mark.parametrize("tile", [TILE, None])
def test_a_compiled_caller_has_no_graph_break_and_the_same_numbers(tile):
    layout = Layout(0, (Grid(16, 32),), tile=tile)

    def call(query, key, value):
        part = window_complement((query * 1, key), value, layout=layout, window=5)
        return part.numerator / part.mass

    states = [torch.rand(1, 2, 512, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    compiled = torch.compile(call, fullgraph=True)
    torch.testing.assert_close(compiled(*states), call(*states), rtol=1e-2, atol=1e-2)


def test_other_tensors_are_left_to_the_portable_form():
    states = torch.rand(1, 2, 40, 64)
    assert not serves(states, states)
    assert not serves(states.bfloat16(), states.bfloat16())


@pytest.mark.gpu
def test_what_the_kernels_take_on_a_gpu():
    states = torch.rand(1, 2, 40, 64, device="cuda", dtype=torch.bfloat16)
    assert serves(states, states[..., :32])
    assert not serves(states[..., :48], states)
    assert not serves(states.float(), states.float())
