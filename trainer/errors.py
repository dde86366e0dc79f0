"""The one exception that means: the user can put this right."""


class UsageError(ValueError):
    """A mistake in a flag, a dataset, a model folder or the machine, told in one line.

    The message names the flag or file, the value found and the cure. `launch` prints it without a
    traceback and exits with code 2; every other exception is a bug and keeps its traceback.
    """

    def __str__(self) -> str:
        return one_line(super().__str__())


def one_line(text: str) -> str:
    """The text in a line that any stream takes, whatever a file or value in it holds."""
    return " ".join(text.splitlines()).encode(errors="backslashreplace").decode()
