"""linearize: distil a pre-trained Diffusion Transformer into a student whose attention is of linear cost.

The public names are imported when they are first used: `import linearize` alone costs nothing. `ModelMixin` is here
because diffusers looks it up beside the student classes when it loads a pipeline.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import ModelMixin

    from linearize.backbones.flux_student import LinearFluxTransformer2DModel
    from linearize.errors import LinearizeError
    from linearize.export import load_pipeline
    from linearize.surgery import SurgeryReport, linearize

__version__ = "0.1.0"

__all__ = [
    "LinearFluxTransformer2DModel",
    "LinearizeError",
    "ModelMixin",
    "SurgeryReport",
    "__version__",
    "linearize",
    "load_pipeline",
]

_HOMES = {
    "LinearFluxTransformer2DModel": "linearize.backbones.flux_student",
    "LinearizeError": "linearize.errors",
    "ModelMixin": "diffusers",
    "SurgeryReport": "linearize.surgery",
    "linearize": "linearize.surgery",
    "load_pipeline": "linearize.export",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
