import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from linearize.errors import LinearizeError
from linearize.ops import chunked_scan
from linearize.ops.chunk_states import BOTH_WAYS, BOTH_WAYS_BACK, GROUP, carry_states
from linearize.ops.chunked_scan import CHUNK, chunked
from linearize.ops.gated_scan import bidirectional_gated_attention, dense, dense_decay, gated_attention_flops

WIDTH = 4


def inputs(num_tokens, gate_width=WIDTH, strength=1.0, seed=0):
    torch.manual_seed(seed)
    query, key = torch.rand(2, 1, 2, num_tokens, WIDTH, dtype=torch.float64)
    value = torch.randn(1, 2, num_tokens, 3, dtype=torch.float64)
    gates = [strength * F.logsigmoid(torch.randn(1, 2, num_tokens, gate_width, dtype=torch.float64)) for _ in range(2)]
    return query, key, value, *gates


@settings(max_examples=15, deadline=None)
@given(
    num_tokens=st.integers(1, 2 * CHUNK + 9),
    gate_width=st.sampled_from([1, WIDTH]),
    strength=st.sampled_from([0.0, 0.01, 1.0, 60.0]),
    symmetric=st.booleans(),
)
def test_recurrent_is_chunked_is_dense(num_tokens, gate_width, strength, symmetric):
    tensors = inputs(num_tokens, gate_width, strength)
    leaves = [tensor.requires_grad_() for tensor in tensors[: 4 if symmetric else 5]]
    results = {}
    for backend in ("chunked", "recurrent", "dense"):
        output = bidirectional_gated_attention(*leaves, backend=backend)
        results[backend] = (output, *torch.autograd.grad(output.sin().sum(), leaves))
    for backend in ("chunked", "recurrent"):
        for ours, theirs in zip(results[backend], results["dense"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_the_mask_is_the_product_of_the_gates_on_the_way():
    *_, forward_gate, backward_gate = inputs(9)
    decay = dense_decay(forward_gate, backward_gate)
    ahead, behind = forward_gate.exp(), backward_gate.exp()
    for i in range(9):
        for j in range(9):
            gates = ahead[:, :, j + 1 : i + 1] if j <= i else behind[:, :, i:j]
            torch.testing.assert_close(decay[:, :, i, j], gates.prod(dim=2))


def test_open_gates_are_linear_attention_and_closed_ones_leave_the_token_itself():
    query, key, value, *_ = inputs(100)
    zeros = torch.zeros_like(query)
    torch.testing.assert_close(
        bidirectional_gated_attention(query, key, value, zeros), query @ (key.transpose(-1, -2) @ value)
    )
    closed = bidirectional_gated_attention(query, key, value, zeros - 1e3)
    torch.testing.assert_close(closed, (query * key).sum(-1, keepdim=True) * value)


def test_with_the_shifted_gate_the_mask_is_symmetric_and_reversing_tokens_commutes():
    query, key, value, gate, _ = inputs(90)
    backward = F.pad(gate, (0, 0, 0, 1))[:, :, 1:]
    decay = dense_decay(gate, backward)
    torch.testing.assert_close(decay, decay.transpose(2, 3))
    expected = bidirectional_gated_attention(query, key, value, gate).flip(2)
    # From the other end a gate stands between the same two tokens one place further.
    turned = F.pad(gate, (0, 0, 0, 1))[:, :, 1:].flip(2)
    ours = bidirectional_gated_attention(query.flip(2), key.flip(2), value.flip(2), turned)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("strength", [1e-6, 1.0, 300.0, 1e30])
def test_float32_neither_overflows_nor_drifts(strength):
    tensors = inputs(300, strength=strength)
    narrow = [tensor.float().requires_grad_() for tensor in tensors]
    output = bidirectional_gated_attention(*narrow)
    torch.testing.assert_close(output.double(), bidirectional_gated_attention(*tensors), rtol=1e-4, atol=1e-4)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(output.square().sum(), narrow))


def test_bf16_is_computed_in_float32():
    assert bidirectional_gated_attention(*(tensor.bfloat16() for tensor in inputs(5))).dtype == torch.float32


@pytest.mark.parametrize("gate_width", [1, WIDTH])
def test_groups_of_heads_make_no_difference(gate_width, monkeypatch):
    leaves = [tensor.requires_grad_() for tensor in inputs(2 * CHUNK + 9, gate_width)]
    expected = chunked(*leaves)
    monkeypatch.setattr(chunked_scan, "NUMBERS_ON_A_CPU", 1)
    output = chunked(*leaves)
    torch.testing.assert_close(output, expected)
    gradients = (torch.autograd.grad(found.sin().sum(), leaves) for found in (output, expected))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("gate_width", [1, 32])
@pytest.mark.parametrize(("openness", "strength"), [(5.5, 1 / 16), (0.0, 1.0), (0.0, 300.0)])
def test_products_in_bf16_are_off_by_their_rounding(gate_width, openness, strength):
    """As on a GPU, where gates are float32."""
    torch.manual_seed(0)
    query, key = torch.rand(2, 1, 2, 300, 32).bfloat16()
    value, *drawn = torch.randn(1, 2, 300, 16).bfloat16(), *torch.randn(2, 1, 2, 300, gate_width)
    gates = [strength * F.logsigmoid(3 * one + openness) for one in drawn]
    leaves = [tensor.requires_grad_() for tensor in (query, key, value, *gates)]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    outputs = chunked(*leaves), dense(*exact)
    weight = torch.randn(outputs[0].shape).bfloat16()
    found, expected = (
        [output, *torch.autograd.grad(output, states, weight.to(output.dtype))]
        for output, states in zip(outputs, (leaves, exact), strict=True)
    )
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other).norm() < 0.02 * other.norm()


def test_there_is_no_second_derivative():
    leaves = [tensor.requires_grad_() for tensor in inputs(5)]
    (gradient,) = torch.autograd.grad(chunked(*leaves).square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


@pytest.mark.parametrize("gate_width", [1, WIDTH])
def test_scans_and_their_gradients_are_one_graph(gate_width):
    leaves = [tensor.requires_grad_() for tensor in inputs(CHUNK + 9, gate_width)]
    compiled = torch.compile(bidirectional_gated_attention, fullgraph=True, backend="aot_eager")
    outputs = compiled(*leaves), bidirectional_gated_attention(*leaves)
    torch.testing.assert_close(*outputs)
    gradients = (torch.autograd.grad(output.sin().sum(), leaves) for output in outputs)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@settings(max_examples=15, deadline=None)
@given(
    num_chunks=st.integers(1, 3 * GROUP**2),
    width=st.sampled_from([1, 3]),
    reverse=st.sampled_from([BOTH_WAYS, BOTH_WAYS_BACK]),
)
def test_states_are_carried_on_both_ways(num_chunks, width, reverse):
    torch.manual_seed(0)
    added = torch.randn(num_chunks, 2, 2, 3, 2, dtype=torch.float64)
    kept = F.logsigmoid(torch.randn(num_chunks, 2, 2, width, dtype=torch.float64))
    states = carry_states(added, kept, reverse)
    for side, turned in enumerate(reverse):
        state = torch.zeros_like(added[0, :, side])
        for chunk in range(num_chunks)[:: -1 if turned else 1]:
            torch.testing.assert_close(states[chunk, :, side], state)
            state = state * kept[chunk, :, side, :, None].exp() + added[chunk, :, side]


class Calls(TorchDispatchMode):
    """Counts what is computed, views aside."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        self.count += not call.is_view
        return call(*args, **(kwargs or {}))


@pytest.mark.parametrize(("gate_width", "most"), [(1, 130), (WIDTH, 190)])
def test_calls_grow_with_the_logarithm_of_the_tokens(gate_width, most):
    counts = []
    for power in (1, 2, 3):
        tensors = [tensor.to("meta") for tensor in inputs(CHUNK * GROUP**power, gate_width)]
        with torch.no_grad(), Calls() as calls:
            chunked(*tensors)
        counts.append(calls.count)
    # Sixteen times the tokens are one more level.
    assert max(counts[2] - counts[1], counts[1] - counts[0]) < 50
    assert counts[2] <= most


class Sizes(TorchDispatchMode):
    """The size in bytes of the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        result = call(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not call.is_view:
            self.largest = max(self.largest, result.nbytes)
        return result


@pytest.mark.parametrize("gate_width", [1, 32])
def test_on_a_cpu_tensors_in_between_are_no_larger_than_the_result(gate_width):
    shape = 1, 8, 2**15, 32
    query, key, value = torch.rand(3, *shape)
    gates = torch.full((2, *shape[:3], gate_width), -0.1)
    with torch.no_grad(), Sizes() as sizes:
        output = chunked(query, key, value, *gates)
    assert sizes.largest == output.nbytes


def test_operations_are_linear_in_tokens():
    assert gated_attention_flops(8192, 64, 65) == 2 * gated_attention_flops(4096, 64, 65)
    # Twice the two products of ungated linear attention, and pairs within chunks.
    assert gated_attention_flops(CHUNK, 128, 129) == 2 * CHUNK * (4 * 128 * 129 + CHUNK * (128 + 129))


def test_an_unknown_backend_names_the_choices():
    with pytest.raises(
        LinearizeError, match="unknown backend 'fast', choose one of auto, chunked, triton, fla, recurrent, dense"
    ):
        bidirectional_gated_attention(*inputs(3), backend="fast")
