"""What the judge says of a set of pictures."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from linearize.evaluation.metrics import proportion
from linearize.scenes.grammar import parse
from linearize.scenes.judge import Judge
from linearize.scenes.world import concatenate

# The judge reads small pictures: many fit in one forward.
_BATCH_SIZE = 64


@dataclasses.dataclass(frozen=True)
class SceneNumbers:
    """Scene metrics of a model; all None without a judge or without a prompt of the scenes grammar.

    Attributes:
        scene_accuracy: {value, n, interval, attributes {name: value}, num_objects {"1" | "2": {value, n, interval}}}.
        caption_log_probability: The judge's mean log-probability of the prompt's attributes, in nats.
    """

    scene_accuracy: dict[str, Any] | None
    caption_log_probability: float | None


def scene_numbers(judge: Judge | None, images: Tensor, prompts: Sequence[str]) -> SceneNumbers:
    """Scores the pictures whose prompts are captions of the scenes grammar.

    Args:
        judge: The judge, or None.
        images: [prompts, 3, height, width] in [0, 1].
        prompts: One per picture.
    """
    parsed = [(index, scene) for index, prompt in enumerate(prompts) if (scene := parse(prompt)) is not None]
    if judge is None or not parsed:
        return SceneNumbers(None, None)
    images = images[[index for index, _ in parsed]]
    scenes = concatenate([scene for _, scene in parsed])
    scores = [
        judge.score(images[start : start + _BATCH_SIZE], scenes[start : start + _BATCH_SIZE])
        for start in range(0, len(images), _BATCH_SIZE)
    ]
    correct = torch.cat([score.correct.cpu() for score in scores])
    attributes = {
        name: torch.cat([score.attributes[name].cpu() for score in scores]).double().mean().item()
        for name in scores[0].attributes
    }
    accuracy = proportion(correct) | {
        "attributes": attributes,
        "num_objects": {
            str(num): proportion(correct[scenes.num_objects == num]) for num in sorted(set(scenes.num_objects.tolist()))
        },
    }
    log_probability = torch.cat([score.log_probability.cpu() for score in scores]).double().mean().item()
    return SceneNumbers(accuracy, log_probability)


@torch.no_grad()
def judge_features(judge: Judge, images: Tensor) -> Tensor:
    """The judge's features [prompts, num_features] of pictures [prompts, 3, height, width], on the CPU."""
    return torch.cat([judge.features(part.to(judge.device)).cpu() for part in images.split(_BATCH_SIZE)])
