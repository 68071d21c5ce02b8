"""Checks of a diffusers pipeline folder before anything in it is loaded."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from linearize.errors import LinearizeError
from linearize.files import read_header, read_json_object

_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")


def check_pipeline_files(folder: Path, libraries: Sequence[str], *, next_step: str) -> dict[str, Any]:
    """Checks a pipeline folder before anything is loaded from it.

    Args:
        folder: What `save_pretrained` of a pipeline wrote.
        libraries: Where its components may come from; nothing else is ever imported.
        next_step: What to do where the folder is no pipeline folder at all.

    Returns:
        Its model_index.json.

    Raises:
        LinearizeError: the index, the folder of a component, or a part of its weights is missing or damaged, or a
            component comes from elsewhere.
    """
    if not (folder / "model_index.json").is_file():
        raise LinearizeError(f"{folder} is no pipeline folder (it has no model_index.json): {next_step}.")
    index = read_json_object(folder / "model_index.json")
    check_libraries(index, str(folder), libraries)
    for component, entry in index.items():
        if isinstance(entry, list) and entry[0] is not None:
            _check_component(folder / component, entry[1])
    for file in sorted(folder.rglob("*.safetensors.index.json")):
        _check_parts(file)
    for file in sorted(folder.rglob("*.safetensors")):
        read_header(file)
    return index


def _check_component(folder: Path, class_name: str) -> None:
    if not folder.is_dir() or not any(folder.iterdir()):
        raise LinearizeError(f"{folder} is missing or empty: copy or download the pipeline again.")
    # Without these files transformers builds an empty tokenizer and says nothing.
    if "Tokenizer" in class_name and not any((folder / name).is_file() for name in _VOCABULARIES):
        raise LinearizeError(
            f"{folder} is incomplete (it has none of {', '.join(_VOCABULARIES)}): copy or download the pipeline again."
        )


def _check_parts(index: Path) -> None:
    """Checks that the parts of weights are safetensors files beside their index: libraries would unpickle others."""
    parts = read_json_object(index).get("weight_map")
    names = set(map(str, parts.values())) if isinstance(parts, dict) else {str(parts)}
    for name in sorted(names):
        if Path(name).name != name or not name.endswith(".safetensors") or not (index.parent / name).is_file():
            raise LinearizeError(
                f"{index} names {name}, which is no safetensors file beside it: copy or download the pipeline again."
            )


def check_libraries(index: Mapping[str, Any], source: str, libraries: Sequence[str]) -> None:
    """Checks where the components in a model_index.json come from.

    Raises:
        LinearizeError: one comes from a library that is not among `libraries`.
    """
    for component, entry in index.items():
        if isinstance(entry, list) and (len(entry) != 2 or entry[0] not in (None, *libraries)):
            raise LinearizeError(
                f"{source} takes its {component} from {'.'.join(map(str, entry))}, not from {' or '.join(libraries)}: "
                "nothing else is imported, so give a stock pipeline from a source that you trust."
            )


def absent_components(index: Mapping[str, Any]) -> list[str]:
    """Components that a pipeline was saved without, which diffusers wants to be told."""
    return [name for name, entry in index.items() if isinstance(entry, list) and entry[0] is None]
