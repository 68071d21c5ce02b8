import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from linearize.config import register_resolvers
from linearize.evaluation.settings import EvaluationSettings
from linearize.export import export_student
from linearize.scenes.judge import Judge
from linearize.surgery import linearize, trained_parameters
from linearize.teachers import load_teacher

ROOT = Path(__file__).resolve().parents[2]
# 8 x 12 latents, 4 x 6 tokens.
HEIGHT, WIDTH = 32, 48


@pytest.fixture(scope="session")
def teacher(tiny_flux_folder):
    return load_teacher(tiny_flux_folder, device="cpu")


@pytest.fixture(scope="session")
def settings():
    return EvaluationSettings(
        num_prompts=5,
        num_rows=2,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=2,
        max_sequence_length=24,
        batch_size=2,
        sigmas=(0.2, 0.7),
    )


@pytest.fixture(scope="session")
def judge():
    torch.manual_seed(0)
    return Judge(channels=(4, 4, 4, 4), num_features=1).eval()


@pytest.fixture(scope="session")
def student_folder(tiny_flux_folder, tmp_path_factory):
    """An exported student of the tiny teacher whose projections have moved a little."""
    pipeline = load_teacher(tiny_flux_folder, device="cpu").pipeline
    linearize(pipeline, mixer="clear", window=2)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trained_parameters(pipeline.transformer).values():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return export_student(pipeline, tmp_path_factory.mktemp("students") / "student")


@pytest.fixture(scope="session")
def run_script():
    """Runs a script as a user starts it, in a given folder."""

    def run(name, folder, *arguments):
        command = [sys.executable, str(ROOT / "scripts" / name), *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)

    return run


@pytest.fixture(scope="session")
def compose_config():
    """Composes an entry point's config with overrides."""

    def composed(name, *overrides):
        register_resolvers(ROOT)
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            return compose(name, list(overrides))

    return composed
