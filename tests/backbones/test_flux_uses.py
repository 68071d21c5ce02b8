"""What diffusers, peft and PyTorch do with a transformer, they do with a student."""

import copy
import pickle

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from peft import LoraConfig

import linearize
from backbones.flux_inputs import flux_inputs, sites
from linearize.backbones.flux_site import LinearFluxAttention
from linearize.errors import LinearizeError
from linearize.surgery import share_student


def test_gradient_checkpointing_changes_neither_output_nor_gradients(student):
    results = []
    for checkpointing in (False, True):
        transformer = student("clear", window=3, downsample=2).train()
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        output = transformer(**flux_inputs())[0]
        output.square().mean().backward()
        results.append([output, *(parameter.grad for parameter in transformer.parameters())])
    for with_, without in zip(*results, strict=True):
        assert torch.equal(with_, without)


@torch.no_grad()
def test_deepcopy_and_pickle_keep_the_student(student, predict):
    transformer = student("clear", window=3, downsample=2)
    for twin in (copy.deepcopy(transformer), pickle.loads(pickle.dumps(transformer))):
        assert type(twin) is linearize.LinearFluxTransformer2DModel
        assert torch.equal(predict(twin), predict(transformer))


@torch.no_grad()
def test_save_and_load_is_the_same_student(student, predict, tmp_path):
    transformer = student(
        None,
        plan=[
            {"layers": "transformer_blocks.*", "mixer": "clear", "window": 3, "downsample": 2},
            {"layers": "single_transformer_blocks.1.attn", "mixer": "clear", "window": 5},
        ],
    )
    for site in sites(transformer).values():
        for parameter in site.mixer.parameters():
            parameter.normal_()
    transformer.save_pretrained(tmp_path)
    loaded = linearize.LinearFluxTransformer2DModel.from_pretrained(tmp_path)
    assert loaded.config.linearize_plan == transformer.config.linearize_plan
    assert torch.equal(predict(loaded), predict(transformer))


def test_no_processor_can_take_a_mixers_place(student):
    transformer = student("clear")
    processors = transformer.attn_processors
    attempts = [
        lambda: transformer.set_attn_processor(FluxAttnProcessor()),
        lambda: transformer.set_attn_processor(dict(processors)),
        lambda: sites(transformer)["transformer_blocks.0.attn"].set_processor(FluxAttnProcessor()),
        lambda: transformer._load_ip_adapter_weights([{"image_proj": {}, "ip_adapter": {}}]),
    ]
    for attempt in attempts:
        with pytest.raises(LinearizeError, match="takes no attention processors and no IP-Adapter"):
            attempt()
    assert transformer.attn_processors == processors
    assert all(type(site) is LinearFluxAttention for site in sites(transformer).values())


def test_an_attention_mask_is_refused(student):
    with pytest.raises(LinearizeError, match="takes no attention_mask"):
        student("clear")(**flux_inputs(), joint_attention_kwargs={"attention_mask": torch.ones(2, 176)})


@torch.no_grad()
@pytest.mark.parametrize("mixer", ["softmax", "clear"])
def test_fused_projections_and_attention_backends_work(student, predict, mixer):
    transformer = student(mixer)
    expected = predict(transformer)
    transformer.fuse_qkv_projections()
    torch.testing.assert_close(predict(transformer), expected, rtol=1e-5, atol=1e-6)
    transformer.unfuse_qkv_projections()
    transformer.set_attention_backend("_native_math")
    try:
        assert {site.processor._attention_backend for site in sites(transformer).values()} == {"_native_math"}
        torch.testing.assert_close(predict(transformer), expected, rtol=1e-5, atol=1e-6)
    finally:
        # diffusers keeps the last choice for the whole process.
        transformer.set_attention_backend("native")
    assert torch.equal(predict(transformer), expected)


@pytest.mark.parametrize(("mixer", "fullgraph"), [("softmax", True), ("clear", False)])
def test_compiled_blocks_compute_the_same(student, predict, mixer, fullgraph):
    transformer = student(mixer)
    expected = predict(transformer)
    gradients = torch.autograd.grad(expected.sum(), list(transformer.parameters()), allow_unused=True)
    transformer.compile_repeated_blocks(fullgraph=fullgraph, backend="eager")
    compiled = predict(transformer)
    torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-6)
    again = torch.autograd.grad(compiled.sum(), list(transformer.parameters()), allow_unused=True)
    torch.testing.assert_close(again, gradients, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


@torch.no_grad()
@pytest.mark.parametrize("mixer", ["softmax", "clear"])
def test_lora_loads_scales_fuses_and_unloads(student, predict, mixer):
    transformer = student(mixer)
    expected = predict(transformer)
    torch.manual_seed(3)
    transformer.add_adapter(
        LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "to_out.0", "add_q_proj"])
    )
    adapted = predict(transformer)
    assert (adapted - expected).abs().max() > 1e-3
    inputs = flux_inputs()
    off = transformer(**inputs, joint_attention_kwargs={"scale": 0.0})[0]
    transformer.fuse_lora()
    torch.testing.assert_close(predict(transformer), adapted, rtol=1e-4, atol=1e-5)
    transformer.unfuse_lora()
    transformer.unload_lora()
    torch.testing.assert_close(predict(transformer), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(off, transformer(**inputs)[0], rtol=1e-5, atol=1e-6)
    assert all(type(site) is LinearFluxAttention for site in sites(transformer).values())


@torch.no_grad()
def test_autocast_runs_a_bf16_student_with_float32_trained_weights(untouched):
    teacher = copy.deepcopy(untouched).bfloat16()
    transformer = share_student(teacher, [{"layers": "*", "mixer": "clear", "window": 3, "downsample": 2}])
    inputs = {
        key: value.bfloat16() if torch.is_tensor(value) and "ids" not in key else value
        for key, value in flux_inputs().items()
    }
    with torch.autocast("cpu", torch.bfloat16):
        assert transformer(**inputs)[0].isfinite().all()
