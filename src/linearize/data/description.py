"""store.json: who made the samples of a store, from which prompts, with which settings."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from linearize.data.prompts import PromptSource
from linearize.data.settings import GenerationSettings
from linearize.errors import LinearizeError
from linearize.files import read_json_object
from linearize.teachers import Teacher

DESCRIPTION = "store.json"
FORMAT = 1


def read_description(folder: Path) -> dict[str, Any]:
    """The description of a store.

    Raises:
        LinearizeError: the folder is no store, or one of another version.
    """
    if not (folder / DESCRIPTION).is_file():
        raise LinearizeError(
            f"{folder} is no store of samples (it has no {DESCRIPTION}): run scripts/generate_data.py out={folder}, "
            "or set data=generated."
        )
    description = read_json_object(folder / DESCRIPTION)
    if description.get("format") != FORMAT:
        raise LinearizeError(
            f"{folder} has the format {description.get('format')} and this version reads {FORMAT}: generate the "
            "samples again."
        )
    return description


def describe(teacher: Teacher, source: PromptSource, settings: GenerationSettings) -> dict[str, Any]:
    """The content of store.json."""
    return {
        "format": FORMAT,
        "teacher": teacher.name,
        "revision": teacher.revision,
        "weight_hash": teacher.weight_hash,
        "prompts": source.description,
        "generation": settings.identity(),
    }


def check_same_origin(folder: Path, description: Mapping[str, Any]) -> None:
    """Checks that a store's samples and new ones would be samples of one kind.

    Raises:
        LinearizeError: the store was made by another teacher, from other prompts or with other settings.
    """
    present = read_description(folder)
    if present["weight_hash"] != description["weight_hash"]:
        raise wrong_teacher(folder, present, description["teacher"], description["weight_hash"])
    for part in ("prompts", "generation"):
        for key in sorted({*present[part], *description[part]}):
            before, now = present[part].get(key), description[part].get(key)
            if before != now:
                raise LinearizeError(
                    f"{folder} was made with {part}.{key}={before}, not {now}: use that value, or choose another "
                    "folder for new samples."
                )


def wrong_teacher(folder: Path, present: Mapping[str, Any], name: str, weight_hash: str) -> LinearizeError:
    """The error of a store that another teacher made."""
    return LinearizeError(
        f"{folder} holds samples of the teacher {present['teacher']} (weights {present['weight_hash'][:12]}), but "
        f"the teacher is {name} "
        f"(weights {weight_hash[:12]}): use that teacher, or data=generated to let this one make its own samples."
    )
