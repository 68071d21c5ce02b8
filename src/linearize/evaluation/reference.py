"""The teacher's own samples, computed once for its weights and the settings and then read from a file."""

import dataclasses
import hashlib
import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from linearize.errors import LinearizeError
from linearize.evaluation.paired import PairedProtocol
from linearize.files import atomic_file

# Settings that change no sample of the teacher.
_IRRELEVANT = ("num_rows", "batch_size", "sigmas")


@dataclasses.dataclass(frozen=True)
class TeacherReference:
    """The teacher's samples for the prompts.

    Attributes:
        latents: [prompts, channels, height, width], what students are paired with.
        second_latents: The same prompts from other seeds: the noise floor.
    """

    latents: Tensor
    second_latents: Tensor


def reference_name(protocol: PairedProtocol) -> str:
    """File name that holds for one set of weights, dtype, scheduler, prompts and settings, and for no other."""
    settings = {name: value for name, value in dataclasses.asdict(protocol.settings).items() if name not in _IRRELEVANT}
    pipeline = protocol.teacher.pipeline
    scheduler = {name: value for name, value in pipeline.scheduler.config.items() if not name.startswith("_")}
    settings |= {"dtype": str(pipeline.transformer.dtype), "scheduler": scheduler}
    key = json.dumps({"prompts": list(protocol.prompts), **settings}, sort_keys=True)
    return f"{protocol.teacher.weight_hash[:12]}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.safetensors"


def teacher_reference(
    protocol: PairedProtocol, folder: str | Path | None = None, *, save: bool = False
) -> TeacherReference:
    """Reads the teacher's samples where the folder has them, else samples them.

    Args:
        protocol: Teacher, prompts, seeds and settings.
        folder: Where references are kept; None samples anew.
        save: Whether new samples are written to the folder.

    Raises:
        LinearizeError: the file is corrupt.
    """
    path = Path(folder) / reference_name(protocol) if folder is not None else None
    if path is not None and path.exists():
        return _read(path)
    transformer = protocol.teacher.pipeline.transformer
    reference = TeacherReference(protocol.sample(transformer), protocol.sample(transformer, second=True))
    if path is not None and save:
        with atomic_file(path) as temporary:
            save_file({field: tensor.contiguous() for field, tensor in vars(reference).items()}, temporary)
    return reference


def _read(path: Path) -> TeacherReference:
    try:
        return TeacherReference(**load_file(path))
    except (SafetensorError, OSError, TypeError) as error:
        raise LinearizeError(f"{path} is truncated or corrupt ({error}): delete it, and it is made again.") from error
