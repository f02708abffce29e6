"""The one atomic write: whatever is written is there as a whole or not at all. Knows no torch."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Literal

from abreast.errors import AbreastError, CheckpointError

LEAVING = re.compile(r"\..+\.(new|partial-\w+)")  # what killed processes leave


@contextmanager
def publish(
    out: Path, *, needed_bytes: int = 0, kind: Literal["folder", "file"] = "folder"
) -> Iterator[Path]:
    """A staging folder or file that becomes `out` if the block succeeds, else vanishes.

    It lies beside `out`, so that the final step is one rename. A staging file is alone in a folder
    of its own, where the block may put other files. What a killed process left is removed. Raises
    CheckpointError when `out` exists already or another process is writing it, its parent is
    missing or not writable, or the disk has less than needed_bytes.
    """
    check_free(out, kind)
    parent, prefix = out.absolute().parent, f".{out.name}.partial-"
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise CheckpointError(
            f"'{parent}' has {free / 1e9:.1f} GB free, {needed_bytes / 1e9:.1f} GB are needed; "
            "make room or choose another disk"
        )
    for path in parent.glob(f"{escape(prefix)}*"):
        if (holder := _holder(path)) is not None:
            raise CheckpointError(f"{holder} is writing '{out}'; wait for it or name another")
    try:
        with scratch(prefix, parent) as folder:
            staging = folder if kind == "folder" else folder / "content"
            yield staging
            if kind == "folder":
                for path in folder.iterdir():
                    path.chmod(0o644) if path.is_file() else None
                folder.chmod(0o755)
            check_free(out, kind)
            staging.rename(out)
    except OSError as error:
        # The file that failed may be one of the source's, which is read inside the block.
        raise CheckpointError(
            f"'{error.filename or out}': {error.strerror or error}; nothing was written"
        ) from None


@contextmanager
def scratch(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """A new folder whose name begins with prefix, and which vanishes with the block.

    parent: where it lies, None for the system's temporary files. It is locked meanwhile; those
    without a lock were left by killed processes, and are removed first.
    """
    parent = parent or Path(tempfile.gettempdir())
    for path in parent.glob(f"{escape(prefix)}*"):
        _remove_leaving(path)
    folder = parent / f"{prefix}{os.urandom(4).hex()}"
    try:
        folder.mkdir(0o700)
        with ExitStack() as stack:
            with suppress(OSError):  # not all file systems have locks
                stack.enter_context(_locked(folder))
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder, made where it is missing, for this process; remove what a killed one left.

    A folder made here that stays empty is removed again. Raises AbreastError where another process
    holds it. One that cannot be made, or locked, is not held: whoever writes there says so.
    """
    absent = [path for path in (folder, *folder.absolute().parents) if not os.path.lexists(path)]
    with ExitStack() as stack:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(_locked(folder))
            except BlockingIOError:
                raise AbreastError(
                    f"{_holder(folder)} is working in '{folder}'; wait for it or choose another"
                ) from None
            for root, folders, names in os.walk(folder):
                for name in filter(LEAVING.fullmatch, (*folders, *names)):
                    _remove_leaving(Path(root, name))
        try:
            yield
        finally:
            for path in absent:
                with suppress(OSError):
                    path.rmdir()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lock a file or folder. Raises BlockingIOError where it is locked; the kernel unlocks it when
    this process ends, however it does."""
    if sys.platform == "win32":
        raise OSError("no locks on Windows")
    import fcntl

    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _holder(path: Path) -> str | None:
    """The process that has locked a path, None if it is not locked."""
    try:
        with _locked(path):
            return None
    except BlockingIOError:
        with suppress(OSError):
            inode = f":{path.stat().st_ino}"
            for line in Path("/proc/locks").read_text().splitlines():
                _, kind, _, _, process, where, *_ = line.split()
                if kind == "FLOCK" and where.endswith(inode):
                    return f"process {process}"
        return "another process"
    except OSError:
        return None


def _remove_leaving(path: Path) -> None:
    with suppress(OSError), _locked(path):
        path.unlink() if path.is_file() else shutil.rmtree(path)


def check_free(out: Path, kind: Literal["folder", "file"] = "folder") -> None:
    """Raise CheckpointError unless `out` can be made: it is absent and its parent is a folder."""
    if "\0" in str(out):
        raise CheckpointError(f"{str(out)!r} is no name for a {kind}: it holds a null byte")
    if os.path.lexists(out):
        raise CheckpointError(f"output '{out}' exists; name a new {kind} or remove it first")
    if not os.path.isdir(out.absolute().parent):
        raise CheckpointError(f"folder '{out.absolute().parent}' does not exist; create it first")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to; the file there replaces `path` if the block succeeds, else vanishes."""
    staging = path.with_name(f".{path.name}.new")
    staging.unlink(missing_ok=True)  # a killed process's, or a link that somebody put there
    try:
        yield staging
        os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)


def write(path: Path, content: str | bytes) -> None:
    """Write a file as a whole or not at all; text as UTF-8."""
    with replacing(path) as staging:
        staging.write_bytes(content.encode() if isinstance(content, str) else content)
