"""SLA: softmax on the blocks of keys that score highest, linear attention on the rest."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from linearize.errors import LinearizeError
from linearize.layout import Layout
from linearize.mixers._arguments import VARIANTS, check_choice, check_number
from linearize.mixers._joint import JointMixer
from linearize.mixers._tokens import FeaturePair, Tokens, map_pair
from linearize.mixers._window import BRANCHES, has_log_scale
from linearize.mixers.base import AttentionShape
from linearize.ops.block_sparse import block_sparse_softmax, chosen, select_blocks, square_blocks
from linearize.ops.block_states import Blocks, mix_block_states
from linearize.ops.feature_maps import build_feature_map
from linearize.ops.linear_attention import (
    LinearPart,
    SoftmaxPart,
    dense_linear_weights,
    join,
    linear_attention_flops,
    mask_keys,
    merge,
    numerator_and_mass,
    with_text_queries,
)
from linearize.ops.pooling import num_cells
from linearize.ops.products import with_ones


class SlaMixer(JointMixer):
    """SLA: "Sparse-Linear Attention", Zhang et al., arXiv 2509.24006, mixed by mass as in SLA2, arXiv 2602.12675.

    Image tokens are cut into blocks of block_size x block_size. Each block of queries selects the share `key_ratio`
    of the blocks of keys by the product of their means; its queries A(i) see those and the text by softmax, and all
    others by linear attention, under one normaliser:

        o_i = [sum_A(i) e^s_ij v_j + a sum_rest phi(q_i)^T phi(k_j) v_j] / [sum_A(i) e^s_ij + a sum_rest phi^T phi]

    with a learned a of each head. **The cost is quadratic in tokens**: key_ratio N^2 pairs, and (N / block_size^2)^2
    products of block scores and states; only their factor is small. key_ratio=1 is the teacher.

    `variant="paper"` is O = O_softmax + P(O_linear), each with its own normaliser, phi the softmax over channels and
    P [head_dim, head_dim] shared by all heads, which starts at zero. The paper skips the lowest tenth of the blocks,
    the code does not and here the linear part is on all that is not selected, as in the code of the paper's branch
    (its main branch has it on all keys). At least one block is selected, where the code's rounding may leave none.
    The learned router of SLA2 and its low-bit kernels are not here.

    Query, key and value are [batch, heads, tokens, head_dim], selections [batch, heads, blocks, selected].

    Args:
        shape: Sizes of the layer.
        key_ratio: Share of the blocks of keys that are seen by softmax, above 0 and at most 1.
        block_size: Side of a block in tokens.
        branches: "both"; or "linear", without selected blocks; or "window", without linear attention.
        feature_map: A name of `linearize.ops.feature_maps`; "paper" has "softmax" whatever this says.
        variant: "dit" or "paper".
        text: "exact" or "state", see `JointMixer`; "paper" has "exact" alone.

    Raises:
        LinearizeError: A knob has none of its values.
    """

    def __init__(
        self,
        shape: AttentionShape,
        *,
        key_ratio: float = 0.1,
        block_size: int = 8,
        branches: str = "both",
        feature_map: str = "polar",
        variant: str = "dit",
        text: str = "exact",
    ) -> None:
        check_number("sla", "block_size", block_size, 1)
        check_choice("sla", "branches", branches, BRANCHES)
        check_choice("sla", "variant", variant, VARIANTS)
        if isinstance(key_ratio, bool) or not isinstance(key_ratio, int | float) or not 0 < key_ratio <= 1:
            raise LinearizeError(f"mixer 'sla' got key_ratio={key_ratio!r}; choose a share above 0 and at most 1")
        for knob, value, only in (("text", text, "exact"), ("branches", branches, "both")):
            if variant == "paper" and value != only:
                raise LinearizeError(
                    f"mixer 'sla' got {knob}={value!r} with variant='paper'; choose {knob}={only!r} or variant='dit'"
                )
        name = "softmax" if variant == "paper" else feature_map
        features = build_feature_map(name, shape.num_heads, shape.head_dim)
        text = "exact" if branches == "window" else text
        super().__init__(
            shape,
            "sla",
            text=text,
            log_mean_product=features.log_mean_product,
            is_joined=variant == "dit" and has_log_scale(branches, text),
        )
        self.branches = branches
        self.key_ratio, self.block_size, self.variant, self.map = key_ratio, block_size, variant, features
        if variant == "paper":
            self.projection = nn.Linear(shape.head_dim, shape.head_dim)
            nn.init.zeros_(self.projection.weight)
            nn.init.zeros_(self.projection.bias)

    def features(self, tokens: Tokens) -> FeaturePair:
        """See `JointMixer.features`."""
        return map_pair(tokens, "before_map", self.map, self.map)

    def image_parts(self, pair: FeaturePair, tokens: Tokens) -> tuple[SoftmaxPart | None, LinearPart]:
        """See `JointMixer.image_parts`: softmax sees the selected blocks, too, and linear attention the others."""
        if self.branches == "linear":
            return super().image_parts(pair, tokens)
        image, (blocks, selected) = tokens.image, self._selection(tokens)
        query, key, value = (states[:, :, image] for states in (*tokens.product_rotated, tokens.product_value))
        mask, scale = tokens.mask_of(image), tokens.context.scale
        sparse = block_sparse_softmax(query, key, value, blocks=blocks, selected=selected, scale=scale, key_mask=mask)
        exact = merge(self.exact_part(tokens), sparse)
        if self.branches == "window":
            nothing = torch.zeros_like(value)
            return exact, LinearPart(nothing, nothing[..., :1], nothing.new_zeros(()))
        pair = pair.at(image, image)
        # One state of each block, summed over those that are not selected.
        rest = (~chosen(selected, blocks.number)).to(value.dtype)
        keys = mask_keys(pair.key.values, mask)
        sums = mix_block_states(pair.query.values, keys, with_ones(value), rest, blocks)
        log_scale = pair.query.log_scale + pair.key.log_scale
        return exact, LinearPart(*numerator_and_mass(sums, value.shape[-1]), log_scale)

    def sees_exactly(self, tokens: Tokens) -> Tensor:
        """See `JointMixer.sees_exactly`."""
        if self.branches == "linear":
            return super().sees_exactly(tokens)
        image, (blocks, selected) = tokens.image, self._selection(tokens)
        seen = super().sees_exactly(tokens).repeat(*selected.shape[:2], 1, 1)
        seen[:, :, image, image] = chosen(selected, blocks.number)[..., blocks.index, :][..., blocks.index]
        return seen

    def is_not_linear(self, tokens: Tokens, seen: Tensor) -> Tensor:
        """See `JointMixer.is_not_linear`."""
        return torch.ones_like(seen) if self.branches == "window" else seen

    def mix(self, tokens: Tokens) -> Tensor:
        """See `JointMixer.mix`."""
        if self.variant == "dit":
            return super().mix(tokens)
        context, (exact, part) = tokens.context, self.image_parts(self.features(tokens).for_products(tokens), tokens)
        output = self._project(join(None, part))
        return with_text_queries(
            output if exact is None else exact.output + output,
            *tokens.given_rotated,
            layout=context.layout,
            scale=context.scale,
            key_mask=context.key_mask,
        )

    def dense_attention(self, tokens: Tokens, pair: FeaturePair) -> Tensor:
        """See `JointMixer.dense_attention`."""
        if self.variant == "dit":
            return super().dense_attention(tokens, pair)
        (query, key), context, seen = tokens.rotated, tokens.context, self.sees_exactly(tokens)
        valid = torch.ones_like(seen) if context.key_mask is None else context.key_mask[:, None, None].expand_as(seen)
        scores = torch.matmul(query, key.transpose(-1, -2)) * context.scale
        softmax = scores.masked_fill(~(seen & valid), -torch.inf).softmax(dim=-1).nan_to_num(0.0)
        weights = dense_linear_weights(pair.query, pair.key)[0].masked_fill(seen | ~valid, 0.0)
        total = weights.sum(dim=-1, keepdim=True)
        linear = torch.matmul(weights / total.masked_fill(total == 0, 1.0), tokens.value)
        is_image = torch.zeros_like(linear[..., :1])
        is_image[:, :, tokens.image] = 1
        return torch.matmul(softmax, tokens.value) + is_image * self._project(linear)

    def flops(self, layout: Layout, batch: int = 1) -> int:
        """Pairs of selected blocks, block scores and sums of block states, which are quadratic, and the rest."""
        tokens, head_dim, num_features = layout.num_image_tokens, self.shape.head_dim, self.map.num_features
        num_blocks = sum(num_cells(grid, self.block_size) for grid in layout.grids)
        pairs = tokens * min(tokens, self._num_selected(num_blocks) * self.block_size**2)
        each = 0 if self.branches == "linear" else 4 * pairs * head_dim + 2 * num_blocks**2 * head_dim
        if self.branches == "both":
            each += 2 * num_blocks**2 * num_features * (head_dim + 1)
        if self.branches != "window":
            each += linear_attention_flops(tokens, tokens, num_features, head_dim)
            each += 2 * self.map.flops(layout.num_tokens)
        each += self.text_flops(layout, num_features)
        if self.variant == "paper":
            each += 2 * tokens * head_dim**2
        return batch * self.shape.num_heads * each

    def _project(self, states: Tensor) -> Tensor:
        return states @ self.projection.weight.to(states.dtype).T + self.projection.bias.to(states.dtype)

    def _num_selected(self, num_blocks: int) -> int:
        return min(num_blocks, max(1, math.ceil(self.key_ratio * num_blocks)))

    def _selection(self, tokens: Tokens) -> tuple[Blocks, Tensor]:
        """The blocks of image tokens, and those of keys for each one of queries."""
        image, query, key = tokens.image, *(states.detach() for states in tokens.rotated)
        if tokens.given[0].dtype != query.dtype:
            # Rotated in float32 at least: rounding the rotated tokens would change which blocks come first.
            query, key = (tokens.context.rotate(states.detach()) for states in (tokens.query, tokens.key))
        blocks = square_blocks(tokens.context.layout, self.block_size, query.device)
        num_selected = self._num_selected(blocks.number)
        return blocks, select_blocks(query[:, :, image], key[:, :, image], blocks, num_selected, tokens.mask_of(image))
