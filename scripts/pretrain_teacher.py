"""Trains the scenes teacher and its judge: python scripts/pretrain_teacher.py --help."""

from typing import Any

from linearize.entry import entry_point


@entry_point(__file__, "pretrain")
def main(cfg: Any) -> None:
    """Runs the stages named by cfg.stages."""
    from linearize.pretrain import pretrain

    pretrain(cfg)


if __name__ == "__main__":
    main()
