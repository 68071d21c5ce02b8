"""The Triton kernels of gated scans compute the definition, forward and backward."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from linearize.errors import LinearizeError
from linearize.ops.gated_scan import _choose, bidirectional_gated_attention
from linearize.ops.head_scan import MOST_FEATURES, STATE, TAIL, blocks_of, refusal
from ops.interpreted import errors_of, needs_interpreter
from ops.scan_parity import CASES, SINGLE_CHUNKS, Case, check_operators, parity


@needs_interpreter
def test_kernels_by_the_interpreter_are_exact_in_float32():
    found = errors_of("scan_parity.py")
    assert list(found) == [*CASES, *(f"{name}, single chunks" for name in SINGLE_CHUNKS)]
    for name, errors in found.items():
        # Sums of gates lose digits behind closed ones, and the gates' gradients behind sums of hundreds of tokens.
        states, gates = (2e-5, 4e-4) if name == "closed gates" else (1e-6, 2e-5)
        limits = [states] * 4 + [gates] * 2
        assert all(error < limit for error, limit in zip(errors, limits, strict=True)), name


@given(num_features=st.integers(1, MOST_FEATURES), channels=st.integers(1, MOST_FEATURES))
def test_blocks_cover_all_features_and_channels_and_fit_a_program(num_features, channels):
    blocks = blocks_of(num_features, channels)
    assert num_features <= blocks.features + blocks.low_features
    assert (blocks.num_blocks - 1) * blocks.channels < channels <= blocks.num_blocks * blocks.channels
    assert blocks.features * blocks.channels <= STATE
    assert min(blocks.features, blocks.channels) >= 16
    for power in (blocks.features, blocks.channels):
        assert power & (power - 1) == 0
    assert blocks.low_features in (0, TAIL)


def test_without_a_gpu_the_kernels_say_why_not():
    states = torch.randn(1, 2, 40, 16)
    gate = torch.zeros(1, 2, 40, 1)
    with pytest.raises(LinearizeError, match=r"triton cannot serve this call, as it needs a GPU, .* chunked or auto"):
        bidirectional_gated_attention(states, states, states, gate, backend="triton")
    assert refusal(states, 16, 16) == "it takes one gate in each head, not 16"


@pytest.mark.skipif(torch.cuda.is_available(), reason="it tells of kernels that fail")
def test_where_kernels_fail_auto_says_so_and_takes_the_portable_form():
    with FakeTensorMode():
        value = torch.empty(2, 3, 300, 3, dtype=torch.bfloat16, device="cuda")
    with pytest.warns(UserWarning, match=r"computed by chunked on this GPU \(not triton: it.*; not fla: it"):
        assert _choose("auto", value, 5, 1) == "chunked"


def assert_as_exact_as_bf16(errors):
    *states, ahead, behind = errors
    assert all(error < 6e-3 for error in states)
    assert ahead < 2e-2 and behind < 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["ragged", "aligned mass", "closed gates"])
def test_kernels_on_a_gpu_are_as_exact_as_bf16(name):
    assert_as_exact_as_bf16(parity(CASES[name]._replace(batch=2), dtype=torch.bfloat16, device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(128, 136), (64, 1), (192, 65)])
def test_long_scans_are_cut_into_segments_and_as_exact(sizes):
    assert_as_exact_as_bf16(parity(Case(2500, *sizes), dtype=torch.bfloat16, device="cuda", openness=6.0))


@pytest.mark.gpu
def test_operators_satisfy_torchs_own_checks():
    check_operators("cuda", torch.bfloat16)


@pytest.mark.gpu
def test_a_compiled_caller_has_no_graph_break_and_the_same_numbers():
    query, key, value = (torch.randn(1, 640, 2, 64, device="cuda").bfloat16().transpose(1, 2) for _ in range(3))
    gates = [-torch.rand(1, 2, 640, 1, device="cuda") / 16 for _ in range(2)]
    leaves = [leaf.requires_grad_() for leaf in (query, key, value, *gates)]

    def call(query, key, value, *gates):
        return bidirectional_gated_attention(query * 1, key, value, *gates, backend="triton")

    outputs = torch.compile(call, fullgraph=True)(*leaves), call(*leaves)
    assert torch.equal(*outputs)
    gradients = (torch.autograd.grad(output.float().square().sum(), leaves) for output in outputs)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2 * other.abs().max().item())


@pytest.mark.gpu
def test_auto_takes_the_kernels_for_gates_of_heads():
    query, key, value = (torch.randn(1, 2, 300, 64, device="cuda").bfloat16() for _ in range(3))
    gate = -torch.rand(1, 2, 300, 1, device="cuda")
    assert refusal(value, 64, 1) is None
    outputs = (bidirectional_gated_attention(query, key, value, gate, backend=name) for name in ("auto", "triton"))
    assert torch.equal(*outputs)


@pytest.mark.gpu
def test_types_and_sizes_that_the_kernels_do_not_take_are_told():
    value = torch.randn(1, 2, 40, 300, device="cuda")
    assert refusal(value, 64, 1) == "it computes in bfloat16, and query, key and value are float32"
    assert refusal(value.bfloat16(), 64, 1) == "it takes at most 272 features and channels, not 300"
