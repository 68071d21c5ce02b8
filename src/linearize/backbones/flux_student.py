"""The student of the FLUX family: the stock transformer whose attention layers are sites, each with its mixer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from diffusers import FluxTransformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_flux import FluxAttention, _get_qkv_projections
from torch import Tensor, nn

from linearize.backbones.flux_fused import FusedAdaLayerNormZero, FusedGelu, LinearFluxSingleBlock, is_compiled
from linearize.backbones.plan import Plan, match_dtype_and_device, mixers_for_plan, preferred_order
from linearize.backbones.position_ids import grids_from_ids
from linearize.backbones.recording import Recorder
from linearize.backbones.saving import StudentSaving
from linearize.errors import LinearizeError, mistake_behind
from linearize.layout import TILE, Layout
from linearize.mixers import AttentionShape, Mixer, MixerContext
from linearize.ops.fused_norms import norm_rotate

_ORDERS = {"raster": None, "tile": TILE}
_NO_PROCESSORS = (
    "the attention of a linearized transformer is its mixers', so it takes no attention processors and no IP-Adapter; "
    "load those into the teacher's own pipeline"
)


@dataclass
class TokenStream:
    """What the transformer tells its sites about the tokens that pass.

    Attributes:
        layout: Text tokens, grids and the order in which image tokens travel.
        positions: Position ids in that order, [tokens, 3].
        timestep_embedding: [batch, channels], if any mixer uses it.
    """

    layout: Layout
    positions: Tensor
    timestep_embedding: Tensor | None = None


class LinearFluxAttention(FluxAttention):
    """A site: FLUX's attention layer with a mixer in the place of softmax(QK^T)V, and all else by its stock name."""

    mixer: Mixer
    theta: int
    axes_dim: tuple[int, ...]
    recorder: Recorder | None = None

    @staticmethod
    def convert(attention: FluxAttention, mixer: Mixer, pos_embed: Any) -> None:
        """Makes a stock layer, or a site, a site with this mixer; parameters stay the objects that they are."""
        attention.__class__ = LinearFluxAttention
        attention.mixer = match_dtype_and_device(mixer, attention)
        attention.theta, attention.axes_dim = pos_embed.theta, tuple(pos_embed.axes_dim)

    def set_processor(self, processor: Any) -> None:
        """Raises LinearizeError, except while the stock constructor runs: no processor may take the mixer's place."""
        raise LinearizeError(_NO_PROCESSORS)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        image_rotary_emb: tuple[Tensor, Tensor],
        token_stream: TokenStream,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The stock layer's forward with `self.mixer` in the middle.

        Args:
            hidden_states: [batch, tokens, channels], image tokens in double blocks, text and image tokens in single
                blocks.
            encoder_hidden_states: [batch, text tokens, channels] in double blocks.
            attention_mask: Always None in this family.
            image_rotary_emb: Cosine and sine [tokens, head_dim] of all tokens.
            token_stream: Layout and positions of all tokens.
        """
        if attention_mask is not None:
            raise LinearizeError("a linearized FLUX transformer takes no attention_mask; leave it out")
        streams = self._streams(hidden_states, encoder_hidden_states)
        query, key, value = self._heads(streams)
        inputs = None
        if self.mixer.uses_hidden_states:
            joined = [hidden_states] if encoder_hidden_states is None else [encoder_hidden_states, hidden_states]
            inputs = torch.cat(joined, dim=1)
        rotated = self._rotated(streams, image_rotary_emb)
        attention = self._mix(query, key, value, image_rotary_emb, token_stream, inputs, rotated)
        attention = attention.flatten(2, 3).to(value.dtype)
        output = (
            attention if encoder_hidden_states is None else self._project(attention, encoder_hidden_states.shape[1])
        )
        if self.recorder is not None:
            keywords = {
                "hidden_states": hidden_states,
                "encoder_hidden_states": encoder_hidden_states,
                "image_rotary_emb": image_rotary_emb,
                "token_stream": token_stream,
            }
            self.recorder.record(attention, keywords, output)
        return output

    def _project(self, attention: Tensor, num_text_tokens: int) -> tuple[Tensor, Tensor]:
        """Image and text outputs of a double block."""
        text, image = attention.split_with_sizes([num_text_tokens, attention.shape[1] - num_text_tokens], dim=1)
        return self.to_out[1](self.to_out[0](image.contiguous())), self.to_add_out(text.contiguous())

    def _streams(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None) -> list[tuple[Tensor, ...]]:
        """Query, key and value, [batch, tokens, heads, head_dim], of each stream of tokens, text first."""
        projected = _get_qkv_projections(self, hidden_states, encoder_hidden_states)
        own = tuple(self._split(states) for states in projected[:3])
        if encoder_hidden_states is None:
            return [own]
        return [tuple(self._split(states) for states in projected[3:]), own]

    def _heads(self, streams: list[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor, Tensor]:
        """Normed query and key, and value, of all tokens: [batch, tokens, heads, head_dim]."""
        normed = [
            (query_norm(query), key_norm(key), value)
            for (query, key, value), (query_norm, key_norm) in zip(streams, self._norms(), strict=True)
        ]
        if len(normed) == 1:
            return normed[0]
        query, key, value = (torch.cat(parts, dim=1) for parts in zip(*normed, strict=True))
        return query, key, value

    def _norms(self) -> list[tuple[nn.Module, nn.Module]]:
        """Norms of query and key of each stream, text first."""
        own = (self.norm_q, self.norm_k)
        return [own] if self.added_kv_proj_dim is None else [(self.norm_added_q, self.norm_added_k), own]

    def _rotated(
        self, streams: list[tuple[Tensor, ...]], rotary: tuple[Tensor, Tensor]
    ) -> Callable[[], tuple[Tensor, Tensor]] | None:
        """Norm, joining and rotation in one pass."""
        queries, keys, _ = zip(*streams, strict=True)
        query_norms, key_norms = zip(*self._norms(), strict=True)
        trains = torch.is_grad_enabled() and any(norm.weight.requires_grad for norm in (*query_norms, *key_norms))
        # Triton's tiles are powers of two.
        if trains or self.head_dim & (self.head_dim - 1) or not is_compiled(queries[0]):
            return None

        def call() -> tuple[Tensor, Tensor]:
            query, key = norm_rotate(
                queries,
                keys,
                [norm.weight for norm in query_norms],
                [norm.weight for norm in key_norms],
                *rotary,
                query_norms[0].eps,
            )
            return query.transpose(1, 2), key.transpose(1, 2)

        return call

    def _split(self, states: Tensor) -> Tensor:
        # Not unflatten, which torch 2.11's compiler cannot trace while a default device is set.
        return states.view(*states.shape[:-1], states.shape[-1] // self.head_dim, self.head_dim)

    def _mix(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotary: tuple[Tensor, Tensor],
        stream: TokenStream,
        inputs: Tensor | None,
        rotated: Callable[[], tuple[Tensor, Tensor]] | None,
    ) -> Tensor:
        """Calls the mixer in its own order; [batch, tokens, heads, head_dim] in and out, in the stream's order."""
        layout, positions = stream.layout, stream.positions
        tile = _ORDERS.get(self.mixer.token_order, layout.tile)
        if tile != layout.tile:
            index = layout.index_to(tile, query.device)
            query, key, value = query[:, index], key[:, index], value[:, index]
            rotary, positions = (rotary[0][index], rotary[1][index]), positions[index]
            inputs, rotated = None if inputs is None else inputs[:, index], None
        context = MixerContext(
            layout=layout.with_tile(tile),
            scale=self.head_dim**-0.5,
            rotate=lambda x: apply_rotary_emb(x.transpose(1, 2), rotary, sequence_dim=1).transpose(1, 2),
            rotated=rotated,
            angles=self._angles,
            positions=positions,
            softmax=self._softmax,
            hidden_states=inputs,
            timestep_embedding=stream.timestep_embedding,
        )
        output = self.mixer(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), context)
        output = output.transpose(1, 2)
        if tile != layout.tile:
            output = output[:, layout.with_tile(tile).index_to(layout.tile, query.device)]
        return output

    def _softmax(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return dispatch_attention_fn(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            backend=self.processor._attention_backend,
            parallel_config=self.processor._parallel_config,
        ).transpose(1, 2)

    def _angles(self, positions: Tensor, dim: int) -> Tensor:
        return rotary_angles(positions, dim, self.axes_dim, self.theta)


def rotary_angles(positions: Tensor, dim: int, axes_dim: tuple[int, ...], theta: float) -> Tensor:
    """FLUX's rotary angles, [tokens, dim // 2] in float64, for features of any even width.

    Channels are shared out among the axes (image, row, column) as `axes_dim` shares out head_dim; at that width they
    are FLUX's own.
    """
    bounds = [2 * round(dim * sum(axes_dim[: i + 1]) / sum(axes_dim) / 2) for i in range(len(axes_dim))]
    angles = []
    for axis, (start, stop) in enumerate(zip([0, *bounds], bounds, strict=False)):
        channels = torch.arange(0, stop - start, 2, dtype=torch.float64, device=positions.device)
        frequencies = theta ** (-channels / max(stop - start, 1))
        angles.append(positions[:, axis, None].double() * frequencies)
    return torch.cat(angles, dim=-1)


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
        raise LinearizeError(_NO_PROCESSORS)

    def _load_ip_adapter_weights(self, state_dicts: Any, low_cpu_mem_usage: bool = True) -> NoReturn:
        raise LinearizeError(_NO_PROCESSORS)

    def token_layout(self, num_text_tokens: int, grids: tuple) -> Layout:
        """The layout of a forward pass, in the order that this transformer's image tokens travel."""
        order = preferred_order([site.mixer for site in flux_sites(self).values()])
        return Layout(num_text_tokens, grids, tile=_ORDERS[order])

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


def shape_of(attention: FluxAttention) -> AttentionShape:
    """The sizes that a mixer in this layer must know."""
    return AttentionShape(attention.heads, attention.head_dim, attention.query_dim)


def _permute_all(samples: Any, index: Tensor) -> Any:
    return None if samples is None else [sample[:, index] for sample in samples]
