"""Kill the verbs, starve them, and run them again; `make N=200 kill`.

Every verb runs twice undisturbed, then in N runs, which give each verb as much time, three times
in four, a signal comes after a random part of that time; else the disk is full, files are cut
short, memory is short, the folder is read-only, or two run at once.
After SIGINT, SIGTERM and SIGHUP nothing that a run stages may be left; after any signal the same
command must succeed, with the files of an undisturbed run, and leave nothing. compared.py says what
is left out of the comparison; so are files that two undisturbed runs do not agree on, which are
printed.
"""

from __future__ import annotations

import argparse
import operator
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from compared import content, same_content
from forked import Ended, memory, run, warm_up
from ledger import add
from samples import FEW, SEARCH, adapter, checkpoint, ending, gguf_files, make

from abreast.checkpoint import LEAVING

HEAL = ["--data", "text.txt", "--window", "32", "--tokens", "2000", "--no-plots"]
TRAIN = ["--steps", "4", "--batch-size", "2", "--micro-batch", "2", "--lora-rank", "2"]
VERBS = {  # name -> its command, without --out
    "convert": ["convert", "model", "--plan", "1+2 3|4", "--max-shard-size", "100KB"],
    "export": ["export", "model", "--gguf", "out"],
    "measure": ["measure", "model", *FEW, "--max-group", "2"],
    "plan": ["plan", "model", *SEARCH, "--depth", "4"],
    "study": ["study", "model", *FEW, "--max-length", "2", "--no-plots"],
    "refit": ["heal", "model", "--plan", "1+2", "--method", "refit", *HEAL],
    "distill": ["heal", "model", "--plan", "1+2", "--method", "distill", *HEAL, *TRAIN],
    "import": ["import", "bytes.gguf"],
    "convert-adapter": ["convert-adapter", "adapter", "converted", "--base", "model"],
    "eval": ["eval", "ending", "--tasks", "python_brackets", "--limit", "4", "--batch-size", "4"],
    "report": ["report", "run"],
    "optimize": [
        *("optimize", "model", *SEARCH, "--depth", "4", "--rounds", "3", "--no-baselines"),
        *("--eval-data", "text.txt", "--max-tokens", "200", "--no-report"),
    ],
}
# the others name a new folder or file
RESUMED = (
    "measure",
    "plan",
    "study",
    "eval",
    "report",
    "optimize",
)
_SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def command(verb: str) -> list[str]:
    return [*VERBS[verb], *(() if verb == "export" else ("-o", "out"))]


def tree(folder: Path) -> dict[str, bytes]:
    """Relative path -> content, without what may vary, of what a run wrote."""
    tops = [top for top in folder.iterdir() if top.name != "tmp" and not top.is_symlink()]
    return {
        str(path.relative_to(folder)): content(path)
        for top in tops
        for path in (top, *sorted(top.rglob("*")))
        if path.is_file()
    }


def left_behind(folder: Path) -> list[str]:
    """Staging files and folders, and whatever is in the folder of temporary files."""
    staged = [p for p in folder.rglob("*") if LEAVING.fullmatch(p.name)]
    return [str(p.relative_to(folder)) for p in (*staged, *folder.glob("tmp/*"))]


def prepare(origin: Path, folder: Path) -> Path:
    """Links to what the verbs read, but for a run, which its report might alter."""
    folder.mkdir(exist_ok=True)
    for path in origin.iterdir():
        if path.name == "run":
            shutil.copytree(path, folder / "run")
        else:
            os.symlink(path, folder / path.name)
    return folder


def fault_of(stopped: Ended, killed: bool, folder: Path) -> str | None:
    if "Traceback" in stopped.err:
        return f"traceback: {stopped.err.strip().splitlines()[-1]}"
    if not killed and (left := left_behind(folder)):
        return f"left {left}"
    return None


def refusal(ended: Ended) -> str | None:
    """What is wrong with a run that met trouble: it ends well, or with status 2 and one line."""
    fine = ended.status == 0 or (ended.status == 2 and "abreast: " in ended.err)
    return None if fine else f"status {ended.status}: {ended.err.strip()[-200:]}"


def files_cut_short(verb: str, folder: Path, chance: random.Random) -> tuple[Ended, str | None]:
    """No file can be longer than so many bytes."""
    most = chance.randrange(8000, 60_000)
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (most, most))
    ended = run(command(verb), folder, limited=False, before=limit)
    return ended, refusal(ended)


def mount(folder: Path, size: int) -> bool:
    """Mount a disk of so many bytes; False where that is not allowed."""
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "abreast-kill", str(folder)]
    return not subprocess.run(words, capture_output=True).returncode


def unmount(folder: Path) -> None:
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def mountable(directory: Path) -> bool:
    """Whether this process may mount disks, which takes root; those of a kill are in memory."""
    folder = directory / "mounted"
    folder.mkdir()
    if allowed := bool(shutil.which("mount")) and mount(folder, 1 << 20):
        unmount(folder)
    folder.rmdir()
    return allowed


def disk_full(verb: str, folder: Path, chance: random.Random) -> tuple[Ended, str | None]:
    """A disk of its own, on which less is free than what the verb writes, for this run only."""
    disk = folder.with_name(f"{folder.name}-disk")
    disk.mkdir()
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    used = sum(-(-path.stat().st_size // 4096) * 4096 for path in files)
    if not mount(disk, used + chance.randrange(16 << 10, 400 << 10)):
        raise OSError(f"cannot mount {disk}")
    try:
        shutil.copytree(folder, disk, symlinks=True, dirs_exist_ok=True)
        ended = run(command(verb), disk, limited=False)
        shutil.rmtree(folder)
        shutil.copytree(disk, folder, symlinks=True)
    finally:
        unmount(disk)
        disk.rmdir()
    return ended, refusal(ended)


def no_memory(verb: str, folder: Path, chance: random.Random) -> tuple[Ended, str | None]:
    most = chance.randrange(1 << 20, 64 << 20)
    ended = run(command(verb), folder, limited=False, before=partial(memory, most))
    return ended, refusal(ended)


def read_only(verb: str, folder: Path, chance: random.Random) -> tuple[Ended, str | None]:
    def give_up() -> None:
        if os.geteuid() == 0:  # whom permissions do not stop
            os.setresuid(65534, 65534, 65534)

    (folder / "tmp").mkdir()
    folder.chmod(0o555)
    ended = run(command(verb), folder, limited=False, before=give_up)
    folder.chmod(0o755)
    return ended, refusal(ended)


def two_at_once(verb: str, folder: Path, chance: random.Random) -> tuple[Ended, str | None]:
    """One ends well; the other says who holds the folder, or comes when the first has ended.

    The status is that of the one that was refused, 0 if none was.
    """
    first = os.fork()
    if first == 0:
        os._exit(run(command(verb), folder, limited=False).status & 255)
    time.sleep(chance.uniform(0, 0.2))
    ended = run(command(verb), folder, limited=False)
    other = os.waitstatus_to_exitcode(os.waitpid(first, 0)[1])
    one = replace(ended, status=max(ended.status, other))
    if sorted((ended.status, other)) not in ([0, 0], [0, 2]):
        return one, f"statuses {ended.status} and {other}: {ended.err.strip()[-200:]}"
    said = ("is working in", "is writing", "exists")
    return one, None if ended.status == 0 or any(s in ended.err for s in said) else ended.err


TROUBLES = {
    "disk full": disk_full,
    "files cut short": files_cut_short,
    "no memory": no_memory,
    "read-only": read_only,
    "two at once": two_at_once,
}


def undisturbed(
    verb: str, origin: Path, directory: Path
) -> tuple[dict[str, bytes], set[str], float]:
    """What a verb writes, which of it two runs do not agree on, and how long a run takes."""
    trees = []
    for turn in range(2):
        folder = prepare(origin, directory / f"{verb}-{turn}")
        ended = run(command(verb), folder, limited=False, learn=turn == 0)
        if ended.status:
            raise SystemExit(f"{verb} fails undisturbed: {ended.err.strip()[-500:]}")
        trees.append(tree(folder))
    first, second = trees
    differ = {name for name, data in first.items() if data != second.get(name)}
    print(
        f"{verb}: {ended.seconds:.1f} s, {len(first)} files; differ by themselves: "
        f"{sorted(differ) or 'none'}",
        flush=True,
    )
    return first, differ, ended.seconds


def disturbed(
    verb: str, kind: str, folder: Path, chance: random.Random, lasting: float
) -> tuple[Ended, str, str | None]:
    """How a run in trouble ended, what kind it is counted as, and what is wrong."""
    if kind == "signal":
        number = chance.choices(_SIGNALS, (15, 1, 1, 1))[0]
        stop = (number, chance.uniform(0, lasting))
        stopped = run(command(verb), folder, stop=stop, limited=False)
        fault = fault_of(stopped, number == signal.SIGKILL, folder)
        return stopped, signal.Signals(number).name, fault
    stopped, fault = TROUBLES[kind](verb, folder, chance)
    return stopped, kind, fault or fault_of(stopped, False, folder)


def counted(kind: str, stopped: Ended) -> str:
    """The name under which a run is counted: a signal may come too late, and a disk suffice."""
    return kind if stopped.status else f"{kind}, ended well"


def rerun(
    verb: str,
    stopped: Ended,
    folder: Path,
    expected: dict[str, bytes],
    differ: set[str],
    same: Callable[..., bool],
) -> str | None:
    """Give the command again, if it has not done all; what is wrong with what lies there then."""
    done = verb not in RESUMED and (folder / "out").exists()
    if stopped.status and not done:
        again = run(command(verb), folder, limited=False)
        if again.status:
            return f"the rerun fails: {again.err.strip()[-300:]}"
    made = tree(folder)
    names = sorted({*made, *expected} - differ)
    wrong = [name for name in names if not same(made.get(name, b""), expected.get(name, b""))]
    if wrong:
        return f"other files than undisturbed: {wrong}"
    left = left_behind(folder)
    return f"the rerun left {left}" if left else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no run after so many")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--verbs", default=",".join(VERBS))
    parser.add_argument("--record", action="store_true", help="add the counts to the ledger")
    options = parser.parse_args()
    verbs, chance = options.verbs.split(","), random.Random(options.seed)
    warm_up()
    counts: Counter[str] = Counter()
    faults: list[str] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        kinds = dict.fromkeys(TROUBLES, 1) | {"signal": 15}
        if not mountable(directory):
            print("disk full: skipped, for only root may mount a small disk")
            del kinds["disk full"]
        origin = directory / "origin"
        checkpoint(origin)
        gguf_files(origin)
        adapter(origin)
        ending(origin)
        make(origin)
        known = {verb: undisturbed(verb, origin, directory) for verb in verbs}
        lasting = {verb: seconds for verb, (_, _, seconds) in known.items()}
        for turn in range(options.n):
            if time.monotonic() > began + 60 * options.minutes:
                break
            (verb,) = chance.choices(verbs, [1 / lasting[verb] for verb in verbs])
            folder = prepare(origin, directory / f"case-{turn}")
            (kind,) = chance.choices(list(kinds), list(kinds.values()))
            stopped, kind, fault = disturbed(verb, kind, folder, chance, lasting[verb])
            if stopped.status == 0:
                lasting[verb] = min(lasting[verb], stopped.seconds)
            counts[counted(kind, stopped)] += 1
            expected, differ, _ = known[verb]
            same = same_content if kind == "no memory" else operator.eq
            fault = fault or rerun(verb, stopped, folder, expected, differ, same)
            if fault:
                faults.append(f"{verb}, {kind}, {stopped.seconds:.2f} s: {fault}")
                print(faults[-1], flush=True)
            shutil.rmtree(folder)
    print(f"seed {options.seed}: {dict(counts)}, {len(faults)} faults")
    if options.record:
        spent = round(time.monotonic() - began)
        add("kill", options.seed, dict(counts), len(faults), seconds=spent)
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
