"""The teacher samples its own training set: what each sample is, and the loop that writes shard after shard.

Sample i is a function of i and the settings alone: its prompt, its seed, its size and its guidance. So any sample can
be made again by a stock pipeline call, and a run that was killed, or goes on with other processes, makes exactly what
is missing.
"""

import logging
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from linearize.data.prompts import PromptSource
from linearize.data.shards import DTYPES, ShardRange, missing_ranges, read_shard, shard_ranges, write_shard
from linearize.errors import LinearizeError
from linearize.files import read_json, require_disk_space, write_json
from linearize.teachers import Teacher

DESCRIPTION = "store.json"
FORMAT = 1
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bucket:
    """A picture size in pixels and how often it is drawn."""

    height: int
    width: int
    weight: float = 1.0


@dataclass(frozen=True)
class GenerationSettings:
    """How samples are made; see configs/generation/default.yaml."""

    seed: int
    buckets: tuple[Bucket, ...]
    guidance_values: tuple[float, ...]
    num_inference_steps: int
    max_sequence_length: int
    prompt_dropout: float
    dtype: str
    shard_size: int
    batch_size: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "GenerationSettings":
        """Reads and checks a config.

        Raises:
            LinearizeError: a value is out of its range.
        """
        config = dict(config)
        guidance = _guidance_values(config.pop("guidance_scale"))
        settings = cls(buckets=_buckets(config.pop("buckets")), guidance_values=guidance, **config)
        settings.check()
        return settings

    def check(self) -> None:
        """Raises LinearizeError for a value out of its range."""
        for name in ("num_inference_steps", "max_sequence_length", "shard_size", "batch_size"):
            require_positive(f"generation.{name}", getattr(self, name))
        if not isinstance(self.prompt_dropout, int | float) or not 0 <= self.prompt_dropout <= 1:
            raise LinearizeError(
                f"generation.prompt_dropout={self.prompt_dropout} is a share: use a number from 0 to 1."
            )
        if self.dtype not in DTYPES:
            raise LinearizeError(f"generation.dtype={self.dtype} is unknown: use one of {', '.join(DTYPES)}.")

    def identity(self) -> dict[str, Any]:
        """What decides the content of samples, as JSON; how they are cut into shards and batches does not."""
        content = asdict(self)
        del content["shard_size"], content["batch_size"]
        content["buckets"] = [asdict(bucket) for bucket in self.buckets]
        content["guidance_values"] = list(self.guidance_values)
        return content


def require_positive(name: str, value: Any) -> None:
    """Raises LinearizeError if a number of things is no whole number from 1 on."""
    if not isinstance(value, int) or value < 1:
        raise LinearizeError(f"{name}={value} must be a whole number of at least 1.")


def _buckets(listed: Any) -> tuple[Bucket, ...]:
    try:
        buckets = tuple(Bucket(**bucket) for bucket in listed)
        if not buckets or any(min(bucket.height, bucket.width, bucket.weight) <= 0 for bucket in buckets):
            raise ValueError
    except (TypeError, ValueError) as error:
        raise LinearizeError(
            f"generation.buckets={listed} must list one or more {{height, width, weight}} of positive numbers."
        ) from error
    return buckets


def _guidance_values(guidance: float | Mapping[str, Any]) -> tuple[float, ...]:
    # A range is a few even steps, because one stock pipeline call has one guidance for its whole batch.
    if isinstance(guidance, int | float):
        return (float(guidance),)
    if not isinstance(guidance, Mapping) or set(guidance) != {"low", "high", "num_values"}:
        raise LinearizeError(
            f"generation.guidance_scale={guidance} is no range: use a number or {{low, high, num_values}}."
        )
    require_positive("generation.guidance_scale.num_values", guidance["num_values"])
    return tuple(float(value) for value in np.linspace(guidance["low"], guidance["high"], guidance["num_values"]))


@dataclass(frozen=True)
class SampleSpec:
    """What a stock pipeline call needs to make one sample, but for steps and text length, which all samples share."""

    index: int
    prompt: str
    seed: int
    height: int
    width: int
    guidance: float


def sample_specs(settings: GenerationSettings, source: PromptSource, wanted: ShardRange) -> list[SampleSpec]:
    """What the samples of a range are."""
    specs = []
    for index, prompt in zip(range(wanted.start, wanted.stop), source.prompts(wanted.start, wanted.stop), strict=True):
        draw = random.Random(f"{settings.seed}/{index}")
        bucket = draw.choices(settings.buckets, [bucket.weight for bucket in settings.buckets])[0]
        guidance = draw.choice(settings.guidance_values)
        kept = "" if draw.random() < settings.prompt_dropout else prompt
        specs.append(SampleSpec(index, kept, settings.seed + index, bucket.height, bucket.width, guidance))
    return specs


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
    present = read_json(folder / DESCRIPTION)
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
        LinearizeError: the folder holds samples of another kind or a damaged shard, or the disk has no room.
    """
    folder = Path(folder)
    wanted = ShardRange(start, num_samples)
    description = describe(teacher, source, settings)
    if (folder / DESCRIPTION).exists():
        check_same_origin(folder, description)
    else:
        write_json(folder / DESCRIPTION, description)
    for present in shard_ranges(folder):
        read_shard(folder / present.file_name, ["index"])
    missing = missing_ranges(wanted, shard_ranges(folder))
    require_disk_space(folder, sum(map(len, missing)) * _bytes_per_sample(teacher, settings))
    own = list(_own_ranges(missing, settings.shard_size, rank, world_size))
    total = sum(map(len, own))
    with _progress(progress and total > 0) as bar:
        task = bar.add_task("generating", total=total)
        for part in own:
            _make_shard(teacher, source, settings, folder, part, lambda num: bar.advance(task, num))
    return total


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
