"""The teacher samples its own training set: the loop that writes shard after shard, alone or beside others."""

import contextlib
import fcntl
import logging
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from linearize.data.description import DESCRIPTION, check_same_origin, describe
from linearize.data.prompts import PromptSource
from linearize.data.settings import GenerationSettings, SampleSpec, sample_specs
from linearize.data.shards import DTYPES, ShardRange, missing_ranges, read_shard, shard_ranges, write_shard
from linearize.errors import LinearizeError
from linearize.files import require_disk_space, write_json
from linearize.teachers import Teacher

_LOCK = ".lock"
log = logging.getLogger(__name__)


def _batches(specs: list[SampleSpec], batch_size: int) -> Iterator[list[SampleSpec]]:
    """Batches of one size and guidance each."""
    groups: dict[tuple[int, int, float], list[SampleSpec]] = defaultdict(list)
    for spec in specs:
        groups[spec.height, spec.width, spec.guidance].append(spec)
    for group in groups.values():
        for first in range(0, len(group), batch_size):
            yield group[first : first + batch_size]


def _encode(teacher: Teacher, prompts: list[str], settings: GenerationSettings) -> dict[str, dict[str, Tensor]]:
    """Conditioning of each distinct prompt, on the CPU."""
    distinct = list(dict.fromkeys(prompts))
    encoded = {}
    for first in range(0, len(distinct), settings.batch_size):
        part = distinct[first : first + settings.batch_size]
        conditioning = {
            name: tensor.cpu() for name, tensor in teacher.encode(part, settings.max_sequence_length).items()
        }
        encoded.update(
            {prompt: {name: conditioning[name][row] for name in conditioning} for row, prompt in enumerate(part)}
        )
    return encoded


def _sample(
    teacher: Teacher, batch: list[SampleSpec], encoded: Mapping[str, Mapping[str, Tensor]], num_steps: int
) -> Tensor:
    """Latents [batch, channels, height, width] of one batch, on the CPU."""
    device = teacher.pipeline.transformer.device
    names = encoded[batch[0].prompt]
    conditioning = {name: torch.stack([encoded[spec.prompt][name] for spec in batch]).to(device) for name in names}
    try:
        latents = teacher.backbone.sample(
            teacher.pipeline,
            conditioning,
            seeds=[spec.seed for spec in batch],
            height=batch[0].height,
            width=batch[0].width,
            num_inference_steps=num_steps,
            guidance_scale=batch[0].guidance,
        )
    except torch.cuda.OutOfMemoryError as error:
        raise LinearizeError(
            f"A batch of {len(batch)} does not fit into the GPU's memory: lower generation.batch_size."
        ) from error
    if not torch.isfinite(latents).all():
        raise LinearizeError(
            f"{teacher.name} gave latents that are not finite for the samples {batch[0].index} to {batch[-1].index}: "
            "try teacher.dtype=float32."
        )
    return latents.cpu()


def _make_shard(
    teacher: Teacher,
    source: PromptSource,
    settings: GenerationSettings,
    folder: Path,
    wanted: ShardRange,
    advance: Callable[[int], None],
) -> None:
    specs = sample_specs(settings, source, wanted)
    encoded = _encode(teacher, [spec.prompt for spec in specs], settings)
    latents: dict[int, Tensor] = {}
    for batch in _batches(specs, settings.batch_size):
        sampled = _sample(teacher, batch, encoded, settings.num_inference_steps)
        latents.update({spec.index: tensor for spec, tensor in zip(batch, sampled, strict=True)})
        advance(len(batch))
    shared = {
        "num_inference_steps": settings.num_inference_steps,
        "max_sequence_length": settings.max_sequence_length,
        "teacher": teacher.name,
        "revision": teacher.revision,
        "weight_hash": teacher.weight_hash,
    }
    tensors = {name: [encoded[spec.prompt][name] for spec in specs] for name in encoded[specs[0].prompt]}
    tensors["latents"] = [latents[spec.index] for spec in specs]
    write_shard(folder, [asdict(spec) | shared for spec in specs], tensors, settings.dtype)


def _progress(enabled: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("samples"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(elapsed_when_finished=False),
        disable=not enabled,
    )


def _own_ranges(missing: Iterable[ShardRange], shard_size: int, rank: int, world_size: int) -> Iterator[ShardRange]:
    """What of the missing samples this process makes: those in the shards rank, rank + world_size, ...

    Shards are cut at fixed indices, so processes that look at the folder at different times still never share one.
    """
    for part in missing:
        for number in range(part.start // shard_size, -(-part.stop // shard_size)):
            if number % world_size == rank:
                yield ShardRange(max(number * shard_size, part.start), min((number + 1) * shard_size, part.stop))


def generate_samples(
    teacher: Teacher,
    source: PromptSource,
    settings: GenerationSettings,
    folder: str | Path,
    *,
    num_samples: int,
    start: int = 0,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = True,
) -> int:
    """Makes the samples start, ..., num_samples - 1 that a store does not hold yet.

    Args:
        teacher: Who samples.
        source: Prompts of the samples.
        settings: How they are made; a store that exists must have been made the same way.
        folder: The store; it is created if need be.
        num_samples: One past the last index.
        start: First index.
        rank: This process among those that share the work; each writes other shards.
        world_size: Number of processes that share the work.
        progress: Whether to show a progress bar.

    Returns:
        How many samples this process made.

    Raises:
        LinearizeError: a size is no whole number of tokens, the folder holds samples of another kind or a damaged
            shard, or the disk has no room.
    """
    folder, wanted = Path(folder), ShardRange(start, num_samples)
    for bucket in settings.buckets:
        teacher.backbone.check_sizes(teacher.pipeline, "generation.buckets", [bucket.height, bucket.width])
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder, shared=world_size > 1):
        _open_store(folder, describe(teacher, source, settings))
        missing = missing_ranges(wanted, shard_ranges(folder))
        require_disk_space(folder, sum(map(len, missing)) * _bytes_per_sample(teacher, settings))
        own = list(_own_ranges(missing, settings.shard_size, rank, world_size))
        total = sum(map(len, own))
        with _progress(progress and total > 0) as bar:
            task = bar.add_task("generating", total=total)
            for part in own:
                _make_shard(teacher, source, settings, folder, part, lambda num: bar.advance(task, num))
    return total


@contextlib.contextmanager
def _locked(folder: Path, shared: bool) -> Iterator[None]:
    """Keeps runs that do not share the work, such as the jobs of a sweep, from making the same samples twice."""
    # A file that is open for writing, because NFS gives an exclusive lock on nothing else.
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("Another process generates into %s: waiting for it.", folder)
            fcntl.flock(descriptor, kind)
        yield
    finally:
        os.close(descriptor)


def _open_store(folder: Path, description: Mapping[str, Any]) -> None:
    """Begins a store, or checks that the one that is there is whole and of the same kind."""
    if (folder / DESCRIPTION).exists():
        check_same_origin(folder, description)
    else:
        write_json(folder / DESCRIPTION, description)
    for present in shard_ranges(folder):
        read_shard(folder / present.file_name, ["index"])


def _bytes_per_sample(teacher: Teacher, settings: GenerationSettings) -> int:
    """Stored size of the largest sample, compression aside."""
    pictures = [
        np.prod(teacher.backbone.latent_shape(teacher.pipeline, bucket.height, bucket.width))
        for bucket in settings.buckets
    ]
    embeddings = sum(tensor.numel() for tensor in teacher.encode([""], settings.max_sequence_length).values())
    return int(max(pictures) + embeddings) * DTYPES[settings.dtype].itemsize


def wait_for_samples(folder: str | Path, wanted: ShardRange, seconds_between: float = 2.0) -> None:
    """Waits until other processes have written their shards of a range."""
    while missing := missing_ranges(wanted, shard_ranges(folder)):
        log.debug("waiting for the samples %d to %d of other processes", missing[0].start, missing[-1].stop - 1)
        time.sleep(seconds_between)
