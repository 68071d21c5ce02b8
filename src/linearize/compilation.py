"""Regional compilation: the repeated blocks of a transformer, once for each kind of block and each resolution."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from linearize.backbones import find_backbone
from linearize.errors import LinearizeError

# Kinds of block x resolutions x (teacher, student) x (with and without gradients). Beyond it torch warns and runs the
# block eagerly; its own limit of 8 is reached by one run with pictures at two sizes.
RECOMPILE_LIMIT = 64


def compile_backend(setting: bool | str, device: torch.device | str) -> str | None:
    """What a config's `compile` stands for.

    Args:
        setting: "auto", True, False, or the name of a backend of torch.compile.
        device: Where the transformer runs; "auto" compiles on a GPU.

    Returns:
        The backend; None runs the blocks eagerly.

    Raises:
        LinearizeError: There is no such backend.
    """
    if setting == "auto":
        setting = torch.device(device).type == "cuda"
    if isinstance(setting, bool):
        return "inductor" if setting else None
    backends = torch.compiler.list_backends(exclude_tags=())
    if setting not in backends:
        raise LinearizeError(f"compile={setting} is unknown: use auto, true, false or one of {', '.join(backends)}.")
    return setting


def compile_blocks(transformer: nn.Module, backend: str | None) -> None:
    """Compiles the repeated blocks of a teacher or a student in place; None leaves them as they are.

    Copies of the transformer are not compiled.

    Args:
        transformer: Of a known family.
        backend: Of torch.compile.
    """
    if backend is None:
        return
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)
    find_backbone(transformer).compile_blocks(transformer, backend)
