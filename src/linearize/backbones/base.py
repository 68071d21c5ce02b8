"""What a backbone is: all that linearize knows of one family of Diffusion Transformers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from linearize.errors import LinearizeError
from linearize.layout import Layout
from linearize.mixers import AttentionShape


class Backbone:
    """One DiT family: where its attention layers are, and how latents, prompts and pictures go in and out.

    Attributes:
        name: Short name of the family.
        transformer_class: The diffusers transformer.
        student_class: Our subclass of it, whose attention layers are sites; `convert(transformer, plan)` makes a
            transformer one in place.
        pipeline_class: The diffusers text-to-image pipeline.
        max_sequence_length: Text tokens that this pipeline takes at most.
    """

    name: ClassVar[str]
    transformer_class: ClassVar[type[nn.Module]]
    student_class: ClassVar[Any]
    pipeline_class: ClassVar[type]
    max_sequence_length: ClassVar[int]

    def sites(self, transformer: nn.Module) -> dict[str, nn.Module]:
        """The attention layers that a mixer can take, by name, in the order of the forward pass."""
        raise NotImplementedError

    def shape(self, site: nn.Module) -> AttentionShape:
        """The sizes of an attention layer."""
        raise NotImplementedError

    def reference_layout(self, transformer: nn.Module) -> Layout:
        """The tokens of one ordinary picture, at which reports count operations."""
        raise NotImplementedError

    def forward_layout(self, transformer: nn.Module, latents: Tensor, num_text_tokens: int) -> Layout:
        """The tokens, in their order inside the transformer, of `predict` on these latents."""
        raise NotImplementedError

    def predict(self, transformer: nn.Module, latents: Tensor, sigma: Tensor, conditioning: dict[str, Any]) -> Tensor:
        """The velocity noise - x_0.

        Args:
            transformer: Teacher or student.
            latents: x_sigma, [batch, channels, height, width].
            sigma: Noise level in [0, 1], [batch].
            conditioning: What `encode` returned, and "guidance" [batch], which teachers without a guidance embedding
                ignore.

        Returns:
            [batch, channels, height, width], in the latents' dtype.
        """
        raise NotImplementedError

    def predict_with_variance(
        self, transformer: nn.Module, latents: Tensor, sigma: Tensor, conditioning: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """`predict`, and what the transformer predicts of the variance, of the same shape.

        A family whose transformers predict one overrides this; by default there is none.
        """
        return self.predict(transformer, latents, sigma, conditioning), None

    def compile_blocks(self, transformer: Any, backend: str) -> None:
        """Compiles the repeated blocks in place, one graph for each kind of block and each resolution.

        Args:
            transformer: Teacher or student.
            backend: Of torch.compile.
        """
        transformer.compile_repeated_blocks(backend=backend, dynamic=False)

    def encode(self, pipeline: Any, prompts: list[str], max_sequence_length: int) -> dict[str, Tensor]:
        """Embeds prompts as the pipeline does.

        Returns:
            "prompt_embeds" [batch, tokens, channels] and what else `predict` needs, batch first.
        """
        raise NotImplementedError

    def sample(
        self,
        pipeline: Any,
        conditioning: dict[str, Any],
        *,
        seeds: list[int],
        height: int,
        width: int,
        num_inference_steps: int,
        guidance_scale: float,
    ) -> Tensor:
        """Latents [batch, channels, height, width] of the stock pipeline call on embedded prompts.

        Height and width are in pixels. Sample i starts from the noise of a CPU generator seeded with `seeds[i]`,
        whatever the device and the batch.
        """
        raise NotImplementedError

    def decode(self, pipeline: Any, latents: Tensor) -> Tensor:
        """Pictures [batch, 3, height, width] in [0, 1] of latents [batch, channels, height, width]."""
        raise NotImplementedError

    def latent_shape(self, pipeline: Any, height: int, width: int) -> tuple[int, int, int]:
        """(channels, height, width) of the latents of a picture of height x width pixels."""
        raise NotImplementedError

    def check_sizes(self, pipeline: Any, setting: str, sizes: Sequence[int]) -> None:
        """Checks that pictures of these heights or widths in pixels are whole tokens, to which they would be cut.

        Raises:
            LinearizeError: One is not.
        """

        def is_whole(size: int) -> bool:
            shapes = (self.latent_shape(pipeline, side, side) for side in (size - 1, size))
            return next(shapes)[1] < next(shapes)[1]

        for size in sizes:
            if not is_whole(size):
                smaller = [side for side in range(size, 0, -1) if is_whole(side)][:1]
                larger = next(side for side in itertools.count(size) if is_whole(side))
                near = " or ".join(map(str, [*smaller, larger]))
                raise LinearizeError(
                    f"{setting}={size} is no whole number of this teacher's tokens: choose {near} pixels."
                )

    def check_sequence_length(self, setting: str, length: int) -> None:
        """Checks that the pipeline takes as many text tokens.

        Raises:
            LinearizeError: It does not.
        """
        if length > self.max_sequence_length:
            raise LinearizeError(
                f"{setting}={length} is more text than a {self.pipeline_class.__name__} takes: choose "
                f"{self.max_sequence_length} tokens or fewer."
            )
