"""Whole-file writes, weight hashes, disk space."""

import os

import pytest
import torch
from safetensors.torch import save_file

from linearize import files
from linearize.errors import LinearizeError


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
