"""`abreast play` as a process of its own."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import urllib.request
from functools import partial


def served_until_interrupted(*arguments: str) -> tuple[int, str]:
    """Exit status, and what the command said from the interrupt on; its page was served before."""
    command = [sys.executable, "-m", "abreast", "play", *arguments, "--no-browser"]
    # What a shell starts in the background ignores interrupts, and so do its children.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed) as process:
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
