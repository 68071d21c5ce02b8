"""The one exception that a user's mistake raises."""


class LinearizeError(ValueError):
    """A user's mistake: its message is one sentence with the value, the choices and the next step."""


def mistake_behind(error: BaseException | None) -> LinearizeError | None:
    """The user's mistake that became another exception on its way up, as it does within a compiler."""
    while error is not None and not isinstance(error, LinearizeError):
        error = error.__cause__ or error.__context__
    return error
