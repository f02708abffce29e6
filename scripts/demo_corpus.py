"""The bundled demonstration model's text and tokenizer, step by step:

    fetch      download the pinned packages of demo_corpus.txt, keep their .py files
    corpus     clean the standard library and those packages into one compressed file
    tokenizer  train the byte-level BPE tokenizer

scripts/train_demo.py gives the commands from here to the finished model.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import lzma
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from abreast.data import is_held_out, stdlib_files

EOT = "<|endoftext|>"
VOCAB = 4096


def fetch_one(requirement: str, to: Path) -> str:
    """Unpack one pinned package's .py files and METADATA below `to`; say what happened."""

    def belongs(name: str) -> bool:
        return ".." not in name and (name.endswith(".py") or name.endswith(".dist-info/METADATA"))

    name, _, version = requirement.partition("==")
    dest = to / f"{name}-{version}"
    if dest.exists():
        return f"present    {requirement}"
    try:  # an installed copy of the same version saves the download (torch: hundreds of MB)
        installed = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        installed = None
    with tempfile.TemporaryDirectory(dir=to) as tmp:
        selected = Path(tmp, "kept")
        if installed is not None and installed.version.split("+")[0] == version:
            for file in filter(lambda f: belongs(f.as_posix()), installed.files or []):
                (selected / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(str(file.locate()), selected / file)
        else:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            command += ["--only-binary=:all:", "--ignore-requires-python", "-d", tmp, requirement]
            done = subprocess.run(command, capture_output=True, text=True)
            wheels = list(Path(tmp).glob("*.whl"))
            if done.returncode or not wheels:
                return f"FAILED     {requirement}: {done.stderr.strip()[-200:]}"
            with zipfile.ZipFile(wheels[0]) as wheel:
                wheel.extractall(selected, [name for name in wheel.namelist() if belongs(name)])
        selected.rename(dest)
    return f"fetched    {requirement}: {sum(1 for _ in dest.rglob('*.py'))} files"


def fetch(args: argparse.Namespace) -> None:
    lines = (line.partition("#")[0].strip() for line in args.list.read_text().splitlines())
    args.to.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(3) as pool:
        for message in pool.map(lambda line: fetch_one(line, args.to), filter(None, lines)):
            print(message, flush=True)


# Vendored copies repeat other packages (under other licences); the rest is not hand-written.
SKIPPED = {"_vendor", "vendor", "_vendored", "vendored", "extern", "externals", "third_party"}
SKIPPED |= {"locale", "locales", "migrations", "__pycache__", "site-packages", "node_modules"}
SKIPPED |= {"_external", "_externals", "_vendored_packages", "testdata", "test_data", "fixtures"}
TEST_DIRS = {"test", "tests", "testing", "unit_tests", "functional"}
DATA_DIRS = {"data", "resources", "samples", "cassettes", "snapshots", "examples"}
GENERATED = re.compile(
    r"generated (by|from|using|with|automatically|code|file)|do not (edit|modify)"
)


def is_test(path: str) -> bool:
    parts = path.split("/")
    leaf = parts[-1]
    named = leaf.startswith("test_") or leaf.endswith("_test.py") or leaf == "conftest.py"
    return named or bool(TEST_DIRS.intersection(parts[:-1]))


def unwanted(path: str, raw: bytes) -> str | None:
    """Why this file is not worth training on, or None if it is."""
    parts = path.split("/")[:-1]
    if SKIPPED.intersection(parts):
        return "vendored, migration, locale or test-data folder"
    if TEST_DIRS.intersection(parts) and DATA_DIRS.intersection(parts):
        return "vendored, migration, locale or test-data folder"
    if not 200 <= len(raw) <= 300_000:
        return "too short or too long"
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return "not UTF-8"
    solid = sum(not c.isspace() for c in text)
    digits = sum(c.isdigit() for c in text)
    if GENERATED.search(text[:1500].lower()) or len(text) > 100 * (text.count("\n") + 1):
        return "generated"
    if digits > 0.2 * solid or sum(c.isascii() for c in text) < 0.9 * len(text):
        return "mostly numbers or not ASCII"
    return None


def long_lines(text: str) -> list[str]:
    return [line for line in map(str.strip, text.splitlines()) if len(line) > 20]


def package_files(root: Path) -> Iterator[tuple[str, str, Path]]:
    """(package, path inside its site folder, file) for an unpacked tree or a site-packages."""
    unpacked = sorted({p.parents[1] for p in root.glob("*/*.dist-info/METADATA")})
    for site in unpacked or [root]:
        for file in sorted(site.rglob("*.py")):
            path = file.relative_to(site).as_posix()
            yield (site.name if unpacked else path.split("/")[0]), path, file


def corpus(args: argparse.Namespace) -> None:
    library = Path(sysconfig.get_path("stdlib"))
    held = {}
    for name, file in stdlib_files().items():
        text = file.read_bytes().decode("utf-8", "ignore")
        if is_held_out(name) and text.strip() and text.encode() == file.read_bytes():
            held[name] = text
    held_lines = {line for text in held.values() for line in long_lines(text)}
    held_leaves = {name.split("/")[-1] for name in held} - {"__init__.py", "__main__.py"}
    candidates = [("stdlib", n, p) for n, p in stdlib_files().items() if n not in held]
    tests = sorted((library / "test").rglob("*.py"))
    candidates += [("stdlib", p.relative_to(library).as_posix(), p) for p in tests]
    packages: dict[str, dict[str, str]] = {}
    for root in args.site:
        candidates += package_files(root)
        for file in [*root.glob("*.dist-info/METADATA"), *root.glob("*/*.dist-info/METADATA")]:
            info = importlib.metadata.PathDistribution(file.parent).metadata
            trove = [
                c.split("::")[-1].strip()
                for c in info.get_all("Classifier") or []
                if c.startswith("License ::")
            ]
            licence = info["License-Expression"] or ", ".join(trove) or info["License"] or "?"
            packages[info["Name"].lower()] = {
                "version": info["Version"],
                "license": licence.strip().splitlines()[0][:60],
            }

    dropped: Counter[str] = Counter()
    seen: set[str] = set()
    files: list[tuple[str, str, str]] = []
    for package, path, file in candidates:
        raw = file.read_bytes()
        reason = unwanted(path.removeprefix("test/") if package == "stdlib" else path, raw)
        digest = hashlib.sha256(raw).hexdigest()
        if reason is None and is_held_out(path):
            reason = "held out by name"
        if reason is None and digest in seen:
            reason = "exact duplicate"
        if reason is None:
            text = raw.decode("utf-8")
            lines = long_lines(text)
            shared = sum(line in held_lines for line in lines) / max(1, len(lines))
            if shared > (0.05 if path.split("/")[-1] in held_leaves else 0.15):
                reason = "copies held-out text"
        if reason is None:
            seen.add(digest)
            files.append((package, path, text))
        else:
            dropped[reason] += 1

    # No package may dominate, and tests are repetitive: at most half of what a package gives.
    room: Counter[str] = Counter()
    for package, path, text in files:
        room[package] += 0 if is_test(path) else len(text)
    cap = int(args.package_mb * 1e6)
    room = Counter({package: min(size, cap // 2) for package, size in room.items()})
    taken: Counter[str] = Counter()
    chosen: set[tuple[str, str]] = set()
    for package, path, text in sorted(files, key=lambda d: hashlib.md5(d[1].encode()).digest()):
        if package != "stdlib":
            if is_test(path) and room[package] < len(text):
                dropped["test beyond half of its package"] += 1
                continue
            if taken[package] + len(text) > cap:
                dropped["beyond the size allowed a package"] += 1
                continue
            room[package] -= len(text) if is_test(path) else 0
            taken[package] += len(text)
        chosen.add((package, path))
    documents: list[dict[str, Any]]
    documents = [{"name": f"stdlib/{n}", "text": t, "held_out": True} for n, t in held.items()]
    documents += [{"name": f"{a}/{b}", "text": c} for a, b, c in files if (a, b) in chosen]
    sizes: Counter[str] = Counter()
    for document in documents:
        sizes[document["name"].split("/")[0]] += len(document["text"])
    print("bytes kept:", json.dumps(dict(sizes.most_common())))
    print(f"held out {len(held)}; kept {len(documents) - len(held)}; dropped", dict(dropped))
    print(f"total {sum(sizes.values()) / 1e6:.1f} MB", flush=True)
    if args.dry_run:
        return

    # A dictionary as large as the text lets copies be found wherever they are.
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": args.dictionary << 20}]
    with lzma.open(args.out, "wt", filters=filters, encoding="utf-8") as out:
        for document in documents:
            out.write(json.dumps(document, ensure_ascii=False) + "\n")
    manifest = {
        "file": args.out.name,
        "sha256": hashlib.sha256(args.out.read_bytes()).hexdigest(),
        "compressed_bytes": args.out.stat().st_size,
        "python": sys.version.split()[0],
        "documents": len(documents) - len(held),
        "characters": sum(sizes.values()) - sum(map(len, held.values())),
        "held_out_documents": len(held),
        "held_out_characters": sum(map(len, held.values())),
        "held_out": sorted(held),
        "dropped": dict(dropped),
        "packages": dict(sorted(packages.items())),
    }
    target = args.out.with_name(args.out.name.split(".")[0] + ".manifest.json")
    target.write_text(json.dumps(manifest, indent=1) + "\n")


def read_corpus(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The documents to train on and the held-out ones."""
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        documents = [json.loads(line) for line in lines]
    return (
        [d for d in documents if not d.get("held_out")],
        [d for d in documents if d.get("held_out")],
    )


def train_tokenizer(args: argparse.Namespace) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    documents, held = read_corpus(args.corpus)
    random.Random(0).shuffle(documents)
    documents.sort(key=lambda d: not d["name"].startswith("stdlib/"))  # stable: stdlib first
    sample, size = [], 0
    for document in documents:
        if size >= args.sample_mb * 1_000_000:
            break
        sample.append(document["text"])
        size += len(document["text"])
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B:1")
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[EOT],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(sample, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=EOT, eos_token=EOT)
    fast.save_pretrained(args.out)
    again = AutoTokenizer.from_pretrained(args.out)
    text = held[0]["text"]
    ids = again(text)["input_ids"]
    assert again.decode(ids) == text and len(again) == VOCAB
    assert again.convert_tokens_to_ids(EOT) == 0
    print(json.dumps({"sample_mb": size / 1e6, "chars_per_token": len(text) / len(ids)}))


_encoder: Any = None


def _load_encoder(path: str) -> None:
    global _encoder
    from tokenizers import Tokenizer

    _encoder = Tokenizer.from_file(path)


def _encode(text: str) -> bytes:
    return np.array([*_encoder.encode(text).ids, 0], np.uint16).tobytes()


def tokenise(corpus_file: Path, tokenizer: Path, out: Path) -> tuple[np.ndarray, np.ndarray]:
    """The training and held-out token streams, kept in `out`; call before touching a GPU."""
    spec = tokenizer / "tokenizer.json"
    key = hashlib.sha256(spec.read_bytes() + corpus_file.read_bytes()).hexdigest()
    if not (out / "tokens.key").exists() or (out / "tokens.key").read_text() != key:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core instead
        documents, held = read_corpus(corpus_file)
        random.Random(0).shuffle(documents)
        context = multiprocessing.get_context("fork")
        with context.Pool(os.cpu_count(), _load_encoder, (str(spec),)) as pool:
            for name, group in (("train", documents), ("heldout", held)):
                texts = (document["text"] for document in group)
                joined = b"".join(pool.imap(_encode, texts, chunksize=32))
                np.save(out / f"{name}.npy", np.frombuffer(joined, np.uint16))
        (out / "tokens.key").write_text(key)
    return np.load(out / "train.npy"), np.load(out / "heldout.npy")


def windows(stream: np.ndarray, length: int, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Non-overlapping windows as (inputs, targets); every target is predicted once."""
    count = min((len(stream) - 1) // length, limit)
    body = stream[: count * length + 1].astype(np.int64)
    return body[:-1].reshape(count, length), body[1:].reshape(count, length)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    here = Path(__file__).resolve().parent

    def command(name: str, run: Any, *paths: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.set_defaults(run=run)
        for path in paths:
            sub.add_argument(f"--{path}", type=Path, required=True)
        return sub

    sub = command("fetch", fetch, "to")
    sub.add_argument("--list", type=Path, default=here / "demo_corpus.txt")

    sub = command("corpus", corpus, "out")
    sub.add_argument("--site", type=Path, nargs="*", default=[], help="folders of packages")
    sub.add_argument("--package-mb", type=float, default=3.0, help="most text from one package")
    sub.add_argument("--dictionary", type=int, default=512, help="xz dictionary, MiB (x 11 memory)")
    sub.add_argument("--dry-run", action="store_true", help="only count")

    sub = command("tokenizer", train_tokenizer, "corpus", "out")
    sub.add_argument("--sample-mb", type=float, default=60)

    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
