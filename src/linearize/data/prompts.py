"""Where prompts come from: the scenes grammar, a text file, a JSONL file, or a `datasets` dataset.

A source answers for any range of sample indices, so that generation can stop, go on and grow: sample i always has the
same prompt. Sources of finite length start over at their end; with another seed the same prompt gives another sample.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from linearize.errors import LinearizeError
from linearize.files import first_sentence
from linearize.scenes import grammar

GRAMMAR_BLOCK = 256


class PromptSource(Protocol):
    """The prompts of a range of sample indices, and a JSON description that tells one source from another."""

    description: dict[str, Any]

    def prompts(self, start: int, stop: int) -> list[str]:
        """Prompts of the samples start, ..., stop - 1."""
        ...


class ScenePrompts:
    """Endless captions of the scenes grammar, drawn in blocks with a seed each."""

    def __init__(self, split: str = "train", seed: int = 0, num_objects: int | None = None):
        self.description = {"source": "scenes", "split": split, "seed": seed, "num_objects": num_objects}
        self._arguments = (split, num_objects)
        self._seed = seed

    def prompts(self, start: int, stop: int) -> list[str]:
        """Prompts of the samples start, ..., stop - 1."""
        first, last = start // GRAMMAR_BLOCK, (stop - 1) // GRAMMAR_BLOCK
        split, num_objects = self._arguments
        drawn = [
            prompt
            for block in range(first, last + 1)
            for prompt in grammar.prompts(GRAMMAR_BLOCK, split, self._seed + 100_003 * block, num_objects)
        ]
        return drawn[start - first * GRAMMAR_BLOCK : stop - first * GRAMMAR_BLOCK]


class ListedPrompts:
    """Prompts of a file or dataset, one after another and over again.

    Raises:
        LinearizeError: `listed` is empty or holds something that is no text.
    """

    def __init__(self, listed: list[str], origin: str, source: str):
        if not listed:
            raise LinearizeError(f"{origin} holds no prompt: give at least one.")
        wrong = next((prompt for prompt in listed if not isinstance(prompt, str)), None)
        if wrong is not None:
            raise LinearizeError(
                f"{origin} holds {wrong!r} where a text is expected: set prompts.key to the field that holds the "
                "prompt."
            )
        self._listed = listed
        digest = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
        self.description = {"source": source, "origin": origin, "num_prompts": len(listed), "sha256": digest}

    def prompts(self, start: int, stop: int) -> list[str]:
        """Prompts of the samples start, ..., stop - 1."""
        return [self._listed[index % len(self._listed)] for index in range(start, stop)]


def _read_lines(path: str | None, source: str) -> list[str]:
    if path is None:
        raise LinearizeError(f"prompts.source={source} needs a file: set prompts.path=<file>.")
    try:
        return [
            line.strip() for line in Path(path).expanduser().read_text(encoding="utf-8").splitlines() if line.strip()
        ]
    except UnicodeDecodeError as error:
        raise LinearizeError(
            f"prompts.path={path} is no UTF-8 text: convert it, or choose another prompts.source."
        ) from error
    except OSError as error:
        raise LinearizeError(f"prompts.path={path} cannot be read ({error.strerror}): check the path.") from error


def scene_prompts(*, split: str, seed: int, num_objects: int | None, **_: Any) -> PromptSource:
    """Captions of the scenes grammar."""
    if split not in ("train", "held_out"):
        raise LinearizeError(f"prompts.split={split} is unknown to the scenes grammar: use train or held_out.")
    return ScenePrompts(split, seed, num_objects)


def text_prompts(*, path: str | None, **_: Any) -> PromptSource:
    """A text file with one prompt per line; empty lines are skipped."""
    return ListedPrompts(_read_lines(path, "text"), Path(str(path)).name, "text")


def jsonl_prompts(*, path: str | None, key: str, **_: Any) -> PromptSource:
    """A file with one JSON object per line, the prompt under `key`."""
    listed = []
    for number, line in enumerate(_read_lines(path, "jsonl"), start=1):
        try:
            listed.append(json.loads(line)[key])
        except (ValueError, KeyError, TypeError) as error:
            raise LinearizeError(
                f"prompts.path={path} line {number} is no JSON object with the key {key!r}: mend the line or set "
                "prompts.key."
            ) from error
    return ListedPrompts(listed, Path(str(path)).name, "jsonl")


def dataset_prompts(*, path: str | None, key: str, split: str, **_: Any) -> PromptSource:
    """A dataset that `datasets` loads: a folder or a file of it (JSON, CSV, Parquet), or a name on the hub.

    The prompt is the column `key`.
    """
    import datasets

    if path is None:
        raise LinearizeError(
            "prompts.source=dataset needs a name: set prompts.path=<dataset on the hub, local file or folder>."
        )
    builders = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
    local = Path(path).expanduser()
    try:
        if local.is_file() and local.suffix in builders:
            dataset = datasets.load_dataset(builders[local.suffix], data_files=str(local), split=split)
        else:
            dataset = datasets.load_dataset(str(local) if local.exists() else path, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise LinearizeError(
            f"prompts.path={path} with prompts.split={split} does not load as a dataset ({first_sentence(error)}): "
            "check the name, the split and the network."
        ) from error
    if key not in dataset.column_names:
        raise LinearizeError(f"prompts.key={key} is no column of {path}: use one of {', '.join(dataset.column_names)}.")
    return ListedPrompts(list(dataset[key]), local.name if local.exists() else path, "dataset")


SOURCES: dict[str, Callable[..., PromptSource]] = {
    "scenes": scene_prompts,
    "text": text_prompts,
    "jsonl": jsonl_prompts,
    "dataset": dataset_prompts,
}


def prompt_source(config: Mapping[str, Any]) -> PromptSource:
    """The source that a config describes.

    Args:
        config: `source` and, as it needs them, `path`, `key`, `split`, `seed`, `num_objects`; see configs/prompts.

    Raises:
        LinearizeError: the source is unknown, or its file or dataset is missing, empty or malformed.
    """
    source = config["source"]
    if source not in SOURCES:
        raise LinearizeError(f"prompts.source={source} is unknown: use one of {', '.join(SOURCES)}.")
    arguments = {"path": None, "key": "prompt", "split": "train", "seed": 0, "num_objects": None, **config}
    del arguments["source"]
    return SOURCES[source](**arguments)
