"""A student with any mixer comes back from the disk as it was: the same velocity, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from torch import Tensor

from linearize.backbones import find_backbone
from linearize.export import export_student, load_pipeline
from linearize.mixers import mixer_names
from linearize.mounting import export_mixer, mount_mixer
from linearize.surgery import linearize, trained_parameters

ABSENT = dict.fromkeys(["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"])
# 9 x 14 tokens
HEIGHT, WIDTH = 18, 28


@pytest.fixture
def base(tiny_flux_folder: Path) -> FluxPipeline:
    """The tiny pipeline without its text encoders."""
    return FluxPipeline.from_pretrained(tiny_flux_folder, **ABSENT)


def make_student(pipeline: FluxPipeline, mixer: str) -> FluxPipeline:
    """The pipeline as a student whose trained tensors have moved."""
    linearize(pipeline, mixer)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained_parameters(pipeline.transformer).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return pipeline


def velocity(pipeline: Any) -> Tensor:
    """Of a picture that is not square; weights are copied first, as sums depend on the alignment of memory."""
    transformer = pipeline.transformer
    for tensor in (*transformer.parameters(), *transformer.buffers()):
        tensor.data = tensor.data.clone()
    generator = torch.Generator().manual_seed(2)
    shapes = {"prompt_embeds": (1, 5, 32), "pooled_prompt_embeds": (1, 32)}
    conditioning = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    latents = torch.randn(1, 4, HEIGHT, WIDTH, generator=generator)
    guidance = {"guidance": torch.full((1,), 3.5)}
    with torch.no_grad():
        return find_backbone(transformer).predict(
            transformer, latents, torch.full((1,), 0.6), {**conditioning, **guidance}
        )


@pytest.mark.parametrize("mixer", mixer_names())
def test_an_exported_student_comes_back_bit_for_bit(base, mixer, tmp_path):
    student = make_student(base, mixer)
    expected = velocity(student)
    loaded = load_pipeline(export_student(student, tmp_path / "student"))
    assert expected.isfinite().all() and torch.equal(velocity(loaded), expected)
    assert loaded.transformer.config.linearize_plan == student.transformer.config.linearize_plan


@pytest.mark.parametrize("mixer", mixer_names())
def test_a_mixer_alone_mounts_on_its_base(base, tiny_flux_folder, mixer, tmp_path):
    student = make_student(base, mixer)
    folder = export_mixer(student, tmp_path / "mixer", base_model="tiny")
    mounted = FluxPipeline.from_pretrained(tiny_flux_folder, **ABSENT)
    torch.manual_seed(3)
    mount_mixer(mounted, folder)
    assert torch.equal(velocity(mounted), velocity(student))


def test_a_hybrid_s_standalone_form_loads_by_its_own_class(base, tmp_path):
    student = make_student(base, "lolcats")
    folder = export_student(student, tmp_path / "student", form="standalone")
    loaded = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **ABSENT)
    assert type(loaded.transformer) is type(student.transformer)
    expected = velocity(student)
    for pipeline in (loaded, load_pipeline(folder)):
        assert torch.equal(velocity(pipeline), expected)
