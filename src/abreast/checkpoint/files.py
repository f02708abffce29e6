"""The folder of a checkpoint: find it, hash it, publish it; its manifest. Knows no torch."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Collection, Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from abreast.errors import CheckpointError, first_line
from abreast.plan import Plan

MANIFEST = "abreast.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HASH_CHUNK = 2 << 20
_PICKLES = {".bin", ".pt", ".pth", ".ckpt"}
_TEMPLATES = "additional_chat_templates"
_SMALL = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "README.md")  # fetched with weights
# What may travel with the weights; nobody can list what may not: access tokens, training state,
# adapters, and all else that people keep in a model's folder.
_TRAVELS = re.compile(
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|tekken|generation_config"
    r"|chat_template|processor_config|(video_)?preprocessor_config)\.json"
    r"|(tokenizer|spiece|spm|sentencepiece(\.bpe)?)\.model|tokenizer\.model\.v\d+\w*|\w+\.tiktoken"
    r"|(vocab|merges)\.txt|vocab\.bpe|chat_template\.jinja|(additional_)?chat_templates/[\w.-]+\.jinja"
    r"|(?i:licen[cs]e|notice|copying|use_policy)(-[\w.-]+|\.(txt|md|rst))?"
    r"|heal\.(csv|png)"
)
_MADE_HERE = re.compile(
    r"config\.json|modeling\.py|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
)


def resolve(model: str | Path, *, revision: str | None = None) -> tuple[Path, str | None]:
    """Local folder of a model, downloaded from the Hugging Face Hub if `model` is a hub id.

    model: a folder, or ``ORG/NAME``. Returns (folder, revision); the revision of a local folder is
    None. Raises as `locate`.
    """
    folder, revision, _ = locate(model, revision=revision)
    return folder, revision


def locate(
    model: str | Path, *, revision: str | None = None, weights: bool = True
) -> tuple[Path, str | None, tuple[str, ...]]:
    """As `resolve`, and the names of the weight files that are only on the Hub.

    Of a model on the Hub, the safetensors files that its index names (or the single one) are
    fetched, unless weights is False, and of the rest tokenizer, configs, licence and card; other
    formats and copies of the weights, other folders and code are not. Without the Hub what its
    cache holds will do. Raises CheckpointError when there is no such folder and the Hub has, or
    gives, no such model.
    """
    folder = Path(os.path.expanduser(model))
    if str(model) and os.path.isdir(folder):
        return folder, None, ()
    if os.path.isfile(folder):
        raise CheckpointError(f"'{model}' is a file; give the folder that holds config.json")
    name = str(model)
    parts = name.split("/")
    if len(parts) > 2 or name.startswith((".", "~", "/")) or not all(parts):
        raise CheckpointError(f"no model at '{model}'; give a folder or a Hugging Face id ORG/NAME")
    try:
        folder, there = _download(name, revision)
        shards = weight_files(folder, there)[0] if there else ()
        absent = tuple(shard for shard in shards if not (folder / shard).is_file())
        if weights and absent:
            _download(name, folder.name, absent)
    except CheckpointError:
        raise
    except Exception as error:  # the client raises many kinds; all mean that it is not available
        raise CheckpointError(
            f"no folder '{model}', and the Hugging Face Hub does not give it "
            f"({first_line(error)}); check the name, the connection, or HF_TOKEN"
        ) from None
    return folder, folder.name, () if weights else absent


def _download(
    name: str, revision: str | None, files: tuple[str, ...] = ()
) -> tuple[Path, frozenset[str]]:
    """Fetch these files, or else what is small; return the folder and the names on the Hub.

    No names where the Hub is out of reach and the folder is what its cache holds.
    """
    from huggingface_hub import HfApi, constants, snapshot_download

    get = partial(snapshot_download, name, revision=revision)
    try:
        # snapshot_download asks the same, but waits for minutes where nobody answers.
        timeout = constants.HF_HUB_ETAG_TIMEOUT
        info = HfApi().model_info(name, revision=revision, timeout=timeout)
    except Exception:
        cached = {"local_files_only": True, "ignore_patterns": ["*/*", "*.index.json"]}
        with suppress(Exception):
            return Path(get(allow_patterns=files or _SMALL, **cached)), frozenset()
        raise
    there = frozenset(entry.rfilename for entry in info.siblings or ())
    small = [n for n in there if any(map(partial(fnmatchcase, n), _SMALL))]
    small = [n for n in small if n.startswith(_TEMPLATES) or "/" not in n]
    small = [n for n in small if n == INDEX or not n.endswith(".index.json")]
    return Path(get(allow_patterns=[*map(escape, files or small)])), there


def weight_files(
    folder: Path, elsewhere: Set[str] = frozenset()
) -> tuple[tuple[str, ...], dict[str, str] | None]:
    """The safetensors files of a model, and its index, tensor -> file, None for a single file.

    elsewhere: names that count as if they lay in the folder. Raises CheckpointError for weights in
    pickles only, names that leave the folder, and files that are neither here nor elsewhere.
    """
    here = {path.name for path in folder.iterdir() if path.is_file()} | elsewhere
    if SINGLE in here:
        return (SINGLE,), None
    if INDEX not in here:
        if any(Path(name).suffix in _PICKLES for name in here):
            raise CheckpointError(
                f"'{folder}' holds pickled weights only, which can run code when opened; "
                "save it as safetensors first (model.save_pretrained does)"
            )
        raise CheckpointError(f"'{folder}' holds no {SINGLE} and no {INDEX}; give a model folder")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"'{folder / INDEX}' has no weight_map; download it again")
    for name in weight_map.values():
        safe = isinstance(name, str) and name == os.path.basename(name) and "\\" not in name
        if not safe or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{INDEX} names shard {name!r}, which is not a plain .safetensors file name; "
                "do not trust this checkpoint"
            )
    for shard in (shards := tuple(sorted(set(weight_map.values())))):
        if shard not in here:
            raise CheckpointError(f"shard '{shard}' is missing from '{folder}'; download it")
    return shards, weight_map


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises CheckpointError when it is absent or not one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"'{path.parent}' has no {path.name}; give a model folder") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: also a number too long
        reason = getattr(error, "strerror", None) or "not valid JSON"
        raise CheckpointError(f"'{path}' cannot be read: {reason}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"'{path}' is not a JSON object; download it again")
    return data


def finite(value: Any) -> Any:
    """JSON-ready values with None in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sha256_of(path: Path, *, stop: threading.Event | None = None) -> str:
    """Hash of a file. Setting `stop` from another thread ends it early with an empty string."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(HASH_CHUNK):
            if stop is not None and stop.is_set():
                return ""
            digest.update(chunk)
    return digest.hexdigest()


def hash_entry(path: Path, *, stop: threading.Event | None = None) -> dict[str, Any]:
    """What a manifest says about one file: its sha256 and its size in bytes."""
    return {"sha256": sha256_of(path, stop=stop), "bytes": path.stat().st_size}


def model_hash(files: Mapping[str, str]) -> str:
    """Hash of a model: of its config and every shard. files: name -> sha256, at least of these."""
    names = ["config.json", *sorted(name for name in files if name.endswith(".safetensors"))]
    return hashlib.sha256("".join(f"{n} {files[n]}\n" for n in names).encode()).hexdigest()


def companions(folder: Path) -> list[str]:
    """Names of the files that travel with the weights: tokenizer, chat templates, those in a folder
    of their own included, generation and processor configs, licence and notices.
    """
    paths = (*folder.iterdir(), *folder.glob("*chat_templates/*"))
    names = (path.relative_to(folder).as_posix() for path in paths if path.is_file())
    return sorted(filter(_TRAVELS.fullmatch, names))


def copy_companions(folder: Path, target: Path) -> None:
    for name in companions(folder):
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / name, target / name)


def left_behind(folder: Path, read: Collection[str]) -> list[str]:
    """Names of the files and folders that do not travel, but for the files that are `read`."""
    travels = {name.split("/")[0] for name in companions(folder)}
    travels |= {"config.json", "README.md", MANIFEST}
    return sorted(
        path.name + "/" * path.is_dir()
        for path in folder.iterdir()
        if path.name not in travels | set(read) and not path.name.startswith(".")
    )


@contextmanager
def publish(
    out: Path, *, needed_bytes: int = 0, kind: Literal["folder", "file"] = "folder"
) -> Iterator[Path]:
    """A staging folder or file that becomes `out` if the block succeeds, else vanishes.

    It lies beside `out`, so that the final step is one rename. A staging file is alone in a folder
    of its own, where the block may put other files. Raises CheckpointError when `out` exists
    already, its parent is missing or not writable, or the disk has less than needed_bytes.
    """
    check_free(out, kind)
    parent = out.absolute().parent
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise CheckpointError(
            f"'{parent}' has {free / 1e9:.1f} GB free, {needed_bytes / 1e9:.1f} GB are needed; "
            "make room or choose another disk"
        )
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=parent))
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"cannot write in '{parent}': {reason}") from None
    staging = folder if kind == "folder" else folder / "content"
    try:
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
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_free(out: Path, kind: Literal["folder", "file"] = "folder") -> None:
    """Raise CheckpointError unless `out` can be made: it is absent and its parent is a folder."""
    if os.path.lexists(out):
        raise CheckpointError(f"output '{out}' exists; name a new {kind} or remove it first")
    if not os.path.isdir(out.absolute().parent):
        raise CheckpointError(f"folder '{out.absolute().parent}' does not exist; create it first")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to; the file there replaces `path` if the block succeeds, else vanishes."""
    staging = path.with_name(f".{path.name}.new")
    try:
        yield staging
        os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)


def write(path: Path, content: str | bytes) -> None:
    """Write a file as a whole or not at all; text as UTF-8."""
    with replacing(path) as staging:
        staging.write_bytes(content.encode() if isinstance(content, str) else content)


@dataclass(frozen=True)
class Manifest:
    """The record of a conversion, abreast.json.

    source, revision: the original model as it was named. files, source_files, healed_files: sha256
    by file name, of the conversion, its original, and the healed weights that were converted, which
    are empty where nothing was healed. healed: how it was healed (method, kl_before, kl_after, ...;
    see abreast.heal), else None. record: everything that the file holds, with None for numbers that
    are not finite.
    """

    plan: Plan
    source: str | None
    revision: str | None
    files: Mapping[str, str]
    source_files: Mapping[str, str]
    healed_files: Mapping[str, str]
    healed: Mapping[str, Any] | None
    record: Mapping[str, Any]


def read_manifest(folder: Path) -> Manifest:
    """Manifest of a converted checkpoint. Raises CheckpointError where there is no valid one."""
    record, name = finite(read_json(folder / MANIFEST)), f"'{folder / MANIFEST}'"
    try:
        plan = Plan.model_validate(record["plan"])
        source, healed = record["source"], record.get("healed")
        files, source_files, healed_files = (
            {file: str(entry["sha256"]) for file, entry in entries.items()}
            for entries in (
                record["files"],
                source["files"],
                {} if healed is None else healed["weights"],
            )
        )
        origin, revision = source.get("name"), source.get("revision")
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise CheckpointError(f"{name} holds no valid plan: {reason}; convert again") from None
    except (AttributeError, KeyError, TypeError):
        raise CheckpointError(f"{name} is not the record of a conversion; convert again") from None
    # Older versions copied, and recorded, whatever lay beside the weights.
    files = {n: h for n, h in files.items() if _TRAVELS.fullmatch(n) or _MADE_HERE.fullmatch(n)}
    complete = [files, source_files] if healed is None else [files, source_files, healed_files]
    if not all("config.json" in names for names in complete):
        raise CheckpointError(f"{name} does not record all files; convert again")
    return Manifest(plan, origin, revision, files, source_files, healed_files, healed, record)


def write_manifest(
    folder: Path,
    plan: Plan,
    *,
    source: Mapping[str, Any],
    files: Mapping[str, Any],
    architecture: str,
    warnings: tuple[str, ...],
    versions: Mapping[str, str],
    healed: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the record of a conversion to `folder` and return it.

    source: name, revision, files and dropped_tensors of the checkpoint that was read. files:
    name -> `hash_entry` of every file in `folder`. healed: where the checkpoint that was read holds
    healed weights: how they were made, and under "source" the entry of the true original.
    """
    record: dict[str, Any] = {
        "format": 1,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "plan": plan.model_dump(mode="json", exclude_none=True),
        "shorthand": plan.shorthand,
        "num_layers": plan.num_layers,
        "depth": plan.depth,
        "architecture": architecture,
        "warnings": list(warnings),
        "source": dict(source),
        "files": dict(files),
        "versions": dict(versions),
    }
    if healed is not None:
        record["healed"] = {**healed, "weights": source["files"]}
        record["source"] = record["healed"].pop("source")
    (folder / MANIFEST).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def damaged(folder: Path, files: Mapping[str, str]) -> Iterator[str]:
    """What is wrong with the files of a folder, one sentence each; files: name -> sha256."""
    for name, sha256 in files.items():
        path = folder / name
        if not path.is_file():
            yield f"file {name} is missing"
        elif sha256_of(path) != sha256:
            yield f"file {name} is not the one recorded in {MANIFEST}"
