"""Proves an export: loads the folder again and compares one picture with the student's in memory."""

from pathlib import Path

import torch
from torch import Tensor, nn

from linearize.errors import LinearizeError
from linearize.evaluation.paired import with_transformer
from linearize.evaluation.pictures import save_png, to_pil
from linearize.evaluation.settings import EvaluationSettings
from linearize.export import load_pipeline
from linearize.teachers import Teacher

# Memory-mapped weights lie elsewhere in memory than those of the run, which can change the last bits of every product.
TOLERANCE = 0.05


def check_reload(
    folder: str | Path, teacher: Teacher, student: nn.Module, settings: EvaluationSettings, prompt: str, picture: Path
) -> float:
    """Loads an exported student and samples one prompt with it.

    The pipeline in memory moves to the CPU before the folder is read, so that two of them never share a GPU.

    Args:
        folder: What ``export_student`` wrote in its local form.
        teacher: The teacher of the run, which encodes the prompt.
        student: The student in memory.
        settings: Size and sampler settings.
        prompt: What to paint.
        picture: PNG file for the reloaded student's picture.

    Returns:
        The norm of the difference of the two latents over the norm of the first.

    Raises:
        LinearizeError: If the two differ by more than rounding.
    """
    device = teacher.pipeline.transformer.device
    conditioning = teacher.encode([prompt], settings.max_sequence_length)
    in_memory = with_transformer(teacher.pipeline, student)
    expected = _sample(teacher, in_memory, conditioning, settings)
    in_memory.to("cpu")
    reloaded = load_pipeline(folder, torch_dtype=teacher.pipeline.transformer.dtype).to(device)
    latents = _sample(teacher, reloaded, conditioning, settings)
    save_png(to_pil(teacher.backbone.decode(reloaded, latents)[0]), picture)
    difference = ((latents - expected).norm() / expected.norm()).item()
    if not difference <= TOLERANCE:
        raise LinearizeError(
            f"{folder} paints another picture than the student that was exported (relative difference "
            f"{difference:.3g}): keep the run's checkpoint and report this as a bug."
        )
    return difference


def _sample(
    teacher: Teacher, pipeline: object, conditioning: dict[str, Tensor], settings: EvaluationSettings
) -> Tensor:
    # Eagerly, in memory and loaded again, for compiled blocks round otherwise.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        return teacher.backbone.sample(
            pipeline,
            conditioning,
            seeds=[settings.seed],
            height=settings.height,
            width=settings.width,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
        ).float()
