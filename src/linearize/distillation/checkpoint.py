"""Training checkpoints as one safetensors file: tensors as tensors, all else as JSON in its header, no pickles."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from linearize.errors import LinearizeError
from linearize.files import atomic_file, require_disk_space

SUFFIX = ".safetensors"
_HEADER = "linearize_checkpoint"
# Keys that mark what JSON has no word for.
_TENSOR, _TUPLE, _ITEMS = "__tensor__", "__tuple__", "__items__"


def flatten(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """Returns `tree` as JSON, with its tensors moved to `tensors` and referred to by name.

    Raises:
        TypeError: it holds what is neither a tensor, an array, a number, a string, nor a container of these.
    """
    if isinstance(tree, Tensor | np.ndarray):
        name = f"{len(tensors):06d}"
        value = torch.from_numpy(tree) if isinstance(tree, np.ndarray) else tree
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {_TENSOR: name}
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    if isinstance(tree, tuple):
        return {_TUPLE: [flatten(value, tensors) for value in tree]}
    if isinstance(tree, list):
        return [flatten(value, tensors) for value in tree]
    if isinstance(tree, dict):
        if all(isinstance(key, str) and not key.startswith("__") for key in tree):
            return {key: flatten(value, tensors) for key, value in tree.items()}
        return {_ITEMS: [[flatten(key, tensors), flatten(value, tensors)] for key, value in tree.items()]}
    raise TypeError(f"a checkpoint cannot hold {type(tree).__name__}")


def unflatten(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """Undoes `flatten`."""
    if isinstance(tree, list):
        return [unflatten(value, tensors) for value in tree]
    if not isinstance(tree, dict):
        return tree
    if _TENSOR in tree:
        return tensors[tree[_TENSOR]]
    if _TUPLE in tree:
        return tuple(unflatten(value, tensors) for value in tree[_TUPLE])
    if _ITEMS in tree:
        return {unflatten(key, tensors): unflatten(value, tensors) for key, value in tree[_ITEMS]}
    return {key: unflatten(value, tensors) for key, value in tree.items()}


def read_checkpoint(path: str | Path, *, shapes_only: bool = False) -> dict[str, Any]:
    """Reads a checkpoint, its tensors on the CPU.

    Args:
        path: The file.
        shapes_only: Leave the weights on the disk: tensors of their shapes on the meta device stand for them.

    Raises:
        LinearizeError: the file is missing, truncated, or no checkpoint of this project.
    """
    path = Path(path)
    if not path.is_file():
        raise LinearizeError(
            f"The checkpoint {path} does not exist: set resume=last, or resume=<path of a checkpoint>."
        )
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {})[_HEADER]
            read = partial(_empty, file) if shapes_only else file.get_tensor
            tensors = {name: read(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        return unflatten(json.loads(header), tensors)
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise LinearizeError(
            f"The checkpoint {path} is truncated, corrupt or no training checkpoint ({type(error).__name__}: {error}): "
            "resume from another one, or start again without resume."
        ) from error


def _empty(file: Any, name: str) -> Tensor:
    return torch.empty(file.get_slice(name).get_shape(), device="meta")


class SafetensorsCheckpointIO(CheckpointIO):
    """Lightning's road to the disk: every checkpoint is one file that appears whole or not at all."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes a checkpoint.

        Raises:
            LinearizeError: the disk is full or refuses the write; an older checkpoint of that name stays as it was.
        """
        tensors: dict[str, Tensor] = {}
        tree = flatten(checkpoint, tensors)
        require_disk_space(path, sum(value.nbytes for value in tensors.values()))
        with atomic_file(path) as temporary:
            save_file(tensors, temporary, metadata={_HEADER: json.dumps(tree)})

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a checkpoint on the CPU, whatever `map_location`: Lightning moves each part to its device.

        Raises:
            LinearizeError: it cannot be read, or training did not write it.
        """
        checkpoint = read_checkpoint(path)
        if not isinstance(checkpoint, dict) or "pytorch-lightning_version" not in checkpoint:
            raise LinearizeError(f"{path} was not written by training: resume another one, or start without resume.")
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        """Deletes a checkpoint."""
        Path(path).unlink(missing_ok=True)
