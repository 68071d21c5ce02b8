"""Pictures of a student or a teacher: python scripts/sample.py student=<run dir>/student prompt="a text"."""

from typing import Any

from linearize.entry import entry_point


@entry_point(__file__, "sample")
def main(cfg: Any) -> None:
    """Draws with configs/sample.yaml and the command line's overrides."""
    from linearize.sample import sample

    sample(cfg)


if __name__ == "__main__":
    main()
