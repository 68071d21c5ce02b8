"""What is optional: which extra of the package brings which module, and how its absence is told."""

import importlib.util
import re
from collections.abc import Sequence

from linearize.errors import LinearizeError

# Modules by the extra of pyproject.toml that installs them.
EXTRAS = {
    "train": (
        *("lightning", "hydra", "omegaconf", "datasets", "pyarrow"),
        *("torchmetrics", "wandb", "tensorboard", "matplotlib", "rich", "peft"),
    ),
    "eval": ("torchvision", "torch_fidelity"),
    "flash": ("flash_attn",),
    "fla": ("fla",),
    "natten": ("natten",),
    "cluster": ("submitit", "hydra_plugins.hydra_submitit_launcher"),
}


def require(*modules: str, purpose: str) -> None:
    """Checks that optional modules are installed, without importing them.

    Args:
        modules: Names in `EXTRAS`.
        purpose: What needs them, for the sentence.

    Raises:
        LinearizeError: one is not.
    """
    missing = [name for name in modules if not _is_installed(name)]
    if missing:
        raise LinearizeError(missing_sentence(purpose, missing))


def describe_missing(error: ImportError, purpose: str) -> str:
    """One sentence about a failed import: the module, and the command that installs it."""
    # Libraries that check for their own optional parts name the module in the text alone.
    named = [error.name or "", *re.findall(r"'([\w.-]+)'", str(error))]
    known = {module for modules in EXTRAS.values() for module in modules}
    for name in named:
        module = name.partition(".")[0].replace("-", "_")
        if module in known:
            return missing_sentence(purpose, [module])
    return f"{purpose} cannot import {error.name or 'a module'} ({error}): install it with pip."


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False


def missing_sentence(purpose: str, missing: Sequence[str]) -> str:
    """One sentence about modules of one extra that are missing."""
    extra = next(extra for extra, modules in EXTRAS.items() if missing[0] in modules)
    are = "is" if len(missing) == 1 else "are"
    return f"{purpose} needs {' and '.join(missing)}, which {are} not installed: run pip install 'linearize[{extra}]'."
