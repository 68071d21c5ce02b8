"""The package as it is shipped: what it imports, what it depends on, which way imports point, how it installs."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "linearize"
TRAIN_ONLY = ("lightning", "hydra", "omegaconf", "wandb", "datasets", "torchmetrics", "matplotlib", "rich")


def _imports(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_importing_the_package_is_light():
    script = "import sys, linearize; print(*(name for name in sys.modules if '.' not in name))"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=_environment()
    )
    loaded = set(result.stdout.split())
    assert "linearize" in loaded
    assert not loaded & {*TRAIN_ONLY, "torch", "diffusers", "transformers"}


def test_public_names_resolve():
    import linearize

    for name in linearize.__all__:
        assert getattr(linearize, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = linearize.no_such_name


@pytest.mark.parametrize(
    ("room", "forbidden"),
    [
        ("layout.py", ("diffusers", "transformers", "linearize.ops", "linearize.mixers", "linearize.backbones")),
        ("ops", ("diffusers", "transformers", "linearize.mixers", "linearize.backbones", *TRAIN_ONLY)),
        ("mixers", ("diffusers", "transformers", "linearize.backbones", "linearize.surgery", *TRAIN_ONLY)),
        (
            "backbones",
            ("linearize.surgery", "linearize.export", "linearize.distillation", "linearize.data", *TRAIN_ONLY),
        ),
        ("surgery.py", ("linearize.export", "linearize.distillation", "linearize.evaluation", *TRAIN_ONLY)),
        ("export.py", ("linearize.distillation", "linearize.data", *TRAIN_ONLY)),
        ("mounting.py", ("linearize.distillation", "linearize.data", *TRAIN_ONLY)),
    ],
)
def test_imports_point_one_way(room, forbidden):
    path = PACKAGE / room
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    assert files
    for file in files:
        wrong = [name for name in _imports(file) if any(name == ban or name.startswith(ban + ".") for ban in forbidden)]
        assert not wrong, f"{file.relative_to(ROOT)} imports {wrong}"


def test_no_subpackage_has_the_name_of_a_diffusers_pipeline():
    """Such a name makes diffusers look for the student's class in its own pipelines."""
    import diffusers.pipelines

    packages = [folder.name for folder in PACKAGE.iterdir() if folder.is_dir()]
    assert not [name for name in packages if hasattr(diffusers.pipelines, name)]


def test_constraints_are_within_the_declared_ranges():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pins = {_canonical(name): version for name, version in pins.items()}
    declared = [
        *project["dependencies"],
        *project["optional-dependencies"]["train"],
        *project["optional-dependencies"]["dev"],
        *project["optional-dependencies"]["cluster"],
    ]
    for line in declared:
        requirement = Requirement(line)
        # Every build of torch for a GPU asks for a triton of its own.
        if requirement.name == "triton":
            continue
        assert requirement.specifier.contains(pins[_canonical(requirement.name)]), line


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "src"), **extra}


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_says_what_is_missing_when_python_is_too_old(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "grep", "sed", "mkdir", "touch"):
        (tools / name).symlink_to(shutil.which(name))
    for name in ("python3", "python3.11", "python3.12", "python3.13", "python3.14"):
        (tools / name).write_text("#!/bin/sh\nexit 1\n")
        (tools / name).chmod(0o755)
    result = subprocess.run(
        [shutil.which("make"), "test", f"VENV={tmp_path / 'venv'}", f"SHELL={tools / 'bash'}"],
        cwd=ROOT,
        env={"PATH": str(tools)},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert "needs Python 3.11 or newer" in result.stderr
    assert not (tmp_path / "venv").exists()
