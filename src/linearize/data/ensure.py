"""Makes sure that a training run has its samples.

Those of a given store, and beyond them new ones in a cache folder.
"""

import hashlib
import json
from pathlib import Path

from linearize.data.description import check_same_origin, describe
from linearize.data.generation import generate_samples, wait_for_samples
from linearize.data.prompts import PromptSource
from linearize.data.settings import GenerationSettings
from linearize.data.shards import ShardRange, missing_ranges, shard_ranges
from linearize.data.store import SampleStore
from linearize.errors import LinearizeError
from linearize.teachers import Teacher


def ensure_samples(
    teacher: Teacher,
    source: PromptSource,
    settings: GenerationSettings,
    *,
    path: str | Path | None,
    num_samples: int | None,
    cache: str | Path,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = True,
) -> list[Path]:
    """Folders of a store with at least `num_samples` samples of a teacher, generating what is missing.

    A store at `path` is never written to: what it lacks goes into a folder of its own under `cache`, named after the
    teacher and the settings, where later runs find it again.

    Args:
        teacher: The teacher that is trained.
        source: Prompts of new samples.
        settings: How new samples are made.
        path: A store to begin with; None generates all.
        num_samples: How many; None is what `path` holds.
        cache: Folder of generated stores.
        rank: This process among those that share the work.
        world_size: Number of processes that share the work; all of them call this, and return when all samples are
            there.
        progress: Whether to show a progress bar.

    Returns:
        One or two folders for `SampleStore` and `SampleDataModule`.

    Raises:
        LinearizeError: another teacher made the store at `path`, more samples are asked for than it has and they would
            be of another kind, or it is damaged.
    """
    folders, present = [], []
    if path is not None:
        store = SampleStore(path)
        store.check_teacher(teacher.name, teacher.weight_hash)
        folders.append(Path(path))
        present = shard_ranges(path)
        if num_samples is None or len(store) >= num_samples:
            return folders
    if num_samples is None:
        raise LinearizeError(
            "data.path names no store and data.num_samples is not set: set data.path=<folder of a store>, or "
            "set data.num_samples=<number of samples to generate>."
        )
    description = describe(teacher, source, settings)
    if path is not None:
        check_same_origin(Path(path), description)
    identity = json.dumps([description[key] for key in ("weight_hash", "prompts", "generation")], sort_keys=True)
    label = teacher.name.rpartition("/")[2]
    folder = Path(cache) / f"{label}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    for part in missing_ranges(ShardRange(0, num_samples), present):
        generate_samples(
            teacher,
            source,
            settings,
            folder,
            start=part.start,
            num_samples=part.stop,
            rank=rank,
            world_size=world_size,
            progress=progress,
        )
    for part in missing_ranges(ShardRange(0, num_samples), present):
        wait_for_samples(folder, part)
    return [*folders, folder]
