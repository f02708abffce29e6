"""Errors that the user can fix."""


class AbreastError(ValueError):
    """Something wrong with the user's input: one line that says what is wrong and what to do.

    The command line prints it and exits with status 2; every other exception is a bug of ours.
    """

    def __init__(self, message: str) -> None:
        # Names from files may hold line breaks.
        super().__init__(" ".join(message.split()))


class CheckpointError(AbreastError):
    """A checkpoint that is missing, broken or unsafe, or an output that cannot be written."""


def first_line(error: BaseException) -> str:
    """First line of an error's message, or the name of its class where it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip()
