import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from linearize.distillation.checkpoint import SafetensorsCheckpointIO, flatten, read_checkpoint, unflatten
from linearize.errors import LinearizeError

LEAVES = st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False) | st.text(max_size=5)
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3)
        | st.dictionaries(st.sampled_from(["__tensor__", "__tuple__", "__items__", "a"]), inner, max_size=2)
    ),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None)
@given(TREES)
def test_trees_go_round(tree: Any) -> None:
    tensors: dict[str, torch.Tensor] = {}
    assert unflatten(flatten(tree, tensors), tensors) == tree
    assert not tensors


def test_a_checkpoint_goes_round(tmp_path: Path) -> None:
    state = {
        "weights": {"a": torch.randn(3, 5), "b": torch.randn(4, 2).to(torch.bfloat16).T},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0), "betas": (0.9, 0.99)}}},
        "random": [np.arange(5, dtype=np.uint32), float("inf")],
    }
    SafetensorsCheckpointIO().save_checkpoint(state, tmp_path / "checkpoints" / "last.safetensors")
    read = read_checkpoint(tmp_path / "checkpoints" / "last.safetensors")
    assert torch.equal(read["weights"]["a"], state["weights"]["a"])
    assert torch.equal(read["weights"]["b"], state["weights"]["b"])
    assert read["optimizer"]["state"][0]["betas"] == (0.9, 0.99)
    assert read["random"][0].tolist() == [0, 1, 2, 3, 4] and read["random"][1] == float("inf")
    assert [file.name for file in (tmp_path / "checkpoints").iterdir()] == ["last.safetensors"]


def test_what_cannot_be_kept_is_refused_and_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    SafetensorsCheckpointIO().save_checkpoint({"a": 1}, path)
    with pytest.raises(TypeError, match="Path"):
        SafetensorsCheckpointIO().save_checkpoint({"a": Path("x")}, path)
    assert read_checkpoint(path) == {"a": 1}


@pytest.mark.parametrize("kind", ["missing", "truncated", "empty", "text", "pickle", "weights"])
def test_damaged_checkpoints_are_told_apart_from_good_ones(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "last.safetensors"
    SafetensorsCheckpointIO().save_checkpoint({"weights": torch.randn(50, 50)}, path)
    content = path.read_bytes()
    match kind:
        case "missing":
            path.unlink()
        case "truncated":
            path.write_bytes(content[: len(content) // 2])
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("no checkpoint")
        case "pickle":
            path.write_bytes(pickle.dumps({"weights": 1}))
        case "weights":
            from safetensors.torch import save_file

            save_file({"a": torch.zeros(2)}, path)
    words = "does not exist" if kind == "missing" else "truncated, corrupt or no training checkpoint"
    with pytest.raises(LinearizeError, match=words):
        read_checkpoint(path)
