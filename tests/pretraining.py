"""Small pre-training runs: the real configuration, smaller still than the smoke run."""

from pathlib import Path
from typing import Any

import lightning
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from linearize.config import register_resolvers
from linearize.files import state_hash, write_json
from runs import ROOT, InterruptAt

QUICK = (
    *("progress_bar=false", "num_judged=2", "autoencoder.batch_size=1", "autoencoder.resolutions=[64]"),
    *("judge.batch_size=2", "judge.max_steps=2", "pretraining.max_steps=2", "time.side=64"),
    "pretraining.phases=[{until: 0.5, buckets: [{side: 64, num_text_tokens: 32, batch_size: 2}]},"
    "{until: 1.0, buckets: [{side: 128, num_text_tokens: 40, batch_size: 1}]}]",
)


def compose_pretrain(*overrides: str, output_folder: Path) -> DictConfig:
    """The config of `python scripts/pretrain_teacher.py --config-name pretrain_smoke <overrides>`, and quicker."""
    register_resolvers(ROOT)
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose("pretrain_smoke", overrides=[*QUICK, f"output_folder={output_folder}", *overrides])


def trainer_interrupted_at(*, step: int, callbacks: list[lightning.Callback], **arguments: Any) -> lightning.Trainer:
    """A `trainer._target_` that presses Ctrl-C in the middle of optimizer step `step`."""
    return lightning.Trainer(callbacks=[InterruptAt(step), *callbacks], **arguments)


class RecordWeights(lightning.Callback):
    """Writes what each rank ends with."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        record = {
            "weights": state_hash(dict(pl_module.named_parameters())),
            "average": state_hash(pl_module.average.average),
            "loss": trainer.callback_metrics["flow"].item(),
            "world_size": trainer.world_size,
            "samples_seen": pl_module.samples_seen,
        }
        write_json(self.folder / f"rank{trainer.global_rank}.json", record)


def trainer_recording(*, folder: str, callbacks: list[lightning.Callback], **arguments: Any) -> lightning.Trainer:
    """A `trainer._target_` whose ranks leave a record of their weights in `folder`."""
    return lightning.Trainer(callbacks=[RecordWeights(folder), *callbacks], **arguments)
