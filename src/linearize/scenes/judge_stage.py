"""Trains the judge on renders, some of which went through the autoencoder."""

from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional

from linearize.scenes.judge import Judge, JudgeScore, counts, labels
from linearize.scenes.render import render, sample_placement
from linearize.scenes.stage import Stage
from linearize.scenes.world import SceneBatch, sample_scenes


class JudgeStage(Stage):
    """Cross-entropy of every head on fresh renders of both splits.

    The judge may see held-out combinations: it is the ruler, and only the teacher is tested on what it has not seen.

    Args:
        judge: The network, trained in place.
        autoencoder: Its reconstructions replace part of the renders.
        batch_size: Pictures per rank and step.
        reconstructed: Share of pictures that go through the autoencoder.
        noise: Largest deviation of the Gaussian noise added to pictures.
        schedule: Arguments of ``Stage``.
    """

    def __init__(
        self,
        judge: Judge,
        autoencoder: AutoencoderKL,
        *,
        batch_size: int,
        reconstructed: float = 0.25,
        noise: float = 0.04,
        **schedule: Any,
    ) -> None:
        super().__init__(**schedule)
        self.judge = judge.train()
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self.batch_size = batch_size
        self.reconstructed = reconstructed
        self.noise = noise

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss on one batch of fresh pictures."""
        generator = self.generator(self.batch_seed())
        num_reconstructed = int(self.batch_size * self.reconstructed)
        scenes, images = judged_renders(self.batch_size, self.autoencoder, num_reconstructed, generator)
        strength = self.noise * torch.rand(len(scenes), 1, 1, 1, generator=generator, device=self.device)
        images = images + strength * torch.randn(images.shape, generator=generator, device=self.device)
        logits = self.judge(images)
        loss = torch.stack([_head_loss(name, logits[name].float(), scenes) for name in logits]).sum()
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.judge.parameters(), lr=self.learning_rate, weight_decay=0.01)

    def on_train_end(self) -> None:
        """Fixes the batch statistics."""
        self.judge.eval()


@torch.no_grad()
def judge_accuracy(
    judge: Judge, autoencoder: AutoencoderKL | None, num: int, generator: torch.Generator, batch_size: int = 64
) -> float:
    """Share of held-out renders that the judge reads entirely right.

    Args:
        judge: In evaluation mode.
        autoencoder: Pictures go through it first, unless None.
        num: How many renders.
        generator: On the judge's device.
        batch_size: Pictures at once.
    """
    right = 0
    for start in range(0, num, batch_size):
        size = min(batch_size, num - start)
        scenes, images = judged_renders(size, autoencoder, size if autoencoder else 0, generator, "held_out")
        score: JudgeScore = judge.score(images, scenes)
        right += int(score.correct.sum())
    return right / num


@torch.no_grad()
def judged_renders(
    num: int, autoencoder: AutoencoderKL | None, num_reconstructed: int, generator: torch.Generator, split: str = ""
) -> tuple[SceneBatch, Tensor]:
    """Scenes and their pictures [num, 3, 256, 256] in [0, 1], the first ``num_reconstructed`` through the autoencoder.

    An empty split means both splits, half and half.
    """
    if split:
        scenes = sample_scenes(num, generator, split=split)
    else:
        unseen = sample_scenes(num, generator, split="held_out")
        seen = sample_scenes(num, generator)
        scenes = _interleave(seen, unseen, generator)
    images, _ = render(scenes, sample_placement(scenes, generator), 256, 256)
    if autoencoder is not None and num_reconstructed:
        part = (images[:num_reconstructed] * 2 - 1).to(autoencoder.dtype)
        decoded = autoencoder.decode(autoencoder.encode(part).latent_dist.mode()).sample.float()
        images = torch.cat([(decoded / 2 + 0.5).clamp(0, 1), images[num_reconstructed:]])
    return scenes, images


def _interleave(first: SceneBatch, second: SceneBatch, generator: torch.Generator) -> SceneBatch:
    pick = torch.rand(len(first), generator=generator, device=generator.device) < 0.5
    return SceneBatch(
        torch.where(pick[:, None, None], first.objects, second.objects),
        torch.where(pick, first.relation, second.relation),
        torch.where(pick, first.background, second.background),
    )


def _head_loss(name: str, logits: Tensor, scenes: SceneBatch) -> Tensor:
    loss = functional.cross_entropy(logits, labels(scenes)[name], reduction="none")
    asked = counts(name, scenes)
    return (loss * asked).sum() / asked.sum().clamp(min=1)
