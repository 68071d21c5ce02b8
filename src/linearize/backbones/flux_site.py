"""A site of the FLUX family: the stock attention layer with a mixer in the place of its softmax."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention, _get_qkv_projections
from torch import Tensor, nn

from linearize.backbones.flux_fused import is_compiled
from linearize.backbones.plan import match_dtype_and_device
from linearize.backbones.recording import Recorder
from linearize.errors import LinearizeError
from linearize.layout import TILE, Layout
from linearize.mixers import AttentionShape, Mixer, MixerContext
from linearize.ops.fused_norms import norm_rotate

ORDERS = {"raster": None, "tile": TILE}
NO_PROCESSORS = (
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
        raise LinearizeError(NO_PROCESSORS)

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
        tile = ORDERS.get(self.mixer.token_order, layout.tile)
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


def shape_of(attention: FluxAttention) -> AttentionShape:
    """The sizes that a mixer in this layer must know."""
    return AttentionShape(attention.heads, attention.head_dim, attention.query_dim)
