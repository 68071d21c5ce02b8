"""What the settings of a run are checked for, and made definite, before its work begins."""

import logging
from typing import cast

import lightning
import torch
from omegaconf import DictConfig, OmegaConf

from linearize.errors import LinearizeError, check_count, check_share

_PRECISIONS = {"32-true": "float32", "bf16-mixed": "bfloat16"}
# Settings that count something, and the least that each takes; what the config leaves null is left alone.
_COUNTS = {
    "trainer.max_steps": 1,
    "trainer.accumulate_grad_batches": 1,
    "trainer.val_check_interval": 1,
    "calibration_samples": 1,
    "schedule.num_warmup_steps": 0,
    "data.batch_size": 1,
    "data.val_batch_size": 1,
    "data.num_samples": 1,
    "data.seed": 0,
    "data.shuffle_shards": 1,
    "data.num_workers": 0,
    "callbacks.progress.every_n_steps": 1,
    "callbacks.pictures.num_prompts": 1,
    "callbacks.pictures.num_inference_steps": 1,
}
_SHARES = ("ema_decay", "data.val_share")
_MAY_BE_NULL = ("trainer.val_check_interval", "data.val_batch_size", "data.num_samples")
_log = logging.getLogger(__name__)


def seed_generators(seed: int) -> None:
    """Seeds every generator of this process.

    Raises:
        LinearizeError: the generators do not take this seed.
    """
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise LinearizeError(f"seed={seed} is no seed: give a whole number from 0 to {2**32 - 1}.")
    lightning.seed_everything(seed, verbose=False)


def check_numbers(cfg: DictConfig) -> None:
    """Checks settings that nobody else would refuse before the work begins, or at all.

    Raises:
        LinearizeError: one is no number of its kind; negative ones would train away from the teacher.
    """
    for name, least in _COUNTS.items():
        value = OmegaConf.select(cfg, name, default=least)
        is_time = name == "trainer.val_check_interval" and isinstance(value, str)
        if not is_time and not (value is None and name in _MAY_BE_NULL):
            check_count(name, value, least)
    for name in _SHARES:
        check_share(name, OmegaConf.select(cfg, name))
    clip = cfg.trainer.gradient_clip_val
    if clip is not None and (not isinstance(clip, int | float) or clip < 0):
        raise LinearizeError(f"trainer.gradient_clip_val={clip} is no norm: give a number above 0, or null for none.")


def warn_of_samples_that_no_step_sees(cfg: DictConfig) -> None:
    """Says so where more samples are to be generated than all steps take."""
    seen = cfg.trainer.max_steps * cfg.trainer.accumulate_grad_batches * cfg.data.batch_size
    if cfg.data.path is None and (cfg.data.num_samples or 0) * (1 - cfg.data.val_share) > seen:
        _log.warning(
            "data.num_samples=%d samples are made where there are none yet, and %d steps see %d of them: set fewer "
            "data.num_samples, or more trainer.max_steps.",
            cfg.data.num_samples,
            cfg.trainer.max_steps,
            seen,
        )


def resolve_precision(cfg: DictConfig) -> DictConfig:
    """Returns the config with precision, and the teacher's dtype and device, made definite.

    Raises:
        LinearizeError: a GPU that is not there, a precision that this project does not train in, or that the teacher's
            dtype does not go with.
    """
    cfg = cast(DictConfig, OmegaConf.merge(cfg))
    wants_gpu = cfg.trainer.accelerator in ("gpu", "cuda")
    if wants_gpu and not torch.cuda.is_available():
        raise LinearizeError(
            f"trainer.accelerator={cfg.trainer.accelerator} needs a CUDA GPU and none is visible: use auto or cpu."
        )
    on_gpu = wants_gpu or (cfg.trainer.accelerator == "auto" and torch.cuda.is_available())
    if cfg.trainer.precision == "auto":
        half = on_gpu or cfg.teacher.dtype == "bfloat16"
        cfg.trainer.precision = "bf16-mixed" if half else "32-true"
    if cfg.trainer.precision not in _PRECISIONS:
        raise LinearizeError(
            f"trainer.precision={cfg.trainer.precision} is unknown: use auto, {' or '.join(_PRECISIONS)}."
        )
    if cfg.teacher.dtype == "auto":
        cfg.teacher.dtype = _PRECISIONS[cfg.trainer.precision]
    if cfg.trainer.precision == "32-true" and cfg.teacher.dtype != "float32":
        raise LinearizeError(
            f"trainer.precision=32-true needs teacher.dtype=float32, not {cfg.teacher.dtype}: "
            "set teacher.dtype=float32, or trainer.precision=bf16-mixed."
        )
    if cfg.teacher.device == "auto" and not on_gpu:
        cfg.teacher.device = "cpu"
    return cfg
