"""What each sample is.

Sample i is a function of i and the settings alone: its prompt, its seed, its size and its guidance. So any sample can
be made again by a stock pipeline call, and a run that was killed, or goes on with other processes, makes exactly what
is missing.
"""

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from linearize.data.prompts import PromptSource
from linearize.data.shards import DTYPES, ShardRange
from linearize.errors import LinearizeError, check_count


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
            check_count(f"generation.{name}", getattr(self, name))
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
    check_count("generation.guidance_scale.num_values", guidance["num_values"])
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
