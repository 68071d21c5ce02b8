"""Makes the scenes teacher and its judge from nothing, stage by stage, through Lightning."""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch
from diffusers import FluxPipeline
from hydra.utils import instantiate
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from linearize.config import plain
from linearize.distillation.callbacks import Checkpointing
from linearize.distillation.checkpoint import SafetensorsCheckpointIO
from linearize.errors import LinearizeError, check_names
from linearize.evaluation.environment import machine, versions
from linearize.files import atomic_folder, read_json, require_replaceable, write_json
from linearize.measure import measure_accuracy, measure_forward
from linearize.scenes.autoencoder_stage import AutoencoderStage, quiet_posterior
from linearize.scenes.grammar import words
from linearize.scenes.judge import Judge
from linearize.scenes.judge_stage import JudgeStage, judge_accuracy
from linearize.scenes.pipeline import build_flux_pipeline
from linearize.scenes.stage import Stage
from linearize.scenes.teacher_stage import Bucket, Phase, TeacherStage, zero_initialize_gates

_log = logging.getLogger(__name__)
_MANY_STEPS = 1_000_000_000
_OPTIONS = {"autoencoder": "autoencoder", "judge": "judge", "teacher": "pretraining"}


def pretrain(cfg: DictConfig) -> dict[str, Any]:
    """Runs the stages that ``cfg.stages`` names, in order, and returns what they measured.

    Each stage starts from what the folders ``cfg.teacher_folder`` and ``cfg.judge_folder`` hold, if anything, and
    writes them back whole when it ends. A stage that already ended in ``cfg.output_folder`` is not run again.

    Raises:
        LinearizeError: a stage is unknown, has no budget, or lacks what an earlier stage makes, or the teacher's folder
            holds something else.
        KeyboardInterrupt: the user stopped a stage; its checkpoint holds everything.
    """
    run: dict[str, Callable[[DictConfig], Any]] = {
        "autoencoder": _autoencoder,
        "judge": _judge,
        "teacher": _teacher,
        "measure": _measure,
        "time": _time,
    }
    names = [cfg.stages] if isinstance(cfg.stages, str) else list(cfg.stages)
    check_names("stages", names, run)
    require_replaceable(Path(cfg.teacher_folder), "model_index.json", "FluxPipeline")
    _quieten()
    lightning.seed_everything(cfg.seed, verbose=False)
    if torch.cuda.is_available():
        # cuDNN's attention gives NaN in training at small head dimensions (torch 2.11).
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.set_float32_matmul_precision("high")
    report: dict[str, Any] = {}
    for name in names:
        report[name] = _finished(cfg, name) or run[name](cfg)
        _log.info("%s: %s", name, report[name])
    return report


def _quieten() -> None:
    """Silences Lightning's advertisements, and warnings of what is meant: few workers, a frozen autoencoder."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (".*does not have many workers.*", ".*in eval mode at the start of training.*", ".*LeafSpec.*"):
        warnings.filterwarnings("ignore", message=message)


def _autoencoder(cfg: DictConfig) -> dict[str, Any]:
    pipeline = _pipeline(cfg, new=True)
    stage = AutoencoderStage(pipeline.vae, **plain(cfg.autoencoder))
    _fit(stage, cfg, "autoencoder")
    return _keep(cfg, pipeline, "autoencoder", stage)


def _judge(cfg: DictConfig) -> dict[str, Any]:
    pipeline = _pipeline(cfg)
    judge = Judge.load(cfg.judge_folder) if (Path(cfg.judge_folder) / "config.json").exists() else Judge()
    stage = JudgeStage(judge, pipeline.vae, **plain(cfg.judge))
    trainer = _fit(stage, cfg, "judge")
    device = trainer.strategy.root_device
    judge.to(device).eval()
    generator = torch.Generator(device).manual_seed(cfg.seed + 17)
    measured = {
        "renders": judge_accuracy(judge, None, cfg.num_judged, generator),
        "reconstructions": judge_accuracy(judge, pipeline.vae.to(device), cfg.num_judged, generator),
        "num": cfg.num_judged,
    }
    record = _record(cfg, "judge", stage) | {"accuracy": measured}
    if trainer.is_global_zero:
        judge.save(cfg.judge_folder)
        write_json(Path(cfg.judge_folder) / "accuracy.json", measured)
        write_json(_end_file(cfg, "judge"), record)
    trainer.strategy.barrier()
    return record


def _teacher(cfg: DictConfig) -> dict[str, Any]:
    pipeline = _pipeline(cfg)
    options = plain(cfg.pretraining)
    options["phases"] = [
        Phase(phase["until"], tuple(Bucket(**bucket) for bucket in phase["buckets"])) for phase in options["phases"]
    ]
    stage = TeacherStage(pipeline, **options)
    _fit(stage, cfg, "teacher")
    return _keep(cfg, pipeline, "teacher", stage)


@rank_zero_only
def _measure(cfg: DictConfig) -> dict[str, Any]:
    """Scene accuracy of the written pipeline, by the first process alone, into accuracy.json."""
    options = plain(cfg.measure)
    pipeline = _pipeline(cfg, options.pop("dtype")).to("cuda" if torch.cuda.is_available() else "cpu")
    measured = measure_accuracy(pipeline, Judge.load(cfg.judge_folder, pipeline.device), **options)
    write_json(Path(cfg.output_folder) / "accuracy.json", measured)
    return measured


@rank_zero_only
def _time(cfg: DictConfig) -> dict[str, Any]:
    """Seconds of a forward of the written transformer, by the first process alone, into forward_time.json."""
    options = plain(cfg.time)
    pipeline = _pipeline(cfg, options.pop("dtype")).to(options.pop("device"))
    measured = measure_forward(pipeline, **options)
    write_json(Path(cfg.output_folder) / "forward_time.json", measured)
    return measured


def _source(cfg: DictConfig) -> Path | None:
    """The pipeline folder that a stage starts from: the one written so far, or else ``cfg.start_from``."""
    if (Path(cfg.teacher_folder) / "model_index.json").exists():
        return Path(cfg.teacher_folder)
    if cfg.start_from is not None and not (Path(cfg.start_from) / "model_index.json").exists():
        raise LinearizeError(f"start_from={cfg.start_from} is no pipeline folder: give one that this script wrote.")
    return None if cfg.start_from is None else Path(cfg.start_from)


def _pipeline(cfg: DictConfig, dtype: str = "float32", *, new: bool = False) -> FluxPipeline:
    """The pipeline that a stage starts from; a new one has random weights."""
    folder = _source(cfg)
    if folder is not None:
        return FluxPipeline.from_pretrained(folder, torch_dtype=getattr(torch, dtype))
    if not new:
        raise LinearizeError(
            f"teacher_folder={cfg.teacher_folder} holds no pipeline: run stages=[autoencoder] first, or set start_from."
        )
    pipeline = build_flux_pipeline(words(), seed=cfg.seed, **plain(cfg.architecture))
    zero_initialize_gates(pipeline.transformer)
    quiet_posterior(pipeline.vae)
    return pipeline


def _fit(stage: Stage, cfg: DictConfig, name: str) -> lightning.Trainer:
    """Trains a stage, from its checkpoint if ``cfg.resume`` and there is one."""
    checkpointing = Checkpointing(Path(cfg.output_folder) / name, cfg.checkpoint_every)
    resumed = cfg.resume and checkpointing.last.exists()
    trainer = instantiate(
        cfg.trainer,
        # Never reached: a stage ends itself, and where it is resumed at its end its last hooks still have to run.
        max_steps=(stage.max_steps or _MANY_STEPS) + 1,
        max_epochs=-1,
        logger=CSVLogger(cfg.output_folder, name=name),  # version_<n>: one metrics.csv for every start
        callbacks=[checkpointing, *([RichProgressBar()] if cfg.progress_bar else [])],
        enable_checkpointing=False,
        enable_progress_bar=cfg.progress_bar,
        enable_model_summary=False,
        plugins=[SafetensorsCheckpointIO()],
    )
    try:
        trainer.fit(stage, ckpt_path=checkpointing.last if resumed else None)
    except SystemExit as stop:  # what Lightning makes of a KeyboardInterrupt
        raise KeyboardInterrupt("Stopped at once; the steps since the last checkpoint are lost.") from stop
    if checkpointing.interrupted:
        raise KeyboardInterrupt(
            f"Stopped stage {name} after step {trainer.global_step}; to go on: the same command with resume=true "
            f"output_folder={cfg.output_folder}"
        )
    if not all(bool(torch.isfinite(parameter).all()) for parameter in stage.parameters()):
        raise LinearizeError(
            f"The weights of stage {name} are no longer finite: lower {_OPTIONS[name]}.learning_rate and start again "
            "with resume=false."
        )
    return trainer


def _keep(cfg: DictConfig, pipeline: FluxPipeline, name: str, stage: Stage) -> dict[str, Any]:
    """Writes the pipeline whole in bfloat16, with a record of how its parts came about."""
    record = _record(cfg, name, stage)
    if stage.trainer.is_global_zero:
        source = _source(cfg)
        history = read_json(source / "training.json") if source and (source / "training.json").exists() else []
        with atomic_folder(cfg.teacher_folder) as temporary:
            pipeline.to("cpu", torch.bfloat16).save_pretrained(temporary)
            write_json(temporary / "training.json", [*history, record])
        write_json(_end_file(cfg, name), record)
    stage.trainer.strategy.barrier()
    return record


def _record(cfg: DictConfig, name: str, stage: Stage) -> dict[str, Any]:
    return {
        "stage": name,
        "seed": cfg.seed,
        "steps": stage.global_step,
        "minutes": round(stage.seconds / 60, 2),
        "num_processes": stage.trainer.world_size,
        "machine": machine(stage.trainer.strategy.root_device),
        "versions": versions(),
        "samples_seen": getattr(stage, "samples_seen", None),
        "metrics": {key: float(value) for key, value in stage.trainer.logged_metrics.items()},
        "options": plain(cfg[_OPTIONS[name]]),
    }


def _end_file(cfg: DictConfig, name: str) -> Path:
    return Path(cfg.output_folder) / name / "finished.json"


def _finished(cfg: DictConfig, name: str) -> dict[str, Any] | None:
    """The record of a stage that ended in the output folder with the same options, or None."""
    if not cfg.resume or name not in _OPTIONS or not _end_file(cfg, name).exists():
        return None
    record = read_json(_end_file(cfg, name))
    if record["options"] != plain(cfg[_OPTIONS[name]]):
        return None
    _log.info("Stage %s is finished in %s; resume=false trains it again.", name, cfg.output_folder)
    return record
