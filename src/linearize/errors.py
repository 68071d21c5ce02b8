"""The one exception that a user's mistake raises."""


class LinearizeError(ValueError):
    """A user's mistake: its message is one sentence with the value, the choices and the next step."""
