"""Fewer passes in compiled FLUX blocks: the same parameters, the same results."""

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from torch import nn

from linearize.backbones.flux_fused import _joint_linear, linear_gelu
from linearize.compilation import compile_blocks
from linearize.surgery import linearize, share_student, trained_parameters


def test_a_product_of_two_inputs_is_that_of_one():
    joint = nn.Linear(9, 4).requires_grad_(False)
    first, second = torch.randn(7, 6), torch.randn(7, 3)
    found = _joint_linear(first, second, joint.weight, joint.bias)
    torch.testing.assert_close(found, joint(torch.cat([first, second], dim=1)))
    torch.library.opcheck(_joint_linear, (first, second, joint.weight, joint.bias))


def test_outside_of_a_compiler_layers_are_themselves(teacher):
    layer, states = nn.Linear(6, 5), torch.randn(2, 3, 6)
    assert torch.equal(linear_gelu(layer, states), nn.functional.gelu(layer(states), approximate="tanh"))
    before = teacher.state_dict()
    linearize(teacher, "softmax")
    assert before.keys() == teacher.state_dict().keys()


def test_diffusers_knows_the_blocks(student, predict):
    transformer = student(window=3)
    blocks = {type(block).__name__ for block in transformer.single_transformer_blocks}
    assert blocks <= set(transformer._repeated_blocks) & set(transformer._get_no_split_modules("auto"))
    with torch.no_grad():
        expected = predict(transformer)
        transformer.enable_cache(FirstBlockCacheConfig(threshold=1e-9))
        with transformer.cache_context("call"):
            assert torch.equal(predict(transformer), expected)
            torch.testing.assert_close(predict(transformer), expected)  # from the cache, as sums with what blocks add


# Rows of 40 tokens, and text tokens: cut tiles and whole ones.
SIZES = [(24, 9), (32, 128)]


def gpu_call(rows, num_text_tokens):
    """Inputs of a small transformer."""
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(float(rows)), torch.arange(40.0)).cuda()
    return {
        "hidden_states": torch.randn(2, len(ids), 16, device="cuda", dtype=torch.bfloat16),
        "encoder_hidden_states": torch.randn(2, num_text_tokens, 32, device="cuda", dtype=torch.bfloat16),
        "pooled_projections": torch.randn(2, 24, device="cuda", dtype=torch.bfloat16),
        "timestep": torch.full((2,), 0.5, device="cuda", dtype=torch.bfloat16),
        "img_ids": ids,
        "txt_ids": torch.zeros(num_text_tokens, 3, device="cuda"),
        "return_dict": False,
    }


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mixer", ["softmax", "clear"])
def test_on_a_gpu_compiled_blocks_compute_what_eager_ones_do(gpu_transformer, mixer, size):
    student = gpu_transformer
    linearize(student, mixer, **({"window": 5} if mixer == "clear" else {}))
    student.requires_grad_(False)
    call = gpu_call(*size)
    expected = student(**call)[0].float()
    compile_blocks(student, "inductor")
    found = student(**call)[0].float()
    assert (found - expected).norm() < 0.02 * expected.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES)
def test_on_a_gpu_compiled_blocks_have_the_gradients_of_eager_ones(gpu_transformer, size):
    student = share_student(gpu_transformer, [{"layers": "*", "mixer": "clear", "window": 5}])
    call = gpu_call(*size)
    parameters = list(trained_parameters(student).values())

    def gradients():
        with torch.autocast("cuda", torch.bfloat16):
            output = student(**call)[0].float()
        return torch.autograd.grad(output.square().mean(), parameters)

    expected = gradients()
    compile_blocks(student, "inductor")
    for found, wanted in zip(gradients(), expected, strict=True):
        assert (found - wanted).norm() < 0.05 * wanted.norm()
