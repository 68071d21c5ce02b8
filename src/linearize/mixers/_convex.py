"""Mixers that add a gated linear branch and a window, each normalised by itself, with shares that sum to 1."""

from __future__ import annotations

from torch import Tensor

from linearize.layout import Layout
from linearize.mixers._gated import GatedMixer
from linearize.mixers._tokens import Tokens
from linearize.mixers._window import window_attention
from linearize.ops.linear_attention import exact_text_flops
from linearize.ops.tile_states import window_flops


class ConvexMixer(GatedMixer):
    """Base of mixers with o = (1 - share) linear + share window.

    Attributes:
        window: Radius of the disc in tokens.
        branches: "both", or "linear" or "window" alone.
    """

    window: int
    branches: str

    def combine(self, linear: Tensor, window: Tensor) -> Tensor:
        """Mixes the outputs of all tokens, [batch, heads, tokens, head_dim]."""
        raise NotImplementedError

    def attend_window(self, tokens: Tokens) -> Tensor:
        """The window's output of all tokens."""
        return window_attention(tokens, self.window)

    def dense_window(self, tokens: Tokens) -> Tensor:
        """The definition of `attend_window`."""
        return window_attention(tokens, self.window, "naive")

    def mix(self, tokens: Tokens) -> Tensor:
        """See `JointMixer.mix`."""
        if self.branches == "window":
            return self.attend_window(tokens)
        linear = super().mix(tokens)
        return linear if self.branches == "linear" else self.combine(linear, self.attend_window(tokens))

    def dense_mix(self, tokens: Tokens) -> Tensor:
        """See `JointMixer.dense_mix`."""
        if self.branches == "window":
            return self.dense_window(tokens)
        linear = super().dense_mix(tokens)
        return linear if self.branches == "linear" else self.combine(linear, self.dense_window(tokens))

    def complete_images(self, output: Tensor, tokens: Tokens) -> Tensor:
        """See `JointMixer.complete_images`."""
        if self.branches == "linear":
            return output
        return self.combine(output, self.attend_window(tokens)[:, :, tokens.image])

    def branch_flops(self, layout: Layout, num_features: int) -> int:
        """Operations of both branches in one head; where both see text by softmax, both count."""
        head_dim, each = self.shape.head_dim, 0
        if self.branches != "linear":
            each += window_flops(layout, self.window, head_dim) + exact_text_flops(layout, head_dim)
        if self.branches != "window":
            each += self.scan_flops(layout.num_image_tokens, num_features) + self.text_flops(layout, num_features)
        return each
