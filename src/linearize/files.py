"""Files that appear whole or not at all, hashes of weights, and a check for disk space."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from linearize.errors import LinearizeError


def _open_to_umask(path: Path) -> None:
    """Gives a new file the permissions that the user's umask asks for; safetensors makes its files private."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def _temporary_sibling(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")


def _sync(path: Path) -> None:
    """Flushes one file, or the entries of one folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refused_write(path: str | Path | None, error: Exception) -> LinearizeError:
    """The error of a write that the disk refused."""
    reason = getattr(error, "strerror", None) or first_sentence(error)
    return LinearizeError(f"{path} could not be written ({reason}): free space or choose another folder.")


def first_sentence(error: Exception) -> str:
    """What an error of a library says, without the advice that follows and without its last full stop."""
    return re.split(r"\n|(?<=[a-z\])])\. (?=[A-Z])", str(error).strip(), maxsplit=1)[0].rstrip(".")


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
        _open_to_umask(temporary)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise refused_write(path, error) from error
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
            if file.is_file():
                _open_to_umask(file)
            _sync(file)
        if path.exists():
            os.replace(path, aside)
        os.replace(temporary, path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        if aside.exists() and not path.exists():
            os.replace(aside, path)
        raise refused_write(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


def require_replaceable(folder: Path, own_file: str, mark: str) -> None:
    """Checks that a folder may be replaced whole: it is not there, is empty, or is an older one of its kind.

    Args:
        folder: The folder.
        own_file: A file that an older one has.
        mark: What stands in that file.

    Raises:
        LinearizeError: it is something else.
    """
    own = folder / own_file
    is_older = own.is_file() and mark in own.read_text(encoding="utf-8", errors="replace")
    is_empty = folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and not is_older and not is_empty:
        raise LinearizeError(f"{folder} holds something else, which would be replaced: choose a folder of its own.")


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


def read_json_object(path: str | Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Raises:
        LinearizeError: the file is missing, is no JSON, or holds something else.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise LinearizeError(f"{path} holds no JSON object but a {type(content).__name__}: make or copy it again.")
    return content


def read_header(file: Path) -> list[str]:
    """Names of the tensors in a safetensors file, whose header is checked against the file's size.

    Raises:
        LinearizeError: the file is truncated or corrupt.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise LinearizeError(
            f"{file} is truncated or corrupt ({first_sentence(error)}): copy or download the folder again."
        ) from error


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
    places: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        places.update(dict.fromkeys(read_header(file), file))
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
            f"{path} needs about {_megabytes(num_bytes)} and the disk has {_megabytes(free)} free: "
            "free space or choose another folder."
        )


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.2f} MB" if num_bytes < 1e9 else f"{num_bytes / 1e9:,.2f} GB"
