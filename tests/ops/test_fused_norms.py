"""Norms fused with what follows; by TRITON_INTERPRET=1 python tests/ops/test_fused_norms.py where there is no GPU."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch.nn.functional import layer_norm, rms_norm

from linearize.ops.fused_norms import norm_modulate, norm_rotate


def rotation_errors(num_tokens=(5, 0, 13), num_heads=3, head_dim=32, dtype=torch.float32, device="cpu"):
    """Relative errors of query, key and their gradients; the query lies within a wider tensor."""
    torch.manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, dtype=dtype, device=device)

    wide = [random(2, count, 3 * num_heads * head_dim) for count in num_tokens]
    queries = [states.chunk(3, dim=-1)[1].unflatten(-1, (num_heads, head_dim)) for states in wide]
    keys = [random(2, count, num_heads, head_dim) for count in num_tokens]
    inputs = [states.detach().requires_grad_() for states in (*queries, *keys)]
    queries, keys = inputs[: len(num_tokens)], inputs[len(num_tokens) :]
    exact = [states.detach().double().requires_grad_() for states in inputs]
    weights = [[random(head_dim) for _ in num_tokens] for _ in range(2)]
    angles = torch.rand(sum(num_tokens), head_dim // 2, device=device).repeat_interleave(2, dim=-1)
    cosine, sine = angles.cos(), angles.sin()
    found = norm_rotate(queries, keys, *weights, cosine, sine, 1e-6)
    errors = []
    slopes = [random(*result.shape) for result in found]
    wanted = []
    for result, streams, norms in zip(
        found, (exact[: len(num_tokens)], exact[len(num_tokens) :]), weights, strict=True
    ):
        parts = zip(streams, norms, strict=True)
        normed = torch.cat([rms_norm(states, (head_dim,), norm.double(), 1e-6) for states, norm in parts], 1)
        expected = apply_rotary_emb(normed, (cosine.double(), sine.double()), sequence_dim=1)
        errors.append(relative(result, expected))
        wanted.append(expected)
    gradients = torch.autograd.grad(found, inputs, slopes)
    expected = torch.autograd.grad(wanted, exact, [slope.double() for slope in slopes])
    return errors + [relative(*pair) for pair in zip(gradients, expected, strict=True) if pair[0].numel()]


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def modulation_error(num_tokens=(5, 0, 13), num_channels=96, dtype=torch.float32, device="cpu"):
    """Relative error; the streams lie within one tensor, and scale and shift in another, as in FLUX's blocks."""
    torch.manual_seed(0)
    joined = 3 + torch.randn(2, sum(num_tokens), num_channels, dtype=dtype, device=device)
    shift, scale, _ = torch.randn(2, 3 * num_channels, dtype=dtype, device=device).chunk(3, dim=1)
    found = norm_modulate(list(joined.split(num_tokens, dim=1)), scale, shift, 1e-6)
    normed = layer_norm(joined.double(), (num_channels,), eps=1e-6)
    expected = normed * (1 + scale.double()[:, None]) + shift.double()[:, None]
    return relative(found, expected)


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or torch.cuda.is_available(), reason="needs triton, and no GPU"
)
def test_the_kernels_by_the_interpreter_are_exact():
    run = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        check=True,
    )
    errors = [float(error) for error in run.stdout.splitlines()[-1].split()]
    assert len(errors) == 2 + 2 * 2 + 1 and all(error < 1e-6 for error in errors)


@pytest.mark.gpu
@pytest.mark.parametrize(("num_heads", "head_dim"), [(24, 128), (3, 64), (5, 32)])
def test_the_kernel_on_a_gpu_is_as_exact_as_its_dtype(num_heads, head_dim):
    sizes = {"num_tokens": (77, 300), "num_heads": num_heads, "head_dim": head_dim, "device": "cuda"}
    assert all(error < 5e-3 for error in rotation_errors(**sizes, dtype=torch.bfloat16))
    torch.library.opcheck(
        norm_rotate,
        (
            *[[torch.randn(1, 9, 2, 32, device="cuda", dtype=torch.bfloat16)]] * 2,
            *[[torch.randn(32, device="cuda", dtype=torch.bfloat16)]] * 2,
            *[torch.randn(9, 32, device="cuda")] * 2,
            1e-6,
        ),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("num_channels", [3072, 192])
def test_modulation_on_a_gpu_is_as_exact_as_its_dtype(num_channels):
    found = modulation_error((77, 300), num_channels, torch.bfloat16, "cuda")
    assert found < 5e-3
    states, row = torch.randn(1, 9, 64, device="cuda"), torch.randn(1, 64, device="cuda")
    torch.library.opcheck(norm_modulate, ([states], row, row, 1e-6), test_utils=("test_schema", "test_faketensor"))


if __name__ == "__main__":
    print(*rotation_errors(), modulation_error())
