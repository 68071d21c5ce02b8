import importlib.util
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from linearize.errors import LinearizeError
from linearize.ops.fla_scan import ALIGNMENT, ScanOfHeads, both_ways, refusal
from linearize.ops.gated_scan import _choose, bidirectional_gated_attention, dense, recurrent
from linearize.ops.scan_gradients import ANCHOR, gate_gradient
from linearize.ops.scan_probe import TOLERANCE

HAS_FLA = importlib.util.find_spec("fla") is not None


def inputs(num_tokens, gate_width=1, dtype=torch.float64, device="cpu", sizes=(5, 3), open_gates=1.0):
    torch.manual_seed(0)
    num_features, channels = sizes
    query, key = torch.rand(2, 2, 3, num_tokens, num_features, dtype=torch.float64)
    value = torch.randn(2, 3, num_tokens, channels, dtype=torch.float64)
    drawn = torch.randn(2, 2, 3, num_tokens, num_features if gate_width > 1 else 1, dtype=torch.float64)
    gates = F.logsigmoid(drawn + open_gates).unbind(0)
    wide = torch.promote_types(dtype, torch.float32)
    narrow = [states.to(device, dtype) for states in (query, key, value)]
    return [states.requires_grad_() for states in (*narrow, *(gate.to(device, wide) for gate in gates))]


def token_major_scan(query, key, value, gate):
    """What fla's kernels compute, on tensors as they take them."""
    assert query.is_contiguous() and key.is_contiguous() and value.is_contiguous() and gate.is_contiguous()
    assert query.shape[-1] % ALIGNMENT == value.shape[-1] % ALIGNMENT == 0
    query, key, value, gate = (states.transpose(1, 2) for states in (query, key, value, gate))
    before = gate.cumsum(dim=2)
    decay = (before[:, :, :, None] - before[:, :, None]).clamp(max=0.0).exp()
    weights = torch.einsum("bhic,bhjc,bhijc->bhij", query, key, decay.expand(*decay.shape[:-1], query.shape[-1]))
    return (weights.tril() @ value).transpose(1, 2)


@pytest.mark.parametrize("gate_width", [1, 5])
def test_both_ways_and_the_diagonal_once_are_the_definition(gate_width):
    query, key, value, *gates = inputs(37, gate_width)
    ahead, behind = both_ways(token_major_scan, query, key, value, *gates)
    diagonal = (query * key).sum(-1, keepdim=True) * value
    torch.testing.assert_close(ahead + behind - diagonal, dense(query, key, value, *gates))


@pytest.mark.parametrize("num_tokens", [1, 40, ANCHOR + 9])
def test_gradients_are_scans_and_products_of_states(num_tokens):
    leaves = inputs(num_tokens)
    outputs = ScanOfHeads.apply(token_major_scan, *leaves), dense(*leaves)
    torch.testing.assert_close(*outputs)
    gradients = (torch.autograd.grad(output.sin().sum(), leaves) for output in outputs)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


def test_without_a_gpu_auto_is_the_portable_form_and_fla_says_why_not():
    leaves = inputs(20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(bidirectional_gated_attention(*leaves), recurrent(*leaves))
    with pytest.raises(
        LinearizeError, match=r"fla cannot serve this call, as it needs a GPU, .* choose chunked or auto"
    ):
        bidirectional_gated_attention(*leaves, backend="fla")


def stand_in(dtype):
    """A tensor of a GPU that needs none."""
    with FakeTensorMode():
        return torch.empty(2, 3, 300, 3, dtype=dtype, device="cuda")


@pytest.mark.skipif(HAS_FLA, reason="it tells of a missing fla")
def test_a_gpu_without_fla_is_told_of():
    with pytest.warns(UserWarning, match=r"computed by chunked on this GPU \(not fla: it needs fla, .*linearize\[fla"):
        assert _choose("auto", stand_in(torch.bfloat16), 5, 5) == "chunked"


def test_float32_on_a_gpu_is_not_rounded_to_bf16():
    value = stand_in(torch.float32)
    assert refusal(value, 5, 1) == "it computes in bfloat16, and query, key and value are float32"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _choose("auto", value, 5, 1) == "chunked"


@pytest.mark.parametrize("gate_width", [1, 5])
def test_tables_are_made_where_the_tensors_are(gate_width):
    tensors = [states.detach() for states in inputs(300, gate_width, torch.float32, "meta")]
    assert bidirectional_gated_attention(*tensors).device.type == "meta"
    query, key, value, gate, _ = tensors
    if gate_width == 1:
        assert gate_gradient(gate, query, key, value, value, gate).device.type == "meta"


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_FLA, reason="fla is not installed")
@pytest.mark.parametrize("gate_width", [1, 64])
@pytest.mark.parametrize("sizes", [(64, 65), (128, 129), (64, 1)])
def test_fla_is_the_float64_form_up_to_rounding(gate_width, sizes):
    gate_width = sizes[0] if gate_width > 1 else 1
    leaves = inputs(1500, gate_width, torch.bfloat16, "cuda", sizes, open_gates=5.0)
    exact = [leaf.detach().cpu().double().requires_grad_() for leaf in leaves]
    outputs = (
        bidirectional_gated_attention(*leaves, backend="fla"),
        bidirectional_gated_attention(*exact, backend="chunked"),
    )
    assert outputs[0].dtype == torch.bfloat16
    weight = torch.randn(outputs[1].shape, dtype=torch.float64)
    found = [outputs[0], *torch.autograd.grad(outputs[0], leaves, weight.to("cuda", torch.bfloat16))]
    expected = [outputs[1], *torch.autograd.grad(outputs[1], exact, weight.bfloat16().double())]
    for one, other in zip(found, expected, strict=True):
        assert (one.cpu().double() - other).norm() < TOLERANCE * other.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("gate_width", [1, 64])
def test_the_portable_form_on_a_gpu_is_the_float64_form_up_to_rounding(gate_width):
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, TOLERANCE)):
        leaves = inputs(3000, gate_width, dtype, "cuda", (64, 65), open_gates=5.0)
        exact = [leaf.detach().cpu().double().requires_grad_() for leaf in leaves]
        outputs = [bidirectional_gated_attention(*states, backend="chunked") for states in (leaves, exact)]
        weight = torch.randn(outputs[1].shape, dtype=torch.float64).to(dtype)
        found = [outputs[0], *torch.autograd.grad(outputs[0], leaves, weight.cuda())]
        expected = [outputs[1], *torch.autograd.grad(outputs[1], exact, weight.double())]
        for one, other in zip(found, expected, strict=True):
            assert (one.cpu().double() - other).norm() < tolerance * other.norm()
