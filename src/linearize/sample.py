"""Pictures of a student or a teacher, through the stock pipeline call."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from linearize.backbones import find_backbone
from linearize.compilation import compile_backend, compile_blocks
from linearize.config import build_prompts, build_teacher
from linearize.errors import LinearizeError, check_count
from linearize.evaluation.pictures import save_png
from linearize.export import load_pipeline
from linearize.teachers import resolve_device, resolve_dtype


def sample(cfg: DictConfig) -> list[Path]:
    """Writes one PNG for every prompt of `configs/sample.yaml`.

    Returns:
        The files.

    Raises:
        LinearizeError: no prompt is given, a size is no whole number, of tokens where it is a picture's, a folder
            cannot be read, or the file's name is no PNG's.
    """
    for name in ("height", "width", "num_inference_steps", "max_sequence_length"):
        check_count(name, cfg[name])
    if cfg.num_prompts is not None:
        check_count("num_prompts", cfg.num_prompts)
    prompts = _prompts(cfg)
    out = Path(cfg.out)
    if out.suffix.lower() != ".png":
        raise LinearizeError(f"out={cfg.out} is no name of a PNG file: give one, for example out=sample.png.")
    pipeline = _load(cfg)
    backbone = find_backbone(pipeline.transformer)
    for name in ("height", "width"):
        backbone.check_sizes(pipeline, name, [cfg[name]])
    backbone.check_sequence_length("max_sequence_length", cfg.max_sequence_length)
    files = [out] if len(prompts) == 1 else [out.with_stem(f"{out.stem}-{index}") for index in range(len(prompts))]
    for index, (prompt, file) in enumerate(zip(prompts, files, strict=True)):
        picture = pipeline(
            prompt=prompt,
            height=cfg.height,
            width=cfg.width,
            num_inference_steps=cfg.num_inference_steps,
            guidance_scale=cfg.guidance_scale,
            max_sequence_length=cfg.max_sequence_length,
            generator=torch.Generator("cpu").manual_seed(cfg.seed + index),
        ).images[0]
        save_png(picture, file)
        print(f"{file}: {prompt}")
    return files


def _prompts(cfg: DictConfig) -> list[str]:
    if cfg.prompt is not None:
        return [str(cfg.prompt)]
    if cfg.prompts.source != "scenes" and cfg.prompts.path is None:
        raise LinearizeError('No prompt is given: set prompt="a text", or prompts.path=<file with one prompt a line>.')
    source = build_prompts(cfg.prompts, cfg.root)
    return source.prompts(0, cfg.num_prompts or source.description.get("num_prompts", 1))


def _load(cfg: DictConfig) -> Any:
    if cfg.student is not None:
        device = resolve_device(cfg.teacher.device)
        pipeline = load_pipeline(cfg.student, torch_dtype=resolve_dtype(cfg.teacher.dtype, device)).to(device)
        compile_blocks(pipeline.transformer, compile_backend(cfg.compile, device))
        return pipeline
    teacher = build_teacher(cfg)
    if not teacher.has_text_encoder:
        raise LinearizeError(
            f"teacher {teacher.name} has no text encoder and cannot be prompted: choose another teacher."
        )
    return teacher.pipeline
