"""The one family of errors that are the user's to mend."""


class AbreastError(ValueError):
    """A fault in what the user gave: the message is one line, what is wrong and what to do.

    The command line prints it and leaves with status 2; every other exception is ours.
    """
