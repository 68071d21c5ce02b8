"""The families of Diffusion Transformers, found by looking at this package."""

from __future__ import annotations

import importlib
import pkgutil

from torch import nn

from linearize.backbones.base import Backbone
from linearize.errors import LinearizeError

__all__ = ["Backbone", "all_backbones", "find_backbone"]


def all_backbones() -> list[Backbone]:
    """One backbone of every family, in the order of their names."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return sorted((family() for family in Backbone.__subclasses__()), key=lambda backbone: backbone.name)


def find_backbone(transformer: nn.Module) -> Backbone:
    """The backbone that a transformer, teacher or student, belongs to.

    Raises:
        LinearizeError: No family has this class.
    """
    backbones = all_backbones()
    for backbone in backbones:
        if isinstance(transformer, backbone.transformer_class):
            return backbone
    choices = ", ".join(backbone.transformer_class.__name__ for backbone in backbones)
    raise LinearizeError(f"no backbone for {type(transformer).__name__}, linearize knows {choices}")
