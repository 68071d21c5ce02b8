"""One distillation step: teacher forward, student forward and backward, optimizer, by CLEAR's losses."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from linearize.benchmark.profile import profiled
from linearize.benchmark.subjects import check_student, student_of
from linearize.benchmark.timing import measured_or_reason
from linearize.compilation import compile_backend
from linearize.costs import GIB
from linearize.distillation.adamw8bit import AdamW8bit
from linearize.distillation.losses import AttentionOutput, FlowMatching, Prediction
from linearize.distillation.module import DistillationModule
from linearize.distillation.noise import Uniform, draw_noise
from linearize.distillation.stages import Stage
from linearize.errors import LinearizeError, is_out_of_memory
from linearize.surgery import trained_parameters
from linearize.teachers import Teacher

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, fused=True),
    "adamw8bit": AdamW8bit,
}
# Largest relative difference between first losses of the same student, which see the same samples and noise, at which a
# speed may be reported: rounding, through all layers.
PARITY = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}
_SEED = 0


@dataclass(frozen=True)
class TrainSettings:
    """What is measured.

    Attributes:
        batch: Pictures in a step.
        max_sequence_length: Text tokens.
        learning_rate: Of every optimizer.
        curve_steps: Steps on the same samples, each with noise of its own, whose losses are kept; the first compile.
        repeats: Timed steps after them.
        profile: Whether one more step is profiled.
    """

    batch: int
    max_sequence_length: int
    learning_rate: float
    curve_steps: int
    repeats: int
    profile: bool = False


@dataclass(frozen=True)
class Recipe:
    """How a student is trained.

    Attributes:
        student: Its mixer, see `student_of`.
        shared: Whether frozen tensors are the teacher's own objects; otherwise there are two whole models.
        compile: Whether blocks are compiled: "auto", True, False, or a backend.
        activation_memory_gib: See `ActivationBudget`; 0 computes every block again.
        optimizer: Of `OPTIMIZERS`.
        optimizer_in_backward: See `StepInBackward`.
    """

    student: Mapping[str, Any]
    shared: bool = True
    compile: bool | str = "auto"
    activation_memory_gib: float | None = None
    optimizer: str = "adamw"
    optimizer_in_backward: bool = False


def train_rows(
    teacher: Teacher,
    settings: TrainSettings,
    *,
    sizes: list[int],
    recipes: Mapping[str, Mapping[str, Any]],
    earlier: Sequence[Mapping[str, Any]] = (),
) -> Iterator[dict[str, Any]]:
    """Measures recipes side by side; the first is what the others are compared with.

    Args:
        teacher: The teacher.
        settings: How.
        sizes: Sides of square pictures in pixels.
        recipes: Fields of `Recipe` by name.
        earlier: Rows of an earlier run of the same code, whose first is the first of all.

    Yields:
        One row for each recipe and size, with `samples_per_second`, `ratio_to_first`, which is None where the first has
        none, the memory before the first step, at the peak, and `losses`; or with `error`, as where the first loss is
        not that of the recipe before with the same student.

    Raises:
        LinearizeError: A recipe names what does not exist, or a size is no whole number of tokens.
    """
    teacher.backbone.check_sizes(teacher.pipeline, "train_step.sizes", sizes)
    built = {name: _recipe(name, fields) for name, fields in recipes.items()}
    for size in sizes:
        before = [row for row in earlier if (row["size"], row["batch"]) == (size, settings.batch)]
        first = next(iter([*(row["model"] for row in before), *built]), None)
        measured = {row["model"]: row for row in before if row["model"] not in built}
        for name, recipe in built.items():
            row = {"model": name, "size": size, "batch": settings.batch, "student": _without_measure(recipe.student)}
            peers = [one for one in measured.values() if "samples_per_second" in one]
            expected = next((one["losses"][0] for one in peers if one["student"] == row["student"]), None)
            row |= _measure(teacher, settings, recipe, size, expected)
            _forget()
            measured[name] = row
            if "samples_per_second" in row:
                rate = measured.get(first, {}).get("samples_per_second")
                row["ratio_to_first"] = row["samples_per_second"] / rate if rate else None
            yield row


def _without_measure(student: Mapping[str, Any]) -> dict[str, Any]:
    """What is trained, whichever way it is computed."""
    return {name: value for name, value in student.items() if name != "measure"}


def build_step(
    teacher: Teacher, student: nn.Module, settings: TrainSettings, recipe: Recipe, size: int
) -> Callable[[], float | torch.Tensor]:
    """A call that takes one step and returns its loss; noise differs between calls, samples do not."""
    device = teacher.pipeline.transformer.device
    terms = {
        "flow_matching": FlowMatching(),
        "prediction": Prediction(weight=0.5),
        "attention_output": AttentionOutput(weight=0.5),
    }
    module = DistillationModule(
        teacher.pipeline.transformer,
        student,  # type: ignore[arg-type]
        stages=[Stage("distill", terms, settings.curve_steps + settings.repeats)],
        optimizer=lambda parameters: OPTIMIZERS[recipe.optimizer](parameters, lr=settings.learning_rate),
        seed=_SEED,
        ema_decay=0,
        activation_memory_gib=recipe.activation_memory_gib,
        optimizer_in_backward=recipe.optimizer_in_backward,
        compile_backend=compile_backend(recipe.compile, device),
    ).train()
    optimizer, batch = module.build_optimizer(), _batch(teacher, settings, size)
    mixed = teacher.pipeline.transformer.dtype == torch.bfloat16
    step = 0

    def call() -> torch.Tensor:
        nonlocal step
        keys = [(_SEED, step, 0, index) for index in range(settings.batch)]
        step += 1
        noise, sigma = draw_noise(batch["latents"], keys, Uniform())
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            values = module.observer.compute_terms(terms, batch, noise, sigma)
        loss = torch.stack([terms[name].weight * value for name, value in values.items()]).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return call


def _recipe(name: str, fields: Mapping[str, Any]) -> Recipe:
    try:
        recipe = Recipe(**fields)
    except TypeError as error:
        choices = ", ".join(Recipe.__dataclass_fields__)
        raise LinearizeError(
            f"the recipe {name} of train_step is wrong ({error}): its settings are {choices}"
        ) from error
    if recipe.optimizer not in OPTIMIZERS:
        raise LinearizeError(f"the recipe {name} has optimizer={recipe.optimizer}: choose {', '.join(OPTIMIZERS)}.")
    check_student(f"train_step.recipes.{name}.student", recipe.student)
    return recipe


def _measure(
    teacher: Teacher, settings: TrainSettings, recipe: Recipe, size: int, expected_loss: float | None
) -> dict[str, Any]:
    device = teacher.pipeline.transformer.device
    on_gpu = device.type == "cuda"
    losses: list[float] = []
    loaded: float | None = None
    # What a mixer draws at random is the same in every recipe.
    torch.manual_seed(_SEED)
    try:
        student = student_of(teacher.pipeline.transformer, recipe.student, shared=recipe.shared)
        trained = trained_parameters(student)
        student.requires_grad_(False)
        for parameter in trained.values():
            parameter.requires_grad_(True)
        call = build_step(teacher, student, settings, recipe, size)
        loaded = torch.cuda.memory_allocated(device) / GIB if on_gpu else None
        losses = [float(call()) for _ in range(settings.curve_steps)]
        if not all(map(math.isfinite, losses)):
            return {"error": f"its loss is not a finite number: {losses}, so no speed of it is reported"}
        limit = PARITY[teacher.pipeline.transformer.dtype]
        if expected_loss is not None and abs(losses[0] / expected_loss - 1) > limit:
            return {
                "error": f"its first loss is {losses[0]:.4g} where the recipe before it has {expected_loss:.4g}, "
                "more than rounding explains, so no speed of it is reported"
            }
        row = measured_or_reason(call, device, warmup=0, repeats=settings.repeats)
        if settings.profile and "median_seconds" in row:
            row["profile"] = profiled(call, device)
    except LinearizeError as error:
        return {"error": str(error)}
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return {"error": "out of memory: choose a smaller size or batch, or less activation_memory_gib"}
    row |= {"memory_after_loading_gib": loaded, "losses": losses, "last_loss": losses[-1]}
    row |= {"trained_parameters": sum(value.numel() for value in trained.values())}
    if "median_seconds" in row:
        row["samples_per_second"] = settings.batch / row["median_seconds"]
    return row


def _batch(teacher: Teacher, settings: TrainSettings, size: int) -> dict[str, Any]:
    device = teacher.pipeline.transformer.device
    shape = (settings.batch, *teacher.backbone.latent_shape(teacher.pipeline, size, size))
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(_SEED)).to(device)
    encoded = teacher.encode(["a picture"] * settings.batch, settings.max_sequence_length)
    return {"latents": latents, "guidance": torch.full((settings.batch,), 3.5, device=device), **encoded}


def _forget() -> None:
    """Frees what the last recipe held: its graphs and, in reference cycles, its tensors."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
