"""Distils a student from a teacher, from the config to the exported folder: what train.py calls."""

import logging
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from rich.console import Console

from linearize.adapters import LoraSettings
from linearize.checks import check_numbers, resolve_precision, seed_generators, warn_of_samples_that_no_step_sees
from linearize.compilation import compile_backend
from linearize.config import build_data, build_teacher, plain
from linearize.costs import Costs
from linearize.data.datamodule import SampleDataModule
from linearize.distillation.calibration import calibrate
from linearize.distillation.callbacks import Checkpointing, Progress
from linearize.distillation.checkpoint import SafetensorsCheckpointIO, read_checkpoint
from linearize.distillation.loggers import build_loggers
from linearize.distillation.module import DistillationModule
from linearize.distillation.resume import check_checkpoint, find_checkpoint
from linearize.distillation.stages import Stage, allot_steps
from linearize.distillation.window_dropout import WindowDropout
from linearize.errors import LinearizeError
from linearize.evaluation.settings import EvaluationSettings
from linearize.evaluation.summary import picture_layout
from linearize.export import FORMS
from linearize.files import first_sentence, write_json
from linearize.outcome import evaluate_run, export_run, finished_student, load_judge
from linearize.processes import is_first_process
from linearize.surgery import share_student, surgery_report
from linearize.teachers import Teacher

# From this width on cuDNN's attention is safe to train with; below it gave NaN (torch 2.11).
_CUDNN_HEAD_DIM = 64
_log = logging.getLogger(__name__)


def train(cfg: DictConfig) -> dict[str, Any]:
    """Runs one distillation and leaves summary.json, samples.png, student/, checkpoints/ and logs in `cfg.run_dir`.

    Args:
        cfg: The composed configs/train.yaml.

    Returns:
        The metrics by name ("val/velocity_error", "train/loss", ...), and "summary" where the run was evaluated.

    Raises:
        LinearizeError: a setting, the teacher, the samples or the checkpoint is wrong; the message says what to do.
        KeyboardInterrupt: the user stopped the run; its message says where it can be taken up again.
    """
    _quieten()
    seed_generators(cfg.seed)
    cfg = resolve_precision(cfg)
    check_numbers(cfg)
    stages, rules = build_stages(cfg), layer_rules(cfg)
    settings = EvaluationSettings(**plain(cfg.evaluation))
    if cfg.export is not None and cfg.export not in FORMS:
        raise LinearizeError(f"export={cfg.export} is unknown: use {', '.join(FORMS)}, or null for none.")
    checkpoint = find_checkpoint(cfg.resume, Path(cfg.run_dir), Path(cfg.root) / "outputs")
    costs = Costs(Path(cfg.run_dir) / "costs.json")
    with costs.part("teacher"):
        teacher = build_teacher(cfg)
        settings.check_sizes(teacher)
        module = build_module(cfg, teacher, stages, rules)
        if checkpoint is not None:
            check_checkpoint(module, read_checkpoint(checkpoint, shapes_only=True))
            _log.info("The run goes on from %s.", checkpoint)
    is_first = is_first_process()
    if is_first:
        report = surgery_report(module.student, picture_layout(module.student, teacher, settings))
        Console().print(str(report), highlight=False, soft_wrap=True)
    # Whatever can be wrong is built before hours of work begin.
    callbacks, judge = build_callbacks(cfg, teacher), load_judge(cfg, teacher)
    trainer = build_trainer(cfg, callbacks)
    if is_first:
        warn_of_samples_that_no_step_sees(cfg)
    with costs.part("samples"):
        data = build_data(cfg, teacher, progress=is_first)
    with costs.part("training"), teacher.resting_encoders():
        start_errors = calibrate(module, *data.first_batches(cfg.calibration_samples)) if checkpoint is None else {}
        if start_errors and is_first:
            mean = sum(start_errors.values()) / len(start_errors)
            _log.info("The layers start at a mean error of %.3g of the teacher's output.", mean)
        trainer.loggers = build_loggers(cfg, checkpoint)
        metrics, training = fit(trainer, callbacks, data, module, checkpoint)
    if is_first:
        student = finished_student(module, teacher)
        summary = None
        if cfg.evaluate:
            with costs.part("evaluation"):
                summary = evaluate_run(cfg, teacher, data, student, settings, judge, training)
        if cfg.export is not None:
            export_run(cfg, teacher, data, student, settings, summary, costs)
        if summary is not None:
            summary |= {"costs": costs.parts, "start_errors": start_errors or None}
            write_json(Path(cfg.run_dir) / "summary.json", summary)
        metrics["summary"] = summary
    return metrics


def build_stages(cfg: DictConfig) -> list[Stage]:
    """The stages of a config: `transfer` has settings of its own (cfg.transfer_*), all others take cfg.loss."""
    stages = []
    for name, number in allot_steps(plain(cfg.stages), cfg.trainer.max_steps).items():
        is_transfer = name == "transfer"
        terms = instantiate(cfg.transfer_loss if is_transfer else cfg.loss, _convert_="all")
        own = {"trains": cfg.transfer_trains, "lr": cfg.transfer_lr} if is_transfer else {}
        stages.append(Stage(name, terms, number, **own))
    return stages


def layer_rules(cfg: DictConfig) -> list[dict[str, Any]]:
    """The plan of a config: `plan` as it is, or one rule of `mixer` and `layers`.

    Raises:
        LinearizeError: `plan` is no list of rules.
    """
    if cfg.plan is None:
        mixer = plain(cfg.mixer)
        if not cfg.layers or not isinstance(cfg.layers, str | ListConfig):
            raise LinearizeError(f"layers={cfg.layers} names no layer: give globs, as [single_transformer_blocks.*].")
        layers = cfg.layers if isinstance(cfg.layers, str) else list(cfg.layers)
        return [{"layers": layers, "mixer": mixer.pop("name"), **mixer}]
    rules = OmegaConf.to_container(cfg.plan, resolve=True) if isinstance(cfg.plan, ListConfig) else cfg.plan
    are_rules = isinstance(rules, list) and all(isinstance(rule, dict) and "mixer" in rule for rule in rules)
    if not are_rules or not rules:
        raise LinearizeError(
            f"plan={rules} is no list of rules: set plan=[{{layers: transformer_blocks.*, mixer: clear, window: 16}}]."
        )
    return cast(list[dict[str, Any]], rules)


def build_module(
    cfg: DictConfig, teacher: Teacher, stages: list[Stage], rules: list[dict[str, Any]]
) -> DistillationModule:
    """The LightningModule around a teacher and a student that shares its frozen tensors.

    Raises:
        LinearizeError: the plan or the compiler that the config names does not exist.
    """
    transformer = teacher.pipeline.transformer
    adapter = None if cfg.adapter is None else LoraSettings.from_config(plain(cfg.adapter))
    student = share_student(transformer, rules, adapter)
    if (
        min(teacher.backbone.shape(site).head_dim for site in teacher.backbone.sites(student).values())
        < _CUDNN_HEAD_DIM
    ):
        torch.backends.cuda.enable_cudnn_sdp(False)
    return DistillationModule(
        transformer,
        student,
        stages=stages,
        optimizer=instantiate(cfg.optimizer, _convert_="all"),
        schedule=instantiate(cfg.schedule),
        sigma=instantiate(cfg.sigma),
        seed=cfg.seed,
        window_dropout=WindowDropout(**plain(cfg.window_dropout)),
        ema_decay=cfg.ema_decay,
        activation_memory_gib=activation_budget(cfg),
        optimizer_in_backward=cfg.optimizer_in_backward,
        compile_backend=compile_backend(cfg.compile, transformer.device),
        identity={
            "teacher": f"{teacher.name} with weights {teacher.weight_hash[:12]}",
            "optimizer": cfg.optimizer._target_,
            "adapter": "none" if adapter is None else str(adapter),
        },
    )


def activation_budget(cfg: DictConfig) -> float | None:
    """`activation_memory_gib` of the config; None stands for auto.

    Raises:
        LinearizeError: it is neither auto nor an amount of memory.
    """
    budget = cfg.activation_memory_gib
    if budget == "auto":
        return None
    if not isinstance(budget, int | float) or isinstance(budget, bool) or budget < 0:
        raise LinearizeError(f"activation_memory_gib={budget} is no amount of memory: give auto, or GiB from 0 up.")
    return float(budget)


def build_trainer(cfg: DictConfig, callbacks: dict[str, Any]) -> lightning.Trainer:
    """The trainer of a config, without loggers.

    Raises:
        LinearizeError: its devices and nodes are not those of the cluster's job.
    """
    trainer = instantiate(
        cfg.trainer,
        callbacks=list(callbacks.values()),
        logger=False,
        plugins=[SafetensorsCheckpointIO()],
        default_root_dir=cfg.run_dir,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        max_epochs=-1,
    )
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if environment is not None:
        try:
            environment.validate_settings(num_devices=trainer.num_devices, num_nodes=trainer.num_nodes)
        except ValueError as error:
            raise LinearizeError(
                f"{first_sentence(error)}: set trainer.devices to a node's tasks, trainer.num_nodes to the nodes."
            ) from error
    return trainer


def fit(
    trainer: lightning.Trainer,
    callbacks: dict[str, Any],
    data: SampleDataModule,
    module: DistillationModule,
    checkpoint: Path | None,
) -> tuple[dict[str, Any], dict[str, float]]:
    """Trains; returns the metrics, and what the training cost ("train_seconds", "trainable_parameters", ...).

    Raises:
        KeyboardInterrupt: the user stopped the training; everything is in the checkpoint.
    """
    start = time.perf_counter()
    try:
        trainer.fit(module, data, ckpt_path=None if checkpoint is None else str(checkpoint))
    except SystemExit as stop:  # what Lightning makes of a KeyboardInterrupt
        raise KeyboardInterrupt("Stopped at once; the steps since the last checkpoint are lost.") from stop
    training: dict[str, float] = {
        "train_seconds": time.perf_counter() - start,
        "trainable_parameters": sum(parameter.numel() for parameter in module.trained.values()),
    }
    for callback in callbacks.values():
        if isinstance(callback, Progress) and callback.samples_per_second is not None:
            training["samples_per_second"] = callback.samples_per_second
        if isinstance(callback, Checkpointing) and callback.interrupted:
            raise KeyboardInterrupt(
                f"Stopped after step {trainer.global_step} of {trainer.max_steps}; to go on: the same command with "
                f"resume={callback.last}"
            )
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    if data.val_rows.size:
        for validated in trainer.validate(module, data, verbose=False):  # none with limit_val_batches=0
            metrics |= validated
    return metrics, training


def build_callbacks(cfg: DictConfig, teacher: Teacher) -> dict[str, lightning.Callback]:
    """The callbacks of a config by name; those that are `_partial_` are given the teacher."""
    built = {}
    for name, settings in cfg.callbacks.items():
        callback = instantiate(settings)
        built[str(name)] = callback(teacher) if isinstance(callback, partial) else callback
    return built


def _quieten() -> None:
    """Silences Lightning's advertisements, and warnings of what is meant: few workers, a teacher in evaluation mode."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (".*does not have many workers.*", ".*in eval mode at the start of training.*", ".*LeafSpec.*"):
        warnings.filterwarnings("ignore", message=message)
