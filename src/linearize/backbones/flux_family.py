"""The FLUX family: FLUX.1 dev, schnell and every transformer of that architecture."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn

from linearize.backbones.base import Backbone
from linearize.backbones.flux_site import shape_of
from linearize.backbones.flux_student import LinearFluxTransformer2DModel, flux_sites
from linearize.errors import LinearizeError
from linearize.layout import Grid, Layout
from linearize.mixers import AttentionShape


class FluxBackbone(Backbone):
    """FLUX: 2 x 2 latent pixels are one token, text tokens stand first, position ids tell (image, row, column)."""

    name = "flux"
    transformer_class = FluxTransformer2DModel
    student_class = LinearFluxTransformer2DModel
    pipeline_class = FluxPipeline
    max_sequence_length = 512

    def sites(self, transformer: nn.Module) -> dict[str, nn.Module]:
        """See `Backbone.sites`: the double blocks' attention, then the single blocks'."""
        return dict(flux_sites(transformer))

    def shape(self, site: nn.Module) -> AttentionShape:
        """See `Backbone.shape`."""
        return shape_of(site)

    def reference_layout(self, transformer: nn.Module) -> Layout:
        """See `Backbone.reference_layout`: 1024 x 1024 pixels and 512 text tokens."""
        return Layout(512, (Grid(64, 64),))

    def forward_layout(self, transformer: nn.Module, latents: Tensor, num_text_tokens: int) -> Layout:
        """See `Backbone.forward_layout`."""
        grids = (_grid_of(latents),)
        if isinstance(transformer, LinearFluxTransformer2DModel):
            return transformer.token_layout(num_text_tokens, grids)
        return Layout(num_text_tokens, grids)

    def predict(self, transformer: Any, latents: Tensor, sigma: Tensor, conditioning: dict[str, Any]) -> Tensor:
        """See `Backbone.predict`."""
        grid, dtype = _grid_of(latents), transformer.x_embedder.weight.dtype
        prompt_embeds = conditioning["prompt_embeds"].to(dtype)
        img_ids = FluxPipeline._prepare_latent_image_ids(1, grid.height, grid.width, latents.device, dtype)
        extra: dict[str, Any] = {}
        if isinstance(transformer, LinearFluxTransformer2DModel):
            extra["joint_attention_kwargs"] = {"grids": (grid,)}
        if transformer.config.guidance_embeds:
            extra["guidance"] = _guidance_of(conditioning)
        output = transformer(
            hidden_states=pack_latents(latents.to(dtype)),
            encoder_hidden_states=prompt_embeds,
            pooled_projections=conditioning["pooled_prompt_embeds"].to(dtype),
            # Through 1000 and back, as the pipeline rounds it.
            timestep=(sigma * 1000).to(dtype) / 1000,
            img_ids=img_ids,
            txt_ids=torch.zeros(prompt_embeds.shape[1], 3, device=latents.device, dtype=dtype),
            return_dict=False,
            **extra,
        )[0]
        return unpack_latents(output, grid.height, grid.width).to(latents.dtype)

    def compile_blocks(self, transformer: Any, backend: str) -> None:
        """See `Backbone.compile_blocks`."""
        super().compile_blocks(transformer, backend)
        transformer.single_transformer_blocks[0].register_forward_pre_hook(_join_streams, with_kwargs=True)

    @torch.no_grad()
    def encode(self, pipeline: Any, prompts: list[str], max_sequence_length: int) -> dict[str, Tensor]:
        """See `Backbone.encode`; also "pooled_prompt_embeds" [batch, channels]."""
        prompt_embeds, pooled, _ = pipeline.encode_prompt(
            prompt=list(prompts), prompt_2=None, max_sequence_length=max_sequence_length
        )
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled}

    @torch.no_grad()
    def sample(
        self,
        pipeline: Any,
        conditioning: dict[str, Any],
        *,
        seeds: list[int],
        height: int,
        width: int,
        num_inference_steps: int,
        guidance_scale: float,
    ) -> Tensor:
        """See `Backbone.sample`."""
        progress = getattr(pipeline, "_progress_bar_config", None)
        pipeline.set_progress_bar_config(disable=True)
        try:
            packed = pipeline(
                prompt_embeds=conditioning["prompt_embeds"],
                pooled_prompt_embeds=conditioning["pooled_prompt_embeds"],
                height=height,
                width=width,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
                output_type="latent",
            ).images
        finally:
            pipeline.set_progress_bar_config(**(progress or {}))
        _, latent_height, latent_width = self.latent_shape(pipeline, height, width)
        return unpack_latents(packed, latent_height // 2, latent_width // 2)

    @torch.no_grad()
    def decode(self, pipeline: Any, latents: Tensor) -> Tensor:
        """See `Backbone.decode`."""
        vae = pipeline.vae
        latents = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        return pipeline.image_processor.postprocess(vae.decode(latents, return_dict=False)[0], output_type="pt")

    def latent_shape(self, pipeline: Any, height: int, width: int) -> tuple[int, int, int]:
        """See `Backbone.latent_shape`: rounded down to whole tokens, as the pipeline does."""
        token = 2 * pipeline.vae_scale_factor
        return pipeline.transformer.config.in_channels // 4, 2 * (height // token), 2 * (width // token)


def pack_latents(latents: Tensor) -> Tensor:
    """[batch, channels, height, width] to tokens [batch, height / 2 * width / 2, 4 channels] in raster order."""
    batch, channels, height, width = latents.shape
    blocks = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return blocks.permute(0, 2, 4, 1, 3, 5).reshape(batch, height // 2 * (width // 2), 4 * channels)


def unpack_latents(tokens: Tensor, grid_height: int, grid_width: int) -> Tensor:
    """Tokens [batch, grid_height * grid_width, 4 channels] to [batch, channels, 2 grid_height, 2 grid_width]."""
    batch, _, channels = tokens.shape
    blocks = tokens.reshape(batch, grid_height, grid_width, channels // 4, 2, 2)
    return blocks.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // 4, 2 * grid_height, 2 * grid_width)


@torch.compiler.disable
def _join_streams(block: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, Any]:
    """Gives the first single block text and image tokens as the others get them: two views of one tensor.

    Tensors of their own have other strides, for which the block would be compiled once more.
    """
    call = dict(zip(("hidden_states", "encoder_hidden_states"), arguments, strict=False)) | keywords
    text, image = call["encoder_hidden_states"], call["hidden_states"]
    joined = torch.cat([text, image], dim=1)
    views = {"encoder_hidden_states": joined[:, : text.shape[1]], "hidden_states": joined[:, text.shape[1] :]}
    if not arguments:
        return (), keywords | views
    return (views["hidden_states"], views["encoder_hidden_states"], *arguments[2:]), keywords


def _grid_of(latents: Tensor) -> Grid:
    height, width = latents.shape[-2:]
    if height % 2 or width % 2:
        raise LinearizeError(
            f"FLUX packs 2 x 2 latent pixels into a token, got latents of {height} x {width}; use even sizes"
        )
    return Grid(height // 2, width // 2)


def _guidance_of(conditioning: dict[str, Any]) -> Tensor:
    guidance = conditioning.get("guidance")
    if guidance is None:
        raise LinearizeError(
            "this transformer has a guidance embedding: give the conditioning a 'guidance' tensor [batch]"
        )
    return guidance
