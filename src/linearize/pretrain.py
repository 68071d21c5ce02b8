"""Makes the scenes teacher and its judge from nothing, stage by stage, through Lightning."""

import logging
import platform
from pathlib import Path
from typing import Any

import lightning
import torch
from diffusers import FluxPipeline
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from omegaconf import DictConfig, OmegaConf

from linearize.distillation.checkpoint import SUFFIX, SafetensorsCheckpointIO
from linearize.errors import LinearizeError
from linearize.files import atomic_folder, read_json, write_json
from linearize.scenes.accuracy import judge_pipeline
from linearize.scenes.autoencoder_stage import AutoencoderStage, quiet_posterior
from linearize.scenes.grammar import prompts, words
from linearize.scenes.judge import Judge
from linearize.scenes.judge_stage import JudgeStage, judge_accuracy
from linearize.scenes.pipeline import build_flux_pipeline
from linearize.scenes.stage import Stage
from linearize.scenes.teacher_stage import Bucket, Phase, TeacherStage, zero_initialize_gates

logger = logging.getLogger(__name__)
STAGES = ("autoencoder", "judge", "teacher", "measure")


def pretrain(cfg: DictConfig) -> dict[str, Any]:
    """Runs the stages that ``cfg.stages`` names, in order, and returns what they measured.

    Each stage starts from what the folders ``cfg.teacher_folder`` and ``cfg.judge_folder`` hold, if anything, and writes
    them back whole when it ends.

    Raises:
        LinearizeError: If a stage is unknown.
    """
    unknown = [stage for stage in cfg.stages if stage not in STAGES]
    if unknown:
        raise LinearizeError(f"stages names {unknown[0]!r}, which is none of {', '.join(STAGES)}: correct stages=[...].")
    lightning.seed_everything(cfg.seed, verbose=False)
    # cuDNN's attention gives NaN in training at small head dimensions (torch 2.11).
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.set_float32_matmul_precision("high")
    run = {"autoencoder": _autoencoder, "judge": _judge, "teacher": _teacher, "measure": _measure}
    report: dict[str, Any] = {}
    for stage in cfg.stages:
        report[stage] = run[stage](cfg)
        logger.info("%s: %s", stage, report[stage])
    return report


def _autoencoder(cfg: DictConfig) -> dict[str, Any]:
    pipeline = _pipeline(cfg)
    stage = AutoencoderStage(pipeline.vae, **_options(cfg.autoencoder))
    _fit(stage, cfg, "autoencoder")
    return _keep(cfg, pipeline, "autoencoder", stage)


def _judge(cfg: DictConfig) -> dict[str, Any]:
    pipeline = _pipeline(cfg)
    judge = Judge.load(cfg.judge_folder) if (Path(cfg.judge_folder) / "config.json").exists() else Judge()
    stage = JudgeStage(judge, pipeline.vae, **_options(cfg.judge))
    trainer = _fit(stage, cfg, "judge")
    device = trainer.strategy.root_device
    judge.to(device).eval()
    autoencoder = pipeline.vae.to(device)
    generator = torch.Generator(device).manual_seed(cfg.seed + 17)
    measured = {
        "renders": judge_accuracy(judge, None, cfg.num_judged, generator),
        "reconstructions": judge_accuracy(judge, autoencoder, cfg.num_judged, generator),
        "num": cfg.num_judged,
    }
    if trainer.is_global_zero:
        judge.save(cfg.judge_folder)
        write_json(Path(cfg.judge_folder) / "accuracy.json", measured)
    trainer.strategy.barrier()
    return measured


def _teacher(cfg: DictConfig) -> dict[str, Any]:
    pipeline = _pipeline(cfg)
    options = _options(cfg.pretraining)
    options["phases"] = [
        Phase(phase["until"], tuple(Bucket(**bucket) for bucket in phase["buckets"])) for phase in options["phases"]
    ]
    stage = TeacherStage(pipeline, **options)
    _fit(stage, cfg, "teacher")
    return _keep(cfg, pipeline, "teacher", stage)


def _measure(cfg: DictConfig) -> dict[str, Any]:
    """Scene accuracy of the written pipeline through the stock call, one row per setting of ``cfg.measure``."""
    pipeline = FluxPipeline.from_pretrained(cfg.teacher_folder, torch_dtype=getattr(torch, cfg.measure.dtype))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline.to(device)
    judge = Judge.load(cfg.judge_folder, device)
    rows = []
    for setting in _options(cfg.measure)["settings"]:
        num_objects = setting.pop("num_objects")
        texts = prompts(cfg.measure.num_prompts, "held_out", seed=cfg.seed + 5, num_objects=num_objects)
        score, _ = judge_pipeline(pipeline, judge, texts, batch_size=cfg.measure.batch_size, **setting)
        row = {
            "num_objects": num_objects,
            **setting,
            "num_prompts": len(texts),
            "scene_accuracy": score.correct.float().mean().item(),
            **{name: right.float().mean().item() for name, right in score.attributes.items()},
        }
        logger.info("%s", row)
        rows.append(row)
    write_json(Path(cfg.output_folder) / "accuracy.json", rows)
    return {"rows": rows}


def _pipeline(cfg: DictConfig) -> FluxPipeline:
    """The pipeline written so far in float32, or a new one with random weights."""
    folder = Path(cfg.teacher_folder)
    if (folder / "model_index.json").exists():
        return FluxPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    parts = OmegaConf.to_container(cfg.architecture, resolve=True)
    pipeline = build_flux_pipeline(words(), seed=cfg.seed, **parts)
    zero_initialize_gates(pipeline.transformer)
    quiet_posterior(pipeline.vae)
    return pipeline


def _fit(stage: Stage, cfg: DictConfig, name: str) -> lightning.Trainer:
    folder = Path(cfg.output_folder) / name
    checkpoint = ModelCheckpoint(folder, filename="last", every_n_train_steps=cfg.checkpoint_every, enable_version_counter=False)
    checkpoint.FILE_EXTENSION = SUFFIX
    trainer = instantiate(
        cfg.trainer,
        max_steps=-1,
        max_epochs=-1,
        logger=CSVLogger(cfg.output_folder, name=name, version=""),
        callbacks=[checkpoint, RichProgressBar()] if cfg.progress_bar else [checkpoint],
        enable_progress_bar=cfg.progress_bar,
        enable_model_summary=False,
        plugins=[SafetensorsCheckpointIO()],
    )
    last = folder / f"last{SUFFIX}"
    trainer.fit(stage, ckpt_path=last if cfg.resume and last.exists() else None)
    if not torch.isfinite(torch.stack([p.detach().abs().max() for p in stage.parameters()])).all():
        raise LinearizeError(f"The weights of stage {name} are no longer finite: lower {name} learning_rate and start again.")
    return trainer


def _keep(cfg: DictConfig, pipeline: FluxPipeline, name: str, stage: Stage) -> dict[str, Any]:
    """Writes the pipeline whole in bfloat16, with a record of how its parts came about."""
    folder = Path(cfg.teacher_folder)
    history = read_json(folder / "training.json") if (folder / "training.json").exists() else []
    record = {
        "stage": name,
        "seed": cfg.seed,
        "steps": stage.global_step,
        "minutes": round(stage.seconds / 60, 2),
        "num_devices": stage.trainer.world_size,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine(),
        "samples_seen": getattr(stage, "samples_seen", None),
        "metrics": {key: float(value) for key, value in stage.trainer.logged_metrics.items()},
        "options": _options(cfg["pretraining" if name == "teacher" else name]),
    }
    if stage.trainer.is_global_zero:
        with atomic_folder(folder) as temporary:
            pipeline.to("cpu", torch.bfloat16).save_pretrained(temporary)
            write_json(temporary / "training.json", [*history, record])
    stage.trainer.strategy.barrier()
    return record


def _options(node: DictConfig) -> dict[str, Any]:
    container = OmegaConf.to_container(node, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}

