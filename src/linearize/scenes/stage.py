"""What the three pre-training stages share: seeded batches, a budget of steps or minutes, and its learning-rate schedule."""

import time
from collections.abc import Iterator
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader, IterableDataset


class Seeds(IterableDataset):
    """An endless stream of seeds, different for every step and rank; each stage renders its batch from one, on its device."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __iter__(self) -> Iterator[int]:
        step = 0
        while True:
            yield (self.seed * 1_000_003 + step) % 2**40
            step += 1


class Stage(lightning.LightningModule):
    """A LightningModule whose length is a budget of steps or of minutes, whichever ends first.

    The learning rate warms up, stays, and falls linearly to zero over the last part of the budget, so that a run that
    is to be continued later asks for ``decay_fraction=0``.

    Args:
        learning_rate: Peak learning rate.
        warmup_steps: Steps of linear warm-up.
        decay_fraction: Last part of the budget over which the learning rate falls to zero.
        max_steps: Budget in optimizer steps.
        max_minutes: Budget in minutes of training.
        seed: Seed of the scenes.
    """

    def __init__(
        self,
        *,
        learning_rate: float,
        warmup_steps: int,
        decay_fraction: float,
        max_steps: int,
        max_minutes: float,
        seed: int,
    ) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps
        self.decay_fraction = decay_fraction
        self.max_steps = max_steps
        self.max_minutes = max_minutes
        self.seed = seed
        self.progress = 0.0
        self.seconds = 0.0
        self._clock: float | None = None

    def train_dataloader(self) -> DataLoader:
        """Seeds, one for every step."""
        return DataLoader(Seeds(self.seed), batch_size=None)

    def generator(self, seed: int) -> torch.Generator:
        """A generator on this module's device, its own on every rank and after every resume."""
        return torch.Generator(self.device).manual_seed((seed * 64 + self.global_rank) * 4099 + self.global_step)

    def on_train_start(self) -> None:
        """Starts the clock of the budget."""
        self._clock = time.monotonic()
        self._steps_at_start = self.global_step

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Moves the clock, the same on every rank, and sets the learning rate."""
        if batch_idx % 20 == 0:
            now = time.monotonic()
            self.seconds += now - (self._clock or now)
            self._clock = now
            spent = max(self.seconds / 60 / self.max_minutes, self.global_step / self.max_steps)
            self.progress = min(1.0, self.trainer.strategy.broadcast(spent))
        warmup = min(1.0, (self.global_step - self._steps_at_start + 1) / max(1, self.warmup_steps))
        decay = min(1.0, (1 - self.progress) / self.decay_fraction) if self.decay_fraction else 1.0
        optimizer = self.trainer.optimizers[0]
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate * warmup * decay

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stops when the budget is spent."""
        if self.progress >= 1.0 or self.global_step >= self.max_steps:
            self.trainer.should_stop = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the clock."""
        checkpoint["seconds"] = self.seconds

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the clock."""
        self.seconds = checkpoint["seconds"]
