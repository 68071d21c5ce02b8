"""Scene accuracy of a pipeline: the share of prompts whose picture has everything right."""

from collections.abc import Sequence

import torch
from diffusers import FluxPipeline
from torch import Tensor

from linearize.scenes.grammar import parse
from linearize.scenes.judge import Judge, JudgeScore
from linearize.scenes.world import SceneBatch, concatenate


def scenes_of(prompts: Sequence[str]) -> SceneBatch:
    """The scenes that captions describe.

    Raises:
        ValueError: If one is no caption of the scenes grammar.
    """
    parsed = [parse(prompt) for prompt in prompts]
    unknown = [prompt for prompt, scene in zip(prompts, parsed, strict=True) if scene is None]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no caption of the scenes grammar.")
    return concatenate([scene for scene in parsed if scene is not None])


@torch.no_grad()
def judge_pipeline(
    pipeline: FluxPipeline,
    judge: Judge,
    prompts: Sequence[str],
    *,
    side: int = 256,
    max_sequence_length: int = 32,
    num_inference_steps: int = 20,
    guidance_scale: float = 3.5,
    true_cfg_scale: float = 1.0,
    batch_size: int = 64,
    seed: int = 0,
) -> tuple[JudgeScore, Tensor]:
    """Draws every prompt through the stock pipeline call and lets the judge read the pictures.

    Args:
        pipeline: The pipeline.
        judge: The judge.
        prompts: Captions of the scenes grammar.
        side: Height and width in pixels.
        max_sequence_length: Text tokens.
        num_inference_steps: Sampler steps.
        guidance_scale: Given to the guidance embedding.
        true_cfg_scale: Above 1, classifier-free guidance against the empty prompt.
        batch_size: Pictures at once.
        seed: Picture i is drawn from the noise of a CPU generator seeded with seed + i.

    Returns:
        The score of all pictures, on the CPU, and the pictures [num, 3, side, side] of the first batch.
    """
    scores: list[JudgeScore] = []
    first: Tensor | None = None
    pipeline.set_progress_bar_config(disable=True)
    for start in range(0, len(prompts), batch_size):
        chunk = list(prompts[start : start + batch_size])
        images = pipeline(
            chunk,
            negative_prompt=[""] * len(chunk) if true_cfg_scale > 1 else None,
            true_cfg_scale=true_cfg_scale,
            height=side,
            width=side,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            max_sequence_length=max_sequence_length,
            generator=[torch.Generator().manual_seed(seed + start + i) for i in range(len(chunk))],
            output_type="pt",
        ).images.float()
        first = images.cpu() if first is None else first
        scores.append(judge.score(images, scenes_of(chunk)))
    assert first is not None
    return _join(scores), first


def _join(scores: list[JudgeScore]) -> JudgeScore:
    return JudgeScore(
        torch.cat([score.correct for score in scores]).cpu(),
        {name: torch.cat([score.attributes[name] for score in scores]).cpu() for name in scores[0].attributes},
        torch.cat([score.log_probability for score in scores]).cpu(),
    )
