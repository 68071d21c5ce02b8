"""SOFT: a Gaussian kernel through a fixed number of landmarks."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from linearize.errors import LinearizeError
from linearize.layout import Layout
from linearize.mixers._arguments import VARIANTS, check_choice, check_number
from linearize.mixers._joint import JointMixer
from linearize.mixers._tokens import FeaturePair, Tokens
from linearize.mixers.base import AttentionShape
from linearize.ops.feature_maps import Features
from linearize.ops.gaussian_kernel import cell_landmarks, gaussian_kernel, landmark_index
from linearize.ops.linear_attention import LinearPart, exact_text_flops, join
from linearize.ops.newton_inverse import newton_inverse, num_newton_iterations

# Added to the diagonal of the landmarks' kernel, as in the published code.
JITTER = 0.01


class SoftMixer(JointMixer):
    """SOFT and SOFT++: "Softmax-free Linear Transformers", Lu et al., arXiv 2110.11945 and IJCV 2024.

    With the Gaussian kernel K(x, y) = exp(-|x - y|^2 / 2) of scaled, rotated queries and keys and M landmarks L,

        W = K(Q, L) D^(-1/2) A D^(-1/2) K(L, K),   A = (K(L, L) + 0.01 I)^-1 by Newton's iteration,
        D = diag(mass of the keys as each landmark sees it),

    is a matrix of rank M that is never built: the cost is linear in tokens. Landmarks are the mean directions and
    lengths of the queries and of the keys in landmarks_per_side^2 cells of each grid, taken after rotation, so that
    everything depends on relative positions. Rows of W sum to 1 where landmarks are near all tokens, else to less or
    more, and weights may be negative; image tokens weigh this part against the text by the mass sum_j K(q_i, landmark
    of key j), which is positive.
    `normalization="none"` is SOFT without the two D^(-1/2), its rows divided by that mass.

    Query and key are [batch, heads, tokens, head_dim], landmarks [batch, heads, M, head_dim]. The kernel's exponent is
    the teacher's times a learned temperature of each head, which starts below 1, as few landmarks cannot follow a
    peaked kernel. Text is exact, or with text="state" among the tokens of the kernel, with landmarks_per_side cells
    more, of tokens that follow one another.

    The paper trains from scratch. `variant=paper` is its formula: keys are the queries, not rotated, and so are the
    landmarks; D is the row sums of K(L, L), normalization="none" is without any division, and text is a state. Its
    rows do not sum to 1: it starts far from the teacher. Two things are still not the paper's: its landmarks come from
    a strided convolution, which fixes their size and not their number, here they are means; and it adds a convolution
    of the value. With "dit" D counts the keys that a landmark stands for, so that it does not depend on the number of
    tokens. In both, Newton's step is of each matrix, where the code's depends on the whole batch, and iterations are as
    many as the bound on eigenvalues asks for, where its 20 may leave a large residual.

    Args:
        shape: Sizes of the layer.
        landmarks_per_side: Cells along either side of a grid.
        temperature: What the temperature starts from; for "dit" alone.
        normalization: "symmetric" or "none".
        text: "exact" or "state".
        variant: "dit" or "paper".

    Raises:
        LinearizeError: A knob has none of its values, or a grid has fewer tokens than landmarks.
    """

    # The inverse of the landmarks' kernel amplifies rounding.
    has_wide_products = True

    def __init__(
        self,
        shape: AttentionShape,
        *,
        landmarks_per_side: int = 7,
        temperature: float = 0.4,
        normalization: str = "symmetric",
        text: str = "exact",
        variant: str = "dit",
    ) -> None:
        check_number("soft", "landmarks_per_side", landmarks_per_side, 1)
        check_choice("soft", "normalization", normalization, ("symmetric", "none"))
        check_choice("soft", "variant", variant, VARIANTS)
        if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not temperature > 0:
            raise LinearizeError(
                f"mixer 'soft' got temperature={temperature!r}; choose a number above 0, at most about 1"
            )
        is_paper = variant == "paper"
        # Of unit normals, the kernel lacks exp(|q|^2 / 2 + |k|^2 / 2) = exp(sqrt(head_dim)) against softmax.
        log_mean_product = 0.5 - temperature * shape.head_dim**0.5
        super().__init__(shape, "soft", text="state" if is_paper else text, log_mean_product=log_mean_product)
        self.landmarks_per_side, self.normalization, self.is_paper = landmarks_per_side, normalization, is_paper
        if not is_paper:
            self.log_temperature = nn.Parameter(torch.full((shape.num_heads,), math.log(temperature)))

    def check_layout(self, layout: Layout) -> None:
        """See `Mixer.check_layout`: a grid must have a token for each landmark."""
        for grid in layout.grids:
            if self.landmarks_per_side**2 > grid.num_tokens:
                most = int(grid.num_tokens**0.5)
                raise LinearizeError(
                    f"mixer 'soft' got landmarks_per_side={self.landmarks_per_side}, which is more landmarks than the "
                    f"{grid.num_tokens} tokens of a grid of {grid}; choose at most {most}"
                )

    def features(self, tokens: Tokens) -> FeaturePair:
        """See `JointMixer.features`: rotated query and key, scaled so that their product is that of softmax."""
        scale, none = tokens.context.scale**0.5, tokens.query.new_zeros(())
        if self.is_paper:
            query = Features(tokens.query * scale, none)
            return FeaturePair(query, query)
        temperature = torch.exp(self.log_temperature / 2)[:, None, None].to(tokens.query.dtype)
        query, key = (Features(states * scale * temperature, none) for states in tokens.rotated)
        return FeaturePair(query, key)

    def mix(self, tokens: Tokens) -> Tensor:
        """See `JointMixer.mix`."""
        if self.text == "exact":
            return super().mix(tokens)
        part = self.mix_images(self.features(tokens), tokens)
        return part.numerator if self.is_paper else join(None, part)

    def dense_mix(self, tokens: Tokens) -> Tensor:
        """See `JointMixer.dense_mix`."""
        if self.text == "exact":
            return super().dense_mix(tokens)
        weights, mass = self.dense_images(self.features(tokens), tokens)
        total = mass.sum(dim=-1, keepdim=True)
        output = torch.matmul(weights, tokens.value)
        return output if self.is_paper else output / total.masked_fill(total == 0, 1.0)

    def mix_images(self, pair: FeaturePair, tokens: Tokens) -> LinearPart:
        """See `JointMixer.mix_images`: from the keys to the landmarks and from there to the queries."""
        kernels = self._kernels(pair, tokens)
        value = torch.matmul(kernels.from_keys, tokens.value[:, :, self._served(tokens)])
        value = torch.matmul(newton_inverse(kernels.among, JITTER), value * kernels.share) * kernels.share
        counts = kernels.num_keys[..., None].expand(*value.shape[:3], 1)
        output, mass = torch.matmul(kernels.to_landmarks, torch.cat([value, counts], dim=-1)).split(
            [value.shape[-1], 1], dim=-1
        )
        return LinearPart(output * mass if self._has_unit_rows else output, mass, pair.query.log_scale)

    def dense_images(self, pair: FeaturePair, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """See `JointMixer.dense_images`: the matrix W with an exact inverse."""
        kernels = self._kernels(pair, tokens)
        share = kernels.share.transpose(-1, -2)
        weights = torch.matmul(kernels.to_landmarks * share, torch.linalg.inv(kernels.among))
        weights = torch.matmul(weights * share, kernels.from_keys)
        # The landmarks of keys come last.
        mass = kernels.to_landmarks[..., kernels.cells - kernels.num_cells]
        mask = tokens.mask_of(self._served(tokens))
        if mask is not None:
            mass = mass * mask[:, None, None]
        return weights * mass.sum(dim=-1, keepdim=True) if self._has_unit_rows else weights, mass

    def flops(self, layout: Layout, batch: int = 1) -> int:
        """Kernels to and from the landmarks and their products with the value, the inverse, and exact text."""
        head_dim, is_state = self.shape.head_dim, self.text == "state"
        tokens = layout.num_tokens if is_state else layout.num_image_tokens
        cells = len(layout.grids) * self.landmarks_per_side**2 + is_state * self.landmarks_per_side
        landmarks = cells if self.is_paper else 2 * cells
        each = 8 * tokens * landmarks * head_dim + 2 * landmarks**2 * head_dim
        each += 4 * landmarks**3 * num_newton_iterations(JITTER, landmarks + JITTER)
        return batch * self.shape.num_heads * (each + (0 if is_state else exact_text_flops(layout, head_dim)))

    @property
    def _has_unit_rows(self) -> bool:
        """Whether rows of W sum to 1 but for errors, so that the mass has to be put on them where text is joined."""
        return self.normalization == "symmetric" and not self.is_paper

    def _served(self, tokens: Tokens) -> slice:
        """The tokens of the kernel."""
        return slice(None) if self.text == "state" else tokens.image

    def _kernels(self, pair: FeaturePair, tokens: Tokens) -> Kernels:
        """Kernels of the landmarks, which are means of queries, and of keys behind them; empty cells have no part."""
        layout, served = tokens.context.layout, self._served(tokens)
        self.check_layout(layout)
        cells, num_cells = landmark_index(layout, self.landmarks_per_side, self.text == "state", tokens.query.device)
        mask = tokens.mask_of(served)
        landmarks, counts = cell_landmarks(pair.query.values, cells, num_cells, mask)
        present = counts > 0
        if not self.is_paper:
            key_means, _ = cell_landmarks(pair.key.values, cells, num_cells, mask)
            landmarks, present = torch.cat([landmarks, key_means], dim=2), present.repeat(1, 1, 2)
            counts = torch.cat([torch.zeros_like(counts), counts], dim=2)
        is_key = None if mask is None else mask[:, None]
        to_landmarks = gaussian_kernel(pair.query.values, landmarks, None, present)
        from_keys = gaussian_kernel(landmarks, pair.key.values, present, is_key)
        among = gaussian_kernel(landmarks, landmarks, present, present)
        share = torch.ones_like(among[..., :1])
        if self.normalization == "symmetric":
            mass = among.sum(dim=-1, keepdim=True) if self.is_paper else torch.matmul(among, counts[..., None])
            share = torch.where(present[..., None], mass, 1.0).rsqrt()
        jitter = JITTER * torch.eye(among.shape[-1], dtype=among.dtype, device=among.device)
        return Kernels(to_landmarks, among + jitter, from_keys, share, counts, cells, num_cells)


class Kernels(NamedTuple):
    """The kernel between tokens and landmarks.

    Attributes:
        to_landmarks: K(Q, L), [batch, heads, tokens, M].
        among: K(L, L) + 0.01 I.
        from_keys: K(L, K), [batch, heads, M, tokens].
        share: The diagonal of D^(-1/2), [batch, heads, M, 1].
        num_keys: Keys that a landmark stands for, [batch, 1, M].
        cells: The cell of every token.
        num_cells: Cells.
    """

    to_landmarks: Tensor
    among: Tensor
    from_keys: Tensor
    share: Tensor
    num_keys: Tensor
    cells: Tensor
    num_cells: int
