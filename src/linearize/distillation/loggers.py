"""The loggers of a run. A resumed run goes on in the Weights & Biases run that its checkpoint belongs to."""

import uuid
from pathlib import Path
from typing import Any

from hydra.utils import get_class, instantiate
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from linearize.config import plain
from linearize.extras import require
from linearize.files import read_json_object, write_json

WANDB_FILE = "wandb.json"


def build_loggers(cfg: DictConfig, checkpoint: Path | None) -> list[Any]:
    """The loggers of `cfg.logger`, told the hyper-parameters of the run.

    Args:
        cfg: The composed configs/train.yaml.
        checkpoint: The checkpoint that the run goes on from.

    Raises:
        LinearizeError: a logger's package is not installed.
    """
    loggers = []
    for settings in cfg.logger.values():
        if issubclass(get_class(settings._target_), WandbLogger):
            loggers.append(_wandb_logger(settings, Path(cfg.run_dir) / "checkpoints", checkpoint))
        else:
            loggers.append(instantiate(settings))
    for logger in loggers:
        logger.log_hyperparams(plain(cfg))
    return loggers


def _wandb_logger(settings: DictConfig, checkpoints: Path, checkpoint: Path | None) -> WandbLogger:
    """A W&B logger whose run id is that of the checkpoint's folder, or a new one; it is kept beside the checkpoints."""
    require("wandb", purpose="logger=wandb")
    kept = None if checkpoint is None else checkpoint.parent / WANDB_FILE
    known = read_json_object(kept).get("id") if kept is not None and kept.is_file() else None
    logger = instantiate(settings, id=settings.id or known or uuid.uuid4().hex[:8])
    _keep(checkpoints / WANDB_FILE, logger)
    return logger


@rank_zero_only
def _keep(path: Path, logger: WandbLogger) -> None:
    write_json(path, {"id": logger.version})
