"""The summary of a run: teacher, untrained student and student under one paired protocol."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from linearize.data.prompts import ScenePrompts
from linearize.evaluation.environment import command, commit, machine, versions
from linearize.evaluation.metrics import frechet_distance, mean_psnr
from linearize.evaluation.paired import PairedProtocol
from linearize.evaluation.pictures import comparison_grid, save_png
from linearize.evaluation.reference import TeacherReference, teacher_reference
from linearize.evaluation.scene_metrics import judge_features, scene_numbers
from linearize.evaluation.settings import EvaluationSettings
from linearize.evaluation.tables import print_summary
from linearize.files import write_json
from linearize.flops import attention_flops
from linearize.layout import Layout
from linearize.scenes.judge import Judge
from linearize.surgery import share_student, trained_parameters

if TYPE_CHECKING:
    from linearize.teachers import Teacher


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What the paired protocol found.

    Attributes:
        numbers: The metrics of each model: "teacher", "untrained", "student".
        images: The pictures of each model, [prompts, 3, height, width] in [0, 1], by the same names.
        prompts: One per picture.
    """

    numbers: dict[str, dict[str, Any]]
    images: dict[str, Tensor]
    prompts: list[str]


def summarize_run(
    student: nn.Module,
    teacher: "Teacher",
    settings: EvaluationSettings,
    *,
    folder: str | Path,
    judge: Judge | None = None,
    prompts: Sequence[str] | None = None,
    training: Mapping[str, float] | None = None,
    reference_folder: str | Path | None = None,
    save_reference: bool = False,
) -> dict[str, Any]:
    """Measures a student, writes `summary.json` and `samples.png` to a folder and prints the numbers.

    Args:
        student: The student transformer.
        teacher: The teacher that it was made from.
        settings: What is measured.
        folder: Where the two files go.
        judge: Reads scenes off pictures; without it `scene_accuracy` and `frechet_distance` are null.
        prompts: The first `num_prompts` are used; None takes held-out prompts of the scenes grammar.
        training: "train_seconds" and "samples_per_second" of the run, null where missing, and "trainable_parameters".
        reference_folder: Where the teacher's own samples may already be; see `teacher_reference`.
        save_reference: Whether to keep new teacher samples there.

    Returns:
        The content of `summary.json`.
    """
    comparison = compare(
        student,
        teacher,
        settings,
        judge=judge,
        prompts=prompts,
        reference_folder=reference_folder,
        save_reference=save_reference,
    )
    summary = build_summary(comparison, student, teacher, settings, training=training)
    write_summary(summary, comparison, settings, folder)
    return summary


def build_summary(
    comparison: Comparison,
    student: nn.Module,
    teacher: "Teacher",
    settings: EvaluationSettings,
    *,
    training: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The content of `summary.json`: the numbers, what the run cost, and where all of it comes from."""
    training = training or {}
    trainable = sum(parameter.numel() for parameter in trained_parameters(student).values())
    return {
        **comparison.numbers,
        "attention_flops_ratio": _flops_ratio(student, teacher, settings),
        "train_seconds": training.get("train_seconds"),
        "samples_per_second": training.get("samples_per_second"),
        # Of a student whose adapters are merged, only the run knows what was trained.
        "trainable_parameters": training.get("trainable_parameters", trainable),
        "plan": _plan(student),
        "teacher_source": {"name": teacher.name, "revision": teacher.revision, "weight_hash": teacher.weight_hash},
        "settings": {
            **dataclasses.asdict(settings),
            "num_prompts": len(comparison.prompts),
            "sigmas": list(settings.sigmas),
        },
        "versions": versions(),
        "commit": commit(),
        "machine": machine(next(student.parameters()).device),
        "command": command(),
    }


def write_summary(
    summary: Mapping[str, Any], comparison: Comparison, settings: EvaluationSettings, folder: str | Path
) -> None:
    """Writes `summary.json` and `samples.png` (teacher | untrained | student | difference) and prints the numbers."""
    columns = {name: images[: settings.num_rows] for name, images in comparison.images.items()}
    write_json(Path(folder) / "summary.json", summary)
    save_png(comparison_grid(columns, comparison.prompts[: settings.num_rows]), Path(folder) / "samples.png")
    print_summary(summary)


def compare(
    student: nn.Module,
    teacher: "Teacher",
    settings: EvaluationSettings,
    *,
    judge: Judge | None = None,
    prompts: Sequence[str] | None = None,
    reference_folder: str | Path | None = None,
    save_reference: bool = False,
) -> Comparison:
    """Runs the paired protocol; the arguments are those of `summarize_run`.

    The teacher is measured against pictures from a second seed of its own, which is the noise floor of PSNR and Fréchet
    distance. A velocity depends on no seed, so the teacher's velocity error is 0. The untrained student is what surgery
    makes of the teacher, before any step of training.
    """
    if prompts is None:
        prompts = ScenePrompts("held_out", settings.seed).prompts(0, settings.num_prompts)
    protocol = PairedProtocol(teacher, list(prompts[: settings.num_prompts]), settings)
    reference = teacher_reference(protocol, reference_folder, save=save_reference)
    velocities = protocol.velocities(teacher.pipeline.transformer, reference.latents)
    images = {"teacher": protocol.decode(reference.latents)}
    numbers = {"teacher": _teacher_numbers(protocol, reference, images["teacher"], judge)}
    for name in ("untrained", "student"):
        model = student if name == "student" else untrained_student(teacher, student, settings.seed)
        images[name] = protocol.decode(protocol.sample(model))
        numbers[name] = {
            **_picture_numbers(images[name], images["teacher"], protocol.prompts, judge),
            "velocity_error": protocol.velocity_error(model, reference.latents, velocities),
        }
    return Comparison(numbers, images, list(protocol.prompts))


def untrained_student(teacher: "Teacher", student: nn.Module, seed: int) -> nn.Module:
    """What surgery makes of the teacher under the student's plan; it shares the teacher's frozen tensors."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return share_student(teacher.pipeline.transformer, _plan(student))


def _teacher_numbers(
    protocol: PairedProtocol, reference: TeacherReference, images: Tensor, judge: Judge | None
) -> dict[str, Any]:
    second = protocol.decode(reference.second_latents)
    return {**_picture_numbers(images, second, protocol.prompts, judge), "velocity_error": 0.0}


def _picture_numbers(images: Tensor, references: Tensor, prompts: Sequence[str], judge: Judge | None) -> dict[str, Any]:
    scenes = scene_numbers(judge, images, prompts)
    distance = None
    # The judge's features mean something for scenes alone.
    if judge is not None and scenes.scene_accuracy is not None:
        distance = frechet_distance(judge_features(judge, images), judge_features(judge, references))
    return {
        "scene_accuracy": scenes.scene_accuracy,
        "caption_log_probability": scenes.caption_log_probability,
        "psnr_to_teacher": mean_psnr(images, references),
        "frechet_distance": distance,
    }


def _plan(student: Any) -> list[dict[str, Any]]:
    """Which site has which mixer, as the student's config holds it."""
    return [dict(rule) for rule in student.config.linearize_plan]


def picture_layout(student: nn.Module, teacher: "Teacher", settings: EvaluationSettings) -> Layout:
    """The tokens of the pictures that are measured."""
    shape = teacher.backbone.latent_shape(teacher.pipeline, settings.height, settings.width)
    latents = torch.empty((1, *shape), device="meta")
    return teacher.backbone.forward_layout(student, latents, settings.max_sequence_length)


def _flops_ratio(student: nn.Module, teacher: "Teacher", settings: EvaluationSettings) -> float:
    layout = picture_layout(student, teacher, settings)
    before, after = (
        attention_flops(teacher.backbone, model, layout) for model in (teacher.pipeline.transformer, student)
    )
    return after / before
