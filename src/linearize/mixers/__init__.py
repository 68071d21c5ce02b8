"""The mixers: the name "clear" is `linearize.mixers.clear.ClearMixer`, and no name leads out of this package."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from typing import Any

from linearize.errors import LinearizeError
from linearize.mixers.base import AttentionShape, Mixer, MixerContext

__all__ = [
    "AttentionShape",
    "Mixer",
    "MixerContext",
    "build_mixer",
    "check_arguments",
    "mixer_class",
    "mixer_defaults",
    "mixer_names",
]


def mixer_names() -> list[str]:
    """The names of all mixers, sorted."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name for name in names if name != "base" and not name.startswith("_"))


def mixer_class(name: str | None) -> type[Mixer]:
    """The class of a mixer by its name.

    Raises:
        LinearizeError: There is no mixer of that name.
    """
    if name not in mixer_names():
        close = difflib.get_close_matches(str(name), mixer_names(), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise LinearizeError(f"unknown mixer {name!r}, choose one of {', '.join(mixer_names())}{hint}")
    module = importlib.import_module(f"{__name__}.{name}")
    return getattr(module, "".join(part.capitalize() for part in name.split("_")) + "Mixer")


def mixer_defaults(name: str | None) -> dict[str, Any]:
    """The arguments of a mixer with their defaults, in the order of its constructor."""
    parameters = inspect.signature(mixer_class(name).__init__).parameters
    return {key: parameter.default for key, parameter in parameters.items() if key not in ("self", "shape")}


def check_arguments(name: str | None, arguments: dict[str, Any]) -> None:
    """Checks that a mixer has these arguments.

    Raises:
        LinearizeError: There is no such mixer, or it has no such argument.
    """
    known = mixer_defaults(name)
    unknown = [key for key in arguments if key not in known]
    if unknown:
        takes = f"it takes {', '.join(known)}" if known else "it takes none"
        raise LinearizeError(f"mixer {name!r} has no argument {unknown[0]!r}, {takes}")


def build_mixer(name: str, shape: AttentionShape, arguments: dict[str, Any]) -> Mixer:
    """Builds a mixer for one attention layer.

    Raises:
        LinearizeError: There is no such mixer, it has no such argument, or it refuses a value.
    """
    check_arguments(name, arguments)
    return mixer_class(name)(shape, **arguments)
