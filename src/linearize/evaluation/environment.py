"""Where numbers come from: versions, machine, command."""

import importlib.metadata
import os
import platform
import shlex
import sys
from pathlib import Path

import torch

_PACKAGES = ("linearize", "torch", "diffusers", "transformers", "lightning", "torchmetrics", "datasets", "safetensors")


def versions() -> dict[str, str | None]:
    """Python's version and those of the packages that numbers depend on; None where one is not installed."""
    return {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine(device: torch.device | str) -> str:
    """One line: the GPUs that `device` stands for, or the processor with its cores."""
    if torch.device(device).type == "cuda":
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(device)}"
    return f"{_processor()}, {os.cpu_count()} cores"


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def command() -> str:
    """The command line of this process, as a user types it: the script relative to the working folder."""
    script = Path(sys.argv[0])
    if script.is_absolute() and script.is_relative_to(Path.cwd()):
        script = script.relative_to(Path.cwd())
    name = str(script) if not script.is_absolute() else script.name
    return shlex.join(["python", name, *sys.argv[1:]])
