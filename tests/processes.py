"""Commands as processes of their own."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import urllib.request
from typing import Any


def start(command: list[str], **options: Any) -> subprocess.Popen:
    """A process that heeds interrupts, as those that a shell starts in the background do not.

    It takes the signal's handling from this one, since with a preexec_fn the process would be
    forked from all of this one's threads and could hang, for good.
    """
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, **options)
    finally:
        signal.signal(signal.SIGINT, previous)


def served_until_interrupted(*arguments: str) -> tuple[int, str]:
    """Exit status, and what the command said from the interrupt on; its page was served before."""
    command = [sys.executable, "-m", "abreast", "play", *arguments, "--no-browser"]
    with start(command, stderr=subprocess.PIPE, text=True) as process:
        late = threading.Timer(300, process.kill)
        late.start()
        try:
            lines: list[str] = []
            while not lines or "playground is at" not in lines[-1]:
                lines.append(process.stderr.readline())
                assert lines[-1], "".join(lines)
            address = re.search(r"http://127\.0\.0\.1:\d+/", lines[-1])
            with urllib.request.urlopen(address.group()) as answer:
                assert answer.status == 200
            process.send_signal(signal.SIGINT)
            said = process.stderr.read()
            return process.wait(30), said
        finally:
            late.cancel()
            process.kill()
