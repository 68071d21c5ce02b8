"""What the pre-training stages share: seeded batches, a budget of steps or minutes, and its learning-rate schedule."""

import itertools
import time
from collections.abc import Iterator
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader, IterableDataset

from linearize.errors import LinearizeError

# Minutes pass differently on every rank, so the first one's are sent around, and not at every step.
_STEPS_BETWEEN_CLOCKS = 20


class _Endless(IterableDataset):
    """Nothing, for ever: each stage renders its batches from seeds, on its device."""

    def __iter__(self) -> Iterator[int]:
        return itertools.repeat(0)


class Stage(lightning.LightningModule):
    """A LightningModule whose length is a budget of steps, of minutes, or of both, whichever ends first.

    The learning rate warms up, stays, and falls linearly to zero over the last part of the budget, so that a run that
    is to be continued later asks for ``decay_fraction=0``. A budget of minutes takes as many steps as the machine
    manages; one of steps is the same on every machine.

    Args:
        learning_rate: Peak learning rate.
        warmup_steps: Steps of linear warm-up.
        decay_fraction: Last part of the budget over which the learning rate falls to zero.
        max_steps: Budget in optimizer steps, or None.
        max_minutes: Budget in minutes of training, or None.
        seed: Seed of the scenes.

    Raises:
        LinearizeError: If there is no budget, or an empty one.
    """

    def __init__(
        self,
        *,
        learning_rate: float,
        warmup_steps: int,
        decay_fraction: float,
        max_steps: int | None,
        max_minutes: float | None,
        seed: int,
    ) -> None:
        super().__init__()
        budget = [limit for limit in (max_steps, max_minutes) if limit is not None]
        if not budget or min(budget) <= 0:
            raise LinearizeError(
                f"max_steps={max_steps} with max_minutes={max_minutes} is no budget: set one of them above 0."
            )
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps
        self.decay_fraction = decay_fraction
        self.max_steps = max_steps
        self.max_minutes = max_minutes
        self.seed = seed
        self.seconds = 0.0
        self.num_batches = 0
        self._clock: float | None = None
        self._share_of_minutes = 0.0

    @property
    def progress(self) -> float:
        """Share of the budget that is spent, the same on every rank, in [0, 1]."""
        steps = self.global_step / self.max_steps if self.max_steps else 0.0
        return min(1.0, max(steps, self._share_of_minutes))

    def train_dataloader(self) -> DataLoader:
        """An endless loader; the position in the data is `num_batches`."""
        return DataLoader(_Endless(), batch_size=None)

    def batch_seed(self) -> int:
        """The seed of the current batch, the same on every rank."""
        return (self.seed * 1_000_003 + self.num_batches - 1) % 2**40

    def generator(self, seed: int) -> torch.Generator:
        """A generator on this module's device, its own on every rank and at every step."""
        return torch.Generator(self.device).manual_seed((seed * 64 + self.global_rank) * 4099 + self.global_step)

    def on_train_start(self) -> None:
        """Starts the clock of the budget; a budget that was spent before the resume ends the stage at once."""
        self._clock = time.monotonic()
        self._read_minutes()
        self.trainer.should_stop = self.progress >= 1.0

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Counts the batch and sets the learning rate."""
        if self.num_batches % _STEPS_BETWEEN_CLOCKS == 0:
            self._read_minutes()
        self.num_batches += 1
        warmup = min(1.0, (self.global_step + 1) / max(1, self.warmup_steps))
        decay = min(1.0, (1 - self.progress) / self.decay_fraction) if self.decay_fraction else 1.0
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self.learning_rate * warmup * decay

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stops when the budget is spent."""
        self._tick()
        if self.progress >= 1.0:
            self.trainer.should_stop = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the clock and the position in the data."""
        self._tick()
        checkpoint["seconds"] = self.seconds
        checkpoint["num_batches"] = self.num_batches

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the clock and the position in the data."""
        self.seconds = checkpoint["seconds"]
        self.num_batches = checkpoint["num_batches"]

    def _tick(self) -> None:
        now = time.monotonic()
        self.seconds += now - (self._clock or now)
        self._clock = now

    def _read_minutes(self) -> None:
        if self.max_minutes is not None:
            self._tick()
            self._share_of_minutes = self.trainer.strategy.broadcast(self.seconds / 60 / self.max_minutes)
