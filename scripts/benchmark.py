"""Measures speed against the dense teacher: python scripts/benchmark.py suite=attention."""

from typing import Any

from linearize.entry import entry_point


@entry_point(__file__, "benchmark")
def main(cfg: Any) -> None:
    """Runs with configs/benchmark.yaml and the command line's overrides."""
    from linearize.benchmark.runner import benchmark

    benchmark(cfg)


if __name__ == "__main__":
    main()
