"""The paired protocol: every model gets the same prompts, the same seeds and the same noise."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline
from rich.progress import track
from torch import Tensor, nn

from linearize.errors import LinearizeError
from linearize.evaluation.metrics import relative_velocity_error
from linearize.evaluation.settings import EvaluationSettings

if TYPE_CHECKING:
    from linearize.teachers import Teacher

# Far apart, so that no prompt's second picture or noise shares a seed with another prompt's first picture.
_SECOND_SEED = 1_000_000
_NOISE_SEED = 2_000_000


def with_transformer(pipeline: DiffusionPipeline, transformer: nn.Module) -> DiffusionPipeline:
    """A pipeline of the same class around another transformer; every other component is the same object."""
    return type(pipeline)(**{**pipeline.components, "transformer": transformer})


@contextlib.contextmanager
def inference(transformer: nn.Module) -> Iterator[None]:
    """No gradients, evaluation mode, and autocast where the weights mix dtypes (trained fp32 beside frozen bf16)."""
    parameters = list(transformer.parameters())
    half = {parameter.dtype for parameter in parameters} - {torch.float32}
    mixed = len({parameter.dtype for parameter in parameters}) > 1
    was_training = transformer.training
    transformer.eval()
    try:
        with (
            torch.no_grad(),
            torch.autocast(parameters[0].device.type, dtype=half.pop() if mixed else None, enabled=mixed),
        ):
            yield
    finally:
        transformer.train(was_training)


@dataclasses.dataclass(frozen=True)
class PairedProtocol:
    """Samples and velocities of a teacher and its students, under one set of prompts, seeds and settings.

    Attributes:
        teacher: The teacher, whose text encoders, autoencoder and scheduler serve every model.
        prompts: One text per picture.
        settings: Sizes, seeds, sampler.
    """

    teacher: "Teacher"
    prompts: Sequence[str]
    settings: EvaluationSettings

    @property
    def batches(self) -> list[slice]:
        """Slices over the prompts."""
        size = self.settings.batch_size
        return [slice(start, min(start + size, len(self.prompts))) for start in range(0, len(self.prompts), size)]

    def seeds(self, *, second: bool = False) -> list[int]:
        """The seed of every prompt's picture, or of its second picture."""
        first = self.settings.seed + (_SECOND_SEED if second else 0)
        return [first + index for index in range(len(self.prompts))]

    def sample(self, transformer: nn.Module, *, second: bool = False) -> Tensor:
        """Latents [prompts, channels, height, width] that a model samples for the prompts, on the CPU.

        Raises:
            LinearizeError: they are not finite, so that no number of them means anything.
        """
        settings, seeds, latents = self.settings, self.seeds(second=second), []
        pipeline = with_transformer(self.teacher.pipeline, transformer)
        with inference(transformer):
            for batch in track(self.batches, "Sampling", transient=True, disable=not sys.stdout.isatty()):
                sampled = self.teacher.backbone.sample(
                    pipeline,
                    self._encode(batch),
                    seeds=seeds[batch],
                    height=settings.height,
                    width=settings.width,
                    num_inference_steps=settings.num_inference_steps,
                    guidance_scale=settings.guidance_scale,
                )
                if not torch.isfinite(sampled).all():
                    raise LinearizeError(
                        f"{type(transformer).__name__} paints pictures that are not finite numbers: if its training "
                        "diverged, train again with a lower optimizer.lr, else try teacher.dtype=float32."
                    )
                latents.append(sampled.cpu())
        return torch.cat(latents)

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [prompts, 3, height, width] in [0, 1], float32 on the CPU."""
        device = self.teacher.pipeline.device
        with torch.no_grad():
            parts = [
                self.teacher.backbone.decode(self.teacher.pipeline, latents[batch].to(device)).float().cpu()
                for batch in self.batches
            ]
        return torch.cat(parts).clamp(0, 1)

    def velocities(self, transformer: nn.Module, latents: Tensor) -> Tensor:
        """A model's velocities on noised samples.

        The noise of prompt `i` and noise level `s` is drawn on the CPU from a seed of its own, so it depends neither on
        the batch nor on the device: x = (1 - sigma) * latents + sigma * noise.

        Args:
            transformer: The model.
            latents: The teacher's samples for the prompts, [prompts, channels, height, width].

        Returns:
            [prompts, sigmas, channels, height, width] on the CPU.
        """
        device = next(transformer.parameters()).device
        sigmas = torch.tensor(self.settings.sigmas)
        velocities = []
        with inference(transformer):
            for batch in self.batches:
                clean = latents[batch]
                guidance = torch.full((len(clean),), self.settings.guidance_scale, device=device)
                conditioning: dict[str, Any] = {**self._encode(batch), "guidance": guidance}
                noise = torch.stack([self._noise(index, clean.shape[1:]) for index in range(batch.start, batch.stop)])
                levels = []
                for level, sigma in enumerate(sigmas):
                    noised = (1 - sigma) * clean.float() + sigma * noise[:, level]
                    noised = noised.to(device=device, dtype=conditioning["prompt_embeds"].dtype)
                    batch_sigma = sigma.expand(len(clean)).to(device)
                    velocity = self.teacher.backbone.predict(transformer, noised, batch_sigma, conditioning)
                    levels.append(velocity.cpu())
                velocities.append(torch.stack(levels, dim=1))
        return torch.cat(velocities)

    def velocity_error(self, transformer: nn.Module, latents: Tensor, teacher_velocities: Tensor) -> float:
        """Mean over prompts and noise levels of |v_student - v_teacher|^2 / |v_teacher|^2; see `velocities`."""
        own = self.velocities(transformer, latents)
        return float(relative_velocity_error(own.flatten(0, 1), teacher_velocities.flatten(0, 1)).mean())

    def _encode(self, batch: slice) -> dict[str, Tensor]:
        return self.teacher.encode(list(self.prompts[batch]), self.settings.max_sequence_length)

    def _noise(self, index: int, shape: torch.Size) -> Tensor:
        generator = torch.Generator().manual_seed(self.settings.seed + _NOISE_SEED + index)
        return torch.randn((len(self.settings.sigmas), *shape), generator=generator)
