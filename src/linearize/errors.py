"""The one exception that a user's mistake raises, checks that raise it, and what a process ends with."""

import re
from collections.abc import Iterable

# Exit codes of entry points: after a mistake of the user, and after Ctrl-C or SIGTERM.
MISTAKE, INTERRUPTED = 2, 130
# What PyTorch's allocators say: those of GPUs, CUDA itself, and that of the CPU, whose error has no class of its own.
_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory")


class LinearizeError(ValueError):
    """A user's mistake: its message is one sentence with the value, the choices and the next step."""


def mistake_behind(error: BaseException | None) -> LinearizeError | None:
    """The user's mistake that became another exception on its way up, as it does within a compiler."""
    while error is not None and not isinstance(error, LinearizeError):
        error = error.__cause__ or error.__context__
    return error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory is full: that of a GPU, or a CPU's, for which PyTorch has no class of errors."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None
    )


def check_names(setting: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Checks a setting that lists names.

    Raises:
        LinearizeError: One of them is not known.
    """
    known = list(known)
    for name in names:
        if name not in known:
            raise LinearizeError(f"{setting} names {name!r}: choose from {', '.join(known)}.")


def check_count(setting: str, value: object, least: int = 1) -> None:
    """Checks a setting that counts something.

    Raises:
        LinearizeError: It is no whole number, or below the least.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise LinearizeError(f"{setting}={value!r}; choose a whole number, {least} or more")


def check_share(setting: str, value: object) -> None:
    """Checks a setting that is a part of a whole, and not all of it.

    Raises:
        LinearizeError: It is no number from 0 up to, not including, 1.
    """
    if not isinstance(value, int | float) or not 0 <= value < 1:
        raise LinearizeError(f"{setting}={value} is a share: use a number from 0 up to, not including, 1.")
