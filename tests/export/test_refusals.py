"""What is no student is neither written nor read, and nothing is lost or left in part."""

import json
import shutil
import sys

import pytest
from diffusers import FluxImg2ImgPipeline

from export.conftest import draw, edit_json
from linearize import load_pipeline
from linearize.errors import LinearizeError
from linearize.export import export_student
from linearize.mounting import export_mixer


def test_only_students_are_exported(tiny_pipeline, student, tmp_path):
    with pytest.raises(LinearizeError, match="FluxTransformer2DModel, which is no student"):
        export_student(tiny_pipeline, tmp_path / "student")
    with pytest.raises(LinearizeError, match="use local or standalone"):
        export_student(tiny_pipeline, tmp_path / "student", form="zip")
    with pytest.raises(LinearizeError, match="opens a FluxPipeline, not a FluxImg2ImgPipeline"):
        export_student(FluxImg2ImgPipeline(**student.components), tmp_path / "student")
    assert not list(tmp_path.iterdir())


def test_an_export_that_fails_leaves_the_old_one(student, picture, tmp_path):
    folder = export_student(student, tmp_path / "student")
    with pytest.raises(ValueError, match="no size"):
        export_student(student, folder, max_shard_size="no size")
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    assert draw(load_pipeline(folder)) == picture


@pytest.mark.parametrize("export", [export_student, lambda *given: export_mixer(*given, base_model="tiny")])
def test_nothing_but_an_older_export_is_replaced(student, tiny_flux_folder, tmp_path, monkeypatch, export):
    models, link = tmp_path / "models", tmp_path / "link"
    shutil.copytree(tiny_flux_folder, models)
    (tmp_path / "file").write_text("mine")
    for taken in (tmp_path, models, tmp_path / "file"):
        with pytest.raises(LinearizeError, match="holds something else"):
            export(student, taken)
    (tmp_path / "scratch").mkdir()
    link.symlink_to(tmp_path / "scratch")
    export(student, link)
    export(student, link)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "models", "scratch"]
    assert link.is_symlink() and any(link.iterdir())
    monkeypatch.chdir(models)
    with pytest.raises(LinearizeError, match="holds something else"):
        export(student, ".")


def test_no_room_on_the_disk_is_said_before_anything_is_written(student, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(LinearizeError, match="MB free"):
        export_student(student, tmp_path / "student")
    assert not list(tmp_path.iterdir())


def test_folders_that_are_no_student(tmp_path, tiny_flux_folder):
    with pytest.raises(LinearizeError, match="it has no model_index"):
        load_pipeline(tmp_path / "absent")
    with pytest.raises(LinearizeError, match="holds no student but a FluxTransformer2DModel"):
        load_pipeline(tiny_flux_folder)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        (
            "transformer/config.json",
            {"linearize_plan": [{"layers": [], "mixer": "os.path", "arguments": {}}]},
            "os.path",
        ),
        ("transformer/config.json", {"linearize_plan": None}, "no plan"),
        ("transformer/config.json", {"num_layers": 3}, "missing keys"),
        ("transformer/config.json", {"num_layers": 1}, "transformer_blocks"),
        ("transformer/config.json", {"joint_attention_dim": 48}, "damaged|does not fit"),
        ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, "StableDiffusionPipeline"),
        ("model_index.json", {"vae": ["antigravity", "AutoencoderKL"]}, "antigravity"),
        ("model_index.json", {"text_encoder": ["diffusers", "NoSuchClass"]}, "damaged"),
    ],
    ids=["mixer", "no plan", "more blocks", "fewer blocks", "other base", "other pipeline", "foreign import", "class"],
)
def test_a_student_folder_that_does_not_fit(copied, file, changes, message):
    edit_json(copied / file, **changes)
    with pytest.raises(LinearizeError, match=message):
        load_pipeline(copied)
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("component", ["transformer/diffusion_pytorch_model", "text_encoder/model"])
def test_truncated_weights(copied, component):
    file = copied / f"{component}.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(LinearizeError, match="truncated or corrupt"):
        load_pipeline(copied)
    file.unlink()
    with pytest.raises(LinearizeError, match="damaged or incomplete"):
        load_pipeline(copied)


@pytest.mark.parametrize("part", ["weights.bin", "../../weights.safetensors", "absent.safetensors"])
@pytest.mark.parametrize("component", ["transformer/diffusion_pytorch_model", "text_encoder/model"])
def test_parts_of_weights_are_safetensors_beside_their_index(copied, component, part):
    """Diffusers and transformers unpickle a part that is named otherwise."""
    file = copied / f"{component}.safetensors"
    file.rename(copied.parent / "weights.safetensors")
    (file.parent / "weights.bin").write_bytes(b"a pickle")
    index = {"metadata": {}, "weight_map": {"weight": part}}
    (copied / f"{component}.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(LinearizeError, match="no safetensors file beside it"):
        load_pipeline(copied)
