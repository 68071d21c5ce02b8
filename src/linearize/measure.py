"""Measures a pre-trained scenes teacher: how often its pictures are right, and what a forward of it costs."""

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import FluxPipeline

from linearize.evaluation.environment import machine, versions
from linearize.evaluation.metrics import wilson_interval
from linearize.scenes.accuracy import judge_pipeline
from linearize.scenes.grammar import prompts
from linearize.scenes.judge import Judge


def with_interval(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of accuracies with the 95 % Wilson interval of its scene accuracy.

    Args:
        row: Has `scene_accuracy`, a share in [0, 1] of `num_prompts` pictures.
    """
    correct = round(row["scene_accuracy"] * row["num_prompts"])
    interval = [round(bound, 4) for bound in wilson_interval(correct, row["num_prompts"])]
    return {**row, "scene_accuracy_interval": interval}


def measure_accuracy(
    pipeline: FluxPipeline,
    judge: Judge,
    rows: list[dict[str, Any]],
    *,
    num_prompts: int,
    batch_size: int,
    num_inference_steps: int,
    guidance_scale: float,
    prompt_seed: int,
    seed: int,
) -> dict[str, Any]:
    """Scene accuracy on prompts with combinations of attributes that training never saw, through the stock call.

    Args:
        pipeline: The pipeline.
        judge: The judge.
        rows: Each with `num_objects` (1, 2, or None for both), `side` and `max_sequence_length`.
        num_prompts: Prompts of each row.
        batch_size: Pictures at once.
        num_inference_steps: Sampler steps.
        guidance_scale: Given to the guidance embedding.
        prompt_seed: Seed of the prompts.
        seed: Picture i starts from the noise of seed + i.

    Returns:
        `settings`, and `rows` with the shares of right pictures and of right attributes.
    """
    sampler: dict[str, Any] = {
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "seed": seed,
    }
    measured = []
    for row in rows:
        setting = dict(row)
        num_objects = setting.pop("num_objects")
        texts = prompts(num_prompts, "held_out", seed=prompt_seed, num_objects=num_objects)
        score, _ = judge_pipeline(pipeline, judge, texts, batch_size=batch_size, **setting, **sampler)
        shares = {name: right.float().mean().item() for name, right in score.attributes.items()}
        accuracy = score.correct.float().mean().item()
        measured.append(with_interval({**row, "num_prompts": num_prompts, "scene_accuracy": accuracy, **shares}))
    settings = {"split": "held_out", "prompt_seed": prompt_seed, **sampler, **_environment(pipeline)}
    return {"settings": settings, "rows": measured}


@torch.no_grad()
def measure_forward(
    pipeline: FluxPipeline, *, side: int, num_text_tokens: int, num_repeats: int = 10
) -> dict[str, Any]:
    """Seconds of one forward of the transformer for one picture, after two that warm it up.

    Args:
        pipeline: The pipeline, on the device and in the dtype that are measured.
        side: Side of the picture in pixels.
        num_text_tokens: Text tokens.
        num_repeats: Forwards that are measured.
    """
    inputs = _transformer_inputs(pipeline, side, num_text_tokens)
    seconds = []
    for _ in range(2 + num_repeats):
        _synchronize(pipeline.device)
        start = time.perf_counter()
        pipeline.transformer(**inputs)
        _synchronize(pipeline.device)
        seconds.append(time.perf_counter() - start)
    return {
        "side": side,
        "num_text_tokens": num_text_tokens,
        "num_repeats": num_repeats,
        "median_seconds": round(statistics.median(seconds[2:]), 5),
        "fastest_seconds": round(min(seconds[2:]), 5),
        "slowest_seconds": round(max(seconds[2:]), 5),
        "num_threads": torch.get_num_threads(),
        **_environment(pipeline),
    }


def _transformer_inputs(pipeline: FluxPipeline, side: int, num_text_tokens: int) -> dict[str, Any]:
    config, device, dtype = pipeline.transformer.config, pipeline.device, pipeline.transformer.dtype
    tokens = side // (pipeline.vae_scale_factor * 2)
    channels = config.in_channels // 4
    noise = torch.randn(1, channels, 2 * tokens, 2 * tokens, generator=torch.Generator().manual_seed(0))
    embeds, pooled, text_ids = pipeline.encode_prompt(
        "a small solid red circle on a white background", None, device=device, max_sequence_length=num_text_tokens
    )
    return {
        "hidden_states": pipeline._pack_latents(noise, *noise.shape).to(device, dtype),
        "encoder_hidden_states": embeds,
        "pooled_projections": pooled,
        "timestep": torch.full((1,), 0.5, device=device, dtype=dtype),
        "guidance": torch.full((1,), 3.5, device=device) if config.guidance_embeds else None,
        "img_ids": pipeline._prepare_latent_image_ids(1, tokens, tokens, device, dtype),
        "txt_ids": text_ids,
    }


def _environment(pipeline: FluxPipeline) -> dict[str, Any]:
    dtype = str(pipeline.transformer.dtype).removeprefix("torch.")
    return {"dtype": dtype, "machine": machine(pipeline.device), "versions": versions()}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
