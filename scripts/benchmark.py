"""Measures speed against the dense teacher: python scripts/benchmark.py suite=attention."""

from pathlib import Path

import hydra
from omegaconf import DictConfig

from linearize.config import register_resolvers, user_errors

register_resolvers(Path(__file__).resolve().parents[1])


@hydra.main(version_base="1.3", config_path="../configs", config_name="benchmark")
def main(cfg: DictConfig) -> None:
    """Runs with configs/benchmark.yaml and the command line's overrides."""
    with user_errors():
        from linearize.benchmark.runner import benchmark

        benchmark(cfg)


if __name__ == "__main__":
    main()
