"""Errors that the user can fix, and the commands that fix them."""

import re
import shlex
import shutil
import sys
from importlib import metadata


class AbreastError(ValueError):
    """Something wrong with the user's input: one line that says what is wrong and what to do.

    The command line prints it and exits with status 2; every other exception is a bug of ours.
    """

    def __init__(self, message: str) -> None:
        # Names from files may hold line breaks.
        super().__init__(" ".join(message.split()))


class CheckpointError(AbreastError):
    """A checkpoint that is missing, broken or unsafe, or an output that cannot be written."""


def install(extra: str) -> str:
    """The command that installs the packages of an extra into this environment."""
    named = rf"extra == ['\"]{extra}['\"]"
    lines = metadata.requires("abreast") or []
    packages = [line.partition(";")[0].strip() for line in lines if re.search(named, line)]
    known = shutil.which("python") == sys.executable
    python = "python" if known else shlex.quote(sys.executable)
    return f"{python} -m pip install {' '.join(map(shlex.quote, packages))}"


def is_fault(error: BaseException) -> bool:
    """Whether a library failed: an Exception, or a panic in Rust, which is not one to Python."""
    return isinstance(error, Exception) or type(error).__module__ == "pyo3_runtime"


def first_line(error: BaseException) -> str:
    """First line of an error's message, or the name of its class where it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip()
