"""What a checkpoint holds beside Lightning's own state, and the checks before a run takes it over."""

import logging
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from linearize.distillation.checkpoint import SUFFIX
from linearize.errors import LinearizeError

if TYPE_CHECKING:
    from linearize.distillation.module import DistillationModule

_FORMAT = 1
_log = logging.getLogger(__name__)


def student_state(module: "DistillationModule") -> dict[str, Any]:
    """The average, and what identifies the run: teacher, plan, stages."""
    return {
        "format": _FORMAT,
        "identity": module.identity,
        "stages": _steps(module),
        "ema": module.ema.state_dict(),
    }


def check_checkpoint(module: "DistillationModule", checkpoint: dict[str, Any]) -> None:
    """Checks that a checkpoint is one of this run; shapes are enough, see `read_checkpoint`.

    Raises:
        LinearizeError: it is of another kind, teacher, plan or optimizer, past the last step, or lacks a tensor.
    """
    state = checkpoint.get("linearize")
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise LinearizeError("The checkpoint was not written by training of this version: start again without resume.")
    for name, mine in module.identity.items():
        theirs = state["identity"].get(name)
        if theirs != mine:
            raise LinearizeError(
                f"The checkpoint is of another {name} ({_short(theirs)}) than this run ({_short(mine)}): "
                "give the run the configuration that the checkpoint was trained with, or start again without resume."
            )
    _check_shapes(module, checkpoint["state_dict"], state["ema"]["average"])
    _check_steps(module, checkpoint["global_step"])


def tell_changed_schedule(module: "DistillationModule", checkpoint: dict[str, Any]) -> None:
    """Warns where a run has other stages than the one that it goes on from."""
    mine, stages = _steps(module), checkpoint["linearize"]["stages"]
    if mine != stages:
        _log.warning(
            "The checkpoint was trained for %d steps and this run has %d (stages %s, before %s): "
            "the learning-rate schedule changes from here on.",
            sum(stages.values()),
            sum(mine.values()),
            mine,
            stages,
        )


def _check_shapes(module: "DistillationModule", weights: dict[str, Any], average: dict[str, Any]) -> None:
    wanted = {name: value.shape for name, value in module.trained.items()}
    found = {name.removeprefix("student."): value.shape for name, value in weights.items()}
    averaged = {name: value.shape for name, value in average.items()}
    if not averaged and module.ema.decay:
        raise LinearizeError("The checkpoint holds no average, as it was trained with ema_decay=0: set ema_decay=0.")
    averaged = averaged or found
    if wanted != found or wanted != averaged:
        differing = sorted(
            name for name in wanted | found if not wanted.get(name) == found.get(name) == averaged.get(name)
        )
        raise LinearizeError(
            f"The checkpoint does not fit this student ({len(differing)} tensors differ, first {differing[0]}): "
            "start again without resume."
        )


def _steps(module: "DistillationModule") -> dict[str, int]:
    return {stage.name: stage.num_steps for stage in module.stages}


def _check_steps(module: "DistillationModule", step: int) -> None:
    total = sum(_steps(module).values())
    if step > total:
        raise LinearizeError(
            f"The checkpoint is at step {step}, past trainer.max_steps={total}: raise trainer.max_steps."
        )


def _short(value: Any) -> str:
    if isinstance(value, list):
        rules = [f"{rule['mixer']} {rule['arguments']} on {len(rule['layers'])} layers" for rule in value]
        return "; ".join(rules) or "nothing replaced"
    return str(value)


def rng_state() -> dict[str, Any]:
    """State of the global generators: training draws from seeded ones of its own, callbacks of a user may not."""
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": list(np.random.get_state()),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_rng(state: dict[str, Any]) -> None:
    """Undoes `rng_state`."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy(), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def restore_rates(optimizer: Optimizer, scheduler: LambdaLR) -> None:
    """Gives a restored optimizer the settings of this run's config, its `defaults`, in place of the checkpoint's."""
    scheduler.base_lrs = [optimizer.defaults["lr"]] * len(optimizer.param_groups)
    for group, base, factor in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        group.update((name, value) for name, value in optimizer.defaults.items() if name in group)
        group.update(initial_lr=base, lr=base * factor(scheduler.last_epoch))


def find_checkpoint(resume: str | None, run_dir: Path, root: Path) -> Path | None:
    """Finds the checkpoint to go on from.

    Args:
        resume: None, "last", or a path: of a checkpoint, or of a run's folder.
        run_dir: Folder of this run; "last" is its own checkpoint if it has one,
        root: else the newest under this folder, where runs are kept.

    Raises:
        LinearizeError: there is none.
    """
    if resume is None:
        return None
    if resume != "last":
        path = Path(str(resume)).expanduser()
        path = path / "checkpoints" / f"last{SUFFIX}" if path.is_dir() else path
        if not path.is_file():
            raise LinearizeError(
                f"resume={resume} is no checkpoint: set resume=last, or the path of a *{SUFFIX} checkpoint."
            )
        return path
    own = run_dir / "checkpoints" / f"last{SUFFIX}"
    if own.is_file():
        return own
    found = sorted(root.glob(f"**/checkpoints/last{SUFFIX}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise LinearizeError(
            f"resume=last finds no checkpoint in {run_dir} or under {root}: start without resume, or give its path."
        )
    return found[-1]
