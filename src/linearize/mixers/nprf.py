"""NPRF: normalised random features with a relative bias of two dimensions."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from linearize.layout import Layout
from linearize.mixers._arguments import VARIANTS, check_choice, check_number
from linearize.mixers._random_features import RandomFeatureMixer
from linearize.mixers.base import AttentionShape, MixerContext
from linearize.ops.offset_bias import canvas, convolution_flops, offset_tables, weigh_by_offset
from linearize.ops.precision import widen

# exp of twice this is far above float32's rounding, which Fourier transforms spread over the whole picture.
LARGEST_BIAS = 4.0


class NprfMixer(RandomFeatureMixer):
    """NPRF: "Stable, Fast and Accurate: Kernelized Attention with Relative Positional Encoding", arXiv 2106.12566.

        o_i = phi(q_i)^T sum_j e^b(j - i) phi(k_j) v_j^T / phi(q_i)^T sum_j e^b(j - i) phi(k_j)

    with positive random features phi of query and key of unit length (here: of the length of a learned temperature),
    and a bias b of the offset between image tokens in rows and columns. e^b is a block-Toeplitz matrix, so the sums
    are convolutions of the picture by Fourier transforms: N log N in tokens, times num_features (head_dim + 1)
    channels, which is why features are few. Pictures of up to 64 tokens a side are transformed by matrix products,
    N (height + width) operations, which are quicker there.

    The paper has one parameter for each offset, which binds a layer to a grid. Here b is a small network of
    sign(offset) log(1 + |offset|), as in Swin V2 (arXiv 2111.09883), so it is defined for every grid; it starts at 0
    and stays within +-4. Rotation stays as the teacher has it; several grids lie on top of one another; pairs with
    text have b = 0.

    `variant=paper` is the published formula: unit lengths, no rotation, and one parameter for each offset of up to
    bias_reach rows and columns, [heads, 2 bias_reach + 1, 2 bias_reach + 1], from 0; offsets beyond have that of the
    border, so that every grid is served. Text is a state.

    Query and key are [batch, heads, tokens, head_dim], features [batch, heads, tokens, num_features].

    Args:
        shape: Sizes of the layer.
        num_features: Random features of a head.
        temperature: What the temperature starts from; 1 is the paper's unit length. For "dit" alone.
        bias_width: Hidden channels of the bias; for "dit" alone.
        bias_reach: Largest offset with a parameter of its own; for "paper" alone.
        text: "exact" or "state", see `JointMixer`.
        variant: "dit" or "paper".

    Raises:
        LinearizeError: A knob has none of its values.
    """

    # Fourier transforms are of float32 at least.
    has_wide_products = True

    def __init__(
        self,
        shape: AttentionShape,
        *,
        num_features: int = 16,
        temperature: float = 1.0,
        bias_width: int = 16,
        bias_reach: int = 64,
        text: str = "exact",
        variant: str = "dit",
    ) -> None:
        check_number("nprf", "bias_width", bias_width, 1)
        check_number("nprf", "bias_reach", bias_reach, 1)
        check_choice("nprf", "variant", variant, VARIANTS)
        is_paper = variant == "paper"
        super().__init__(
            shape,
            "nprf",
            num_features=num_features,
            temperature=temperature,
            lengths="unit" if is_paper else "learned",
            text="state" if is_paper else text,
            is_rotated=not is_paper,
        )
        self.is_paper, self.bias_reach = is_paper, bias_reach
        if is_paper:
            self.table = nn.Parameter(torch.zeros(shape.num_heads, 2 * bias_reach + 1, 2 * bias_reach + 1))
            return
        self.offset_weight = nn.Parameter(torch.randn(bias_width, 2))
        self.offset_bias = nn.Parameter(torch.zeros(bias_width))
        self.head_weight = nn.Parameter(torch.zeros(shape.num_heads, bias_width))

    def bias(self, offsets: Tensor) -> Tensor:
        """The bias b [heads, ...] of offsets [..., 2] in rows and columns, key less query."""
        if self.is_paper:
            row, column = (offsets.clamp(-self.bias_reach, self.bias_reach) + self.bias_reach).unbind(dim=-1)
            return widen(self.table)[:, row, column]
        dtype = torch.promote_types(self.offset_weight.dtype, torch.float32)
        distance = torch.log1p(offsets.to(dtype).abs()) * offsets.sign() / math.log(8)
        hidden = torch.relu(distance @ widen(self.offset_weight).T + widen(self.offset_bias))
        raw = (hidden @ widen(self.head_weight).T).movedim(-1, 0)
        return LARGEST_BIAS * torch.tanh(raw / LARGEST_BIAS)

    def weigh(self, query: Tensor, key: Tensor, value: Tensor, context: MixerContext) -> Tensor:
        """See `KernelMixer.weigh`."""
        tables = offset_tables(context.layout, query.device)
        # Without what is there for alignment alone.
        value = value[..., : self.shape.head_dim + 1]
        factor = self.bias(tables.offsets).exp().to(query.dtype)
        return weigh_by_offset(query, key, value, factor, tables.places, tables.order)

    def dense_factor(self, context: MixerContext, like: Tensor) -> Tensor:
        """See `KernelMixer.dense_factor`: e^b of every pair."""
        places = offset_tables(context.layout, like.device).places
        return self.bias(places[None] - places[:, None]).exp().to(like.dtype)

    def flops(self, layout: Layout, batch: int = 1) -> int:
        """Features, transforms, products with features before and after them, and text."""
        tokens, head_dim = layout.num_image_tokens, self.shape.head_dim
        mapped = tokens if self.text == "exact" else layout.num_tokens
        each = 4 * mapped * self.num_features * head_dim
        each += self.num_features * (head_dim + 1) * (convolution_flops(*canvas(layout)) + 3 * tokens)
        return batch * self.shape.num_heads * (each + self.text_flops(layout, self.num_features))
