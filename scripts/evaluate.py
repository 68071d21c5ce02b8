"""Measures an exported student against its teacher: python scripts/evaluate.py student=<run dir>/student."""

from typing import Any

from linearize.entry import entry_point


@entry_point(__file__, "evaluate")
def main(cfg: Any) -> None:
    """Measures with configs/evaluate.yaml and the command line's overrides."""
    from linearize.evaluate import evaluate

    evaluate(cfg)


if __name__ == "__main__":
    main()
