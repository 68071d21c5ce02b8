"""Compiled FLUX blocks on a GPU: the stock operations in fewer passes over the activations."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.activations import GELU
from diffusers.models.normalization import AdaLayerNormZero
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from torch import Tensor, nn
from torch.nn.functional import linear

from linearize.ops.fused_norms import norm_modulate

_HALVES = (torch.bfloat16, torch.float16)


def is_compiled(states: Tensor) -> bool:
    """Whether this is compiled for a GPU; eager code is the stock code, bit for bit."""
    return torch.compiler.is_compiling() and states.is_cuda


def is_fused(states: Tensor, *layers: nn.Module) -> bool:
    """Whether operations without gradients may stand for these layers.

    Layers that an adapter or a quantizer has replaced, or that offloading has elsewhere, are left to themselves.
    """
    return (
        is_compiled(states)
        and not torch.is_grad_enabled()
        and all(
            type(layer) is nn.Linear and layer.weight.dtype in _HALVES and layer.weight.device == states.device
            for layer in layers
        )
    )


class FusedGelu(GELU):
    """Diffusers' linear layer with GELU behind it, as one product."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., channels] to [..., wider channels]."""
        return linear_gelu(self.proj, hidden_states) if self.approximate == "tanh" else super().forward(hidden_states)


def linear_gelu(layer: nn.Linear, states: Tensor) -> Tensor:
    """GELU by its tanh approximation of a linear layer."""
    if not is_fused(states, layer):
        return nn.functional.gelu(layer(states), approximate="tanh")
    flat = states.to(layer.weight.dtype).flatten(0, -2)
    result = torch._addmm_activation(layer.bias, flat, layer.weight.t(), use_gelu=True)
    return result.view(*states.shape[:-1], result.shape[-1])


class FusedAdaLayerNormZero(AdaLayerNormZero):
    """The modulated norm that a double block begins with."""

    def forward(self, x: Tensor, *arguments: Any, emb: Tensor | None = None, **keywords: Any) -> tuple[Tensor, ...]:
        """The stock norm's forward, argument for argument."""
        if emb is None or not is_fused(x):
            return super().forward(x, *arguments, emb=emb, **keywords)
        shift, scale, *others = self.linear(self.silu(emb)).chunk(6, dim=1)
        return norm_modulate([x], scale, shift, self.norm.eps), *others


# An operator, as compilers would copy the first product before they add the second.
@torch.library.custom_op("linearize::joint_linear", mutates_args=())
def _joint_linear(first: Tensor, second: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The linear layer of [tokens, channels] inputs side by side that are not side by side in memory."""
    width = first.shape[1]
    return linear(first, weight[:, :width], bias).addmm_(second, weight[:, width:].t())


@_joint_linear.register_fake
def _(first: Tensor, second: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return first.new_empty(len(first), len(weight))


class LinearFluxSingleBlock(FluxSingleTransformerBlock):
    """The single block without joining attention and MLP in memory: their product with `proj_out` is a sum of two."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The stock block's forward, argument for argument."""
        if not is_fused(hidden_states, self.proj_mlp, self.proj_out):
            return super().forward(hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs)
        num_text_tokens = encoder_hidden_states.shape[1]
        streams = [encoder_hidden_states, hidden_states]
        shift, scale, gate = self.norm.linear(self.norm.silu(temb)).chunk(3, dim=1)
        normed = norm_modulate(streams, scale, shift, self.norm.norm.eps)
        mlp = linear_gelu(self.proj_mlp, normed).flatten(0, 1)
        attention = self.attn(normed, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
        weight = self.proj_out.weight
        update = _joint_linear(attention.to(weight.dtype).flatten(0, 1), mlp, weight, self.proj_out.bias)
        joined = torch.cat(streams, dim=1) + gate.unsqueeze(1) * update.view(normed.shape)
        if joined.dtype == torch.float16:
            joined = joined.clip(-65504, 65504)
        return joined[:, :num_text_tokens], joined[:, num_text_tokens:]


# Diffusers' caches of blocks, such as FirstBlockCacheConfig, know blocks by their class.
TransformerBlockRegistry.register(
    LinearFluxSingleBlock,
    TransformerBlockMetadata(return_hidden_states_index=1, return_encoder_hidden_states_index=0),
)
