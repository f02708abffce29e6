"""The command in forks of this process, which has imported everything once, under limits.

Linux only. A fork may write below its working folder, run no code from there, open no connection
and start no process; what it tries is recorded.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import pkgutil
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MEMORY = 2 << 30  # bytes beyond what this process holds
CPU_SECONDS = 10
IDLE_SECONDS = 10  # neither running nor kept from it by other processes
WALL_SECONDS = 120  # for machines that are busy: the limits that count are the two above
_WRITES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate"}
_FORBIDDEN = {"socket.connect", "socket.bind", "subprocess.Popen", "os.system", "os.exec"}


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    status: minus the signal where one ended it. tried: what it must not do. idle: it was killed
    because it waited too long for something else than a CPU.
    """

    status: int
    out: str
    err: str
    seconds: float
    tried: tuple[str, ...]
    idle: bool = False

    @property
    def fault(self) -> str | None:
        """What no input may lead to, None for success or one line and status 2."""
        if self.tried:
            return f"it tried {self.tried[0]}"
        if "Traceback (most recent call last)" in self.err:
            return f"traceback: {self.err.strip().splitlines()[-1]}"
        if self.idle:
            return f"waited for more than {IDLE_SECONDS} s"
        if self.status == -signal.SIGXCPU or self.seconds > WALL_SECONDS:
            return f"ran for more than {CPU_SECONDS} s"
        if self.status not in (0, 1, 2) or "out of memory" in self.err:
            return f"status {self.status}: {self.err.strip()[-200:]}"
        lines = [line for line in self.err.splitlines() if line.startswith("abreast: ")]
        if self.status == 2 and not lines and "Usage:" not in self.err:
            return f"status 2 without our line: {self.err.strip()[-200:]}"
        return None


def warm_up() -> None:
    """Import whatever a verb imports, once."""
    names = ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")
    os.environ |= {**dict.fromkeys(names, "1"), "TOKENIZERS_PARALLELISM": "false"}
    import jinja2.sandbox  # noqa: F401
    import torch
    import transformers  # noqa: F401

    import abreast

    for module in pkgutil.walk_packages(abreast.__path__, "abreast."):
        if module.name.startswith(("abreast.engines.vllm.", "abreast.__main__")):
            continue
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as lacking:  # what runs in an engine that is not installed
            if (lacking.name or "").startswith("abreast"):
                raise
    torch.set_num_threads(1)
    keep()
    memory_disk = Path("/dev/shm")
    usable = os.access(memory_disk, os.R_OK | os.W_OK | os.X_OK)
    if usable and shutil.disk_usage(memory_disk).free > 1 << 30:
        tempfile.tempdir = str(memory_disk)


def keep() -> None:
    """Let collections in forks pass over, and so not copy, what this process holds."""
    gc.collect()
    gc.freeze()


def run(
    arguments: list[Any],
    folder: Path,
    *,
    stop: tuple[int, float] | None = None,
    limited: bool = True,
    addresses: bool = True,
    before: Callable[[], None] = lambda: None,
    learn: bool = False,
) -> Ended:
    """Run `abreast ARGUMENTS` in `folder`.

    stop: a signal, and after how many seconds it comes. addresses: limit those, else what may be
    written to: V8, which draws a report's charts, sets aside more addresses than any limit leaves.
    before: called in the fork. learn: import here what the run imports, for later ones.
    """
    with tempfile.TemporaryDirectory() as directory:
        logs = [Path(directory, name) for name in ("out", "err", "tried", "imported")]
        began = time.monotonic()
        # held back until the fork can end by it: Python's own hooks after a fork cannot
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # until the command has its own
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            if limited:
                memory(MEMORY, addresses)
            _child([str(word) for word in arguments], folder, logs, limited, before, learn)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        watch = os.pidfd_open(child)
        waiting = False
        try:
            if stop is not None:
                ended = select.select([watch], [], [], max(0.0, stop[1]))[0]
                if not ended:
                    os.kill(child, stop[0])
            while not select.select([watch], [], [], 1.0)[0]:
                passed = time.monotonic() - began
                waiting = limited and passed - busy(child) > IDLE_SECONDS
                if waiting or passed > WALL_SECONDS:
                    os.kill(child, signal.SIGKILL)
                    break
        finally:
            os.close(watch)
        _, status = os.waitpid(child, 0)
        seconds = time.monotonic() - began
        out, err, tried, imported = (
            log.read_text(errors="replace") if log.exists() else "" for log in logs
        )
        if learn:
            for name in imported.split():
                with suppress(Exception):  # what a run makes itself
                    importlib.import_module(name)
            keep()
        code = os.waitstatus_to_exitcode(status)
        return Ended(code, out, err, seconds, tuple(tried.splitlines()), waiting)


def busy(process: int) -> float:
    """Seconds in which a process ran, or would have if it had had a CPU."""
    used = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
    waited = int(Path(f"/proc/{process}/schedstat").read_text().split()[1])
    return sum(map(int, used)) / os.sysconf("SC_CLK_TCK") + waited / 1e9


def memory(most: int, addresses: bool = True) -> None:
    """Let this process take so many bytes more than it has, of addresses or of what is written."""
    pages = Path("/proc/self/statm").read_text().split()[0 if addresses else 5]
    size = int(pages) * resource.getpagesize() + most
    kind = resource.RLIMIT_AS if addresses else resource.RLIMIT_DATA
    resource.setrlimit(kind, (size, size))


def _child(
    arguments: list[str],
    folder: Path,
    logs: list[Path],
    limited: bool,
    before: Callable[[], None],
    learn: bool,
) -> None:
    status = 70
    imported = os.open(logs[3], os.O_WRONLY | os.O_CREAT)
    try:
        for number, log in enumerate(logs[:2], 1):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), number)
        sys.stdout, sys.stderr = (  # as Python itself opens them
            os.fdopen(number, "w", buffering=1, closefd=False, errors=errors)
            for number, errors in ((1, "strict"), (2, "backslashreplace"))
        )
        temporary = folder / "tmp"
        temporary.mkdir(exist_ok=True)
        os.chdir(folder)
        os.environ["TMPDIR"] = str(temporary)
        tempfile.tempdir = None
        sys.dont_write_bytecode = True  # of modules that are first imported here
        if limited:
            spent = int(time.process_time())
            resource.setrlimit(resource.RLIMIT_CPU, (spent + CPU_SECONDS, spent + CPU_SECONDS + 5))
            _watch(folder, logs[2])
        before()
        sys.argv = ["abreast", *arguments]
        from abreast.cli.main import main

        main()
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        if learn:
            os.write(imported, "\n".join(sys.modules).encode())
        os._exit(status)


def _watch(folder: Path, log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    inside = os.path.realpath(folder)

    def outside(path: Any) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        full = os.path.realpath(os.fsdecode(path))
        if full == inside or full.startswith((inside + os.sep, "/proc/")):
            return False
        return full.startswith("/dev/shm/") or not full.startswith("/dev/")

    def hook(event: str, values: tuple[Any, ...]) -> None:
        tried = ""
        if event in _FORBIDDEN:
            tried = event
        elif event == "open" and values[2] & (os.O_WRONLY | os.O_RDWR) and outside(values[0]):
            tried = f"open {values[0]!r} for writing"
        elif event in _WRITES and any(map(outside, values[:2])):
            tried = f"{event} {values!r}"
        elif event == "exec" and str(getattr(values[0], "co_filename", "")).startswith(inside):
            tried = f"code of {values[0].co_filename}"
        if tried:
            os.write(descriptor, json.dumps(tried).encode() + b"\n")

    sys.addaudithook(hook)
