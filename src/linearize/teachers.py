"""Teachers: a pipeline folder, a hub id, or a full-size architecture with random weights, all loaded the same way."""

import contextlib
import hashlib
import inspect
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from linearize.backbones import Backbone, all_backbones
from linearize.errors import LinearizeError
from linearize.files import first_sentence, read_json_object, weight_hash
from linearize.hub import fetch_index, fetch_pipeline
from linearize.pipeline_folder import check_libraries, check_pipeline_files
from linearize.processes import local_rank

COMPONENT_LIBRARIES = ("diffusers", "transformers")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Teacher:
    """A frozen pipeline and where it came from.

    Attributes:
        pipeline: The diffusers pipeline, in evaluation mode, nothing requires a gradient.
        backbone: The family of its transformer.
        name: Folder name, hub id, or the given name of a random architecture.
        revision: The commit on the hub; None for folders and random weights.
        weight_hash: `files.weight_hash` of the transformer as it is stored, so it does not depend on the dtype in
            memory.
    """

    pipeline: DiffusionPipeline
    backbone: Backbone
    name: str
    revision: str | None
    weight_hash: str
    _resting: dict[str, torch.nn.Module] = field(default_factory=dict, init=False, repr=False)

    @property
    def has_text_encoder(self) -> bool:
        """False for random architectures, whose prompt embeddings are drawn instead of encoded."""
        return self.pipeline.text_encoder is not None or bool(self._resting)

    @contextlib.contextmanager
    def resting_encoders(self) -> Iterator[None]:
        """Within the block text encoders wait in CPU memory, out of the pipeline, and `encode` fetches them.

        FLUX.1's take 9 GiB of a GPU that training has better use for.
        """
        device = self.pipeline.transformer.device
        parts = self.pipeline.components.items()
        self._resting = {name: part for name, part in parts if isinstance(part, PreTrainedModel)}
        for name, part in self._resting.items():
            setattr(self.pipeline, name, None)
            part.to("cpu")
        try:
            yield
        finally:
            for name, part in self._resting.items():
                setattr(self.pipeline, name, part.to(device))
            self._resting = {}

    @contextlib.contextmanager
    def _awake_encoders(self) -> Iterator[None]:
        for name, part in self._resting.items():
            setattr(self.pipeline, name, part.to(self.pipeline.transformer.device))
        try:
            yield
        finally:
            for name, part in self._resting.items():
                setattr(self.pipeline, name, None)
                part.to("cpu")

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], max_sequence_length: int) -> dict[str, Tensor]:
        """Conditioning of prompts: {"prompt_embeds": [batch, tokens, dim], "pooled_prompt_embeds": [batch, dim]}.

        A teacher without text encoders gets standard normal embeddings of the right shape, drawn from a seed that is
        the prompt's hash.
        """
        if self.has_text_encoder:
            with self._awake_encoders():
                return self.backbone.encode(self.pipeline, list(prompts), max_sequence_length)
        transformer = self.pipeline.transformer
        shapes = {
            "prompt_embeds": (max_sequence_length, transformer.config.joint_attention_dim),
            "pooled_prompt_embeds": (transformer.config.pooled_projection_dim,),
        }
        drawn = [_random_embeddings(prompt, shapes) for prompt in prompts]
        return {
            name: torch.stack([one[name] for one in drawn]).to(transformer.device, transformer.dtype) for name in shapes
        }


def _random_embeddings(prompt: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") >> 1
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def load_teacher(
    path: str | Path | None = None,
    *,
    hub_id: str | None = None,
    revision: str | None = None,
    random: Mapping[str, Any] | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
) -> Teacher:
    """Loads a teacher and freezes it.

    Args:
        path: Folder of a pipeline; it wins over `hub_id` and `random`.
        hub_id: Model id on the hub.
        revision: Branch, tag or commit on the hub; None is its main branch. The commit it resolves to is recorded.
        random: Architecture to fill with random weights: {"name", "backbone", "seed", "transformer", "vae",
            "scheduler"}.
        dtype: A torch dtype, its name, or "auto": bfloat16 on a GPU, float32 on a CPU.
        device: A torch device, its name, or "auto": this process's GPU if there is one, else the CPU.

    Returns:
        The teacher on `device`.

    Raises:
        LinearizeError: no source is given, the folder is missing, damaged or of another architecture, the hub is
            unreachable or the model gated, or the dtype or device does not exist.
    """
    place = resolve_device(device)
    precision = resolve_dtype(dtype, place)
    if path is not None:
        folder = Path(path).expanduser()
        return _load_folder(folder, name=folder.resolve().name, revision=None, dtype=precision, device=place)
    if hub_id is not None:
        folder, commit = _download(hub_id, revision)
        return _load_folder(folder, name=hub_id, revision=commit, dtype=precision, device=place)
    if random is not None:
        return _build_random(random, precision, place)
    raise LinearizeError(
        "No teacher is given: set teacher.path=<folder of a pipeline>, or choose teacher=scenes, flux_dev, "
        "flux_schnell or flux_dev_random."
    )


def resolve_device(device: str | torch.device) -> torch.device:
    """The device of a name; "auto" is the GPU of this process if there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise LinearizeError(f"device={device} does not exist: use auto, cpu, cuda or cuda:<number>.") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise LinearizeError(f"device={device} needs a CUDA GPU and none is visible: use device=cpu or device=auto.")
    return place


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of a name; "auto" is bfloat16 on a GPU and float32 on a CPU, where bfloat16 is slow."""
    if isinstance(dtype, torch.dtype):
        return dtype
    choices = {"auto": torch.bfloat16 if device.type == "cuda" else torch.float32, **DTYPES}
    if dtype not in choices:
        raise LinearizeError(f"teacher.dtype={dtype} is unknown: use one of {', '.join(choices)}.")
    return choices[dtype]


def _freeze(pipeline: DiffusionPipeline) -> None:
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)


def _backbone_of(index: Mapping[str, Any], source: str) -> Backbone:
    """The backbone of a pipeline's model_index.json, which must name known classes."""
    backbones = {backbone.pipeline_class.__name__: backbone for backbone in all_backbones()}
    name = index.get("_class_name")
    if name not in backbones:
        raise LinearizeError(f"{source} is a {name}, which has no backbone: give a folder of {' or '.join(backbones)}.")
    backbone = backbones[name]
    transformer = index.get("transformer", [None, None])[1]
    if transformer != backbone.transformer_class.__name__:
        raise LinearizeError(
            f"{source} has the transformer {transformer}, not {backbone.transformer_class.__name__}: give a stock "
            f"{name} folder."
        )
    return backbone


def _read_pipeline(pipeline_class: Any, folder: Path, dtype: torch.dtype) -> DiffusionPipeline:
    try:
        with warnings.catch_warnings():
            # Newer versions call it `dtype`, older ones know no other name than this.
            warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated", category=FutureWarning)
            return pipeline_class.from_pretrained(
                folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True
            )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise LinearizeError(
            f"{folder} does not load as a pipeline ({first_sentence(error)}): copy or download it again."
        ) from error


def _load_folder(folder: Path, *, name: str, revision: str | None, dtype: torch.dtype, device: torch.device) -> Teacher:
    index = check_pipeline_files(
        folder,
        COMPONENT_LIBRARIES,
        next_step="set teacher.path to a folder that save_pretrained wrote, or choose teacher=scenes",
    )
    backbone = _backbone_of(index, str(folder))
    digest = weight_hash(folder / "transformer")
    pipeline = _read_pipeline(backbone.pipeline_class, folder, dtype)
    missing = [key for key, parameter in pipeline.transformer.named_parameters() if parameter.is_meta]
    if missing:
        raise LinearizeError(
            f"{folder} lacks {len(missing)} tensors of its transformer ({missing[0]}, ...): copy or download it again."
        )
    _freeze(pipeline)
    return Teacher(pipeline.to(device), backbone, name, revision, digest)


def _download(hub_id: str, revision: str | None) -> tuple[Path, str]:
    """Fetches a pipeline into the hub cache; returns its folder and the commit that the revision resolved to."""
    index = fetch_index(hub_id, revision)
    commit = index.parent.name
    content = read_json_object(index)
    check_libraries(content, hub_id, COMPONENT_LIBRARIES)
    pipeline_class: Any = _backbone_of(content, hub_id).pipeline_class
    return fetch_pipeline(pipeline_class, hub_id, commit), commit


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _build_random(random: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Teacher:
    """A full-size pipeline without text encoders, its weights drawn in place on the device in `dtype`.

    No float32 copy, no copy on the CPU.
    """
    backbones = {backbone.name: backbone for backbone in all_backbones()}
    if random["backbone"] not in backbones:
        raise LinearizeError(
            f"teacher.random.backbone={random['backbone']} is unknown: use one of {', '.join(backbones)}."
        )
    backbone = backbones[random["backbone"]]
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        torch.device(device),
        _default_dtype(dtype),
    ):
        torch.manual_seed(random["seed"])
        transformer = backbone.transformer_class(**random["transformer"])
        autoencoder = AutoencoderKL(**random["vae"])
    absent = dict.fromkeys(inspect.signature(backbone.pipeline_class).parameters)
    scheduler = FlowMatchEulerDiscreteScheduler(**random["scheduler"])
    pipeline = backbone.pipeline_class(
        **{**absent, "transformer": transformer, "vae": autoencoder, "scheduler": scheduler}
    )
    _freeze(pipeline)
    recipe = json.dumps([dict(random), str(dtype), device.type], sort_keys=True)
    return Teacher(pipeline, backbone, random["name"], None, hashlib.sha256(recipe.encode()).hexdigest())
