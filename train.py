"""Distils a teacher into a student of linear cost: python train.py mixer=clear window=16."""

from pathlib import Path

import hydra
from omegaconf import DictConfig

from linearize.config import register_resolvers, user_errors
from linearize.overrides import override_errors

ROOT = Path(__file__).resolve().parent
register_resolvers(ROOT)


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(cfg: DictConfig) -> float | None:
    """Trains with configs/train.yaml and the command line's overrides; returns the number that a sweep minimises."""
    with user_errors():
        from linearize.train import train

        return train(cfg).get(cfg.objective)
    return None


if __name__ == "__main__":
    with override_errors(ROOT / "configs", "train"):
        main()
