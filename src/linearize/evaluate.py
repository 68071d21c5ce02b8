"""Measures an exported student against its teacher, on the paired protocol and, where asked, on real pictures."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from linearize.compilation import compile_backend, compile_blocks
from linearize.config import build_prompts, build_teacher, plain
from linearize.errors import LinearizeError
from linearize.evaluation import real_data
from linearize.evaluation.settings import EvaluationSettings
from linearize.evaluation.summary import Comparison, build_summary, compare, write_summary
from linearize.export import check_student, load_pipeline
from linearize.scenes.judge import Judge
from linearize.surgery import trained_parameters
from linearize.teachers import Teacher


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Writes `summary.json` and `samples.png` for the student of `configs/evaluate.yaml`.

    Returns:
        The summary.

    Raises:
        LinearizeError: student, teacher, judge or real data cannot be read, or the student has another teacher.
    """
    if cfg.student is None:
        raise LinearizeError("student is not given: set student=<run dir>/student, the folder of an exported student.")
    check_student(Path(cfg.student).expanduser())
    settings = EvaluationSettings(**plain(cfg.evaluation))
    real = _open_real_data(cfg)
    teacher = build_teacher(cfg)
    settings.check_sizes(teacher)
    student = load_student_of(teacher, cfg.student)
    compile_blocks(student, compile_backend(cfg.compile, teacher.pipeline.transformer.device))
    captions = real_data.captions(*real) if real else None
    comparison = compare(
        student,
        teacher,
        settings,
        judge=None if cfg.judge is None else Judge.load(cfg.judge, teacher.pipeline.device),
        prompts=captions or build_prompts(cfg.prompts, cfg.root).prompts(0, settings.num_prompts),
        reference_folder=cfg.reference_folder,
        save_reference=cfg.save_reference,
    )
    summary = build_summary(comparison, student, teacher, settings)
    if real:
        summary["real_data"] = _real_data_metrics(*real, comparison, settings, teacher.pipeline.device)
    write_summary(summary, comparison, settings, cfg.folder)
    return summary


def load_student_of(teacher: Teacher, folder: str) -> nn.Module:
    """The transformer of a student folder, beside its teacher: same device, same dtype, same frozen tensors.

    Raises:
        LinearizeError: the folder holds no whole student, or one of another teacher.
    """
    base = teacher.pipeline.transformer
    components = {name: part for name, part in teacher.pipeline.components.items() if name != "transformer"}
    student = load_pipeline(folder, torch_dtype=base.dtype, **components).transformer.to(base.device).eval()
    trained = trained_parameters(student)
    expected = base.state_dict()
    for name, parameter in student.named_parameters():
        if name not in trained and not _equal(parameter, expected.get(name)):
            raise LinearizeError(
                f"student={folder} was not made from teacher {teacher.name} (its frozen {name} differs): "
                "choose the teacher that it was distilled from with teacher=<name> or teacher.path=<folder>."
            )
    return student.requires_grad_(False)


def _equal(tensor: torch.Tensor, other: torch.Tensor | None) -> bool:
    """Whether two tensors are one tensor in storage; bfloat16 is the least that either was kept in."""
    if other is None or other.shape != tensor.shape:
        return False
    return torch.equal(tensor.to(torch.bfloat16), other.to(torch.bfloat16))


def _open_real_data(cfg: DictConfig) -> tuple[Any, real_data.RealData] | None:
    if cfg.real_data is None:
        return None
    real_data.require_eval_extra()
    data = real_data.RealData(path=cfg.real_data, **plain(cfg.real))
    return real_data.open_real_data(data), data


def _real_data_metrics(
    dataset: Any, data: real_data.RealData, comparison: Comparison, settings: EvaluationSettings, device: torch.device
) -> dict[str, Any]:
    batches = real_data.real_batches(dataset, data, settings.height, settings.width, settings.batch_size)
    return real_data.real_data_metrics(
        comparison.images,
        comparison.prompts,
        batches,
        features=real_data.inception_features(data.inception_weights, device),
        lpips=real_data.load_lpips(data.lpips_network, device),
        clip=real_data.load_clip(data.clip_model),
        device=device,
        batch_size=settings.batch_size,
    )
