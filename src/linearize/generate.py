"""Generates a store of samples: what scripts/generate_data.py calls."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from linearize.config import build_prompts, build_teacher, plain, under_root
from linearize.data.generation import generate_samples
from linearize.data.settings import GenerationSettings
from linearize.data.shards import shard_ranges
from linearize.errors import LinearizeError, check_count
from linearize.processes import process_place


def _out_folder(config: DictConfig) -> Path:
    if OmegaConf.is_missing(config, "out"):
        raise LinearizeError("out is not set: give the folder of the store, for example out=data/generated/mine.")
    folder = under_root(config.root, config.out)
    assert folder is not None
    return folder


def _num_present(folder: Path) -> int:
    return sum(len(shard) for shard in shard_ranges(folder))


def _show_summary(summary: dict[str, Any]) -> None:
    table = Table(show_header=False, title="samples")
    for name, value in summary.items():
        table.add_row(name, str(value))
    Console().print(table)


def generate(config: DictConfig) -> dict[str, Any]:
    """Generates what a store lacks and tells what it holds.

    Args:
        config: The composed configs/generate.yaml.

    Returns:
        {"folder", "generated" (by this process), "samples", "megabytes", "teacher", "weight_hash"}

    Raises:
        LinearizeError: a setting, the teacher, the prompts or the folder is wrong; the message says what to do.
        KeyboardInterrupt: the user stopped it; the message says how far it came.
    """
    folder = _out_folder(config)
    check_count("num_samples", config.num_samples)
    source = build_prompts(config.prompts, config.root)
    settings = GenerationSettings.from_config(plain(config.generation))
    teacher = build_teacher(config)
    rank, world_size = process_place()
    try:
        generated = generate_samples(
            teacher,
            source,
            settings,
            folder,
            num_samples=config.num_samples,
            rank=rank,
            world_size=world_size,
            progress=config.progress and rank == 0,
        )
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(
            f"Stopped: {folder} holds {_num_present(folder)} of {config.num_samples} samples; the same command goes "
            "on from there."
        ) from stop
    size = sum(file.stat().st_size for file in folder.iterdir())
    summary = {
        "folder": str(folder),
        "generated": generated,
        "samples": _num_present(folder),
        "megabytes": round(size / 1e6, 1),
        "teacher": teacher.name,
        "weight_hash": teacher.weight_hash,
    }
    if rank == 0:
        _show_summary(summary)
    return summary
