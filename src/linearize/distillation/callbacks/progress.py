"""A progress bar over the optimizer steps of a run, with the loss and the speed."""

import statistics
import time
from typing import Any

import lightning
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from linearize.distillation.module import DistillationModule
from linearize.distillation.stages import stage_at


class Progress(ProgressBar):
    """Shows stage, step, loss, validation error, samples per second and time left; logs train/samples_per_second.

    On a terminal it is a bar; elsewhere a line every `every_n_steps` steps.

    Args:
        every_n_steps: Optimizer steps between two lines where there is no terminal.

    Attributes:
        samples_per_second: Over all ranks, from the median time of a step, so that validation, pictures and checkpoints
            do not count.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        super().__init__()
        self.every_n_steps = every_n_steps
        self.samples_per_second: float | None = None
        self._seconds: list[float] = []
        self._num_samples = 0
        self._step = 0
        self._time = 0.0
        self._console = Console()
        self._bar: RichProgress | None = None
        self._shown = True

    def disable(self) -> None:
        """Lightning's call on all ranks but the first: measures, and shows nothing."""
        self._shown = False

    def enable(self) -> None:
        """Undoes `disable`."""
        self._shown = True

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Starts the bar at the step that the run begins with."""
        self._step, self._time = trainer.global_step, time.perf_counter()
        if self._shown and self._console.is_terminal:
            columns = (
                TextColumn("{task.fields[stage]}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}"),
            )
            self._bar = RichProgress(*columns, console=self._console)
            self._bar.start()
            self._bar.add_task("train", total=trainer.max_steps, completed=self._step, stage="", numbers="")

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measures every optimizer step and shows it."""
        self._num_samples += len(batch["latents"]) * trainer.world_size
        if trainer.global_step == self._step:
            return
        now = time.perf_counter()
        self._seconds.append(now - self._time)
        self.samples_per_second = self._num_samples / statistics.median(self._seconds[-200:])
        self._step, self._time, self._num_samples = trainer.global_step, now, 0
        pl_module.log("train/samples_per_second", self.samples_per_second, batch_size=1)
        assert isinstance(pl_module, DistillationModule)
        self._show(trainer, stage_at(pl_module.stages, self._step - 1)[0].name)

    def _show(self, trainer: lightning.Trainer, stage: str) -> None:
        metrics = trainer.callback_metrics
        numbers = f"loss {metrics['train/loss']:.4f}  {self.samples_per_second:.1f} samples/s"
        if "val/velocity_error" in metrics:
            numbers += f"  val {metrics['val/velocity_error']:.4f}"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._step, stage=stage, numbers=numbers)
        elif self._shown and (self._step % self.every_n_steps == 0 or self._step == trainer.max_steps):
            self._console.print(f"{stage} step {self._step}/{trainer.max_steps}  {numbers}", highlight=False)

    @rank_zero_only
    def print(self, *arguments: Any, **keywords: Any) -> None:
        """Prints above the bar."""
        (self._bar.console if self._bar is not None else self._console).print(*arguments)

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Ends the bar, also after an error."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
