"""Compiled FLUX blocks on a GPU: the stock operations in fewer products and fewer passes over the activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.activations import GELU
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from torch import Tensor, nn
from torch.nn.functional import linear

_HALVES = (torch.bfloat16, torch.float16)


def is_compiled(states: Tensor, *layers: nn.Module) -> bool:
    """Whether a GPU's compiler traces these layers, and no adapter or quantizer has replaced one of them."""
    return torch.compiler.is_compiling() and states.is_cuda and all(type(layer) is nn.Linear for layer in layers)


def is_fused(states: Tensor, *layers: nn.Linear) -> bool:
    """Whether operations that have no backward pass may stand for these layers."""
    has_halves = all(layer.weight.dtype in _HALVES for layer in layers)
    return is_compiled(states, *layers) and has_halves and not torch.is_grad_enabled()


class PackedLinears:
    """Linear layers of the same input as one product, their weights side by side in memory.

    Each layer keeps its parameters, which become views: state dicts, optimizers and other owners of the parameters see
    no difference, and a weight that is changed in place is changed here, too.

    Args:
        layers: Linear layers with biases.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.widths = [len(layer.weight) for layer in layers]
        self.sources = [parameter for layer in layers for parameter in (layer.weight, layer.bias)]
        self.weight, self.bias = (self._pack([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))

    def __deepcopy__(self, memo: Any) -> None:
        """A copy's layers are not packed."""
        return None

    @staticmethod
    def takes(layers: Sequence[nn.Module]) -> bool:
        """Whether layers can be packed: plain ones with biases that do not train."""
        return all(type(layer) is nn.Linear and layer.bias is not None for layer in layers) and not any(
            parameter.requires_grad for layer in layers for parameter in layer.parameters()
        )

    def serves(self, layers: Sequence[nn.Linear]) -> bool:
        """Whether these layers' parameters are still those that were packed."""
        found = [parameter for layer in layers for parameter in (layer.weight, layer.bias)]
        same = all(one is other for one, other in zip(found, self.sources, strict=True))
        return same and not any(parameter.requires_grad for parameter in found)

    def __call__(self, states: Tensor) -> tuple[Tensor, ...]:
        """The layers' outputs."""
        return linear(states.to(self.weight.dtype), self.weight, self.bias).split(self.widths, dim=-1)

    @staticmethod
    def _pack(parameters: list[nn.Parameter]) -> Tensor:
        first, sizes = parameters[0], [len(parameter) for parameter in parameters]
        starts = [first.storage_offset() + first.stride(0) * sum(sizes[:number]) for number in range(len(sizes))]
        place = first.untyped_storage().data_ptr()
        if [(value.untyped_storage().data_ptr(), value.storage_offset()) for value in parameters] == [
            (place, start) for start in starts
        ]:
            # A teacher and its student share parameters, and the other has packed them.
            return first.detach().as_strided((sum(sizes), *first.shape[1:]), first.stride())
        packed = torch.cat([parameter.detach() for parameter in parameters])
        for parameter, rows in zip(parameters, packed.split(sizes), strict=True):
            parameter.data = rows
        return packed


def project(states: Tensor, layers: Sequence[nn.Linear], packed: PackedLinears | None) -> tuple[Tensor, ...]:
    """The outputs of linear layers of one input; compiled on a GPU, of one product where that costs no copy.

    Args:
        states: [..., channels].
        layers: The layers.
        packed: Them side by side, where they have been packed.
    """
    if is_compiled(states, *layers):
        if packed is not None and packed.serves(layers):
            return packed(states)
        if all(layer.weight.dtype == torch.float32 for layer in layers):
            # Autocast copies what trains anyhow.
            weight, bias = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
            return linear(states, weight, bias).split([len(layer.weight) for layer in layers], dim=-1)
    return tuple(layer(states) for layer in layers)


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
        residual = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        normed, gate = self.norm(residual, emb=temb)
        mlp = linear_gelu(self.proj_mlp, normed).flatten(0, 1)
        attention = self.attn(normed, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
        weight = self.proj_out.weight
        update = _joint_linear(attention.to(weight.dtype).flatten(0, 1), mlp, weight, self.proj_out.bias)
        joined = residual + gate.unsqueeze(1) * update.view(residual.shape)
        if joined.dtype == torch.float16:
            joined = joined.clip(-65504, 65504)
        return joined[:, :num_text_tokens], joined[:, num_text_tokens:]
