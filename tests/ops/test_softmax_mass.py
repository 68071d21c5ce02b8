import pytest
import torch

from linearize.ops import softmax_mass
from linearize.ops.linear_attention import softmax_part, weigh
from linearize.ops.softmax_mass import softmax_with_mass


def tokens(dtype=torch.float64, num_queries=37, num_keys=11, head_dim=16, device="cpu"):
    torch.manual_seed(0)
    sizes = [num_queries, num_keys, num_keys]
    drawn = [torch.randn(2, 3, size, head_dim, dtype=torch.float64) for size in sizes]
    return [states.to(device, dtype).requires_grad_() for states in drawn]


def with_gradients(compute, leaves):
    output, log_mass = compute(*leaves)
    finite = torch.where(log_mass.isinf(), 0.0, log_mass)
    return output, log_mass, *torch.autograd.grad((output.sin().sum() + (0.3 * finite).cos().sum()), leaves)


def dense(key_mask=None, scale=0.7):
    def compute(query, key, value):
        seen = None if key_mask is None else key_mask[:, None, None]
        return weigh(query @ key.transpose(-1, -2) * scale, value, seen)[:2]

    return compute


def ours(key_mask=None, scale=0.7):
    return lambda *leaves: softmax_with_mass(*leaves, scale=scale, key_mask=key_mask)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("at_a_time", [2**26, 2 * 3 * 11 * 5])
def test_output_mass_and_gradients_are_those_of_dense_scores(masked, at_a_time, monkeypatch):
    monkeypatch.setattr(softmax_mass, "SCORES_AT_A_TIME", at_a_time)
    key_mask = None
    if masked:
        key_mask = torch.rand(2, 11) > 0.4
        key_mask[1] = False
    leaves = tokens()
    for one, other in zip(with_gradients(ours(key_mask), leaves), with_gradients(dense(key_mask), leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_the_form_for_devices_without_a_fused_kernel_agrees(monkeypatch):
    monkeypatch.setattr(softmax_mass, "SCORES_AT_A_TIME", 500)
    key_mask = torch.rand(2, 11) > 0.4
    key_mask[1] = False
    leaves = [states.detach() for states in tokens()]
    for one, other in zip(
        softmax_mass._in_blocks(*leaves, key_mask, 0.7), softmax_mass._on_cpu(*leaves, key_mask, 0.7), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_in_bf16_errors_are_those_of_its_rounding():
    exact = tokens()
    rounded = [states.detach().bfloat16().requires_grad_() for states in exact]
    wide = [states.detach().double().requires_grad_() for states in rounded]
    for one, other in zip(with_gradients(ours(), rounded), with_gradients(dense(), wide), strict=True):
        assert (one.double() - other).norm() < 1e-2 * other.norm()
    assert ours()(*rounded)[1].dtype == torch.float32


def test_memory_does_not_grow_with_queries_times_keys():
    query, key, value = tokens(torch.float32, 4096, 256)
    part = softmax_part(query, key, value, scale=1.0)
    assert part.largest is None
    saved = [state for state in part.output.grad_fn.saved_tensors if state is not None]
    assert sum(state.numel() for state in saved) < 4 * query.numel()


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_it_is_the_float64_form(dtype, masked):
    leaves = tokens(dtype, 300, 77, 64, "cuda")
    key_mask = (torch.arange(77) < 50).expand(2, 77).to("cuda") if masked else None
    wide = [states.detach().double().requires_grad_() for states in leaves]
    results = with_gradients(ours(key_mask, 0.125), leaves), with_gradients(dense(key_mask, 0.125), wide)
    for one, other in zip(*results, strict=True):
        assert (one.double() - other).norm() < (2e-2 if dtype == torch.bfloat16 else 1e-5) * other.norm()
