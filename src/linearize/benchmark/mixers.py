"""Every mixer in the teacher's own attention layer: the time of its forward pass, and of a training step with it."""

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from linearize.benchmark.parity import check_errors
from linearize.benchmark.timing import measure
from linearize.benchmark.training import TrainSettings, train_rows
from linearize.errors import check_names
from linearize.files import first_sentence
from linearize.mixers import Mixer, MixerContext, mixer_defaults, mixer_names
from linearize.ops.parity import largest_error
from linearize.surgery import share_student, trained_parameters
from linearize.teachers import Teacher

DENSE = "softmax"
_SIGMA, _GUIDANCE = 0.5, 3.5


@dataclasses.dataclass(frozen=True)
class MixerSettings:
    """What is measured.

    Attributes:
        sizes: Sides of square pictures in pixels, for the forward pass of one layer, one picture at a time.
        probe: Height and width in pixels of the picture on which forward is compared with its definition.
        whole_probe: Those of another, of tiles that are whole.
        max_sequence_length: Text tokens.
        train_batch: Pictures in a training step; 0 measures none.
        train_size: Their side in pixels.
        train_repeats: Timed training steps, after one that is not.
        warmup: Calls of a layer before the clock starts.
        repeats: Timed calls of a layer.
    """

    sizes: Sequence[int]
    probe: tuple[int, int]
    whole_probe: tuple[int, int]
    max_sequence_length: int
    train_batch: int
    train_size: int
    train_repeats: int
    warmup: int
    repeats: int


@dataclasses.dataclass(frozen=True)
class LayerCall:
    """What a layer's mixer was called with: query, key and value [1, heads, tokens, head_dim], and their context."""

    mixer: Mixer
    query: Tensor
    key: Tensor
    value: Tensor
    context: MixerContext

    def forward(self) -> Tensor:
        """Calls the mixer again."""
        return self.mixer(self.query, self.key, self.value, self.context)

    def reference(self) -> Tensor:
        """The mixer's definition of the same numbers in float64, but for the rotation, which has its own width."""
        inputs = self.context.hidden_states
        context = dataclasses.replace(self.context, hidden_states=None if inputs is None else inputs.double())
        query, key, value = (states.double() for states in (self.query, self.key, self.value))
        return copy.deepcopy(self.mixer).double().reference(query, key, value, context)


def mixer_rows(teacher: Teacher, names: Sequence[str], settings: MixerSettings) -> Iterator[dict[str, Any]]:
    """Measures mixers with their defaults, softmax attention first.

    Forward is timed on query, key and value of the teacher's first layer, in the teacher's dtype, without the layer's
    projections. A mixer that fails has a row with `error`, and the others are measured all the same.

    Args:
        teacher: The teacher.
        names: Mixers.
        settings: How.

    Yields:
        A row for each mixer and size ("pass": "forward"), with `ratio_to_dense`, which is to `dense_seconds`, then one
        of its training step ("train_step": forward of teacher and student, backward and optimizer) with
        `samples_per_second`.

    Raises:
        LinearizeError: A mixer is unknown, or a size is no whole number of tokens.
    """
    check_names("mixers.names", names, mixer_names())
    for setting in ("sizes", "probe", "whole_probe"):
        teacher.backbone.check_sizes(teacher.pipeline, f"mixers.{setting}", getattr(settings, setting))
    teacher.backbone.check_sizes(teacher.pipeline, "mixers.train_size", [settings.train_size])
    dense: dict[int, float] = {}
    for name in [DENSE, *(name for name in names if name != DENSE)]:
        try:
            for row in _rows(teacher, name, settings):
                if name == DENSE and row["pass"] == "forward":
                    dense[row["size"]] = row["median_seconds"]
                if row["pass"] == "forward" and row["size"] in dense:
                    row["dense_seconds"] = dense[row["size"]]
                    row["ratio_to_dense"] = row["dense_seconds"] / row["median_seconds"]
                yield {"mixer": name, "arguments": mixer_defaults(name), **row}
        except Exception as error:  # of any kernel: its failure is this mixer's result
            yield {"mixer": name, "arguments": mixer_defaults(name), "error": first_sentence(error)}


def parity_error(call: LayerCall) -> float:
    """|forward - reference| / |reference|, the reference in float64."""
    with torch.no_grad():
        return largest_error([call.forward()], [call.reference()])


def layer_call(teacher: Teacher, student: nn.Module, height: int, width: int, num_text_tokens: int) -> LayerCall:
    """What the mixer of a student's first layer is called with when it paints a picture of this size."""
    site = next(iter(teacher.backbone.sites(student).values()))
    mixer: Any = site.mixer
    calls: list[LayerCall] = []
    handle = mixer.register_forward_pre_hook(lambda module, arguments: calls.append(LayerCall(module, *arguments)))
    generator = torch.Generator().manual_seed(0)
    shape = (1, *teacher.backbone.latent_shape(teacher.pipeline, height, width))
    conditioning: dict[str, Any] = teacher.encode(["a picture"], num_text_tokens)
    device = conditioning["prompt_embeds"].device
    conditioning["guidance"] = torch.full((1,), _GUIDANCE, device=device)
    latents = torch.randn(shape, generator=generator).to(device)
    try:
        with torch.no_grad():
            teacher.backbone.predict(student, latents, torch.full((1,), _SIGMA, device=device), conditioning)
    finally:
        handle.remove()
    return calls[0]


def _rows(teacher: Teacher, name: str, settings: MixerSettings) -> Iterator[dict[str, Any]]:
    device = teacher.pipeline.transformer.device
    student = share_student(teacher.pipeline.transformer, [{"layers": "*", "mixer": name}])
    for parameter in trained_parameters(student).values():
        parameter.data = parameter.data.to(teacher.pipeline.transformer.dtype)
    probes = (settings.probe, settings.whole_probe)
    errors = (parity_error(layer_call(teacher, student, *probe, settings.max_sequence_length)) for probe in probes)
    error = check_errors(errors, teacher.pipeline.transformer.dtype, f"mixer {name}", "leave it out of mixers.names")
    for size in settings.sizes:
        call = layer_call(teacher, student, size, size, settings.max_sequence_length)
        with torch.no_grad():
            timing = measure(call.forward, device, warmup=settings.warmup, repeats=settings.repeats, graphed=True)
        yield {
            "pass": "forward",
            "size": size,
            "side": call.context.layout.grids[0].height,
            "parity_error": error,
            "parameters": sum(parameter.numel() for parameter in call.mixer.parameters()),
            **timing.as_dict(),
        }
    del student
    if settings.train_batch:
        yield _train_step(teacher, name, settings)


def _train_step(teacher: Teacher, name: str, settings: MixerSettings) -> dict[str, Any]:
    measured = TrainSettings(
        batch=settings.train_batch,
        max_sequence_length=settings.max_sequence_length,
        learning_rate=1e-5,
        curve_steps=1,
        repeats=settings.train_repeats,
    )
    recipes = {"student": {"student": {"mixer": name}, "compile": False}}
    (row,) = train_rows(teacher, measured, sizes=[settings.train_size], recipes=recipes)
    unwanted = ("model", "student", "losses", "last_loss", "ratio_to_first")
    return {"pass": "train_step"} | {name: value for name, value in row.items() if name not in unwanted}
