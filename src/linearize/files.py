"""Files that appear whole or not at all, hashes of weights, and a check for disk space."""

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from linearize.errors import LinearizeError


def _temporary_sibling(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")


def _sync(path: Path) -> None:
    """Flushes one file, or the entries of one folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _no_space(path: Path, error: OSError) -> LinearizeError:
    return LinearizeError(f"{path} could not be written ({error.strerror}): free space or choose another folder.")


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary sibling of `path` to write; it takes the name `path` when the block ends without an error.

    Raises:
        LinearizeError: the disk refuses the write; `path` keeps its old content.
    """
    path = Path(path)
    temporary = _temporary_sibling(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        raise _no_space(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yields an empty temporary sibling folder; it replaces the folder `path` when the block ends without an error.

    A folder cannot be renamed over a filled one in one step, so an old folder is moved aside first and deleted last.

    Raises:
        LinearizeError: the disk refuses the write; the folder `path` keeps its old content.
    """
    path = Path(path)
    temporary = _temporary_sibling(path)
    aside = _temporary_sibling(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            _sync(file)
        if path.exists():
            os.replace(path, aside)
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        if aside.exists() and not path.exists():
            os.replace(aside, path)
        raise _no_space(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Writes a whole file of bytes."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | Path, content: str) -> None:
    """Writes a whole text file in UTF-8."""
    write_bytes(path, content.encode())


def write_json(path: str | Path, content: Any) -> None:
    """Writes a whole JSON file; NaN and infinities are refused, because JSON has no word for them."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Reads a JSON file.

    Raises:
        LinearizeError: the file is missing or is no JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise LinearizeError(f"{path} cannot be read ({error.strerror}): check the path.") from error
    except ValueError as error:
        raise LinearizeError(f"{path} is no valid JSON ({error}): delete it and make it again.") from error


def _update(digest: Any, name: str, tensor: torch.Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    flat = tensor.detach().contiguous().cpu().reshape(-1)
    if flat.numel():
        digest.update(flat.view(torch.uint8).numpy().data)


def state_hash(state: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of a state dict: its sorted names, dtypes, shapes and bytes.

    `weight_hash` of the folder it is saved to is the same.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        _update(digest, name, state[name])
    return digest.hexdigest()


def weight_hash(folder: str | Path) -> str:
    """SHA-256 over the tensors of a folder's safetensors files, as they are stored: names, dtypes, shapes and bytes.

    How the tensors are split into files, the order they stand in and the dtype they are later loaded in do not matter.

    Raises:
        LinearizeError: no safetensors file is there, or one is truncated or corrupt.
    """
    folder = Path(folder)
    places = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                places.update({name: file for name in tensors.keys()})  # noqa: SIM118 (no mapping: it has keys() alone)
        except (SafetensorError, OSError) as error:
            raise LinearizeError(
                f"{file} is truncated or corrupt ({error}): fetch or make the folder again."
            ) from error
    if not places:
        raise LinearizeError(f"{folder} holds no *.safetensors file: give a folder that a model was saved to.")
    digest = hashlib.sha256()
    with contextlib.ExitStack() as stack:
        opened = {file: stack.enter_context(safe_open(file, framework="pt")) for file in set(places.values())}
        for name in sorted(places):
            _update(digest, name, opened[places[name]].get_tensor(name))
    return digest.hexdigest()


def require_disk_space(path: str | Path, num_bytes: int) -> None:
    """Checks, before long work begins, that the disk under `path` has room for `num_bytes`.

    Raises:
        LinearizeError: it has not.
    """
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise LinearizeError(
            f"{path} needs about {num_bytes / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free: "
            "free space or choose another folder."
        )
