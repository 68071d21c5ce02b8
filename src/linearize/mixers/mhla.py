"""MHLA: linear attention with one state per block of tokens, mixed among blocks by a learned matrix."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linearize.layout import Layout
from linearize.mixers._arguments import ROPE, VARIANTS, check_choice, check_number
from linearize.mixers._kernel import KernelMixer
from linearize.mixers._tokens import FeaturePair, Tokens, map_pair
from linearize.mixers.base import AttentionShape, MixerContext
from linearize.ops.block_states import even_blocks, mix_block_states
from linearize.ops.feature_maps import build_feature_map
from linearize.ops.linear_attention import LinearPart, SoftmaxPart, linear_attention_flops


class MhlaMixer(KernelMixer):
    """MHLA: "Multi-Head Linear Attention" on the token axis, DAGroup-PKU, ICLR 2026.

    Image tokens are cut into M = blocks_per_side^2 blocks with a state S_b = sum_(j in b) phi(k_j) v_j^T each, and a
    token in block a reads sum_b m_ab S_b:

        o_i = phi(q_i)^T sum_b m_(a(i) b) S_b / phi(q_i)^T sum_b m_(a(i) b) z_b,   z_b = sum_(j in b) phi(k_j),

    which is linear attention with weights m_(a(i) b(j)) phi(q_i)^T phi(k_j) of a rank up to the sum over blocks. The
    cost is that of linear attention and M^2 states, linear in tokens. m [heads, M, M] is exp of a parameter, so that
    weights stay positive, and starts as the cosine of the distance of the blocks, from 1 to cos(pi/4), as in the
    code: near plain linear attention, which a constant matrix is. M does not depend on the grid: grids of any size
    are cut into as many blocks, and several grids lie on top of one another.

    `variant=paper` is the published formula: m is the parameter itself, shared by all heads, from columns of sum 1, and
    may turn negative; nothing is rotated, and text is a state. It differs from the published code, whose normaliser
    mixes phi(q)^T z of *different* queries, those at the same place in other blocks, where the paper's formula has one
    query throughout. The code's depthwise convolution on the value is not part of this mixer.

    Query and key are [batch, heads, tokens, head_dim], states [batch, heads, M, num_features, head_dim + 1].

    Args:
        shape: Sizes of the layer.
        blocks_per_side: Blocks along either side of the picture.
        feature_map: A name of `linearize.ops.feature_maps`.
        rope: "before_map", "after_map" (relative positions as in the video code; weights may be negative) or "none".
        text: "exact" or "state", see `JointMixer`.
        shared_mix: One matrix for all heads, as "paper" has it.
        variant: "dit" or "paper".

    Raises:
        LinearizeError: A knob has none of its values.
    """

    def __init__(
        self,
        shape: AttentionShape,
        *,
        blocks_per_side: int = 4,
        feature_map: str = "polar",
        rope: str = "before_map",
        text: str = "exact",
        shared_mix: bool = False,
        variant: str = "dit",
    ) -> None:
        check_choice("mhla", "variant", variant, VARIANTS)
        check_number("mhla", "blocks_per_side", blocks_per_side, 1)
        check_choice("mhla", "rope", rope, ROPE)
        feature_module = build_feature_map(feature_map, shape.num_heads, shape.head_dim)
        is_paper = variant == "paper"
        super().__init__(
            shape,
            "mhla",
            text="state" if is_paper else text,
            log_mean_product=feature_module.log_mean_product,
        )
        self.blocks_per_side, self.rope, self.map = blocks_per_side, "none" if is_paper else rope, feature_module
        self.is_paper, near = is_paper, _near_blocks(blocks_per_side)
        if is_paper:
            self.mix_of_blocks = nn.Parameter((near / near.sum(dim=0))[None])
        else:
            self.log_mix = nn.Parameter(near.log().repeat(1 if shared_mix else shape.num_heads, 1, 1))

    def features(self, tokens: Tokens) -> FeaturePair:
        """See `JointMixer.features`."""
        return map_pair(tokens, self.rope, self.map, self.map)

    def weigh(self, query: Tensor, key: Tensor, value: Tensor, context: MixerContext) -> Tensor:
        """See `KernelMixer.weigh`."""
        blocks = even_blocks(context.layout, self.blocks_per_side, query.device)
        return mix_block_states(query, key, value, self.block_weights(), blocks)

    def block_weights(self) -> Tensor:
        """The matrix m, [heads or 1, blocks, blocks]."""
        return self.mix_of_blocks if self.is_paper else self.log_mix.exp()

    def normalise(self, exact: SoftmaxPart | None, part: LinearPart) -> Tensor:
        """See `JointMixer.normalise`; the published sum of weights may turn negative."""
        if not self.is_paper:
            return super().normalise(exact, part)
        return part.numerator / part.mass.masked_fill(part.mass == 0, 1.0)

    def dense_factor(self, context: MixerContext, like: Tensor) -> Tensor:
        """See `KernelMixer.dense_factor`: m of the blocks of query and key."""
        index = even_blocks(context.layout, self.blocks_per_side, like.device).index
        return self.block_weights().to(like.dtype)[:, index][:, :, index]

    def flops(self, layout: Layout, batch: int = 1) -> int:
        """Linear attention, the mixing of states, the map, and text."""
        num_features, head_dim = self.map.num_features, self.shape.head_dim
        tokens, states = layout.num_image_tokens, self.blocks_per_side**4
        each = linear_attention_flops(tokens, tokens, num_features, head_dim)
        each += 2 * states * num_features * (head_dim + 1) + self.text_flops(layout, num_features)
        each += 2 * self.map.flops(layout.num_tokens)
        return batch * self.shape.num_heads * each


def _near_blocks(blocks_per_side: int) -> Tensor:
    """cos(pi/4 distance / largest distance) of the centres of blocks, [blocks, blocks]."""
    rows, columns = torch.meshgrid(torch.arange(blocks_per_side), torch.arange(blocks_per_side), indexing="ij")
    centres = torch.stack([rows, columns], dim=-1).reshape(-1, 2).to(torch.float32)
    distance = torch.cdist(centres, centres)
    return torch.cos(distance / distance.max().clamp(min=1.0) * torch.pi / 4)
