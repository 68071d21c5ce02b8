"""Trains the scenes teacher and its judge: python scripts/pretrain_teacher.py --help."""

import hydra
from omegaconf import DictConfig

from linearize.pretrain import pretrain


@hydra.main(version_base=None, config_path="../configs", config_name="pretrain")
def main(cfg: DictConfig) -> None:
    """Runs the stages named by cfg.stages."""
    pretrain(cfg)


if __name__ == "__main__":
    main()
