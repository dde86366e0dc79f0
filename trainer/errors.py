"""The exceptions that end a run in one line: what the user can put right, and lost ranks."""


class UsageError(ValueError):
    """A mistake in a flag, a dataset, a model folder or the machine, told in one line.

    The message names the flag or file, the value found and the cure. `launch` prints it without a
    traceback and exits with code 2; every other exception is a bug and keeps its traceback.
    """

    def __str__(self) -> str:
        return one_line(super().__str__())


class RanksLost(RuntimeError):
    """Other ranks are gone or do not answer, told in one line that names them.

    Args:
        speaks: whether this rank is the one of those left that says it.
    """

    def __init__(self, message: str, speaks: bool = True) -> None:
        super().__init__(message)
        self.speaks = speaks


def one_line(text: str) -> str:
    """The text in a line that any stream takes, whatever a file or value in it holds."""
    return " ".join(text.splitlines()).encode(errors="backslashreplace").decode()
