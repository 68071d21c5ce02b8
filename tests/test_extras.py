"""Without an extra: one sentence that names the missing package and the pip command."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from linearize.extras import EXTRAS, describe_missing, require

ROOT = Path(__file__).parents[1]
SCRIPTS = [
    str(file.relative_to(ROOT))
    for file in (ROOT / "train.py", *sorted((ROOT / "scripts").glob("*.py")))
    if "@entry_point(" in file.read_text()
]
# Stands in front of the installed packages and makes the named modules impossible to import.
WITHOUT = """
import importlib.abc, runpy, sys
hidden = set(sys.argv[1].split(","))
class Hider(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hider())
sys.argv = sys.argv[2:]
sys.path.insert(0, ".")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_without(hidden: str, *command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", WITHOUT, hidden, *command]
    return subprocess.run(arguments, cwd=cwd, env=environment, text=True, capture_output=True, timeout=120)


@pytest.mark.parametrize("script", SCRIPTS)
def test_entry_points_name_the_train_extra_in_a_base_install(script: str, tmp_path: Path) -> None:
    done = run_without(",".join(EXTRAS["train"]), str(ROOT / script), cwd=tmp_path)
    name = script.rpartition("/")[2]
    assert done.stderr == (f"error: {name} needs hydra, which is not installed: run pip install 'linearize[train]'.\n")
    assert done.returncode == 2 and not list(tmp_path.iterdir())


def test_extras_are_those_of_the_package() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(EXTRAS) == set(declared) - {"dev"}


def test_a_missing_module_is_told() -> None:
    require("rich", "lightning", purpose="this test")
    error = ModuleNotFoundError("Module not found: 'torch-fidelity'. HINT: Try running `pip install -U`")
    assert describe_missing(error, "FID") == (
        "FID needs torch_fidelity, which is not installed: run pip install 'linearize[eval]'."
    )
    assert "cannot import nonsense" in describe_missing(ModuleNotFoundError("no", name="nonsense"), "This run")
