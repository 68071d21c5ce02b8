"""Pictures of a student or a teacher: python scripts/sample.py student=<run dir>/student prompt="a text"."""

from pathlib import Path

import hydra
from omegaconf import DictConfig

from linearize.config import register_resolvers, user_errors
from linearize.sample import sample

register_resolvers(Path(__file__).resolve().parents[1])


@hydra.main(version_base="1.3", config_path="../configs", config_name="sample")
def main(cfg: DictConfig) -> None:
    """Runs with configs/sample.yaml and the command line's overrides."""
    with user_errors():
        sample(cfg)


if __name__ == "__main__":
    main()
