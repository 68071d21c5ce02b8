"""Writes checkpoints every so many steps, at the end, and when the user or the cluster stops the run."""

import signal
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from linearize.distillation.checkpoint import SUFFIX


class Checkpointing(Callback):
    """Keeps `last` and, if asked, every k-th checkpoint.

    Ctrl-C or SIGTERM lets the current optimizer step end, writes `last` and stops the training; a second one stops at
    once.
    All ranks stop after the same step.

    Args:
        folder: Where checkpoints go.
        every_n_steps: Optimizer steps between two writes of `last`; 0 writes only at the end and when stopped.
        keep_every_n_steps: Optimizer steps between checkpoints that are kept beside it; 0 keeps none.

    Attributes:
        interrupted: Whether a signal stopped the training.
    """

    def __init__(self, folder: str | Path, every_n_steps: int = 500, keep_every_n_steps: int = 0) -> None:
        self.last = Path(folder) / f"last{SUFFIX}"
        self.every_n_steps = every_n_steps
        self.keep_every_n_steps = keep_every_n_steps
        self.interrupted = False
        self._asked_to_stop = False
        self._seen_step = 0
        self._previous_handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Takes over Ctrl-C and SIGTERM."""
        self._seen_step = trainer.global_step
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous_handlers[number] = signal.signal(number, self._ask_to_stop)

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Gives them back."""
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers.clear()

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        if self._asked_to_stop:
            raise KeyboardInterrupt
        self._asked_to_stop = True

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Acts once after each optimizer step: between micro steps, gradients summed so far would be lost."""
        step = trainer.global_step
        if step == self._seen_step:
            return
        self._seen_step = step
        stop = trainer.strategy.reduce_boolean_decision(self._asked_to_stop, all=False)
        due = self.every_n_steps > 0 and step % self.every_n_steps == 0
        if stop or due or step >= trainer.max_steps:
            trainer.save_checkpoint(self.last)
        if self.keep_every_n_steps > 0 and step % self.keep_every_n_steps == 0:
            trainer.save_checkpoint(self.last.with_name(f"step-{step:07d}{SUFFIX}"))
        if stop and step < trainer.max_steps:
            self.interrupted = True
            trainer.should_stop = True

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Writes `last` where something else ended the training early, such as trainer.max_time."""
        if trainer.global_step < trainer.max_steps and not self.interrupted:
            trainer.save_checkpoint(self.last)
