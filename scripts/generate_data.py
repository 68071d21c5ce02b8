"""Lets a teacher generate samples: python scripts/generate_data.py out=data/generated/mine num_samples=1000."""

from typing import Any

from linearize.entry import entry_point


@entry_point(__file__, "generate")
def main(cfg: Any) -> None:
    """Generates with configs/generate.yaml and the command line's overrides."""
    from linearize.generate import generate

    generate(cfg)


if __name__ == "__main__":
    main()
