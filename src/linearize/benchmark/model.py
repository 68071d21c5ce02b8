"""Whole models: one forward pass, one distillation step and one picture, teacher and student side by side."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from linearize.benchmark.timing import measure
from linearize.errors import LinearizeError
from linearize.evaluation.paired import with_transformer
from linearize.flops import attention_flops
from linearize.surgery import share_student, trained_parameters
from linearize.teachers import Teacher


@dataclass(frozen=True)
class ModelSettings:
    """What is measured.

    Attributes:
        batch: Pictures at once.
        max_sequence_length: Text tokens.
        num_inference_steps: Sampler steps of one picture.
        warmup: Calls before the clock starts.
        repeats: Timed calls.
        compile_backend: Backend for torch.compile of the repeated blocks; None runs them eagerly.
    """

    batch: int
    max_sequence_length: int
    num_inference_steps: int
    warmup: int
    repeats: int
    compile_backend: str | None = None


def model_rows(
    teacher: Teacher, settings: ModelSettings, *, kind: str, sizes: list[int], plans: Mapping[str, list[dict[str, Any]]]
) -> Iterator[dict[str, Any]]:
    """Measures the teacher and every student at every size.

    Args:
        teacher: The teacher.
        settings: How.
        kind: "transformer" (one forward pass), "train_step" (teacher forward, student forward and backward, optimizer)
            or "sampling" (the stock pipeline call on embeddings, without decoding).
        sizes: Sides of square pictures in pixels.
        plans: Layer rules of each student by name.

    Yields:
        One row for each model and size, with `ratio_to_teacher`; a training step has no teacher's row to compare with,
        so its ratio is to a student with softmax in every layer.

    Raises:
        LinearizeError: `kind` is unknown.
    """
    if kind not in _CALLS:
        raise LinearizeError(f"suite={kind} is unknown: choose attention, {', '.join(_CALLS)}.")
    all_plans: dict[str, list[dict[str, Any]]] = {"teacher": [{"layers": "*", "mixer": "softmax"}], **plans}
    for size in sizes:
        dense: float | None = None
        for name, rules in all_plans.items():
            student = share_student(teacher.pipeline.transformer, rules)
            if settings.compile_backend is not None:
                cast(Any, student).compile_repeated_blocks(backend=settings.compile_backend)
            call = _CALLS[kind](teacher, student, settings, size)
            timing = measure(call, teacher.pipeline.device, warmup=settings.warmup, repeats=settings.repeats)
            dense = dense or timing.median_seconds
            yield {
                "model": name,
                "size": size,
                **timing.as_dict(),
                "ratio_to_teacher": dense / timing.median_seconds,
                "attention_gflops": _gflops(teacher, student, settings, size),
            }


def _inputs(teacher: Teacher, settings: ModelSettings, size: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    device = teacher.pipeline.transformer.device
    shape = (settings.batch, *teacher.backbone.latent_shape(teacher.pipeline, size, size))
    conditioning: dict[str, Any] = teacher.encode(["a picture"] * settings.batch, settings.max_sequence_length)
    conditioning["guidance"] = torch.full((settings.batch,), 3.5, device=device)
    return (
        torch.randn(shape, generator=generator).to(device),
        torch.full((settings.batch,), 0.5, device=device),
        conditioning,
    )


def _forward(teacher: Teacher, student: nn.Module, settings: ModelSettings, size: int) -> Callable[[], object]:
    inputs = _inputs(teacher, settings, size)
    student.to(teacher.pipeline.transformer.dtype)

    def call() -> None:
        with torch.no_grad():
            teacher.backbone.predict(student, *inputs)

    return call


def _train_step(teacher: Teacher, student: nn.Module, settings: ModelSettings, size: int) -> Callable[[], object]:
    inputs = _inputs(teacher, settings, size)
    device = teacher.pipeline.transformer.device.type
    optimizer = torch.optim.AdamW(list(trained_parameters(student).values()), lr=1e-5)
    mixed = teacher.pipeline.transformer.dtype == torch.bfloat16

    def call() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=mixed):
            with torch.no_grad():
                target = teacher.backbone.predict(teacher.pipeline.transformer, *inputs)
            loss = (teacher.backbone.predict(student, *inputs) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return call


def _sampling(teacher: Teacher, student: nn.Module, settings: ModelSettings, size: int) -> Callable[[], object]:
    student.to(teacher.pipeline.transformer.dtype)
    pipeline = with_transformer(teacher.pipeline, student)
    conditioning = teacher.encode(["a picture"] * settings.batch, settings.max_sequence_length)

    def call() -> None:
        teacher.backbone.sample(
            pipeline,
            conditioning,
            seeds=list(range(settings.batch)),
            height=size,
            width=size,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=3.5,
        )

    return call


def _gflops(teacher: Teacher, student: nn.Module, settings: ModelSettings, size: int) -> float:
    shape = teacher.backbone.latent_shape(teacher.pipeline, size, size)
    latents = torch.empty((settings.batch, *shape), device="meta")
    layout = teacher.backbone.forward_layout(cast(Any, student), latents, settings.max_sequence_length)
    return attention_flops(teacher.backbone, student, layout, settings.batch) / 1e9


_CALLS: dict[str, Callable[[Teacher, nn.Module, ModelSettings, int], Callable[[], object]]] = {
    "transformer": _forward,
    "train_step": _train_step,
    "sampling": _sampling,
}
