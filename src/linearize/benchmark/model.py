"""Whole models: one forward pass and one picture, teacher and students side by side."""

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from linearize.benchmark.profile import profiled
from linearize.benchmark.subjects import BASELINES, RemovedAttention, check_student, student_of
from linearize.benchmark.timing import measured_or_reason
from linearize.compilation import compile_backend, compile_blocks
from linearize.errors import LinearizeError, is_out_of_memory
from linearize.evaluation.paired import with_transformer
from linearize.flops import attention_flops
from linearize.mixers._local import LocalMixer
from linearize.teachers import Teacher

# Largest relative error of a compiled model's velocity, against the same model run eagerly with attention by `halo`, at
# which its speed may be reported: rounding, through all layers.
PARITY = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


@dataclass(frozen=True)
class ModelSettings:
    """What is measured.

    Attributes:
        batch: Pictures at once.
        max_sequence_length: Text tokens.
        num_inference_steps: Sampler steps of one picture.
        warmup: Calls before the clock starts.
        repeats: Timed calls.
        compile: Whether blocks are compiled: "auto", True, False, or a backend.
        profile: Whether one more call is profiled.
    """

    batch: int
    max_sequence_length: int
    num_inference_steps: int
    warmup: int
    repeats: int
    compile: bool | str = "auto"
    profile: bool = False


def model_rows(
    teacher: Teacher,
    settings: ModelSettings,
    *,
    kind: str,
    sizes: list[int],
    students: Mapping[str, Mapping[str, Any]],
    baselines: Sequence[str] = ("teacher",),
    earlier: Sequence[Mapping[str, Any]] = (),
) -> Iterator[dict[str, Any]]:
    """Measures baselines and every student at every size.

    On a GPU dense attention is cuDNN's. Each model is compared with what it computes eagerly before it is timed: as a
    whole at the first of its sizes, by its first blocks at the others, where a whole pass may take minutes.

    Args:
        teacher: The teacher.
        settings: How.
        kind: "transformer" (one forward pass) or "sampling" (the stock pipeline call on embeddings, without decoding).
        sizes: Sides of square pictures in pixels.
        students: Students by name, see `student_of`.
        baselines: Of `BASELINES`.
        earlier: Rows of an earlier run of the same code: models that were compared there are not compared as a whole
            again, and what they compare with holds where it is not measured again.

    Yields:
        One row for each model and size, with `ratio_to_teacher`, which is to the first model at that size, and None
        where that has no time, or with `error`: why there is no speed.

    Raises:
        LinearizeError: A baseline, or a mixer of a student, is unknown, or a size is no whole number of tokens.
    """
    unknown = [name for name in baselines if name not in BASELINES]
    if unknown:
        raise LinearizeError(f"model.baselines names {unknown[0]!r}: choose from {', '.join(BASELINES)}.")
    for name, rule in students.items():
        check_student(f"model.mixers.{name}", rule)
    teacher.backbone.check_sizes(teacher.pipeline, "model.sizes", sizes)
    subjects: dict[str, Callable[[nn.Module], nn.Module]] = {name: BASELINES[name] for name in baselines}
    subjects |= {name: partial(student_of, rule=rule) for name, rule in students.items()}
    again = {(name, size, settings.batch) for name in subjects for size in sizes}
    lasting = [row for row in earlier if (row["model"], row["size"], row["batch"]) not in again]
    checked = {row["model"] for row in lasting if _is_checked(row)}
    for size in sizes:
        measured = [row for row in earlier if (row["size"], row["batch"]) == (size, settings.batch)]
        first = next(iter([*(row["model"] for row in measured), *subjects]), None)
        dense: float | None = measured[0].get("median_seconds") if measured and first not in subjects else None
        for name, build in subjects.items():
            row: dict[str, Any] = {"model": name, "size": size, "batch": settings.batch}
            row |= _measure(teacher, settings, kind, size, build, name not in checked)
            if _is_checked(row):
                checked.add(name)
            seconds = row.get("median_seconds")
            dense = seconds if name == first else dense
            yield row | {"ratio_to_teacher": dense / seconds if dense and seconds else None}


def _is_checked(row: Mapping[str, Any]) -> bool:
    return row.get("parity_error") is not None and "error" not in row


def _measure(
    teacher: Teacher,
    settings: ModelSettings,
    kind: str,
    size: int,
    build: Callable[[nn.Module], nn.Module],
    checks_whole: bool,
) -> dict[str, Any]:
    # Graphs of one model are no guide to the next, and hold its memory.
    torch.compiler.reset()
    gc.collect()
    device = teacher.pipeline.transformer.device
    found: dict[str, Any] = {}
    try:
        student = build(teacher.pipeline.transformer)
        found["attention_gflops"] = _gflops(teacher, student, settings, size)
        with _dense_kernel(device):
            call = _CALLS[kind](teacher, student, settings, size)
            with _first_blocks(student):
                error = None if checks_whole else _parity_error(teacher, student, settings, size)
                if error is None:  # The comparison compiles as much.
                    call()
            if checks_whole:
                error = _parity_error(teacher, student, settings, size)
            found["parity_error"] = error
            if error is None or error <= PARITY[teacher.pipeline.transformer.dtype]:
                found |= measured_or_reason(call, device, warmup=settings.warmup, repeats=settings.repeats)
                if settings.profile and "median_seconds" in found:
                    found["profile"] = profiled(call, device)
                return found
    except LinearizeError as refusal:
        return found | {"error": str(refusal)}
    except RuntimeError as failure:  # of the first call or the comparison
        if not is_out_of_memory(failure):
            raise
        return found | {"error": "out of memory: choose a smaller size or batch"}
    return found | {
        "error": f"compiled, it is off by {error:.2g} from what it computes eagerly, more than rounding explains, so "
        "no speed of it is reported"
    }


@contextlib.contextmanager
def _first_blocks(transformer: nn.Module, count: int = 2) -> Iterator[None]:
    """The transformer with the first blocks of each kind alone: enough to compile what all blocks run.

    At 8192 pixels a warm-up of the whole teacher would take a minute and a half.
    """
    stacks = {name: blocks for name, blocks in transformer.named_children() if isinstance(blocks, nn.ModuleList)}
    for name, blocks in stacks.items():
        setattr(transformer, name, blocks[:count])
    try:
        yield
    finally:
        for name, blocks in stacks.items():
            setattr(transformer, name, blocks)


def _dense_kernel(device: torch.device) -> contextlib.AbstractContextManager:
    """CuDNN's attention where there is a choice, and others where it refuses: masked attention, small heads."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    others = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel([SDPBackend.CUDNN_ATTENTION, *others], set_priority=True)


@torch.no_grad()
def _parity_error(teacher: Teacher, student: nn.Module, settings: ModelSettings, size: int) -> float | None:
    """The relative error of the compiled student's velocity against the same student run eagerly with `halo`."""
    mixers = [getattr(site, "mixer", None) for site in teacher.backbone.sites(student).values()]
    if any(isinstance(mixer, RemovedAttention) for mixer in mixers):
        return None
    inputs = _inputs(teacher, settings, size)
    found = teacher.backbone.predict(student, *inputs).float()
    with torch.compiler.set_stance("force_eager"), _backend("halo", mixers):
        expected = teacher.backbone.predict(student, *inputs).float()
    return ((found - expected).norm() / expected.norm()).item()


@contextlib.contextmanager
def _backend(name: str, mixers: Sequence[object]) -> Iterator[None]:
    """Local mixers with a backend; afterwards each is as it was, or what was compiled before would compile again."""
    local = [mixer for mixer in mixers if isinstance(mixer, LocalMixer)]
    before = [vars(mixer).get("backend") for mixer in local]
    for mixer in local:
        mixer.backend = name
    try:
        yield
    finally:
        for mixer, own in zip(local, before, strict=True):
            if own is None:
                del mixer.backend
            else:
                mixer.backend = own


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
    _ready(teacher, student, settings)

    def call() -> None:
        with torch.no_grad():
            teacher.backbone.predict(student, *inputs)

    return call


def _sampling(teacher: Teacher, student: nn.Module, settings: ModelSettings, size: int) -> Callable[[], object]:
    _ready(teacher, student, settings)
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


def _ready(teacher: Teacher, student: nn.Module, settings: ModelSettings) -> None:
    """As a student is sampled: in the teacher's dtype, compiled."""
    transformer = teacher.pipeline.transformer
    # diffusers' own `to` warns of modules to keep in float32 even where a model names none.
    nn.Module.to(student, transformer.dtype).eval()
    compile_blocks(student, compile_backend(settings.compile, transformer.device))


def _gflops(teacher: Teacher, student: nn.Module, settings: ModelSettings, size: int) -> float:
    shape = teacher.backbone.latent_shape(teacher.pipeline, size, size)
    latents = torch.empty((settings.batch, *shape), device="meta")
    layout = teacher.backbone.forward_layout(cast(Any, student), latents, settings.max_sequence_length)
    return attention_flops(teacher.backbone, student, layout, settings.batch) / 1e9


_CALLS: dict[str, Callable[[Teacher, nn.Module, ModelSettings, int], Callable[[], object]]] = {
    "transformer": _forward,
    "sampling": _sampling,
}
