import copy

import pytest
import torch
from diffusers import FluxTransformer2DModel

from linearize.backbones import find_backbone
from linearize.surgery import linearize


def random_flux(num_single_layers, head_dim=16, axes_dims=(4, 6, 6), guidance_embeds=True):
    """A random FLUX transformer of two double blocks and some single ones."""
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=num_single_layers,
        num_attention_heads=2,
        attention_head_dim=head_dim,
        axes_dims_rope=axes_dims,
        joint_attention_dim=32,
        pooled_projection_dim=24,
        guidance_embeds=guidance_embeds,
    ).eval()


@pytest.fixture(scope="session")
def untouched():
    """A transformer of two double and two single blocks; not to be changed."""
    return random_flux(num_single_layers=2)


@pytest.fixture(scope="session")
def deep():
    """The same with three single blocks."""
    return random_flux(num_single_layers=3)


@pytest.fixture
def gpu_transformer():
    """One whose heads GPU kernels take, in bf16 and on the GPU."""
    transformer = random_flux(3, head_dim=64, axes_dims=(16, 24, 24), guidance_embeds=False)
    return transformer.train().to("cuda", torch.bfloat16)


@pytest.fixture
def teacher(untouched):
    """The same transformer, to change as one likes."""
    return copy.deepcopy(untouched)


@pytest.fixture
def student(untouched):
    """Makes a student of it: `student(mixer="clear", window=3)`."""

    def make(mixer="clear", **arguments):
        transformer = copy.deepcopy(untouched)
        linearize(transformer, mixer, **arguments)
        return transformer

    return make


@pytest.fixture
def predict():
    """The velocity on random latents of height x width tokens."""

    def call(transformer, height=9, width=19, num_text_tokens=5, batch=2, seed=0):
        generator = torch.Generator().manual_seed(seed)
        random = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        conditioning = {
            "prompt_embeds": random(batch, num_text_tokens, 32),
            "pooled_prompt_embeds": random(batch, 24),
            "guidance": torch.linspace(1.0, 4.0, batch),
        }
        latents = random(batch, 4, 2 * height, 2 * width)
        return find_backbone(transformer).predict(transformer, latents, torch.linspace(0.2, 0.9, batch), conditioning)

    return call
