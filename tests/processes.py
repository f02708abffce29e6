"""Commands as processes of their own."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import urllib.request
from typing import Any


def start(command: list[str], **options: Any) -> subprocess.Popen:
    """A process that heeds interrupts, as those that a shell starts in the background do not.

    It inherits how this one handles the signal: a preexec_fn would run in a fork of this one, where
    it can wait for ever for a lock that another thread held.
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
            process.kill()
