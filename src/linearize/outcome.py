"""What a run leaves behind: the student it ended with, the summary, the export and the proof that it loads."""

import logging
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from linearize.adapters import merge_lora
from linearize.costs import Costs
from linearize.data.datamodule import SampleDataModule
from linearize.data.prompts import ScenePrompts
from linearize.distillation.module import DistillationModule
from linearize.evaluation.paired import with_transformer
from linearize.evaluation.settings import EvaluationSettings
from linearize.evaluation.summary import summarize_run
from linearize.export import export_student
from linearize.reload import check_reload
from linearize.scenes.judge import Judge
from linearize.surgery import trained_parameters
from linearize.teachers import Teacher

_log = logging.getLogger(__name__)


def finished_student(module: DistillationModule, teacher: Teacher) -> torch.nn.Module:
    """The student as it is exported: averaged weights, adapters merged, the teacher's dtype and device."""
    module.ema.swap()
    merge_lora(module.student)
    for parameter in trained_parameters(module.student).values():
        parameter.data = parameter.data.to(teacher.pipeline.transformer.dtype)
        parameter.grad = None
    module.student.disable_gradient_checkpointing()
    device = teacher.pipeline.vae.device
    teacher.pipeline.to(device)
    return module.student.to(device).eval().requires_grad_(False)


def load_judge(cfg: DictConfig, teacher: Teacher) -> Judge | None:
    """The judge of the config, where there is something for it to judge."""
    if cfg.judge is None or not cfg.evaluate or not is_of_scenes(cfg):
        return None
    return Judge.load(cfg.judge, teacher.pipeline.device)


def is_of_scenes(cfg: DictConfig) -> bool:
    """Whether the teacher paints scenes of the grammar, which the judge can read."""
    return cfg.teacher.hub_id is None and cfg.teacher.random is None and cfg.data.prompts.source == "scenes"


def run_prompts(cfg: DictConfig, data: SampleDataModule, settings: EvaluationSettings) -> list[str]:
    """Held-out prompts: of the scenes grammar where the teacher paints scenes, else those of its samples."""
    if is_of_scenes(cfg):
        return ScenePrompts("held_out", settings.seed).prompts(0, settings.num_prompts)
    return data.held_out_prompts(settings.num_prompts)


def evaluate_run(
    cfg: DictConfig,
    teacher: Teacher,
    data: SampleDataModule,
    student: torch.nn.Module,
    settings: EvaluationSettings,
    judge: Judge | None,
    training: dict[str, float],
) -> dict[str, Any]:
    """Measures the student on held-out prompts: of the scenes grammar where it paints scenes, else its samples'."""
    return summarize_run(
        student,
        teacher,
        settings,
        folder=cfg.run_dir,
        judge=judge,
        prompts=run_prompts(cfg, data, settings),
        training=training,
        reference_folder=cfg.reference_folder,
        save_reference=cfg.save_reference,
    )


def export_run(
    cfg: DictConfig,
    teacher: Teacher,
    data: SampleDataModule,
    student: torch.nn.Module,
    settings: EvaluationSettings,
    summary: dict[str, Any] | None,
    costs: Costs,
) -> None:
    """Writes <run dir>/student and, where `check_export` is set, proves it by loading it again."""
    folder = Path(cfg.run_dir) / "student"
    with costs.part("export"):
        export_student(with_transformer(teacher.pipeline, student), folder, form=cfg.export, summary=summary)
    _log.info("The student is in %s.", folder)
    if cfg.check_export and cfg.export == "local":
        prompt = run_prompts(cfg, data, settings)[0]
        with costs.part("reload"):
            difference = check_reload(folder, teacher, student, settings, prompt, Path(cfg.run_dir) / "reloaded.png")
        _log.info("Loaded again, it paints reloaded.png; its latents differ from the student's by %.2g.", difference)
