"""Trains the transformer and the text encoders of the scenes teacher by flow matching."""

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxPipeline
from torch import Tensor, nn
from torch.nn import functional

from linearize.distillation.ema import ExponentialMovingAverage
from linearize.scenes.latent_pool import Captioner, LatentPool, owner_labels
from linearize.scenes.optimizer import muon_adamw
from linearize.scenes.stage import Stage
from linearize.scenes.world import COLOURS, SHAPES, TEXTURES

NATIVE_SIDE = 256
PATCH = 8


@dataclass(frozen=True)
class Bucket:
    """One kind of batch.

    Attributes:
        side: Picture side in pixels. Below the native side, position ids are spread so that the picture keeps its
            extent: a cheap first lesson in layout. From the native side on they count tokens, as the pipeline's do.
        num_text_tokens: Length that captions are padded to.
        batch_size: Per rank and step.
        weight: Relative frequency.
    """

    side: int
    num_text_tokens: int
    batch_size: int
    weight: float = 1.0


@dataclass(frozen=True)
class Phase:
    """The buckets in use until a share ``until`` of the budget is spent."""

    until: float
    buckets: tuple[Bucket, ...]


class _Tap(nn.Module):
    """Passes a double-stream block through and keeps its image stream."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.hidden: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        text, image = self.block(*args, **kwargs)
        self.hidden = image
        return text, image


class TeacherStage(Stage):
    """Flow matching on what ``FluxPipeline.encode_prompt`` feeds: padded, unmasked tokens.

    A linear read-out of the double-stream blocks' image tokens also predicts shape, colour and texture of the object
    that each token belongs to: a representation loss (compare REPA, Yu et al., 2025) with the renderer as its oracle.
    It is meant to make captions bind to places early (its part was not measured alone), and is dropped afterwards.

    With ``guidance`` the target is the guided velocity of a frozen copy of the teacher, with the guidance scale drawn
    at random and given to the guidance embedding (guidance distillation, Meng et al., 2023), as in FLUX.1-dev.

    Args:
        pipeline: A FLUX pipeline; its transformer and text encoders are trained in place.
        phases: Buckets over the budget, in order.
        pool_capacity: Scenes of the native size in each pool.
        pool_reuse: How often a scene is used before it is replaced.
        prompt_dropout: Share of captions replaced by the empty prompt.
        read_out_weight: Weight of the representation loss.
        ema_decay: Decay of the weights' moving average, which is what ships.
        weight_decay: Of the hidden matrices.
        noise_shift: Shift of the sampled noise levels towards noise, as in the scheduler.
        guidance: Lowest and highest guidance scale to distil; None trains on data.
        compile_blocks: Compiles the repeated blocks.
        schedule: Arguments of ``Stage``.
    """

    def __init__(
        self,
        pipeline: FluxPipeline,
        *,
        phases: Sequence[Phase],
        pool_capacity: int,
        pool_reuse: int = 8,
        prompt_dropout: float = 0.1,
        read_out_weight: float = 0.1,
        ema_decay: float = 0.999,
        weight_decay: float = 0.01,
        noise_shift: float = 3.0,
        guidance: tuple[float, float] | None = None,
        compile_blocks: bool = False,
        **schedule: Any,
    ) -> None:
        super().__init__(**schedule)
        self.transformer = pipeline.transformer.train()
        self.t5 = pipeline.text_encoder_2.train()
        self.clip = pipeline.text_encoder.train()
        self.autoencoder = pipeline.vae.eval().requires_grad_(False)
        self.phases = tuple(phases)
        self.prompt_dropout = prompt_dropout
        self.read_out_weight = read_out_weight
        self.ema_decay = ema_decay
        self.weight_decay = weight_decay
        self.noise_shift = noise_shift
        self.guidance = guidance
        self.compile_blocks = compile_blocks
        self.read_out = nn.Linear(self.transformer.inner_dim, len(SHAPES) + len(COLOURS) + len(TEXTURES) + 3)
        self.captioner = Captioner(pipeline.tokenizer, pipeline.tokenizer_2)
        self.empty_caption = self.captioner([""], torch.device("cpu"))
        self.pool_capacity = pool_capacity
        self.pool_reuse = pool_reuse
        self.pools: dict[int, LatentPool] = {}
        self.samples_seen = 0
        # In a list, so that the frozen copy is neither saved nor counted as this module's own.
        self._reference: list[nn.ModuleDict] = []
        if guidance is not None:
            self._reference.append(copy.deepcopy(self._velocity_parts()).eval().requires_grad_(False))

    def _velocity_parts(self) -> nn.ModuleDict:
        return nn.ModuleDict({"transformer": self.transformer, "t5": self.t5, "clip": self.clip})

    def setup(self, stage: str) -> None:
        """Taps the last double-stream block and starts the moving average."""
        self._tap = _Tap(self.transformer.transformer_blocks[-1])
        self.transformer.transformer_blocks[-1] = self._tap
        self.average = ExponentialMovingAverage(dict(self._velocity_parts().named_parameters()), self.ema_decay)

    def on_fit_start(self) -> None:
        """Moves what Lightning does not own to the device and compiles the repeated blocks."""
        for reference in self._reference:
            reference.to(self.device)
        if self.compile_blocks:
            for transformer in [self.transformer, *[reference["transformer"] for reference in self._reference]]:
                transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Flow matching and read-out losses on one batch."""
        seed = self.batch_seed()
        bucket = self._bucket(seed)
        self.samples_seen += bucket.batch_size * self.trainer.world_size
        generator = self.generator(seed)
        encoded = self._pool(bucket.side).draw(bucket.batch_size, generator)
        num, device = bucket.batch_size, self.device
        dropped = torch.rand(num, generator=generator, device=device) < self.prompt_dropout
        tokens = self._tokens(encoded.t5_tokens, encoded.clip_tokens, dropped, bucket.num_text_tokens)
        noise = torch.randn(encoded.latents.shape, generator=generator, device=device)
        spread = torch.sigmoid(1.2 * torch.randn(num, generator=generator, device=device))
        sigma = self.noise_shift * spread / (1 + (self.noise_shift - 1) * spread)
        clean = encoded.latents.float()
        noisy = torch.lerp(clean, noise, sigma[:, None, None, None])
        low, high = self.guidance or (1.0, 5.0)
        guidance = low + (high - low) * torch.rand(num, generator=generator, device=device)
        inputs = (_pack(noisy), sigma, guidance, _image_ids(bucket.side, device))
        target = self._guided_velocity(inputs, tokens) if self._reference else _pack(noise - clean)
        velocity = _velocity(self._velocity_parts(), inputs, tokens)
        flow = functional.mse_loss(velocity.float(), target)
        read_out = self._read_out_loss(owner_labels(encoded))
        self.log_dict({"flow": flow, "read_out": read_out, f"flow_{bucket.side}": flow}, prog_bar=True)
        return flow + self.read_out_weight * read_out

    def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        """Updates the moving average after each optimizer step."""
        self.average.update()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Muon and AdamW."""
        return muon_adamw(self, self.learning_rate, self.weight_decay)

    def on_train_end(self) -> None:
        """Leaves the averaged weights in the pipeline and removes the tap."""
        self.average.swap()
        self.transformer.transformer_blocks[-1] = self._tap.block
        for part in self._velocity_parts().values():
            part.eval()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the moving average and the count of samples; pools are filled anew after a resume."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["samples_seen"] = self.samples_seen
        checkpoint["average"] = self.average.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the moving average and the count of samples."""
        super().on_load_checkpoint(checkpoint)
        self.samples_seen = checkpoint["samples_seen"]
        self.average.load_state_dict(checkpoint["average"])

    def _bucket(self, seed: int) -> Bucket:
        """The same on every rank, so that all ranks do the same work."""
        phase = next((phase for phase in self.phases if self.progress < phase.until), self.phases[-1])
        weights = [bucket.weight for bucket in phase.buckets]
        return random.Random(seed).choices(phase.buckets, weights)[0]

    def _pool(self, side: int) -> LatentPool:
        if side not in self.pools:
            capacity = max(8, min(self.pool_capacity, int(self.pool_capacity * NATIVE_SIDE**2 / side**2)))
            self.pools[side] = LatentPool(self.autoencoder, self.captioner, side, capacity, self.pool_reuse)
        return self.pools[side]

    def _tokens(self, t5_tokens: Tensor, clip_tokens: Tensor, dropped: Tensor, length: int) -> tuple[Tensor, Tensor]:
        empty_t5, empty_clip = (ids.to(t5_tokens.device) for ids in self.empty_caption)
        t5_tokens = torch.where(dropped[:, None], empty_t5, t5_tokens)
        clip_tokens = torch.where(dropped[:, None], empty_clip, clip_tokens)
        padding = self.captioner.t5_tokenizer.pad_token_id
        return functional.pad(t5_tokens, (0, length - t5_tokens.shape[1]), value=padding), clip_tokens

    @torch.no_grad()
    def _guided_velocity(self, inputs: tuple[Tensor, ...], tokens: tuple[Tensor, Tensor]) -> Tensor:
        reference = self._reference[0]
        everywhere = torch.ones(tokens[0].shape[0], dtype=torch.bool, device=self.device)
        empty = self._tokens(tokens[0][:, : Captioner.length], tokens[1], everywhere, tokens[0].shape[1])
        conditional = _velocity(reference, inputs, tokens).float()
        unconditional = _velocity(reference, inputs, empty).float()
        return unconditional + inputs[2][:, None, None] * (conditional - unconditional)

    def _read_out_loss(self, classes: Tensor) -> Tensor:
        assert self._tap.hidden is not None
        logits = self.read_out(functional.layer_norm(self._tap.hidden, self._tap.hidden.shape[-1:])).float()
        parts = logits.split([len(SHAPES) + 1, len(COLOURS) + 1, len(TEXTURES) + 1], dim=-1)
        pairs = zip(parts, classes, strict=True)
        losses = [functional.cross_entropy(part.flatten(0, 1), label.flatten()) for part, label in pairs]
        return torch.stack(losses).sum()


def zero_initialize_gates(transformer: nn.Module) -> None:
    """AdaLN-Zero (Peebles and Xie, 2023, section 3.2): every block starts as the identity, the output as zero."""
    for name, module in transformer.named_modules():
        gate = name.endswith(("norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear"))
        if isinstance(module, nn.Linear) and (gate or name == "proj_out"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def _velocity(parts: nn.ModuleDict, inputs: tuple[Tensor, ...], tokens: tuple[Tensor, Tensor]) -> Tensor:
    """Packed velocity [batch, tokens, channels] for packed latents, noise level, guidance scale and image ids."""
    latents, sigma, guidance, image_ids = inputs
    prompt_embeds = parts["t5"](tokens[0])[0]
    pooled = parts["clip"](tokens[1]).pooler_output
    text_ids = image_ids.new_zeros(prompt_embeds.shape[1], 3)
    transformer: Any = parts["transformer"]
    return transformer(
        hidden_states=latents,
        encoder_hidden_states=prompt_embeds,
        pooled_projections=pooled,
        timestep=sigma,
        guidance=guidance if transformer.config.guidance_embeds else None,
        img_ids=image_ids,
        txt_ids=text_ids,
        return_dict=False,
    )[0]


def _pack(latents: Tensor) -> Tensor:
    return FluxPipeline._pack_latents(latents, *latents.shape)


def _image_ids(side: int, device: torch.device) -> Tensor:
    num = side // PATCH
    stride = max(1.0, NATIVE_SIDE / side)
    axis = (torch.arange(num, device=device) + 0.5) * stride - 0.5
    grid = torch.zeros(num, num, 3, device=device)
    grid[..., 1], grid[..., 2] = axis[:, None], axis[None, :]
    return grid.flatten(0, 1)
