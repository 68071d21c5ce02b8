"""What makes `save_pretrained` of a student, or of a pipeline around it, write a student that loads."""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn

from linearize.errors import LinearizeError


class StudentSaving:
    """Mixin of student classes, in front of the diffusers class.

    diffusers notes the class of a pipeline's components when they are assigned, and `linearize(pipe.transformer)`
    changes that class afterwards. Saved with the stale note, the student would come back as plain softmax without a
    word. So a student that a pipeline is saving renews the note first, and one whose layers are no longer its plan's
    refuses to be saved.
    """

    @functools.wraps(ModelMixin.save_pretrained)
    def save_pretrained(self, save_directory: Any, *args: Any, **arguments: Any) -> None:
        """The stock method, for a student that will load again, in safetensors alone."""
        if not arguments.get("safe_serialization", True):
            raise LinearizeError(
                "safe_serialization=False would pickle the student: leave it out, only safetensors loads."
            )
        empty_student(self)
        _renew_pipeline_entry(self)
        super().save_pretrained(save_directory, *args, **arguments)  # type: ignore[misc]


def empty_student(student: Any) -> Any:
    """A student of the same configuration on the meta device, after a check that it has the same layers and tensors.

    Raises:
        LinearizeError: layers were replaced or an adapter added, so a file of these tensors would not load.
    """
    with init_empty_weights():
        empty = type(student).from_config(copy.deepcopy(dict(student.config)))
    ours, planned = _layout_of(student), _layout_of(empty)
    different = sorted(key for key in ours.keys() | planned.keys() if ours.get(key) != planned.get(key))
    if different:
        raise LinearizeError(
            f"The student is no longer what its plan says ({different[0]} differs): unload or fuse adapters, and give "
            "layers another mixer only by linearize()."
        )
    return empty


def _layout_of(student: nn.Module) -> dict[str, Any]:
    """The shape of every tensor and the class of every layer that has a mixer, or is one."""
    shapes = {name: tuple(tensor.shape) for name, tensor in student.state_dict().items()}
    mixers = {name: type(module) for name, module in student.named_modules() if name.endswith((".attn", ".mixer"))}
    return {**shapes, **mixers}


def _renew_pipeline_entry(student: Any) -> None:
    """Assigns the student once more in the pipeline whose `save_pretrained` is running, if one is.

    Only the call stack knows that pipeline.
    """
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, DiffusionPipeline):
            for name, component in owner.components.items():
                if getattr(component, "_orig_mod", component) is student:
                    setattr(owner, name, component)
            return
        frame = frame.f_back
