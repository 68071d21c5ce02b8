"""What an evaluation measures: one set of settings for teacher, untrained student and student alike."""

import dataclasses
from typing import TYPE_CHECKING

from linearize.errors import LinearizeError

if TYPE_CHECKING:
    from linearize.teachers import Teacher


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """The settings of a paired evaluation; every model sees the same prompts, seeds and sampler.

    Attributes:
        num_prompts: Prompts, and pictures of each model.
        num_rows: Rows of `samples.png`, at most `num_prompts`.
        seed: Prompt `i` is sampled with seed `seed + i`; the held-out prompts are drawn with it too.
        height: Height of the pictures in pixels.
        width: Width of the pictures in pixels.
        num_inference_steps: Steps of the sampler.
        guidance_scale: Guidance given to the pipeline.
        max_sequence_length: Text tokens of a prompt.
        batch_size: Pictures in one forward.
        sigmas: Noise levels in (0, 1) at which the velocity error is measured, each with the same weight.
    """

    num_prompts: int = 8
    num_rows: int = 4
    seed: int = 0
    height: int = 256
    width: int = 256
    num_inference_steps: int = 10
    guidance_scale: float = 3.5
    max_sequence_length: int = 32
    batch_size: int = 4
    sigmas: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)

    def __post_init__(self) -> None:
        sigmas = tuple(self.sigmas) if isinstance(self.sigmas, list | tuple) else (self.sigmas,)
        object.__setattr__(self, "sigmas", sigmas)
        positive = (
            "num_prompts",
            "num_rows",
            "height",
            "width",
            "num_inference_steps",
            "max_sequence_length",
            "batch_size",
        )
        for name in positive:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise LinearizeError(f"{name}={value} is no positive integer: give {name}=1 or more.")
        if not sigmas or not all(isinstance(sigma, float) and 0 < sigma < 1 for sigma in sigmas):
            raise LinearizeError(
                f"sigmas={list(sigmas)} must be noise levels between 0 and 1, for example [0.1, 0.5, 0.9]."
            )

    def check_sizes(self, teacher: "Teacher") -> None:
        """Checks that the pictures are whole tokens of a teacher, whose pipeline takes as much text.

        Raises:
            LinearizeError: they are not.
        """
        for name in ("height", "width"):
            teacher.backbone.check_sizes(teacher.pipeline, f"evaluation.{name}", [getattr(self, name)])
        teacher.backbone.check_sequence_length("evaluation.max_sequence_length", self.max_sequence_length)
