"""Whole-file writes, weight hashes, disk space."""

import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from linearize import files
from linearize.errors import LinearizeError
from linearize.pipeline_folder import check_pipeline_files


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path):
    path = tmp_path / "folder" / "a.json"
    files.write_json(path, {"value": 1})
    with pytest.raises(ValueError):
        files.write_json(path, {"value": float("nan")})
    with pytest.raises(KeyboardInterrupt), files.atomic_file(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert files.read_json(path) == {"value": 1}
    assert os.listdir(path.parent) == ["a.json"]


def test_a_refused_write_is_one_clear_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LinearizeError, match="could not be written"):
        files.write_text(tmp_path / "file" / "below", "text")


def test_a_folder_is_replaced_whole(tmp_path):
    target = tmp_path / "student"
    for content in ("one", "two"):
        with files.atomic_folder(target) as temporary:
            (temporary / "deep").mkdir()
            (temporary / "deep" / content).write_text(content)
    with pytest.raises(RuntimeError), files.atomic_folder(target) as temporary:
        (temporary / "three").write_text("three")
        raise RuntimeError
    assert [file.name for file in target.rglob("*") if file.is_file()] == ["two"]
    assert os.listdir(tmp_path) == ["student"]


def test_read_json_names_the_file(tmp_path):
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(LinearizeError, match=r"bad\.json is no valid JSON"):
        files.read_json(tmp_path / "bad.json")
    with pytest.raises(LinearizeError, match=r"none\.json cannot be read"):
        files.read_json(tmp_path / "none.json")


def test_hash_of_a_folder_is_the_hash_of_the_state_however_it_is_split(tmp_path):
    state = {
        "b": torch.randn(3, 2).bfloat16(),
        "a": torch.randn(5),
        "scalar": torch.tensor(2.0),
        "empty": torch.zeros(0, 2),
    }
    for folder in ("whole", "split"):
        (tmp_path / folder).mkdir()
    save_file(state, tmp_path / "whole" / "model.safetensors")
    for name in state:
        save_file({name: state[name]}, tmp_path / "split" / f"model-{name}.safetensors")
    expected = files.state_hash(state)
    assert files.weight_hash(tmp_path / "whole") == files.weight_hash(tmp_path / "split") == expected
    for changed in ({"a": state["a"] + 1}, {"a": state["a"].double()}, {"a": state["a"][None]}):
        assert files.state_hash(state | changed) != expected


def test_hash_of_a_damaged_or_empty_folder_is_an_error(tmp_path):
    with pytest.raises(LinearizeError, match="holds no"):
        files.weight_hash(tmp_path)
    save_file({"a": torch.randn(100)}, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-8])
    with pytest.raises(LinearizeError, match="truncated or corrupt"):
        files.weight_hash(tmp_path)


def test_disk_space(tmp_path):
    files.require_disk_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(LinearizeError, match="GB free"):
        files.require_disk_space(tmp_path, 10**18)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: (folder / "model_index.json").unlink(), "is no pipeline folder .*: choose another"),
        (lambda folder: (folder / "model_index.json").write_text("[]"), "holds no JSON object but a list"),
        (lambda folder: shutil.rmtree(folder / "tokenizer"), "tokenizer is missing or empty"),
        (
            lambda folder: (folder / "tokenizer_2" / "tokenizer.json").unlink(),
            "tokenizer_2 is incomplete .it has none of tokenizer.json",
        ),
        (lambda folder: os.truncate(next((folder / "vae").glob("*.safetensors")), 99), "truncated or corrupt"),
    ],
)
def test_a_damaged_pipeline_folder_is_told_before_it_is_loaded(tiny_flux_folder, tmp_path, damage, sentence):
    folder = tmp_path / "pipeline"
    shutil.copytree(tiny_flux_folder, folder)
    libraries = ("diffusers", "transformers")
    assert check_pipeline_files(folder, libraries, next_step="none")["_class_name"] == "FluxPipeline"
    with pytest.raises(LinearizeError, match="takes its scheduler from diffusers"):
        check_pipeline_files(folder, ("transformers",), next_step="none")
    damage(folder)
    with pytest.raises(LinearizeError, match=sentence):
        check_pipeline_files(folder, libraries, next_step="choose another")


def test_a_library_s_error_is_cut_to_its_first_sentence():
    assert (
        files.first_sentence(ValueError("a.bias is of shape [2]. If you want, see https://x."))
        == "a.bias is of shape [2]"
    )
    assert files.first_sentence(OSError("no file a.b found\nsecond line.")) == "no file a.b found"


def test_new_files_are_as_open_as_the_umask_says(tmp_path):
    with files.atomic_folder(tmp_path / "folder") as temporary:
        save_file({"weight": torch.ones(2)}, temporary / "private.safetensors")
    with files.atomic_file(tmp_path / "file.safetensors") as temporary:
        save_file({"weight": torch.ones(2)}, temporary)
    (tmp_path / "plain").touch()
    expected = (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "folder" / "private.safetensors").stat().st_mode == expected
    assert (tmp_path / "file.safetensors").stat().st_mode == expected
