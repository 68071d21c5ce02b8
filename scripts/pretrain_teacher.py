"""Trains the scenes teacher and its judge: python scripts/pretrain_teacher.py --help."""

from pathlib import Path

import hydra
from omegaconf import DictConfig

from linearize.config import register_resolvers, user_errors
from linearize.overrides import override_errors

ROOT = Path(__file__).resolve().parents[1]
register_resolvers(ROOT)


@hydra.main(version_base="1.3", config_path="../configs", config_name="pretrain")
def main(cfg: DictConfig) -> None:
    """Runs the stages named by cfg.stages, or says in one sentence why it cannot."""
    with user_errors():
        from linearize.pretrain import pretrain

        pretrain(cfg)


if __name__ == "__main__":
    with override_errors(ROOT / "configs", "pretrain"):
        main()
