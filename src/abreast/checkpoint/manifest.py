"""The record of a conversion, abreast.json: what it says, and whether the files agree with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from abreast.checkpoint.files import MANIFEST, read_json, sha256_of
from abreast.errors import CheckpointError
from abreast.plan import Plan


def read_manifest(folder: Path) -> tuple[Plan, dict[str, str], dict[str, str], dict[str, str]]:
    """The plan, and the sha256 of every file: converted, original, healed. Raises AbreastError.

    The last is empty for a checkpoint that is not healed.
    """
    manifest, where = read_json(folder / MANIFEST), f"'{folder / MANIFEST}'"
    try:
        plan = Plan.model_validate(manifest["plan"])
        lists = [manifest["files"], manifest["source"]["files"]]
        if "healed" in manifest:
            lists.append(manifest["healed"]["weights"])
        hashes = [{str(k): str(v["sha256"]) for k, v in files.items()} for files in lists]
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise CheckpointError(f"{where} holds no valid plan: {reason}; convert again") from None
    except (AttributeError, KeyError, TypeError):
        raise CheckpointError(f"{where} is not the record of a conversion; convert again") from None
    if not all("config.json" in files for files in hashes):
        raise CheckpointError(f"{where} does not record all files; convert again")
    return plan, hashes[0], hashes[1], hashes[2] if len(hashes) > 2 else {}


def damaged(folder: Path, files: dict[str, str]) -> Iterator[str]:
    """What is wrong with the files of a folder, one sentence each; files: name -> sha256."""
    for name, sha256 in files.items():
        path = folder / name
        if not path.is_file():
            yield f"file {name} is missing"
        elif sha256_of(path) != sha256:
            yield f"file {name} is not the one recorded in {MANIFEST}"
