"""Triton's interpreter, which proves kernels where there is no GPU, in a process of its own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# Where there is a GPU, the kernels themselves are tested.
needs_interpreter = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or torch.cuda.is_available(), reason="needs triton, and no GPU"
)


def errors_of(script: str) -> dict[str, list[float]]:
    """What a script of this folder prints under the interpreter: a line for each case, its name and its errors."""
    return numbers_of(script, TRITON_INTERPRET="1")


def numbers_of(script: str, **variables: str) -> dict[str, list[float]]:
    """What a script of this folder prints where these environment variables are set: lines of a name and numbers."""
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script))],
        env={**os.environ, "PYTHONWARNINGS": "ignore", **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [line.split("\t") for line in run.stdout.splitlines() if "\t" in line]
    return {name: [float(number) for number in numbers] for name, *numbers in rows}
