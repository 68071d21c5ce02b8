"""A tiny student, its picture, and the folders it is exported to."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline

import linearize
from linearize.export import export_student
from linearize.mixers.clear import ClearMixer
from linearize.surgery import trained_parameters

CALL = {"prompt": "a red circle", "height": 64, "width": 96, "num_inference_steps": 2, "max_sequence_length": 16}
CALL |= {"guidance_scale": 3.5}  # the ControlNet pipeline has another default
LAYERS = ["transformer_blocks.*", "single_transformer_blocks.0.attn"]
NUM_SITES = 3


def draw(pipeline: DiffusionPipeline, **extra: torch.Tensor) -> str:
    """The SHA-256 of one picture's floats: equal hashes are equal pictures, to the bit.

    Weights are copied first: sums on a CPU depend on the alignment of memory, and mapped files have their own.
    """
    pipeline.set_progress_bar_config(disable=True)
    for part in (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        for parameter in part.parameters():
            parameter.data = parameter.data.clone()
    generator = torch.Generator().manual_seed(0)
    image = pipeline(**CALL, **extra, generator=generator, output_type="pt").images.float()
    assert image.shape == (1, 3, 64, 96) and image.isfinite().all()
    return hashlib.sha256(image.numpy().tobytes()).hexdigest()


def num_mixers(pipeline: DiffusionPipeline) -> int:
    return sum(isinstance(module, ClearMixer) for module in pipeline.transformer.modules())


def make_student(folder: Path) -> FluxPipeline:
    """A linearized pipeline whose trained weights have moved."""
    pipeline = FluxPipeline.from_pretrained(folder)
    linearize.linearize(pipeline, mixer="clear", window=2, layers=LAYERS)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained_parameters(pipeline.transformer).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return pipeline


@pytest.fixture(scope="session")
def student(tiny_flux_folder) -> FluxPipeline:
    return make_student(tiny_flux_folder)


@pytest.fixture(scope="session")
def picture(student) -> str:
    return draw(student)


@pytest.fixture(scope="session")
def folders(student, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("students")
    return {form: export_student(student, root / form, form=form) for form in ("local", "standalone")}


@pytest.fixture
def copied(folders, tmp_path) -> Path:
    """A copy of the local form that a test may damage."""
    return Path(shutil.copytree(folders["local"], tmp_path / "student"))


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
