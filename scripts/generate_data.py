"""Lets a teacher generate samples: python scripts/generate_data.py out=data/generated/mine num_samples=1000."""

from pathlib import Path

import hydra
from omegaconf import DictConfig

from linearize.config import register_resolvers, user_errors
from linearize.generate import generate

register_resolvers(Path(__file__).resolve().parents[1])


@hydra.main(version_base="1.3", config_path="../configs", config_name="generate")
def main(config: DictConfig) -> None:
    """Generates, or says in one sentence why it cannot."""
    with user_errors():
        generate(config)


if __name__ == "__main__":
    main()
