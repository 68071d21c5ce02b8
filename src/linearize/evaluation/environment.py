"""Where numbers come from: versions, machine, command, commit."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
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


def commit() -> str | None:
    """The commit of this code, marked where files differ from it; None where it is in no repository."""
    here = Path(__file__)
    try:
        # A repository around an environment that has the code installed is not the code's.
        _git(here.parent, "ls-files", "--error-unmatch", here.name)
        return _git(here.parent, "describe", "--always", "--dirty", "--abbrev=12")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    call = ["git", "-C", str(folder), *arguments]
    return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()
