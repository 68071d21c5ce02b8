"""Arguments that several mixers take, and how a wrong one is told."""

from __future__ import annotations

from linearize.errors import LinearizeError, check_count

TEXT = ("exact", "state")
ROPE = ("before_map", "after_map", "none")
VARIANTS = ("dit", "paper")


def check_choice(mixer: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    """Checks an argument that has a few values.

    Raises:
        LinearizeError: It is none of them.
    """
    if value not in choices:
        raise LinearizeError(f"mixer {mixer!r} got {name}={value!r}; choose {', '.join(choices[:-1])} or {choices[-1]}")


def check_number(mixer: str, name: str, value: object, least: int) -> None:
    """Checks an argument that counts something.

    Raises:
        LinearizeError: It is no whole number, or below the least.
    """
    check_count(f"mixer {mixer!r} got {name}", value, least)


def check_rotation(mixer: str, rope: str, width: int) -> None:
    """Checks that features of so many channels can be rotated, two by two.

    Raises:
        LinearizeError: They cannot.
    """
    if rope == "after_map" and width % 2:
        raise LinearizeError(
            f"mixer {mixer!r} got width={width} with rope='after_map', which rotates channels two by two; choose an "
            "even width, or rope='before_map' or 'none'"
        )
