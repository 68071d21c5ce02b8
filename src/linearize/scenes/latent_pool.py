"""A pool of encoded scenes that the teacher trains on: each is rendered and encoded once and used a few times."""

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from linearize.scenes.grammar import captions
from linearize.scenes.render import render, sample_placement
from linearize.scenes.world import ALONE, SceneBatch, concatenate, sample_scenes


@dataclass
class EncodedScenes:
    """A batch of encoded scenes.

    Attributes:
        latents: [batch, channels, height / 4, width / 4], shifted and scaled as the transformer sees them.
        owner: [batch, tokens] which object covers most of each image token: 0 none, 1 first, 2 second.
        scenes: What the pictures show.
        t5_tokens: [batch, 32] token ids.
        clip_tokens: [batch, 32] token ids.
    """

    latents: Tensor
    owner: Tensor
    scenes: SceneBatch
    t5_tokens: Tensor
    clip_tokens: Tensor


class Captioner:
    """Token ids of captions, padded as ``FluxPipeline.encode_prompt`` pads them but to 32 tokens.

    Args:
        clip_tokenizer: The pipeline's ``tokenizer``.
        t5_tokenizer: The pipeline's ``tokenizer_2``.
    """

    length = 32

    def __init__(self, clip_tokenizer: PreTrainedTokenizerBase, t5_tokenizer: PreTrainedTokenizerBase) -> None:
        self.clip_tokenizer = clip_tokenizer
        self.t5_tokenizer = t5_tokenizer

    def __call__(self, texts: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """T5 and CLIP ids, each [len(texts), 32]."""
        ids = [
            tokenizer(texts, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt")
            for tokenizer in (self.t5_tokenizer, self.clip_tokenizer)
        ]
        return ids[0].input_ids.to(device), ids[1].input_ids.to(device)


class LatentPool:
    """A ring of encoded training scenes of one resolution, refreshed a little at every draw.

    Args:
        autoencoder: Encodes the renders.
        captioner: Tokenizes the captions.
        side: Picture side in pixels.
        capacity: How many scenes the ring holds.
        reuse: How often a scene is drawn on average before it is replaced.
    """

    def __init__(
        self, autoencoder: AutoencoderKL, captioner: Captioner, side: int, capacity: int, reuse: int = 8
    ) -> None:
        self.autoencoder = autoencoder
        self.captioner = captioner
        self.side = side
        self.capacity = capacity
        self.reuse = reuse
        self._ring: EncodedScenes | None = None
        self._next = 0

    def draw(self, num: int, generator: torch.Generator) -> EncodedScenes:
        """``num`` scenes at random, after replacing the oldest ``num / reuse``."""
        if self._ring is None:
            chunk = max(1, min(256, self.capacity) * 256**2 // max(self.side, 128) ** 2)
            parts = [self._encode(min(chunk, self.capacity - i), generator) for i in range(0, self.capacity, chunk)]
            self._ring = _join(parts)
        else:
            self._replace(self._encode(max(1, num // self.reuse), generator))
        index = torch.randint(self.capacity, (num,), generator=generator, device=generator.device)
        ring = self._ring
        return EncodedScenes(
            ring.latents[index], ring.owner[index], ring.scenes[index], ring.t5_tokens[index], ring.clip_tokens[index]
        )

    def _replace(self, fresh: EncodedScenes) -> None:
        num = fresh.latents.shape[0]
        index = (torch.arange(num, device=fresh.latents.device) + self._next) % self.capacity
        self._next = (self._next + num) % self.capacity
        assert self._ring is not None
        for old, new in zip(_tensors(self._ring), _tensors(fresh), strict=True):
            old[index] = new

    @torch.no_grad()
    def _encode(self, num: int, generator: torch.Generator) -> EncodedScenes:
        device = generator.device
        # Scenes and captions are drawn on the CPU, so that no step waits for the GPU.
        text_generator = torch.Generator().manual_seed(generator.initial_seed() % 2**62)
        drawn = sample_scenes(num, text_generator)
        t5_tokens, clip_tokens = self.captioner(captions(drawn, text_generator), device)
        scenes = drawn.to(device)
        images, coverage = render(scenes, sample_placement(scenes, generator), self.side, self.side)
        config = self.autoencoder.config
        posterior = self.autoencoder.encode((images * 2 - 1).to(self.autoencoder.dtype)).latent_dist
        latents = (posterior.mode() - config.shift_factor) * config.scaling_factor
        share = functional.avg_pool2d(coverage, 8).flatten(2)
        background = 1 - share.sum(dim=1, keepdim=True)
        owner = torch.cat([background, share], dim=1).argmax(dim=1).to(torch.uint8)
        return EncodedScenes(latents.to(torch.bfloat16), owner, scenes, t5_tokens, clip_tokens)


def owner_labels(encoded: EncodedScenes) -> Tensor:
    """[3, batch, tokens] shape, colour and texture at each image token, 0 where there is no object, else index + 1."""
    scenes = encoded.scenes
    padding = scenes.objects.new_full((len(scenes), 1, 3), -1)
    second = torch.where((scenes.relation == ALONE)[:, None, None], padding, scenes.objects[:, 1:, :3])
    table = torch.cat([padding, scenes.objects[:, :1, :3], second], dim=1) + 1
    index = encoded.owner.long()[..., None].expand(-1, -1, 3)
    return table.gather(1, index).permute(2, 0, 1)


def _tensors(encoded: EncodedScenes) -> list[Tensor]:
    scenes = encoded.scenes
    attributes = [scenes.objects, scenes.relation, scenes.background]
    return [encoded.latents, encoded.owner, *attributes, encoded.t5_tokens, encoded.clip_tokens]


def _join(parts: list[EncodedScenes]) -> EncodedScenes:
    return EncodedScenes(
        torch.cat([part.latents for part in parts]),
        torch.cat([part.owner for part in parts]),
        concatenate([part.scenes for part in parts]),
        torch.cat([part.t5_tokens for part in parts]),
        torch.cat([part.clip_tokens for part in parts]),
    )
