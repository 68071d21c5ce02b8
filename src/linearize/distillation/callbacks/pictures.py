"""Draws teacher and student side by side while training, always from the same prompts and noise."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from torch import Tensor, nn

from linearize.errors import LinearizeError
from linearize.evaluation.paired import inference, with_transformer
from linearize.evaluation.pictures import comparison_grid, save_png
from linearize.teachers import Teacher


class Pictures(Callback):
    """Every so many steps, writes `step-<n>.png`: teacher | student | difference, one row a prompt.

    The student is its average (EMA).

    Args:
        teacher: The teacher's pipeline; its pictures are drawn once.
        folder: Where the pictures go.
        every_n_steps: Optimizer steps between two grids; 0 draws none.
        prompts_file: A text file with a prompt a line; None takes held-out prompts of the samples.
        num_prompts: Rows of the grid.
        seed: Prompt i starts from the noise of seed + i.
        height: Height in pixels.
        width: Width in pixels.
        num_inference_steps: Steps of the sampler.
        guidance_scale: Guidance given to the pipeline.
        max_sequence_length: Text tokens of a prompt.
    """

    def __init__(
        self,
        teacher: Teacher,
        folder: str | Path,
        *,
        every_n_steps: int = 500,
        prompts_file: str | Path | None = None,
        num_prompts: int = 4,
        seed: int = 0,
        height: int = 256,
        width: int = 256,
        num_inference_steps: int = 20,
        guidance_scale: float = 3.5,
        max_sequence_length: int = 32,
    ) -> None:
        self.teacher, self.folder = teacher, Path(folder)
        self.every_n_steps = every_n_steps
        self.prompts = read_prompts(prompts_file)[:num_prompts] if prompts_file is not None else None
        self.num_prompts, self.seed = num_prompts, seed
        self.max_sequence_length = max_sequence_length
        self.sampling: dict[str, Any] = {
            "height": height,
            "width": width,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
        }
        self._teacher_pictures: Tensor | None = None
        self._seen_step = 0

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draws after every n-th optimizer step, on the first rank."""
        step = trainer.global_step
        if self.every_n_steps > 0 and step != self._seen_step and step % self.every_n_steps == 0:
            self._draw(trainer, pl_module)
        self._seen_step = step

    @rank_zero_only
    def _draw(self, trainer: lightning.Trainer, module: Any) -> None:
        prompts = self.prompts or trainer.datamodule.held_out_prompts(self.num_prompts)  # type: ignore[attr-defined]
        conditioning = self.teacher.encode(prompts, self.max_sequence_length)
        if self._teacher_pictures is None:
            self._teacher_pictures = self._sample(self.teacher.pipeline.transformer, conditioning)
        with module.ema.applied():
            student = self._sample(module.student, conditioning)
        grid = comparison_grid({"teacher": self._teacher_pictures, "student": student}, prompts)
        save_png(grid, self.folder / f"step-{trainer.global_step:07d}.png")
        log_picture(trainer, grid)

    def _sample(self, transformer: nn.Module, conditioning: dict[str, Tensor]) -> Tensor:
        backbone, pipeline = self.teacher.backbone, with_transformer(self.teacher.pipeline, transformer)
        seeds = [self.seed + row for row in range(len(conditioning["prompt_embeds"]))]
        with inference(transformer):
            latents = backbone.sample(pipeline, conditioning, seeds=seeds, **self.sampling)
        return backbone.decode(pipeline, latents).cpu()


def log_picture(trainer: lightning.Trainer, picture: Image.Image) -> None:
    """Sends a picture to the loggers that can show one."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image("pictures", [picture], step=trainer.global_step)
        elif isinstance(logger, TensorBoardLogger):
            pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
            image = pixels.view(picture.height, picture.width, 3)
            logger.experiment.add_image("pictures", image, trainer.global_step, dataformats="HWC")


def read_prompts(path: str | Path) -> Sequence[str]:
    """The lines of a text file that are not empty.

    Raises:
        LinearizeError: the file cannot be read or has no prompt.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LinearizeError(
            f"The prompts file {path} cannot be read ({error}): give a UTF-8 text file with a prompt a line."
        ) from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise LinearizeError(f"The prompts file {path} has no prompt: give a text file with a prompt a line.")
    return prompts
