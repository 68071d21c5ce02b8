"""Distils a teacher into a student of linear cost: python train.py mixer=clear window=16."""

from typing import Any

from linearize.entry import entry_point


@entry_point(__file__, "train")
def main(cfg: Any) -> float | None:
    """Trains with configs/train.yaml and the command line's overrides; returns the number that a sweep minimises."""
    from linearize.train import train

    return train(cfg).get(cfg.objective)


if __name__ == "__main__":
    main()
