"""Linear attention without causality or gates: LinFusion's, LiT's and SANA's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linearize.errors import LinearizeError
from linearize.layout import Layout
from linearize.mixers._arguments import ROPE, check_choice, check_number
from linearize.mixers._joint import JointMixer
from linearize.mixers._tokens import FeaturePair, Tokens, in_order, rotate_pair
from linearize.mixers.base import AttentionShape
from linearize.ops.depthwise import depthwise_flops, depthwise_images
from linearize.ops.feature_maps import Features, build_feature_map, swap_signs
from linearize.ops.linear_attention import LinearPart, exact_text_flops, linear_attention, linear_attention_flops


class LinearMixer(JointMixer):
    """Normalised linear attention: LinFusion (arXiv 2409.02097), LiT (arXiv 2501.12976), SANA (arXiv 2410.10629).

    With feature map phi, image token i sees image tokens by o_i = phi(q_i) S / phi(q_i) z, with the state
    S = sum_j phi(k_j) v_j^T [num_features, head_dim] and z = sum_j phi(k_j) [num_features]. By default text is exact:
    text tokens see everything by softmax, and image tokens see o_i = (sum_text e^s_ij v_j + e^c n_i) / (sum_text
    e^s_ij + e^c z_i) with a learned c of each head.

    The published systems are choices of arguments:

    - LinFusion: `feature_map=elu mlp=<hidden_size / 16> rope=none text=state`. Its MLP acts on the hidden states before
      the projection, here on the projected query and key; here it starts as zero.
    - LiT: `feature_map=relu num_heads=<few> convolution=5 rope=none text=state`. Its convolution is shared by heads, as
      in FLatten's code, from which its filter starts at zero here.
    - SANA: `feature_map=relu rope=none text=state`; SANA-Video rotates after the map: `rope=after_map`.
    - FLatten (arXiv 2308.00442): `feature_map=focused convolution=5 rope=none text=state`. The lengths are those of
      each head, as in the paper; its code takes them over the whole width, before it splits heads:
      `focused_lengths=width`.
    - PolaFormer (arXiv 2501.15061): `feature_map=polar convolution=5 rope=none text=state`; half of the channels of the
      value read products of equal, half of opposite signs. Its output gate and its position table, which depends on the
      grid, are left out.

    Args:
        shape: Sizes of the layer.
        feature_map: elu, relu, focused, hedgehog, polar or exponential.
        rope: Rotate query and key before the map; or the features after it, in the numerator alone (relative
            positions, but weights may be negative and rows do not sum to 1); or none. On the scenes teacher the first
            starts nearer with every map.
        num_heads: Heads of the linear attention, of which each holds several of the layer's (LiT); 0 means as many.
        convolution: Odd side of a depthwise convolution of the image tokens' value, which is added; 0 means none.
        mlp: Hidden width of residual MLPs on query and key of the linear attention (LinFusion); 0 means none.
        text: "exact", or "state": text is part of the linear attention.
        focused_lengths: What feature_map=focused keeps the length of: "head" or "width".

    Raises:
        LinearizeError: An argument is none of its choices, or the layer's heads are no multiple of num_heads.
    """

    def __init__(
        self,
        shape: AttentionShape,
        *,
        feature_map: str = "elu",
        rope: str = "before_map",
        num_heads: int = 0,
        convolution: int = 0,
        mlp: int = 0,
        text: str = "exact",
        focused_lengths: str = "head",
    ) -> None:
        check_choice("linear", "rope", rope, ROPE)
        check_choice("linear", "focused_lengths", focused_lengths, ("head", "width"))
        for name, number in (("num_heads", num_heads), ("convolution", convolution), ("mlp", mlp)):
            check_number("linear", name, number, 0)
        if convolution and convolution % 2 == 0:
            raise LinearizeError(f"mixer 'linear' got convolution={convolution}; choose an odd side, or 0 for none")
        heads = num_heads or shape.num_heads
        if shape.num_heads % heads:
            raise LinearizeError(
                f"mixer 'linear' got num_heads={heads}, but the layer has {shape.num_heads}; choose a divisor of that"
            )
        merged = shape.num_heads // heads
        options = {"whole_width": focused_lengths == "width"} if feature_map == "focused" else {}
        maps = [build_feature_map(feature_map, heads, merged * shape.head_dim, **options) for _ in range(2)]
        super().__init__(shape, "linear", text=text, log_mean_product=maps[0].log_mean_product)
        self.query_map, self.key_map = maps
        self.rope, self.merged, self.polar = rope, merged, feature_map == "polar"
        width = shape.num_heads * shape.head_dim
        if convolution:
            self.filter = nn.Parameter(torch.zeros(width // heads, convolution, convolution))
            self.filter_bias = nn.Parameter(torch.zeros(width // heads))
        self.convolution, self.mlp = convolution, mlp
        if mlp:
            self.query_mlp, self.key_mlp = _ResidualMlp(width, mlp), _ResidualMlp(width, mlp)

    def mix(self, tokens: Tokens) -> Tensor:
        """See `JointMixer.mix`; with text="state" all tokens have one state, which is summed and read once."""
        if self.text == "exact":
            return super().mix(tokens)
        pair, context = self.features(tokens).for_products(tokens), tokens.context
        output = self.normalise(None, self.attend(pair, tokens.product_value, context.key_mask))
        image = self.add_to_images(output[:, :, tokens.image], tokens)
        return in_order(output[:, :, tokens.text], image, context.layout)

    def features(self, tokens: Tokens) -> FeaturePair:
        """See `JointMixer.features`."""
        if self.mlp:
            query, key = self.query_mlp(tokens.query), self.key_mlp(tokens.key)
            if self.rope == "before_map":
                query, key = tokens.context.rotate(query), tokens.context.rotate(key)
        else:
            query, key = tokens.rotated if self.rope == "before_map" else (tokens.query, tokens.key)
        mapped = self.query_map(self._merge(query), is_key=False)
        keys = self.key_map(self._merge(key), is_key=True, key_mask=tokens.context.key_mask)
        if self.rope != "after_map":
            return FeaturePair(mapped, keys)
        return rotate_pair(mapped, keys, tokens.context, self.query_map.num_parts * self.merged)

    def attend(self, pair: FeaturePair, value: Tensor, key_mask: Tensor | None) -> LinearPart:
        """See `JointMixer.attend`; merged heads are parted again."""
        value = self._merge(value)
        if not self.polar:
            part = linear_attention(pair.query, pair.key, value, key_mask=key_mask, rotated=pair.rotated)
            return LinearPart(self._part(part.numerator), self._repeat(part.mass), self._repeat(part.log_scale))
        parts = [
            linear_attention(one.query, one.key, some, key_mask=key_mask, rotated=one.rotated)
            for one, some in zip((pair, _opposite(pair)), value.chunk(2, dim=-1), strict=True)
        ]
        numerator = torch.cat([part.numerator for part in parts], dim=-1)
        mass = torch.cat([part.mass.expand_as(part.numerator) for part in parts], dim=-1)
        return LinearPart(self._part(numerator), self._part(mass), self._repeat(parts[0].log_scale))

    def dense_weights(self, pair: FeaturePair) -> tuple[Tensor, Tensor]:
        """See `JointMixer.dense_weights`."""
        numerator, mass = super().dense_weights(pair)
        return self._repeat(numerator), self._repeat(mass)

    def dense_attention(self, tokens: Tokens, pair: FeaturePair) -> Tensor:
        """See `JointMixer.dense_attention`; polar features have two sets of weights, one for each half of a value."""
        if not self.polar:
            return super().dense_attention(tokens, pair)
        same, opposite = super().dense_attention(tokens, pair), super().dense_attention(tokens, _opposite(pair))
        width = self.merged * self.shape.head_dim
        is_first = torch.arange(width, device=same.device).view(self.merged, 1, -1) < width / 2
        return torch.where(is_first.repeat(self.shape.num_heads // self.merged, 1, 1), same, opposite)

    def add_to_images(self, output: Tensor, tokens: Tokens) -> Tensor:
        """See `JointMixer.add_to_images`: LiT's convolution of the value."""
        if not self.convolution:
            return output
        value = self._merge(tokens.product_value[:, :, tokens.image])
        weight, bias = self.filter.to(value.dtype), self.filter_bias.to(value.dtype)
        return output + self._part(depthwise_images(value, weight, bias, tokens.context.layout))

    def flops(self, layout: Layout, batch: int = 1) -> int:
        """States and their readings, maps, exact text, the convolution and the MLPs."""
        shape, features = self.shape, self.query_map.num_features
        heads, width = shape.num_heads // self.merged, self.merged * shape.head_dim
        if self.text == "exact":
            total = heads * linear_attention_flops(layout.num_image_tokens, layout.num_image_tokens, features, width)
            total += shape.num_heads * exact_text_flops(layout, shape.head_dim)
        else:
            total = heads * linear_attention_flops(layout.num_tokens, layout.num_tokens, features, width)
        total += heads * (self.query_map.flops(layout.num_tokens) + self.key_map.flops(layout.num_tokens))
        if self.convolution:
            total += depthwise_flops(layout, heads * width, self.convolution)
        return batch * (total + 2 * layout.num_tokens * 4 * heads * width * self.mlp)

    def _merge(self, states: Tensor) -> Tensor:
        """[batch, heads, tokens, head_dim] to heads of the linear attention, which are wider."""
        if self.merged == 1:
            return states
        return states.unflatten(1, (-1, self.merged)).transpose(2, 3).flatten(3)

    def _part(self, states: Tensor) -> Tensor:
        """The inverse of `_merge`."""
        if self.merged == 1:
            return states
        return states.unflatten(3, (self.merged, -1)).transpose(2, 3).flatten(1, 2)

    def _repeat(self, states: Tensor) -> Tensor:
        return states.repeat_interleave(self.merged, dim=1) if self.merged > 1 and states.dim() > 1 else states


def _opposite(pair: FeaturePair) -> FeaturePair:
    """The pair with the signs of the query changed over."""
    query = Features(swap_signs(pair.query.values), pair.query.log_scale)
    return pair._replace(query=query, rotated=pair.rotated and (swap_signs(pair.rotated[0]), pair.rotated[1]))


class _ResidualMlp(nn.Module):
    """LinFusion's x + W2 leaky_relu(norm(W1 x)) over the whole width; W2 starts as zero."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.inner, self.norm, self.outer = nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.Linear(hidden, width)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, states: Tensor) -> Tensor:
        """[batch, heads, tokens, head_dim] to the same."""
        flat = states.transpose(1, 2).flatten(2).to(self.inner.weight.dtype)
        change = self.outer(F.leaky_relu(self.norm(self.inner(flat))))
        return states + change.unflatten(2, states.shape[1::2]).transpose(1, 2)
