"""SOFT: a Gaussian kernel through a fixed number of landmarks."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from linearize.errors import LinearizeError
from linearize.layout import Layout
from linearize.mixers._joint import FeaturePair, JointMixer, Tokens, check_choice, check_number
from linearize.mixers.base import AttentionShape
from linearize.ops.feature_maps import Features
from linearize.ops.gaussian_kernel import cell_landmarks, gaussian_kernel, landmark_index
from linearize.ops.linear_attention import LinearPart, exact_text_flops
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
    everything depends on relative positions. Rows of W sum to about 1 and not exactly, and weights may be negative;
    image tokens weigh this part against the text by the mass sum_j K(q_i, landmark of key j), which is positive.
    `normalization="none"` is SOFT without the two D^(-1/2), its rows divided by that mass.

    Where this differs from the paper, which trains from scratch: there keys are the queries, and landmarks come from
    a strided convolution, which fixes their size and not their number; here D counts the keys that a landmark stands
    for, so that it does not depend on the number of tokens; the code's step of Newton's iteration depends on the
    whole batch, and its 20 iterations may leave a large residual: here it is of each matrix, and iterations are as
    many as the bound on eigenvalues asks for.

    Query and key are [batch, heads, tokens, head_dim], landmarks [batch, heads, M, head_dim]. The kernel's
    exponent is the teacher's times a learned temperature of each head, which starts below 1, as few landmarks cannot
    follow a peaked kernel. The text is always exact.

    Args:
        shape: Sizes of the layer.
        landmarks_per_side: Cells along either side of a grid.
        temperature: What the temperature starts from.
        normalization: "symmetric" or "none".

    Raises:
        LinearizeError: A knob has none of its values, or a grid has fewer tokens than landmarks.
    """

    def __init__(
        self,
        shape: AttentionShape,
        *,
        landmarks_per_side: int = 7,
        temperature: float = 0.4,
        normalization: str = "symmetric",
    ) -> None:
        check_number("soft", "landmarks_per_side", landmarks_per_side, 1)
        check_choice("soft", "normalization", normalization, ("symmetric", "none"))
        if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not temperature > 0:
            raise LinearizeError(
                f"mixer 'soft' got temperature={temperature!r}; choose a number above 0, at most about 1"
            )
        # Of unit normals, the kernel lacks exp(|q|^2 / 2 + |k|^2 / 2) = exp(sqrt(head_dim)) against softmax.
        super().__init__(shape, "soft", text="exact", log_mean_product=0.5 - temperature * shape.head_dim**0.5)
        self.landmarks_per_side, self.normalization = landmarks_per_side, normalization
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
        scale = tokens.context.scale**0.5 * torch.exp(self.log_temperature / 2)[:, None, None].to(tokens.query.dtype)
        none = tokens.query.new_zeros(())
        query, key = (Features(states * scale, none) for states in tokens.rotated)
        return FeaturePair(query, key)

    def mix_images(self, pair: FeaturePair, tokens: Tokens) -> LinearPart:
        """See `JointMixer.mix_images`: from the keys to the landmarks and from there to the queries."""
        to_landmarks, among, from_keys, share = self._kernels(pair, tokens)
        value = torch.matmul(from_keys, tokens.value[:, :, tokens.image])
        value = torch.matmul(newton_inverse(among, JITTER), value * share) * share
        mass = self._mass(pair, tokens)[0]
        output = torch.matmul(to_landmarks, value)
        numerator = output * mass if self.normalization == "symmetric" else output
        return LinearPart(numerator, mass, pair.query.log_scale)

    def dense_images(self, pair: FeaturePair, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """See `JointMixer.dense_images`: the matrix W with an exact inverse."""
        to_landmarks, among, from_keys, share = self._kernels(pair, tokens)
        weights = torch.matmul(to_landmarks * share.transpose(-1, -2), torch.linalg.inv(among))
        weights = torch.matmul(weights * share.transpose(-1, -2), from_keys)
        total, each, index = self._mass(pair, tokens)
        mask = tokens.mask_of(tokens.image)
        mass = each[..., index]
        if mask is not None:
            mass = mass * mask[:, None, None]
        return weights * total if self.normalization == "symmetric" else weights, mass

    def flops(self, layout: Layout, batch: int = 1) -> int:
        """Kernels to and from the landmarks and their products with the value, the inverse, and text."""
        tokens, head_dim = layout.num_image_tokens, self.shape.head_dim
        landmarks = 2 * len(layout.grids) * self.landmarks_per_side**2
        each = 8 * tokens * landmarks * head_dim + 2 * landmarks**2 * head_dim
        each += 4 * landmarks**3 * num_newton_iterations(JITTER, landmarks + JITTER)
        return batch * self.shape.num_heads * (each + exact_text_flops(layout, head_dim))

    def _landmarks(self, pair: FeaturePair, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Means of queries and of keys in each cell, how many keys a cell has, and the cell of every token."""
        self.check_layout(tokens.context.layout)
        index, num_cells = landmark_index(tokens.context.layout, self.landmarks_per_side, tokens.query.device)
        mask = tokens.mask_of(tokens.image)
        query_means, counts = cell_landmarks(pair.query.values, index, num_cells, mask)
        key_means, _ = cell_landmarks(pair.key.values, index, num_cells, mask)
        return query_means, key_means, counts, index

    def _kernels(self, pair: FeaturePair, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """K(Q, L), K(L, L) + 0.01 I, K(L, K) and the diagonal of D^(-1/2) as a column; empty cells have no part."""
        query_means, key_means, counts, _ = self._landmarks(pair, tokens)
        landmarks = torch.cat([query_means, key_means], dim=2)
        present = (torch.cat([counts, counts], dim=2) > 0).to(landmarks.dtype)
        to_landmarks = gaussian_kernel(pair.query.values, landmarks) * present[:, :, None, :]
        from_keys = gaussian_kernel(landmarks, pair.key.values) * present[..., None]
        mask = tokens.mask_of(tokens.image)
        if mask is not None:
            from_keys = from_keys * mask[:, None, None]
        among = gaussian_kernel(landmarks, landmarks) * present[..., None] * present[:, :, None, :]
        share = torch.ones_like(present).expand(among.shape[:3])[..., None]
        if self.normalization == "symmetric":
            mass = torch.matmul(among, torch.cat([torch.zeros_like(counts), counts], dim=2)[..., None])
            share = torch.where(present[..., None] > 0, mass, 1.0).rsqrt()
        return (
            to_landmarks,
            among + JITTER * torch.eye(among.shape[-1], dtype=among.dtype, device=among.device),
            from_keys,
            share,
        )

    def _mass(self, pair: FeaturePair, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """sum_j K(q_i, landmark of key j) [.., 1], the kernel to each cell's key landmark, and the cell of each key."""
        _, key_means, counts, index = self._landmarks(pair, tokens)
        each = gaussian_kernel(pair.query.values, key_means)
        return torch.matmul(each, counts[..., None].to(each.dtype)), each, index
