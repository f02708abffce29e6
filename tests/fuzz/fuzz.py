"""Hand damaged files to the command; `make MINUTES=10 fuzz`.

Every input runs in a fork of its own under limits (forked.py). It must end with status 0 and a
result that reads back, or with status 2 and one line: no traceback, no more than 10 s of CPU, 2 GiB
of memory, no 10 s of waiting, no write outside its folder, no code run, no connection, no process.
Whatever fails is written to corpus/, which `test_fuzz.py` replays.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from families import FAMILIES, families
from forked import Ended, run, warm_up
from ledger import add
from mutate import either, json_file, raw_file, safetensors_file, template_file, yaml_file
from mutate_gguf import gguf_file
from samples import PLAN, checkpoint, gguf_files, make

from abreast.checkpoint import open_checkpoint

CORPUS = Path(__file__).with_name("corpus")
SCORE = ["--data", "text.txt", "--max-tokens", "40", "--window", "16", "--stride", "16"]
INSPECT, EVAL = ["inspect", "model"], ["eval", "model", *SCORE]
CHAT = [*EVAL, "--chat", "chat.jsonl"]
CONVERT = ["convert", "model", "--plan", "1+2 3|4", "-o", "out"]
FROM_FILE = ["--plan", "plan.yaml"]
ESTIMATE = ["estimate", "model", "--hardware", "2xA100-NVLink"]
VERIFY = ["verify", "converted", "--against", "model", "--tokens", "8"]
PUSH = ["push", "converted", "org/name", "--dry-run"]
REPORT = ["report", "run", "-o", "report"]


@dataclass(frozen=True)
class Target:
    """A file to damage, how, and the commands that read it."""

    file: str
    mutate: Callable[[bytes, random.Random], bytes]
    commands: tuple[list[str], ...]


def weights(folder: str) -> dict[str, Target]:
    """The config, index and headers of a checkpoint, by name."""

    def reading(*commands: list[str]) -> tuple[list[str], ...]:
        return tuple(
            [folder if word == "model" else word for word in command] for command in commands
        )

    kind = "" if folder == "model" else f"{folder} "
    index = f"{folder}/model.safetensors.index.json"
    return {
        f"{kind}config": Target(
            f"{folder}/config.json",
            either(json_file),
            reading(INSPECT, CONVERT, EVAL, ESTIMATE),
        ),
        f"{kind}index": Target(index, either(json_file), reading(INSPECT, CONVERT)),
        f"{kind}header": Target(
            f"{folder}/SHARD", either(safetensors_file), reading(INSPECT, CONVERT, EVAL)
        ),
    }


TARGETS = {
    **weights("model"),
    "tokenizer": Target("model/tokenizer.json", either(json_file), (EVAL, CONVERT)),
    "tokenizer config": Target("model/tokenizer_config.json", either(json_file), (CHAT, CONVERT)),
    "generation": Target("model/generation_config.json", either(json_file), (EVAL, CONVERT)),
    "template": Target("model/chat_template.jinja", either(template_file), (CHAT,)),
    "chat": Target("chat.jsonl", either(json_file), (CHAT,)),
    "plan": Target(
        "plan.yaml",
        either(yaml_file),
        (
            [*CONVERT[:2], *FROM_FILE, "-o", "out"],
            [*EVAL, *FROM_FILE],
            [*ESTIMATE, *FROM_FILE],
        ),
    ),
    "manifest": Target("converted/abreast.json", either(json_file), (VERIFY, PUSH)),
    "converted config": Target("converted/config.json", either(json_file), (VERIFY, PUSH)),
    "stats": Target("run/calibration/stats.safetensors", either(safetensors_file), (REPORT,)),
    "identity": Target("run/calibration/measure.json", either(json_file), (PLAN,)),
    "journal": Target("run/calibration/journal-0.jsonl", raw_file, (PLAN,)),
    "front": Target("run/front.json", either(json_file), (REPORT,)),
    "results": Target("run/results.json", either(json_file), (REPORT,)),
    "gguf": Target("bytes.gguf", either(gguf_file), (["import", "bytes.gguf", "-o", "out"],)),
    "gguf pieces": Target(
        "pieces.gguf", either(gguf_file), (["import", "pieces.gguf", "-o", "out"],)
    ),
    **{name: target for kind in FAMILIES for name, target in weights(kind).items()},
}

# What takes long to read and does not come from strangers gets a third of the inputs of others.
SELDOM = ("template", "journal", "results", "front", "stats", "identity", "generation")


def prepare(origin: Path) -> None:
    """Write everything that the targets name below `origin`."""
    checkpoint(origin)
    gguf_files(origin)
    families(origin)
    template = json.loads((origin / "model/tokenizer_config.json").read_text())["chat_template"]
    (origin / "model/chat_template.jinja").write_text(template)
    chat = {"messages": [{"role": "user", "content": "one two three four"}]}
    (origin / "chat.jsonl").write_text(json.dumps(chat))
    plan = {"num_layers": 6, "groups": [{"layers": [1, 2], "wiring": "cqil", "bypass": 1}]}
    (origin / "plan.yaml").write_text(json.dumps(plan))
    (origin / "model/own.py").write_text("class Own: pass\n")
    make(origin)
    manifest = json.loads((origin / "converted/abreast.json").read_text())
    (origin / "run/results.json").write_text(json.dumps({"plan": "1+2", "result": manifest}))


def undamaged(targets: Mapping[str, Target], origin: Path, directory: Path) -> list[str]:
    """The targets' commands that fail on what is whole: damage to it would show nothing.

    What they import is then imported here, so that later runs need not.
    """
    faults = []
    for name, target in targets.items():
        file = place_of(target, origin, random.Random(0))
        data = (origin / file).read_bytes()
        for command in target.commands:
            ended, fault = tried(origin, directory / "case", file, data, command, learn=True)
            if fault or ended.status:
                faults.append(f"{name}, undamaged: {fault or ended.err.strip()[-300:]}")
    return faults


def place_of(target: Target, origin: Path, chance: random.Random) -> str:
    folder = (origin / target.file).parent
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    return target.file.replace("SHARD", chance.choice(shards or [""]))


def undrawn() -> None:
    """Report with charts described but not drawn: vl-convert takes most of a report's time."""
    from abreast.report import page

    page.png = lambda spec: b""
    page._svg_png = lambda svg: b""
    page._bundle = lambda: ""


def tried(
    origin: Path,
    folder: Path,
    file: str,
    data: bytes,
    command: list[str],
    *,
    before: Callable[[], None] = lambda: None,
    learn: bool = False,
) -> tuple[Ended, str | None]:
    """Run a command on a copy of `origin` in which one file holds other bytes; what is wrong."""
    folder.mkdir()
    for name in {"model", Path(file).parts[0], *command} & set(os.listdir(origin)):
        if (origin / name).is_dir():
            shutil.copytree(origin / name, folder / name, copy_function=os.link)
        else:
            os.link(origin / name, folder / name)
    (folder / file).unlink()
    (folder / file).write_bytes(data)
    ended = run(command, folder, addresses=command[0] != "report", before=before, learn=learn)
    fault = ended.fault or _result_fault(ended, folder, command)
    shutil.rmtree(folder)
    return ended, fault


def _result_fault(ended: Ended, folder: Path, command: list[str]) -> str | None:
    if ended.status == 1 and command[0] != "verify":  # it says no by its status
        return f"status 1: {ended.err.strip()[-200:]}"
    out = folder / "out"
    if ended.status == 0 and command[0] in ("convert", "import"):
        try:
            open_checkpoint(out)
        except Exception as error:
            return f"the result does not read back: {error}"
    if ended.status and out.exists():
        return "refused, but there is an output"
    return None


def keep(name: str, file: str, data: bytes, command: list[str], fault: str) -> Path:
    CORPUS.mkdir(exist_ok=True)
    digest = hashlib.sha256(data + " ".join(command).encode()).hexdigest()[:8]
    path = CORPUS / f"{name.replace(' ', '-')}-{digest}.json"
    case = {"file": file, "command": command, "fault": fault}
    path.write_text(json.dumps({**case, "data": base64.b64encode(data).decode()}, indent=1) + "\n")
    return path


def replay(origin: Path, directory: Path) -> list[str]:
    """What still fails of the corpus."""
    faults = []
    for path in sorted(CORPUS.glob("*.json")):
        case: dict[str, Any] = json.loads(path.read_text())
        data = base64.b64decode(case["data"])
        fault = tried(origin, directory / "case", case["file"], data, case["command"])[1]
        if fault:
            faults.append(f"{path.name}: {fault}")
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--inputs", type=int, default=10**9, help="at most so many")
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--record", action="store_true", help="add the counts to the ledger")
    parser.add_argument("--replay", action="store_true", help="only run the corpus")
    options = parser.parse_args()
    targets = {name: TARGETS[name] for name in options.targets.split(",")}
    warm_up()
    with tempfile.TemporaryDirectory() as directory:
        origin = Path(directory, "origin")
        prepare(origin)
        failed = undamaged(targets, origin, Path(directory)) + replay(origin, Path(directory))
        for fault in failed:
            print(fault, flush=True)
        if options.replay:
            print(f"{len(failed)} of what is whole and of the corpus fail")
            return bool(failed)
        began = time.monotonic()
        counts, faults = damage(targets, origin, Path(directory), options)
        seconds = time.monotonic() - began
    succeeded = counts.pop("succeeded", 0)
    rate = round(60 * counts.total() / seconds)
    print(
        f"seed {options.seed}: {counts.total()} inputs, {rate} a minute, {succeeded} of them "
        f"with a result, {faults} faults; {dict(counts)}"
    )
    if options.record:
        add("fuzz", options.seed, dict(counts), faults, seconds=round(seconds))
    return bool(faults or failed)


def damage(
    targets: Mapping[str, Target], origin: Path, directory: Path, options: argparse.Namespace
) -> tuple[Counter[str], int]:
    """Hand over inputs until the time is over, or somebody interrupts; counts by target, faults."""
    chance = random.Random(options.seed)
    names = [name for name in targets for _ in range(1 if name in SELDOM else 3)]
    counts: Counter[str] = Counter()
    faults, seen = 0, set()
    before = contents(origin)
    end = time.monotonic() + 60 * options.minutes
    try:
        for turn in range(options.inputs):
            if time.monotonic() > end:
                break
            name = names[turn % len(names)]
            target = targets[name]
            file, command = place_of(target, origin, chance), chance.choice(target.commands)
            data = target.mutate((origin / file).read_bytes(), chance)
            plain = command[0] == "report" and chance.random() < 0.98
            settings = {"before": undrawn} if plain else {}
            ended, fault = tried(origin, directory / "case", file, data, command, **settings)
            counts[name] += 1
            counts["succeeded"] += ended.status == 0
            if fault:
                faults += 1
                if (kind := f"{name}: {fault[:80]}") not in seen:
                    seen.add(kind)
                    print(f"{keep(name, file, data, command, fault).name}: {fault}", flush=True)
    except KeyboardInterrupt:
        pass
    if before != contents(origin):
        print("files outside the working folder were changed")
        faults += 1
    return counts, faults


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


if __name__ == "__main__":
    sys.exit(main())
