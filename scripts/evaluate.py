"""Measures an exported student against its teacher: python scripts/evaluate.py student=<run dir>/student."""

from pathlib import Path

import hydra
from omegaconf import DictConfig

from linearize.config import register_resolvers, user_errors
from linearize.evaluate import evaluate

register_resolvers(Path(__file__).resolve().parents[1])


@hydra.main(version_base="1.3", config_path="../configs", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    """Runs with configs/evaluate.yaml and the command line's overrides."""
    with user_errors():
        evaluate(cfg)


if __name__ == "__main__":
    main()
