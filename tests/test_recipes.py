"""The commands of docs/recipes.md, run on the tiny teacher."""

import re
import shlex
from pathlib import Path

import pytest

from linearize.distillation.checkpoint import read_checkpoint
from linearize.train import train
from runs import ROOT, compose_train, tiny_overrides

PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.startswith("python train.py ")]
EXPERIMENTS = [command.partition("experiment=")[2] for command in COMMANDS if "experiment=" in command]


@pytest.fixture(scope="module")
def tiny(tiny_flux_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of a tiny run of three steps; its samples are generated once."""
    overrides = tiny_overrides(tiny_flux_folder, tmp_path_factory.mktemp("cache"))
    kept = [one for one in overrides if not one.startswith(("window=", "optimizer."))]
    return [
        *(*kept, "trainer.max_steps=3", "calibration_samples=2", "trainer.limit_val_batches=1"),
        *("evaluate=false", "export=null", "logger=none", "callbacks.pictures.every_n_steps=0"),
    ]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_trains(tiny: list[str], tmp_path: Path, command: str) -> None:
    overrides = [*shlex.split(command)[2:], *tiny]
    cfg = compose_train(*overrides, run_dir=tmp_path)
    train(cfg)
    checkpoint = read_checkpoint(tmp_path / "checkpoints" / "last.safetensors")
    assert checkpoint["global_step"] == 3
    adapted = any(".lora_A." in name for name in checkpoint["state_dict"])
    assert adapted == (cfg.adapter is not None)
    assert checkpoint["linearize"]["stages"].keys() == ({"transfer", "distill"} if cfg.stages.transfer else {"distill"})


def test_the_page_has_a_row_for_every_experiment() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", PAGE, flags=re.MULTILINE)
    assert rows == EXPERIMENTS and len(rows) == 6
    for experiment in rows:
        text = (ROOT / "configs" / "experiment" / f"{experiment}.yaml").read_text()
        assert f"python train.py experiment={experiment}\n" in text


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / link).exists(), link
