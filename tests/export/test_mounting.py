"""A mixer alone, as a file for whoever has the teacher."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import (
    FluxPipeline,
)
from safetensors.torch import load_file, save_file

from export.conftest import NUM_SITES, draw, edit_json, make_student, num_mixers
from linearize.errors import LinearizeError
from linearize.mounting import export_mixer, mount_mixer


@pytest.fixture
def mixer_folder(student, tmp_path) -> Path:
    return export_mixer(student, tmp_path / "mixer", base_model="tiny")


def test_a_mounted_mixer_is_the_student(mixer_folder, tiny_pipeline, picture):
    assert sorted(file.name for file in mixer_folder.iterdir()) == ["mixer.json", "mixer.safetensors"]
    report = mount_mixer(tiny_pipeline, mixer_folder)
    assert len(report.sites) == num_mixers(tiny_pipeline) == NUM_SITES
    assert draw(tiny_pipeline) == picture
    with pytest.raises(LinearizeError, match="student already"):
        mount_mixer(tiny_pipeline, mixer_folder)


def test_a_mixer_is_mounted_on_its_base_alone(mixer_folder, tiny_pipeline, picture):
    with torch.no_grad():
        tiny_pipeline.transformer.proj_out.bias += 1
    with pytest.raises(LinearizeError, match="not those of tiny"):
        mount_mixer(tiny_pipeline, mixer_folder)
    assert num_mixers(tiny_pipeline) == 0
    mount_mixer(tiny_pipeline, mixer_folder, same_base=False)
    assert num_mixers(tiny_pipeline) == NUM_SITES
    assert draw(tiny_pipeline) != picture


def test_a_mixer_mounts_on_its_base_in_another_dtype(mixer_folder, tiny_flux_folder):
    pipeline = FluxPipeline.from_pretrained(tiny_flux_folder, dtype=torch.bfloat16)
    mount_mixer(pipeline, mixer_folder)
    assert num_mixers(pipeline) == NUM_SITES


def _drop(tensors):
    tensors.popitem()


def _add(tensors):
    tensors["proj_out.weight"] = torch.zeros(1)


def _reshape(tensors):
    name = next(iter(tensors))
    tensors[name] = tensors[name][..., :-1].clone()


@pytest.mark.parametrize(
    ("damage", "message"), [(_drop, "lacks the tensor"), (_add, "that its plan has not"), (_reshape, "of shape")]
)
def test_mixer_tensors_are_strict(mixer_folder, tiny_pipeline, damage, message):
    tensors = load_file(mixer_folder / "mixer.safetensors")
    damage(tensors)
    save_file(tensors, mixer_folder / "mixer.safetensors")
    with pytest.raises(LinearizeError, match=message):
        mount_mixer(tiny_pipeline, mixer_folder)
    assert type(tiny_pipeline.transformer).__name__ == "FluxTransformer2DModel"


def test_mixer_folders_that_do_not_fit(mixer_folder, tiny_pipeline, tmp_path):
    with pytest.raises(LinearizeError, match="no folder"):
        mount_mixer(tiny_pipeline, tmp_path / "absent")
    spec = json.loads((mixer_folder / "mixer.json").read_text())
    base = {**spec["base"], "architecture": {**spec["base"]["architecture"], "num_layers": 19}}
    edit_json(mixer_folder / "mixer.json", base=base)
    with pytest.raises(LinearizeError, match="num_layers=2 and the mixer was trained for tiny with num_layers=19"):
        mount_mixer(tiny_pipeline, mixer_folder)
    edit_json(mixer_folder / "mixer.json", **spec)
    file = mixer_folder / "mixer.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(LinearizeError, match="missing or damaged"):
        mount_mixer(tiny_pipeline, mixer_folder)
    edit_json(mixer_folder / "mixer.json", format=99)
    with pytest.raises(LinearizeError, match="no mixer export of format 1"):
        mount_mixer(tiny_pipeline, mixer_folder)
    assert num_mixers(tiny_pipeline) == 0


def test_a_student_with_adapters_is_not_written_in_part(tiny_flux_folder, tmp_path):
    from peft import LoraConfig

    pipeline = make_student(tiny_flux_folder)
    pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    with pytest.raises(LinearizeError, match="unload or fuse adapters"):
        export_mixer(pipeline, tmp_path / "mixer", base_model="tiny")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes", [{"base": [1]}, {"base": {}}, {"plan": "clear"}, {"plan": [{"mixer": "clear"}]}], ids=str
)
def test_a_damaged_spec_is_told(mixer_folder, tiny_pipeline, changes):
    edit_json(mixer_folder / "mixer.json", **changes)
    with pytest.raises(LinearizeError, match="export the"):
        mount_mixer(tiny_pipeline, mixer_folder)
