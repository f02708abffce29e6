"""The folder of a checkpoint: find it, check and hash its files; its manifest. Knows no torch."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
import threading
from collections.abc import Collection, Iterator, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from abreast.errors import CheckpointError, first_line
from abreast.plan import Plan

MANIFEST = "abreast.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HASH_CHUNK = 1 << 20
MOST_TEXT = 100 << 20  # bytes of a file that is read as a whole; the largest real ones have 40 MB
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
    r"config\.json|modeling(_members)?\.py|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
)
_READ = re.compile(
    rf"{_TRAVELS.pattern}|(adapter_)?config\.json|abreast\.json|README\.md|.*\.(py|jinja)"
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
        check_files(folder)
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
        # snapshot_download asks the same, but waits for minutes if there is no answer.
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


def check_files(folder: Path) -> None:
    """Raise CheckpointError where a file of a checkpoint is none of its own, see `own_file`.

    Only what is read counts: weights, configs, tokenizers, templates, code.
    """
    for path in (*folder.iterdir(), *folder.glob("*chat_templates/*")):
        name = path.relative_to(folder).as_posix()
        weights = name.endswith((".safetensors", INDEX))
        if weights or _READ.fullmatch(name):
            try:
                own_file(path, folder, most=None if weights else MOST_TEXT)
            except FileNotFoundError:  # a dangling link, which nothing reads
                continue
            except OSError as error:
                raise CheckpointError(
                    f"'{path}' {error.strerror}; put a file there, if you trust it"
                ) from None


def own_file(path: Path, folder: Path | None = None, *, most: int | None = MOST_TEXT) -> None:
    """Raise OSError where a path is no file of its folder; its strerror says why not.

    Such are devices, pipes, sockets, links out of the folder (but to the blobs of the Hub's cache
    that it lies in), and files of more than `most` bytes. A folder is for the caller to refuse.
    """
    home = Path(os.path.realpath(folder or path.parent))
    real, homes = Path(os.path.realpath(path)), [home]
    if home.parent.name == "snapshots":
        homes.append(home.parents[1] / "blobs")
    status = os.stat(path)
    if not any(real.is_relative_to(root) for root in homes):
        raise OSError(errno.EPERM, f"is a link to '{real}', outside its folder", str(path))
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise OSError(errno.EPERM, "is a device, pipe or socket, not a file", str(path))
    if most is not None and status.st_size > most:
        raise OSError(errno.EFBIG, f"has {status.st_size:,} bytes, too many to be what it says")


def read_text(path: Path, *, most: int | None = MOST_TEXT) -> str:
    """The text of a file, see `own_file`. Raises OSError, and UnicodeDecodeError."""
    own_file(path, most=most)
    return path.read_text(encoding="utf-8")


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
        data = json.loads(text := read_text(path))
        if r"\ud" in text.lower():  # half a character, which no file that we write can hold
            json.dumps(data, ensure_ascii=False).encode()
    except FileNotFoundError:
        raise CheckpointError(f"'{path.parent}' has no {path.name}; give a model folder") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: also a number too long
        reason = getattr(error, "strerror", None) or "not valid JSON"
        raise CheckpointError(f"'{path}' cannot be read: {reason}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"'{path}' is not a JSON object; download it again")
    return data


def cannot_unpack(settings: Any) -> str | None:
    """Why weights that are quantised so (quantization_config) cannot be read, None if they can."""
    own = settings if isinstance(settings, dict) else {}
    method, block = own.get("quant_method"), own.get("weight_block_size")
    wrong: dict[str, Any] = {"quant_method": method}
    if method == "fp8":
        sizes = block if isinstance(block, list) and len(block) == 2 else [None]
        plain = all(isinstance(size, int) and size > 0 for size in sizes)
        wrong = {} if plain else {"weight_block_size": block}
        defaults = {"fmt": "e4m3", "scale_fmt": "float", "expert_dtype": "fp8"}
        wrong |= {key: own[key] for key, value in defaults.items() if own.get(key, value) != value}
    if method == "mxfp4" or not wrong:
        return None
    said = ", ".join(f"{key} {value}" for key, value in wrong.items())
    return (
        f"is quantised ({method}; quantization_config: {said}), its weights cannot be folded "
        "(mxfp4, and fp8 with a weight_block_size, can); convert the unquantised original and "
        "quantise the result"
    )


def finite(value: Any) -> Any:
    """JSON-ready values with None in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sha256_of(path: Path, *, stop: threading.Event | None = None) -> str:
    """Hash of a file. Setting `stop` from another thread ends it early with an empty string."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(HASH_CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            if stop is not None and stop.is_set():
                return ""
            digest.update(buffer[:count])
    return digest.hexdigest()


def source_sha256(path: Path, *, stop: threading.Event | None = None) -> str:
    """As `sha256_of`, but of a large file in the Hub's own cache what its name there says.

    The Hub's client checks the size of what it fetched, not the hash; `damaged` reads every byte.
    """
    from huggingface_hub import constants

    blob = Path(os.path.realpath(path))
    cached = blob.parent.name == "blobs" and blob.is_relative_to(
        os.path.realpath(constants.HF_HUB_CACHE)
    )
    named = cached and re.fullmatch("[0-9a-f]{64}", blob.name)  # small ones by another hash
    return blob.name if named else sha256_of(path, stop=stop)


def hash_entry(path: Path, *, stop: threading.Event | None = None) -> dict[str, Any]:
    """What a manifest says about one file: its `source_sha256` and its size in bytes."""
    return {"sha256": source_sha256(path, stop=stop), "bytes": path.stat().st_size}


def model_hash(files: Mapping[str, str]) -> str:
    """Hash of a model: of its config and every shard. files: name -> sha256, at least of these."""
    return _hash_of(["config.json", *_shards(files)], files)


def weights_hash(files: Mapping[str, str]) -> str:
    """As `model_hash`, of the shards alone: every version of transformers writes another config."""
    return _hash_of(_shards(files), files)


def _shards(files: Mapping[str, str]) -> list[str]:
    return sorted(name for name in files if name.endswith(".safetensors"))


def _hash_of(names: list[str], files: Mapping[str, str]) -> str:
    return hashlib.sha256("".join(f"{n} {files[n]}\n" for n in names).encode()).hexdigest()


def companions(folder: Path) -> list[str]:
    """Names of the files that travel with the weights: tokenizer, chat templates, those in a folder
    of their own included, generation and processor configs, licence and notices.
    """
    check_files(folder)
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
        record.get("versions", {}).items()
        if not isinstance(origin, str | None) or not isinstance(revision, str | None):
            raise TypeError
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


def unrecorded(folder: Path, files: Mapping[str, str]) -> Iterator[str]:
    """The files that a reader of the folder would take but that are none of `files`, as sentences;
    a card may have been written since."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        read = _READ.fullmatch(name) or name.endswith((".safetensors", INDEX, *_PICKLES))
        if read and name not in {*files, MANIFEST, "README.md"}:
            yield f"file {name} is not recorded in {MANIFEST}"
