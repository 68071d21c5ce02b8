import pytest
import torch
from diffusers import FluxTransformer2DModel

from linearize.backbones import find_backbone
from linearize.backbones.flux_family import unpack_latents
from linearize.errors import LinearizeError
from linearize.layout import TILE, Grid, Layout
from linearize.surgery import linearize


@pytest.fixture
def backbone(tiny_pipeline):
    return find_backbone(tiny_pipeline.transformer)


SETTINGS = {"height": 48, "width": 80, "num_inference_steps": 2, "guidance_scale": 2.5}


def test_teacher_and_student_have_one_backbone(tiny_pipeline, backbone):
    linearize(tiny_pipeline)
    assert backbone.name == find_backbone(tiny_pipeline.transformer).name == "flux"
    assert list(backbone.sites(tiny_pipeline.transformer)) == [
        "transformer_blocks.0.attn",
        "transformer_blocks.1.attn",
        "single_transformer_blocks.0.attn",
        "single_transformer_blocks.1.attn",
    ]


def test_an_unknown_family_is_refused(tiny_pipeline):
    with pytest.raises(LinearizeError, match="no backbone for T5EncoderModel, linearize knows FluxTransformer2DModel"):
        find_backbone(tiny_pipeline.text_encoder_2)


@pytest.mark.parametrize("surgery", [None, "clear"])
def test_samples_are_the_stock_pipelines_on_the_prompts(tiny_pipeline, backbone, surgery):
    if surgery:
        linearize(tiny_pipeline, surgery, window=2)
    prompts = ["a red circle", "a small blue square"]
    conditioning = backbone.encode(tiny_pipeline, prompts, 12)
    assert conditioning["prompt_embeds"].shape[:2] == (2, 12)
    latents = backbone.sample(tiny_pipeline, conditioning, seeds=[7, 8], **SETTINGS)
    assert latents.shape == (2, *backbone.latent_shape(tiny_pipeline, 48, 80))
    images = backbone.decode(tiny_pipeline, latents)
    assert images.shape == (2, 3, 48, 80)
    assert images.min() >= 0
    assert images.max() <= 1
    stock = tiny_pipeline(
        prompts,
        max_sequence_length=12,
        generator=[torch.Generator().manual_seed(seed) for seed in (7, 8)],
        output_type="pt",
        **SETTINGS,
    ).images
    assert torch.equal(images, stock)


def test_each_seed_is_its_own_noise_whatever_the_batch(tiny_pipeline, backbone):
    conditioning = backbone.encode(tiny_pipeline, ["a red circle", "a small blue square"], 8)
    together = backbone.sample(tiny_pipeline, conditioning, seeds=[7, 8], **SETTINGS)
    second = {key: value[1:] for key, value in conditioning.items()}
    alone = backbone.sample(tiny_pipeline, second, seeds=[8], **SETTINGS)
    torch.testing.assert_close(alone, together[1:], rtol=1e-4, atol=1e-5)


def test_sampling_leaves_the_progress_bar_as_it_was(tiny_pipeline, backbone):
    tiny_pipeline.set_progress_bar_config(desc="mine", disable=True)
    conditioning = backbone.encode(tiny_pipeline, ["a red circle"], 8)
    backbone.sample(tiny_pipeline, conditioning, seeds=[0], **SETTINGS)
    assert tiny_pipeline._progress_bar_config == {"desc": "mine", "disable": True}


@torch.no_grad()
def test_predict_is_what_the_pipeline_computes_in_a_step(tiny_pipeline, backbone):
    conditioning = backbone.encode(tiny_pipeline, ["a red circle"], 8) | {"guidance": torch.tensor([2.5])}
    seen = []
    handle = tiny_pipeline.transformer.register_forward_hook(
        lambda module, args, kwargs, output: seen.append((kwargs, output[0])), with_kwargs=True
    )
    latents = backbone.sample(tiny_pipeline, conditioning, seeds=[0], **SETTINGS)
    handle.remove()
    for (kwargs, velocity), sigma in zip(seen, tiny_pipeline.scheduler.sigmas, strict=False):
        state = unpack_latents(kwargs["hidden_states"], 6, 10)
        assert state.shape == latents.shape
        ours = backbone.predict(tiny_pipeline.transformer, state, sigma[None], conditioning)
        assert torch.equal(ours, unpack_latents(velocity, 6, 10))


def test_transformers_without_guidance_ignore_it_and_those_with_need_it(tiny_pipeline, backbone):
    torch.manual_seed(0)
    config = {**tiny_pipeline.transformer.config, "guidance_embeds": False}
    schnell = FluxTransformer2DModel.from_config(config).eval()
    conditioning = backbone.encode(tiny_pipeline, ["a red circle"], 8)
    latents, sigma = torch.randn(1, 4, 8, 12), torch.tensor([0.5])
    with torch.no_grad():
        plain = backbone.predict(schnell, latents, sigma, conditioning)
        guided = backbone.predict(schnell, latents, sigma, conditioning | {"guidance": torch.tensor([9.0])})
    assert torch.equal(plain, guided)
    with pytest.raises(LinearizeError, match="give the conditioning a 'guidance' tensor"):
        backbone.predict(tiny_pipeline.transformer, latents, sigma, conditioning)


def test_odd_latents_are_refused(tiny_pipeline, backbone):
    with pytest.raises(LinearizeError, match="got latents of 7 x 8; use even sizes"):
        backbone.forward_layout(tiny_pipeline.transformer, torch.zeros(1, 4, 7, 8), 3)


def test_the_layout_of_a_forward_pass(tiny_pipeline, backbone):
    latents = torch.zeros(1, 4, 12, 8)
    assert backbone.forward_layout(tiny_pipeline.transformer, latents, 3) == Layout(3, (Grid(6, 4),))
    linearize(tiny_pipeline)
    assert backbone.forward_layout(tiny_pipeline.transformer, latents, 3) == Layout(3, (Grid(6, 4),), tile=TILE)


def test_predict_keeps_the_latents_dtype(tiny_pipeline, backbone):
    transformer = tiny_pipeline.transformer.bfloat16()
    conditioning = backbone.encode(tiny_pipeline, ["a red circle"], 8) | {"guidance": torch.tensor([2.5])}
    with torch.no_grad():
        velocity = backbone.predict(transformer, torch.randn(1, 4, 8, 12), torch.tensor([0.5]), conditioning)
    assert velocity.dtype == torch.float32
