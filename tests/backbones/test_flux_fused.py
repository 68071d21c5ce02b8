"""Fewer products and passes in compiled FLUX blocks: the same parameters, the same results."""

import copy

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from linearize.backbones import find_backbone
from linearize.backbones.flux_fused import PackedLinears, _joint_linear, linear_gelu, project
from linearize.compilation import compile_blocks
from linearize.surgery import linearize, share_student


def layers_of(*widths, channels=6):
    torch.manual_seed(0)
    return [nn.Linear(channels, width).requires_grad_(False) for width in widths]


def test_packed_layers_are_one_product_of_the_same_parameters():
    layers = layers_of(4, 7, 3)
    states = torch.randn(2, 5, 6)
    expected = [layer(states) for layer in layers]
    parameters, before = [layer.weight for layer in layers], copy.deepcopy(layers)
    packed = PackedLinears(layers)
    torch.testing.assert_close(list(packed(states)), expected)
    assert all(layer.weight is parameter for layer, parameter in zip(layers, parameters, strict=True))
    assert all(torch.equal(layer.bias, old.bias) for layer, old in zip(layers, before, strict=True))
    # What changes them in place changes the product.
    layers[1].load_state_dict({name: value + 1 for name, value in layers[1].state_dict().items()})
    torch.testing.assert_close(packed(states)[1], layers[1](states))


def test_layers_that_are_packed_twice_lie_in_one_place():
    layers = layers_of(4, 7, 3)
    first, second = PackedLinears(layers), PackedLinears(layers)
    for one, other in ((first.weight, second.weight), (first.bias, second.bias)):
        assert one.data_ptr() == other.data_ptr() and torch.equal(one, other)
    part = PackedLinears(layers[1:])
    assert torch.equal(part.weight, first.weight[4:]) and part.weight.data_ptr() == first.weight[4:].data_ptr()


def test_packed_layers_serve_no_others():
    layers = layers_of(4, 7)
    packed = PackedLinears(layers)
    assert packed.serves(layers)
    assert not packed.serves(layers[::-1])
    layers[0].weight = nn.Parameter(layers[0].weight.clone(), requires_grad=False)
    assert not packed.serves(layers)
    trained = layers_of(4, 7)
    packed = PackedLinears(trained)
    trained[1].requires_grad_(True)
    assert not packed.serves(trained) and not PackedLinears.takes(trained)
    assert not PackedLinears.takes([nn.Linear(3, 3, bias=False).requires_grad_(False)])
    assert copy.deepcopy([packed]) == [None]


def test_sites_pack_what_does_not_train_until_it_moves(untouched):
    student = share_student(untouched, [{"layers": "*", "mixer": "clear", "window": 3}])
    site = student.transformer_blocks[0].attn
    before = {name: value.clone() for name, value in student.state_dict().items()}
    site.pack()
    own, text = site.packed
    assert own is None and text.serves([site.add_q_proj, site.add_k_proj, site.add_v_proj])
    after = student.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert copy.deepcopy(student).transformer_blocks[0].attn.packed == (None, None)
    student.double()
    assert site.packed == (None, None)


def test_a_packed_student_is_saved(untouched, tmp_path):
    linearize(untouched, "clear", window=3)
    untouched.requires_grad_(False)
    for site in find_backbone(untouched).sites(untouched).values():
        site.pack()
    untouched.save_pretrained(tmp_path)
    loaded = type(untouched).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in untouched.state_dict().items())


def test_layers_of_one_input_and_of_two():
    states, (first, second) = torch.randn(2, 5, 6), layers_of(4, 4)
    assert all(map(torch.equal, project(states, [first, second], None), (first(states), second(states))))
    joint = nn.Linear(9, 4)
    one, two = torch.randn(7, 6), torch.randn(7, 3)
    found = _joint_linear(one, two, joint.weight.detach(), joint.bias.detach())
    torch.testing.assert_close(found, joint(torch.cat([one, two], dim=1)))
    torch.library.opcheck(_joint_linear, (one, two, joint.weight.detach(), joint.bias.detach()))
    torch.testing.assert_close(linear_gelu(first, states), nn.functional.gelu(first(states), approximate="tanh"))


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("mixer", ["softmax", "clear"])
def test_on_a_gpu_compiled_blocks_compute_what_eager_ones_do(mixer):
    torch.manual_seed(0)
    student = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        num_attention_heads=2,
        attention_head_dim=64,
        axes_dims_rope=(16, 24, 24),
        joint_attention_dim=32,
        pooled_projection_dim=24,
    ).to("cuda", torch.bfloat16)
    linearize(student, mixer, **({"window": 5} if mixer == "clear" else {}))
    student.requires_grad_(False)
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(24.0), torch.arange(40.0)).cuda()
    call = {
        "hidden_states": torch.randn(2, 960, 16, device="cuda", dtype=torch.bfloat16),
        "encoder_hidden_states": torch.randn(2, 9, 32, device="cuda", dtype=torch.bfloat16),
        "pooled_projections": torch.randn(2, 24, device="cuda", dtype=torch.bfloat16),
        "timestep": torch.full((2,), 0.5, device="cuda", dtype=torch.bfloat16),
        "img_ids": ids,
        "txt_ids": torch.zeros(9, 3, device="cuda"),
        "return_dict": False,
    }
    expected = student(**call)[0].float()
    compile_blocks(student, "inductor")
    found = student(**call)[0].float()
    assert student.transformer_blocks[0].attn.packed[0] is not None
    assert (found - expected).norm() < 0.02 * expected.norm()
