"""The one family of errors that are the user's to mend."""


class AbreastError(ValueError):
    """A fault in what the user gave: the message is one line, what is wrong and what to do.

    The command line prints it and leaves with status 2; every other exception is ours.
    """

    def __init__(self, message: str) -> None:
        # Names from files may hold line breaks.
        super().__init__(" ".join(message.split()))


class CheckpointError(AbreastError):
    """A checkpoint that is missing, broken or unsafe, or a place that cannot be written."""
