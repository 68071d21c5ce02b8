"""New random features every few optimizer steps, for mixers that have some."""

from typing import Any

import lightning

from linearize.distillation.module import DistillationModule
from linearize.mixers._random_features import RandomFeatureMixer


class Redrawing(lightning.Callback):
    """Draws random features anew (`redraw` of performer and nprf), between optimizer steps and never within one.

    Draws depend on the step and the layer alone: they are the same on every rank, and after a run is resumed.

    Args:
        every_n_steps: Optimizer steps between two draws; 0 keeps the first features.
    """

    def __init__(self, every_n_steps: int = 0) -> None:
        self.every_n_steps = every_n_steps
        self._drawn_at = 0

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Draws where the step asks for other features than those that are there."""
        self._draw(pl_module, trainer.global_step)

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Draws what the checkpoint's last step had: a run that was finished has no further step to draw in."""
        self._draw(pl_module, max(checkpoint["global_step"] - 1, 0))

    def _draw(self, pl_module: lightning.LightningModule, step: int) -> None:
        if not self.every_n_steps or not isinstance(pl_module, DistillationModule):
            return
        step = step // self.every_n_steps * self.every_n_steps
        if step == self._drawn_at:
            return
        layers = [module for module in pl_module.student.modules() if isinstance(module, RandomFeatureMixer)]
        for number, layer in enumerate(layers):
            layer.redraw(step * len(layers) + number)
        self._drawn_at = step
