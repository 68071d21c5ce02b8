"""The student of the FLUX family: the stock transformer whose attention layers are sites, each with its mixer."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from diffusers import FluxTransformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import Tensor

from linearize.backbones.flux_fused import FusedAdaLayerNormZero, FusedGelu, LinearFluxSingleBlock
from linearize.backbones.flux_site import NO_PROCESSORS, ORDERS, LinearFluxAttention, TokenStream, shape_of
from linearize.backbones.plan import Plan, mixers_for_plan, preferred_order
from linearize.backbones.position_ids import grids_from_ids
from linearize.backbones.saving import StudentSaving
from linearize.errors import LinearizeError, mistake_behind
from linearize.layout import Layout


class LinearFluxTransformer2DModel(StudentSaving, FluxTransformer2DModel):
    """FLUX's transformer with mixers, a stock component of any FLUX pipeline.

    The config entry `linearize_plan` says which site has which mixer: [{"layers": [...], "mixer": name, "arguments":
    {...}}]. All other arguments are `FluxTransformer2DModel`'s. Image tokens travel in the order that most mixers
    want, and come out in raster order.
    """

    __module__ = "linearize"
    _repeated_blocks = _no_split_modules = ("FluxTransformerBlock", "LinearFluxSingleBlock")
    # Context parallelism cuts the tokens of softmax attention; mixers need theirs whole.
    _cp_plan = None

    @register_to_config
    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 64,
        out_channels: int | None = None,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768,
        guidance_embeds: bool = False,
        axes_dims_rope: tuple[int, int, int] = (16, 56, 56),
        linearize_plan: Plan | None = None,
    ) -> None:
        super().__init__(
            patch_size=patch_size,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=num_layers,
            num_single_layers=num_single_layers,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim,
            pooled_projection_dim=pooled_projection_dim,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=axes_dims_rope,
        )
        self.convert(self, linearize_plan or [])

    @classmethod
    def convert(cls, transformer: FluxTransformer2DModel, plan: Plan) -> None:
        """Makes a transformer a student in place.

        Every site gets its mixer, `softmax` where the plan names none, and the config gets the plan.

        Args:
            transformer: Stock, or a student, whose mixers are replaced.
            plan: Resolved rules.

        Raises:
            LinearizeError: The plan does not fit; the transformer is as it was.
        """
        sites = flux_sites(transformer)
        mixers = mixers_for_plan(plan, {name: shape_of(site) for name, site in sites.items()})
        transformer.__class__ = cls
        for name, mixer in mixers.items():
            LinearFluxAttention.convert(sites[name], mixer, transformer.pos_embed)
        for block in transformer.single_transformer_blocks:
            block.__class__ = LinearFluxSingleBlock
        for block in transformer.transformer_blocks:
            block.ff.net[0].__class__ = block.ff_context.net[0].__class__ = FusedGelu
            block.norm1.__class__ = block.norm1_context.__class__ = FusedAdaLayerNormZero
        transformer.register_to_config(linearize_plan=plan)

    def set_attn_processor(self, processor: Any) -> NoReturn:
        """Raises LinearizeError: no processor may take a mixer's place."""
        raise LinearizeError(NO_PROCESSORS)

    def _load_ip_adapter_weights(self, state_dicts: Any, low_cpu_mem_usage: bool = True) -> NoReturn:
        raise LinearizeError(NO_PROCESSORS)

    def token_layout(self, num_text_tokens: int, grids: tuple) -> Layout:
        """The layout of a forward pass, in the order that this transformer's image tokens travel."""
        order = preferred_order([site.mixer for site in flux_sites(self).values()])
        return Layout(num_text_tokens, grids, tile=ORDERS[order])

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        controlnet_block_samples: Any = None,
        controlnet_single_block_samples: Any = None,
        return_dict: bool = True,
        controlnet_blocks_repeat: bool = False,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The stock forward, argument for argument; image tokens are permuted at its two ends only.

        Image grids are read off `img_ids`; a caller that knows them saves the look by
        `joint_attention_kwargs={"grids": (Grid(...),)}`.
        """
        kwargs = dict(joint_attention_kwargs or {})
        img_ids, txt_ids = (ids[0] if ids.ndim == 3 else ids for ids in (img_ids, txt_ids))
        layout = self.token_layout(encoder_hidden_states.shape[1], kwargs.pop("grids", None) or grids_from_ids(img_ids))
        if layout.tile is not None:
            index = layout.raster_to_tile(hidden_states.device)
            hidden_states, img_ids = hidden_states[:, index], img_ids[index]
            controlnet_block_samples = _permute_all(controlnet_block_samples, index)
            controlnet_single_block_samples = _permute_all(controlnet_single_block_samples, index)
        stream = TokenStream(layout, torch.cat((txt_ids, img_ids)))
        if any(site.mixer.uses_timestep_embedding for site in flux_sites(self).values()):
            stream.timestep_embedding = self._timestep_embedding(hidden_states, timestep, guidance, pooled_projections)
        output = self._stock_forward(
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=timestep,
            img_ids=img_ids,
            txt_ids=txt_ids,
            guidance=guidance,
            joint_attention_kwargs={**kwargs, "token_stream": stream},
            controlnet_block_samples=controlnet_block_samples,
            controlnet_single_block_samples=controlnet_single_block_samples,
            return_dict=False,
            controlnet_blocks_repeat=controlnet_blocks_repeat,
        )[0]
        if layout.tile is not None:
            output = output[:, layout.tile_to_raster(output.device)]
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _stock_forward(self, **arguments: Any) -> tuple[Tensor]:
        try:
            return super().forward(**arguments)
        except RuntimeError as error:
            mistake = mistake_behind(error)
            if mistake is None:
                raise
            raise mistake from error

    def _timestep_embedding(self, hidden_states: Tensor, timestep: Tensor, guidance: Tensor | None, pooled: Tensor):
        times = [time.to(self.x_embedder.weight.dtype) * 1000 for time in (timestep, guidance) if time is not None]
        return self.time_text_embed(*times, pooled)


def flux_sites(transformer: Any) -> dict[str, FluxAttention]:
    """All attention layers of a FLUX transformer by name, in the order of the forward pass."""
    double = {f"transformer_blocks.{i}.attn": block.attn for i, block in enumerate(transformer.transformer_blocks)}
    blocks = enumerate(transformer.single_transformer_blocks)
    return double | {f"single_transformer_blocks.{i}.attn": block.attn for i, block in blocks}


def _permute_all(samples: Any, index: Tensor) -> Any:
    return None if samples is None else [sample[:, index] for sample in samples]
