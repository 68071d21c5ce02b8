"""A student on disk is the student in memory, however it was saved and however it is loaded."""

import json

import pytest
import torch
from diffusers import (
    AutoModel,
    AutoPipelineForText2Image,
    DiffusionPipeline,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxImg2ImgPipeline,
    FluxPipeline,
)
from safetensors.torch import load_file

import linearize
from export.conftest import CALL, NUM_SITES, draw, make_student, num_mixers
from linearize import LinearFluxTransformer2DModel, load_pipeline
from linearize.errors import LinearizeError
from linearize.export import export_student
from linearize.mixers.clear import ClearMixer
from linearize.surgery import trained_parameters


def test_the_student_differs_from_its_teacher(tiny_pipeline, picture):
    assert draw(tiny_pipeline) != picture


@pytest.mark.parametrize("form", ["local", "standalone"])
def test_load_pipeline_takes_both_forms(folders, form, picture):
    pipeline = load_pipeline(folders[form])
    assert type(pipeline) is FluxPipeline and type(pipeline.transformer) is LinearFluxTransformer2DModel
    assert num_mixers(pipeline) == NUM_SITES
    assert draw(pipeline) == picture


def test_a_stock_pipeline_takes_the_student_as_its_transformer(folders, tiny_flux_folder, picture, tmp_path):
    transformer = LinearFluxTransformer2DModel.from_pretrained(folders["local"] / "transformer")
    pipeline = AutoPipelineForText2Image.from_pretrained(tiny_flux_folder, transformer=transformer)
    assert draw(pipeline) == picture
    pipeline.save_pretrained(tmp_path / "again")
    assert draw(load_pipeline(tmp_path / "again")) == picture


def test_from_pipe_needs_the_transformer_named(student):
    """diffusers carries over components by exact type, so the student has to be passed."""
    pipeline = FluxImg2ImgPipeline.from_pipe(student, transformer=student.transformer)
    assert num_mixers(pipeline) == NUM_SITES


def test_a_bfloat16_student_comes_back_bit_for_bit(tiny_flux_folder, tmp_path):
    """What trains is float32 in memory and stored in the dtype of the rest."""
    pipeline = make_student(tiny_flux_folder).to(torch.bfloat16)
    expected = draw(pipeline)
    trained = trained_parameters(pipeline.transformer)
    for parameter in trained.values():
        parameter.data = parameter.data.float()
    export_student(pipeline, tmp_path / "student")
    loaded = load_pipeline(tmp_path / "student", torch_dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.transformer.parameters()} == {torch.bfloat16}
    assert draw(loaded) == expected
    stored = load_file(tmp_path / "student" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}


def test_big_students_are_sharded(student, picture, tmp_path):
    folder = export_student(student, tmp_path / "student", max_shard_size="100KB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 1
    assert draw(load_pipeline(folder)) == picture


def test_a_student_without_text_encoders(student, tmp_path):
    """A random full-size teacher has none; its student is drawn from embeddings."""
    absent = dict.fromkeys(["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"])
    pipeline = FluxPipeline(**{**student.components, **absent})
    loaded = load_pipeline(export_student(pipeline, tmp_path / "student"))
    assert loaded.text_encoder is None and num_mixers(loaded) == NUM_SITES
    generator = torch.Generator().manual_seed(0)
    embeddings = {
        "prompt_embeds": torch.randn(1, 16, 32, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, 32, generator=generator),
    }
    call = {**CALL, **embeddings, "prompt": None, "output_type": "pt"}
    first, second = (one(**call, generator=torch.Generator().manual_seed(0)).images for one in (pipeline, loaded))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)


def test_a_pipeline_whose_transformer_was_linearized_saves_the_student(tiny_pipeline, tmp_path):
    """Row H: the pipeline has noted the stock class when it was loaded, and a stale note would load as softmax."""
    linearize.linearize(tiny_pipeline.transformer, mixer="clear", window=2)
    expected = draw(tiny_pipeline)
    tiny_pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["transformer"] == [
        "linearize",
        "LinearFluxTransformer2DModel",
    ]
    for loaded in (DiffusionPipeline.from_pretrained(tmp_path), load_pipeline(tmp_path)):
        assert num_mixers(loaded) == 4
        assert draw(loaded) == expected


def test_a_compiled_student_is_saved_as_the_student(student, picture, tmp_path):
    compiled = FluxPipeline(**student.components)
    compiled.transformer = torch.compile(student.transformer, backend="eager")
    compiled.save_pretrained(tmp_path / "saved")
    export_student(compiled, tmp_path / "exported")
    for folder in (tmp_path / "saved", tmp_path / "exported"):
        assert draw(load_pipeline(folder)) == picture


def test_a_transformer_alone_is_saved_as_the_student(student, tmp_path):
    student.transformer.save_pretrained(tmp_path)
    again = LinearFluxTransformer2DModel.from_pretrained(tmp_path)
    assert sum(isinstance(module, ClearMixer) for module in again.modules()) == NUM_SITES
    with pytest.raises((ValueError, AttributeError, OSError)):  # diffusers has no class of this name
        AutoModel.from_pretrained(tmp_path)


def test_what_would_not_load_is_not_saved(tiny_pipeline, tiny_flux_folder, tmp_path):
    linearize.linearize(tiny_pipeline, mixer="clear", window=2)
    with pytest.raises(LinearizeError, match="only safetensors"):
        tiny_pipeline.transformer.save_pretrained(tmp_path / "pickle", safe_serialization=False)
    stock = FluxPipeline.from_pretrained(tiny_flux_folder).transformer
    tiny_pipeline.transformer.transformer_blocks[0].attn = stock.transformer_blocks[0].attn
    for save in (tiny_pipeline.save_pretrained, lambda folder: export_student(tiny_pipeline, folder)):
        with pytest.raises(LinearizeError, match="no longer what its plan says"):
            save(tmp_path / "replaced")
    assert not list(tmp_path.rglob("transformer/*")) and not list(tmp_path.rglob("model_index.json"))


def test_lora_of_the_teacher_loads_fuses_and_unloads(student, picture):
    """Row N: adapters go into the projections and leave the mixers alone."""
    from peft import LoraConfig

    pipeline = FluxPipeline(**student.components)
    pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    assert num_mixers(pipeline) == NUM_SITES
    assert draw(pipeline) != picture
    with pytest.raises(LinearizeError, match="unload or fuse adapters"):
        export_student(pipeline, "never_written")
    pipeline.unload_lora_weights()
    assert draw(pipeline) == picture


def test_controlnet_made_from_the_student_runs_with_it(student):
    """Row O: a ControlNet starts with zero residuals, so the picture stays what it was."""
    sizes = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16}
    controlnet = FluxControlNetModel.from_transformer(student.transformer, **sizes).eval()
    parts = {name: part for name, part in student.components.items() if part is not None}
    pipeline = FluxControlNetPipeline(**parts, controlnet=controlnet)
    generator = torch.Generator().manual_seed(2)
    latents, control = torch.randn(1, 8 * 12, 16, generator=generator), torch.rand(1, 3, 64, 96, generator=generator)
    assert draw(pipeline, latents=latents, control_image=control) == draw(student, latents=latents)


def test_ip_adapter_is_refused_and_changes_nothing(student, picture):
    """Row P: it would put softmax processors where the mixers are."""
    pipeline = FluxPipeline(**student.components)
    weights = {"image_proj": {"proj.weight": torch.zeros(8, 4)}, "ip_adapter": {"0.to_k_ip.weight": torch.zeros(8, 8)}}
    with pytest.raises(LinearizeError, match="IP-Adapter"):
        pipeline.load_ip_adapter(weights, weight_name="none", image_encoder_pretrained_model_name_or_path=None)
    assert num_mixers(pipeline) == NUM_SITES and draw(pipeline) == picture


@pytest.mark.parametrize("asked", [{}, {"dtype": torch.float32}, {"variant": "bf16"}], ids=str)
def test_all_parts_of_a_loaded_student_are_of_one_dtype(tiny_flux_folder, tmp_path, asked):
    """As a run on a GPU stores it: the libraries' own defaults would mix float32 and bfloat16."""
    pipeline = FluxPipeline.from_pretrained(tiny_flux_folder, dtype=torch.bfloat16)
    linearize.linearize(pipeline, mixer="clear", window=2)
    if "variant" in asked:
        pipeline.save_pretrained(tmp_path, **asked)
    else:
        export_student(pipeline, tmp_path)
    loaded = load_pipeline(tmp_path, **asked)
    parts = (loaded.transformer, loaded.vae, loaded.text_encoder, loaded.text_encoder_2)
    assert {part.dtype for part in parts} == {asked.get("dtype", torch.bfloat16)}
    draw(loaded)
