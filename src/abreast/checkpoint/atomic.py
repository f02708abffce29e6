"""Writing whole or not at all: folders, files, and numbers that JSON can hold; knows no torch."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from abreast.errors import CheckpointError


@contextmanager
def publish(out: Path, *, needed_bytes: int = 0) -> Iterator[Path]:
    """A staging folder that becomes `out` if the block succeeds and vanishes if it does not.

    It lies beside `out`, so that the final step is one rename. Raises CheckpointError when `out`
    exists already, its parent is missing or not writable, or the disk has less than needed_bytes.
    """
    check_free(out)
    parent = out.absolute().parent
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise CheckpointError(
            f"'{parent}' has {free / 1e9:.1f} GB free, {needed_bytes / 1e9:.1f} GB are needed; "
            "make room or choose another disk"
        )
    try:
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=parent))
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"cannot write in '{parent}': {reason}") from None
    try:
        yield staging
        for path in staging.iterdir():
            path.chmod(0o644) if path.is_file() else None
        staging.chmod(0o755)
        check_free(out)
        staging.rename(out)
    except OSError as error:
        # The file that failed may be one of the source's, which is read inside the block.
        place = error.filename or out
        raise CheckpointError(
            f"'{place}': {error.strerror or error}; nothing was written"
        ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_free(out: Path) -> None:
    """Raise CheckpointError unless `out` can be made: it is absent and its parent is a folder."""
    if os.path.lexists(out):
        raise CheckpointError(f"output '{out}' exists; name a new folder or remove it first")
    if not os.path.isdir(out.absolute().parent):
        raise CheckpointError(f"folder '{out.absolute().parent}' does not exist; create it first")


def write(path: Path, text: str) -> None:
    """Write a file as a whole or not at all."""
    staging = path.with_name(f".{path.name}.new")
    staging.write_text(text, encoding="utf-8")
    os.replace(staging, path)


def finite(value: Any) -> Any:
    """JSON-ready values with None in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
