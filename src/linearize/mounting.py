"""The small export: the mixer and the trained projections alone, to be mounted on a pipeline of the base model."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from linearize.backbones import Backbone, find_backbone
from linearize.backbones.plan import check_plan
from linearize.backbones.saving import empty_student
from linearize.errors import LinearizeError
from linearize.export import student_of
from linearize.files import (
    atomic_folder,
    read_json_object,
    require_disk_space,
    require_replaceable,
    state_hash,
    write_json,
)
from linearize.surgery import SurgeryReport, linearize, trained_parameters

WEIGHTS_FILE = "mixer.safetensors"
SPEC_FILE = "mixer.json"
FORMAT = 1
_BASE = {"model", "architecture", "frozen_hash"}


def export_mixer(pipeline: DiffusionPipeline, folder: str | Path, *, base_model: str) -> Path:
    """Writes what a student has beyond its base model: its tensors, its plan, and what identifies the base.

    Args:
        pipeline: A pipeline with a student.
        folder: Where to write: a folder of its own, as an older export there is replaced whole.
        base_model: Hub id or name of the teacher, for the reader of the file.

    Returns:
        The folder, which `mount_mixer` reads.

    Raises:
        LinearizeError: the pipeline holds no student, or one with adapters, the folder holds something else, or the
            disk has no room.
    """
    folder, student = Path(folder).expanduser().resolve(), student_of(pipeline)
    require_replaceable(folder, SPEC_FILE, '"frozen_hash"')
    empty_student(student)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in _own_tensors(student).items()}
    require_disk_space(folder, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
    spec = {
        "format": FORMAT,
        "plan": student.config.linearize_plan,
        "base": {
            "model": base_model,
            "architecture": _architecture(student),
            "frozen_hash": _frozen_hash(student, tensors),
        },
    }
    with atomic_folder(folder) as temporary:
        save_file(tensors, temporary / WEIGHTS_FILE)
        write_json(temporary / SPEC_FILE, spec)
    return folder


def mount_mixer(pipeline: DiffusionPipeline, folder: str | Path, *, same_base: bool = True) -> SurgeryReport:
    """Makes the stock pipeline of the base model a student, in place, with the mixer and tensors of `export_mixer`.

    Nothing is changed unless everything fits.

    Args:
        pipeline: A pipeline with the base model's transformer.
        folder: What `export_mixer` wrote.
        same_base: Whether the frozen weights must be the base model's own. False also takes a fine-tuned base
            of the same architecture.

    Raises:
        LinearizeError: the folder is missing or damaged, the pipeline is already a student, or of another
            architecture or base, or a tensor is missing, left over or of another shape.
    """
    folder = Path(folder).expanduser()
    spec, tensors = _read(folder)
    transformer = pipeline.transformer
    backbone = find_backbone(transformer)
    if isinstance(transformer, backbone.student_class):
        raise LinearizeError("The pipeline is a student already: load the base model anew and mount the mixer on it.")
    _check_architecture(spec["base"], transformer)
    _check_tensors(folder, tensors, _expected_shapes(backbone, transformer, spec["plan"]))
    if same_base and _frozen_hash(transformer, tensors) != spec["base"]["frozen_hash"]:
        raise LinearizeError(
            f"The pipeline's weights are not those of {spec['base']['model']}, for which {folder} was trained: load "
            "that model, in bfloat16 or float32, or pass same_base=False for a fine-tuned one."
        )
    report = linearize(pipeline, plan=spec["plan"])
    for name, tensor in _own_tensors(pipeline.transformer).items():
        tensor.copy_(tensors[name])
    return report


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not folder.is_dir():
        raise LinearizeError(f"{folder} is no folder: give one that export_mixer wrote.")
    spec = read_json_object(folder / SPEC_FILE)
    base = spec.get("base")
    if spec.get("format") != FORMAT or not isinstance(base, dict) or not base.keys() >= _BASE:
        raise LinearizeError(f"{folder / SPEC_FILE} is no mixer export of format {FORMAT}: export the mixer again.")
    check_plan(spec.get("plan"), str(folder / SPEC_FILE))
    try:
        return spec, load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise LinearizeError(
            f"{folder / WEIGHTS_FILE} is missing or damaged ({error}): export the mixer again."
        ) from error


def _architecture(transformer: Any) -> dict[str, Any]:
    """The configuration of the base model as JSON has it: all but the plan and diffusers' own bookkeeping."""
    config = {key: value for key, value in transformer.config.items() if not key.startswith("_")}
    config.pop("linearize_plan", None)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in sorted(config.items())}


def _own_tensors(student: nn.Module) -> dict[str, Tensor]:
    """What a student has beyond its base model: what trains, and all else that mixers keep, such as random features."""
    sites: dict[str, Any] = find_backbone(student).sites(student)
    names = {f"{name}.mixer.{key}" for name, site in sites.items() for key in site.mixer.state_dict()}
    names |= trained_parameters(student).keys()
    return {name: tensor for name, tensor in student.state_dict().items() if name in names}


def _frozen_hash(transformer: nn.Module, own: Iterable[str]) -> str:
    """Hash of all tensors that are the base model's own.

    They are rounded to bfloat16, so that loaded in bfloat16 and in float32 they are the same; float16 has no numbers as
    small.
    """
    state, skipped = transformer.state_dict(), set(own)
    digest = hashlib.sha256()
    for name in sorted(state.keys() - skipped):
        digest.update(state_hash({name: state[name].to(torch.bfloat16)}).encode())
    return digest.hexdigest()


def _check_architecture(base: dict[str, Any], transformer: Any) -> None:
    ours, theirs = _architecture(transformer), base["architecture"]
    for key in sorted({*ours, *theirs}):
        if ours.get(key) != theirs.get(key):
            raise LinearizeError(
                f"The pipeline's transformer has {key}={ours.get(key)} and the mixer was trained for {base['model']} "
                f"with {key}={theirs.get(key)}: load that model."
            )


def _expected_shapes(backbone: Backbone, transformer: Any, plan: list[dict[str, Any]]) -> dict[str, tuple[int, ...]]:
    student_class: Any = backbone.student_class
    with init_empty_weights():
        student = student_class.from_config({**_architecture(transformer), "linearize_plan": plan})
    return {name: tuple(tensor.shape) for name, tensor in _own_tensors(student).items()}


def _check_tensors(folder: Path, tensors: dict[str, Tensor], expected: dict[str, tuple[int, ...]]) -> None:
    missing, superfluous = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    if missing:
        raise LinearizeError(f"{folder} lacks the tensor {min(missing)} of its own plan: export the mixer again.")
    if superfluous:
        raise LinearizeError(f"{folder} has a tensor {min(superfluous)} that its plan has not: export the mixer again.")
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise LinearizeError(
                f"{folder} has {name} of shape {tuple(tensors[name].shape)} where the base model has {shape}: "
                "export the mixer again."
            )
