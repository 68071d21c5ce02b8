"""Trains the autoencoder of the scenes teacher on renders."""

from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from linearize.scenes.render import render, sample_placement
from linearize.scenes.stage import Stage
from linearize.scenes.world import sample_scenes


class AutoencoderStage(Stage):
    """Reconstruction (absolute and squared error, edges) with a small KL term, at several resolutions.

    Args:
        autoencoder: The model, trained in place.
        batch_size: Pictures of 256 x 256 per rank and step; other resolutions keep the number of pixels.
        resolutions: Sides in pixels, one drawn per step.
        object_weight: Extra weight of the pixels that objects cover, which are few.
        kl_weight: Weight of the KL divergence, per latent value.
        schedule: Arguments of ``Stage``.
    """

    def __init__(
        self,
        autoencoder: AutoencoderKL,
        *,
        batch_size: int,
        resolutions: tuple[int, ...] = (256, 256, 256, 128, 512),
        object_weight: float = 4.0,
        kl_weight: float = 1e-4,
        **schedule: Any,
    ) -> None:
        super().__init__(**schedule)
        self.autoencoder = autoencoder.train().to(memory_format=torch.channels_last)
        self.batch_size = batch_size
        self.resolutions = tuple(resolutions)
        self.object_weight = object_weight
        self.kl_weight = kl_weight

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss on one batch of fresh renders."""
        seed = self.batch_seed()
        generator, side = self.generator(seed), self.resolutions[seed % len(self.resolutions)]
        images, coverage = fresh_renders(max(1, self.batch_size * 256 * 256 // side**2), side, generator)
        images = images.to(memory_format=torch.channels_last)
        weight = 1 + self.object_weight * coverage
        posterior = self.autoencoder.encode(images).latent_dist
        decoded = self.autoencoder.decode(posterior.sample(generator)).sample.float()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        error = decoded - images
        loss = (weight * (error.abs() + 4 * error.square())).mean() + _edge_loss(error) + self.kl_weight * kl
        self.log_dict({"loss": loss, "mse": error.square().mean()}, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW without weight decay."""
        return torch.optim.AdamW(self.autoencoder.parameters(), lr=self.learning_rate, weight_decay=0.0)

    @torch.no_grad()
    def on_train_end(self) -> None:
        """Writes the latents' mean and deviation into the configuration, as FLUX pipelines read them."""
        images, _ = fresh_renders(64 if self.device.type == "cuda" else 8, 256, self.generator(1))
        latents = self.autoencoder.encode(images.to(self.autoencoder.dtype)).latent_dist.mode().float()
        shift, scale = latents.mean().item(), 1 / latents.std().item()
        self.autoencoder.register_to_config(shift_factor=round(shift, 4), scaling_factor=round(scale, 4))
        self.autoencoder.to(memory_format=torch.contiguous_format).eval()


@torch.no_grad()
def quiet_posterior(autoencoder: AutoencoderKL, log_variance: float = -4.0) -> None:
    """Starts the posterior narrow, so that its noise does not hide the latents while they are still small."""
    output = autoencoder.encoder.conv_out
    output.weight[autoencoder.config.latent_channels :] = 0
    output.bias[autoencoder.config.latent_channels :] = log_variance


def fresh_renders(num: int, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Renders of training scenes [num, 3, side, side] in [-1, 1], and how much objects cover [num, 1, side, side]."""
    scenes = sample_scenes(num, generator)
    images, coverage = render(scenes, sample_placement(scenes, generator), side, side)
    return images * 2 - 1, coverage.sum(dim=1, keepdim=True)


def _edge_loss(error: Tensor) -> Tensor:
    """L1 on horizontal and vertical differences: textures and edges are what an average forgets first."""
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
