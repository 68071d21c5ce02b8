"""Small training runs: the real configuration, cut to the size of the tiny pipeline."""

import os
import signal
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import Tensor

from linearize.config import register_resolvers
from linearize.distillation.checkpoint import read_checkpoint

ROOT = Path(__file__).resolve().parents[1]


def tiny_overrides(teacher: Path, cache: Path) -> list[str]:
    """Command line arguments for a run on a tiny teacher: 3 x 4 tokens, two batches an epoch, six steps."""
    return [
        f"teacher.path={teacher}",
        "teacher.height=48",
        "teacher.width=64",
        "teacher.num_inference_steps=2",
        "teacher.max_sequence_length=8",
        "data=generated",
        "data.num_samples=12",
        f"data.cache={cache}",
        "data.batch_size=4",
        "data.val_share=0.2",
        "window=2",
        "judge=null",
        "reference_folder=null",
        "trainer.accelerator=cpu",
        "trainer.max_steps=6",
        "trainer.val_check_interval=2",
        "evaluation.num_prompts=2",
        "optimizer.lr=1e-3",
    ]


def compose_train(*overrides: str, run_dir: Path) -> DictConfig:
    """The config that `python train.py <overrides>` would run with, in the given folder."""
    register_resolvers(ROOT)
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose("train", overrides=[*overrides, f"run_dir={run_dir}"])


class InterruptAt(lightning.Callback):
    """Presses Ctrl-C in the middle of the micro step that leads to optimizer step `step`."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.pressed = False

    def on_train_batch_start(self, trainer: lightning.Trainer, *unused: Any) -> None:
        if trainer.global_step == self.step - 1 and not self.pressed:
            self.pressed = True
            os.kill(os.getpid(), signal.SIGINT)


def last(run_dir: Path) -> dict[str, Any]:
    return read_checkpoint(run_dir / "checkpoints" / "last.safetensors")


def assert_equal_states(first: Any, second: Any, path: str = "") -> None:
    assert type(first) is type(second), path
    if isinstance(first, Tensor):
        assert torch.equal(first, second), path
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), path
        for key, value in first.items():
            assert_equal_states(value, second[key], f"{path}/{key}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), path
        for number, (one, other) in enumerate(zip(first, second, strict=True)):
            assert_equal_states(one, other, f"{path}/{number}")
    else:
        assert first == second, path


def assert_same_training(first: Path, second: Path) -> None:
    """Weights, average, optimizer, schedule, generators, data position: equal bit for bit in both last checkpoints."""
    one, other = last(first), last(second)
    assert one["global_step"] == other["global_step"]
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "linearize", "SampleDataModule"):
        assert_equal_states(one[key], other[key], key)
