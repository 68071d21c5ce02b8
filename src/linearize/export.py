"""Students as pipeline folders: written whole by `export_student`, read back by `load_pipeline`."""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from torch import nn

from linearize.backbones import Backbone, all_backbones, find_backbone
from linearize.backbones.plan import check_plan
from linearize.backbones.saving import empty_student
from linearize.errors import LinearizeError
from linearize.files import (
    atomic_folder,
    first_sentence,
    read_json_object,
    require_disk_space,
    require_replaceable,
    write_json,
    write_text,
)
from linearize.model_card import model_card
from linearize.pipeline_folder import absent_components, check_pipeline_files

# Names of dtypes in safetensors files.
_STORED_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
FORMS = ("local", "standalone")
LIBRARIES = ("diffusers", "transformers", "linearize")
# What a damaged folder makes diffusers, transformers and safetensors raise.
LOADING_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError)


def export_student(
    pipeline: DiffusionPipeline,
    folder: str | Path,
    *,
    form: str = "local",
    summary: dict[str, Any] | None = None,
    max_shard_size: str = "10GB",
) -> Path:
    """Writes a pipeline whose transformer is a student as a folder that diffusers loads, whole or not at all.

    Trained tensors are kept in float32 while they train; they are stored in the dtype of the rest of the transformer.

    Args:
        pipeline: A pipeline after `linearize`, or with a student as its transformer.
        folder: Where to write: a folder of its own, as an older student there is replaced whole.
        form: "local" is loaded by `linearize.load_pipeline(folder)`, or by `DiffusionPipeline.from_pretrained(folder)`
            after `import linearize`. "standalone" is loaded by
            `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` with no import, and is the form for a
            model hub; the linearize package has to be installed all the same.
        summary: The numbers of `summary.json`, for the model card.
        max_shard_size: Weights are split into files of at most this size.

    Returns:
        The folder.

    Raises:
        LinearizeError: the pipeline holds no student or is of another class, the form is unknown, the folder holds
            something else, or the disk has no room.
    """
    if form not in FORMS:
        raise LinearizeError(f"form={form!r} is unknown: use {' or '.join(FORMS)}.")
    folder = Path(folder).expanduser().resolve()
    student = student_of(pipeline)
    expected = find_backbone(student).pipeline_class
    if form == "local" and type(pipeline) is not expected:
        raise LinearizeError(
            f"load_pipeline opens a {expected.__name__}, not a {type(pipeline).__name__}: export "
            f'{expected.__name__}(**pipeline.components), or take form="standalone".'
        )
    components = {**pipeline.components, "transformer": _storage_copy(student)}
    require_replaceable(folder, "transformer/config.json", '"linearize_plan"')
    require_disk_space(folder, sum(_num_bytes(part) for part in components.values() if isinstance(part, nn.Module)))
    with atomic_folder(folder) as temporary:
        type(pipeline)(**components).save_pretrained(temporary, max_shard_size=max_shard_size)
        if form == "standalone":
            _write_stub(temporary / "transformer", type(student).__name__)
        write_text(
            temporary / "README.md",
            model_card(components["transformer"], type(pipeline).__name__, form=form, summary=summary),
        )
    return folder


def load_pipeline(folder: str | Path, *, torch_dtype: torch.dtype | None = None, **arguments: Any) -> DiffusionPipeline:
    """Loads an exported student, of either form, as the diffusers pipeline it is.

    Args:
        folder: What `export_student`, or `save_pretrained` of a linearized pipeline, wrote.
        torch_dtype: The dtype of all parts; None is the one that the transformer is stored in. Left to the libraries,
            diffusers would take float32 for its parts and transformers the stored one, which do not run together.
        **arguments: For `from_pretrained` of the pipeline, such as `text_encoder_2=None`; `dtype` is diffusers' newer
            name of `torch_dtype`.

    Raises:
        LinearizeError: the folder is missing, damaged or holds no student, or asks for a mixer that does not exist.
    """
    folder = Path(folder).expanduser()
    backbone, index = check_student(folder)
    absent = dict.fromkeys(absent_components(index))
    dtype = arguments.pop("dtype", torch_dtype) or _stored_dtype(folder / "transformer")
    student = _load_student(folder / "transformer", backbone, dtype=dtype, variant=arguments.get("variant"))
    pipeline_class: Any = backbone.pipeline_class
    arguments = {**absent, "dtype": dtype, "use_safetensors": True, "local_files_only": True, **arguments}
    try:
        return pipeline_class.from_pretrained(folder, transformer=student, **arguments)
    except LOADING_ERRORS as error:
        raise _damaged(folder, error) from error


def check_student(folder: Path) -> tuple[Backbone, dict[str, Any]]:
    """Checks the folder of an exported student before anything is loaded.

    Returns:
        The student's backbone, and the folder's model_index.json.

    Raises:
        LinearizeError: the folder is missing, damaged or holds no student, or asks for a mixer that does not exist.
    """
    index = check_pipeline_files(
        folder, LIBRARIES, next_step="give the student/ folder that a run or export_student wrote"
    )
    return _backbone_of(folder, index), index


def _stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of most tensors of a transformer as it is stored."""
    counts: Counter[str] = Counter()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            counts.update(tensors.get_slice(name).get_dtype() for name in list(tensors.keys()))
    return _STORED_DTYPES.get(max(counts, key=lambda name: counts[name], default="F32"), torch.float32)


def _load_student(folder: Path, backbone: Backbone, *, dtype: torch.dtype, variant: str | None = None) -> nn.Module:
    """Loads the transformer of a student strictly: every tensor is there, none is left over, all shapes fit.

    Raises:
        LinearizeError: a tensor is missing, left over or of another shape, or a file is damaged.
    """
    try:
        student_class: Any = backbone.student_class
        student, report = student_class.from_pretrained(
            folder,
            dtype=dtype,
            variant=variant,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except LinearizeError:
        raise
    except LOADING_ERRORS as error:
        raise _damaged(folder, error) from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            raise LinearizeError(
                f"{folder} does not fit its own config.json ({problem.replace('_', ' ')}: {report[problem][0]}): "
                "the weights are of another mixer or base, so export the student again."
            )
    return student


def student_of(pipeline: DiffusionPipeline) -> Any:
    """The student in a pipeline, out of its compiled wrapper.

    Raises:
        LinearizeError: its transformer is no student.
    """
    transformer = getattr(pipeline, "transformer", None)
    transformer = getattr(transformer, "_orig_mod", transformer)
    classes = tuple(backbone.student_class for backbone in all_backbones())
    if not isinstance(transformer, classes):
        raise LinearizeError(
            f"The transformer of this pipeline is a {type(transformer).__name__}, which is no student: "
            "call linearize.linearize(pipeline) first, or pass a pipeline with a trained student."
        )
    return transformer


def _storage_copy(student: nn.Module) -> nn.Module:
    """The same student on the same tensors, but for those of another dtype than most of it, which are cast."""
    stored, state = empty_student(student), student.state_dict()
    sizes: dict[torch.dtype, int] = {}
    for tensor in state.values():
        if tensor.is_floating_point():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    dtype = max(sizes, key=lambda kind: sizes[kind])
    cast = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    stored.load_state_dict(cast, strict=True, assign=True)
    return stored


def _num_bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())


def _write_stub(folder: Path, class_name: str) -> None:
    """Lets diffusers find the class by trust_remote_code: the pipeline by the file's name, AutoModel by auto_map."""
    write_text(
        folder / "linearize.py",
        f'"""The class of this transformer; it needs the package linearize."""\n\n'
        f'from linearize import {class_name}\n\n__all__ = ["{class_name}"]\n',
    )
    config = read_json_object(folder / "config.json")
    write_json(folder / "config.json", {**config, "auto_map": {"AutoModel": f"linearize.{class_name}"}})


def _backbone_of(folder: Path, index: dict[str, Any]) -> Backbone:
    """The backbone of a student folder, after its plan has been found to name mixers of ours alone."""
    config = read_json_object(folder / "transformer" / "config.json")
    backbones = {backbone.student_class.__name__: backbone for backbone in all_backbones()}
    name = config.get("_class_name")
    if name not in backbones:
        raise LinearizeError(
            f"{folder} holds no student but a {name}: load it with diffusers, or give a folder with a "
            f"{' or '.join(backbones)}."
        )
    check_plan(config.get("linearize_plan"), str(folder / "transformer" / "config.json"))
    expected = backbones[name].pipeline_class.__name__
    if index.get("_class_name") != expected:
        raise LinearizeError(
            f"{folder} is a {index.get('_class_name')}, and a student of {backbones[name].name} is a {expected}: "
            "export it again from that pipeline."
        )
    return backbones[name]


def _damaged(path: Path, error: Exception) -> LinearizeError:
    return LinearizeError(
        f"{path} is damaged or incomplete ({first_sentence(error)}): copy it or export the student again."
    )
