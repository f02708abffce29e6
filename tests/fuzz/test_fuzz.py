"""A minute of the fuzz harness and some kills, with the corpus of what ever failed; and the ledger.

The harnesses fork, so each is a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def harness(*arguments: str) -> None:
    done = subprocess.run([sys.executable, *arguments], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


@pytest.mark.slow
def test_a_minute_of_damaged_files_and_all_that_ever_failed():
    harness("fuzz.py", "--minutes", "3", "--seed", "1", "--inputs", "112")


@pytest.mark.slow
def test_killed_and_starved_runs_leave_nothing_and_go_on():
    harness("kill.py", "-n", "24", "--seed", "1")


WRITES = """
import os, sys
from pathlib import Path
from forked import _watch
folder = Path(sys.argv[1], "case")
folder.mkdir()
_watch(folder, folder / "tried")
for name in ("case/within", "case-beside", "above"):
    Path(sys.argv[1], name).write_text("x")
Path(os.devnull).write_text("x")
print((folder / "tried").read_text())
"""


@pytest.mark.parametrize("disk", [None, "/dev/shm"])
def test_a_write_outside_the_working_folder_counts_on_any_disk(disk):
    if disk and not os.access(disk, os.W_OK):
        pytest.skip(f"no {disk} here")
    with tempfile.TemporaryDirectory(dir=disk) as place:
        done = subprocess.run(
            [sys.executable, "-c", WRITES, place], cwd=HERE, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    said = [line.split("/")[-1] for line in done.stdout.split("\n") if line]
    assert [name.split("'")[0] for name in said] == ["case-beside", "above"]


def test_the_ledger_says_what_was_run_and_when():
    for text in (HERE / "ledger.jsonl").read_text().splitlines():
        line = json.loads(text)
        assert line.keys() == {"date", "commit", "harness", "seed", "counts", "faults"}
        assert all(isinstance(count, int) for count in line["counts"].values())


def test_the_corpus_can_be_replayed():
    for path in (HERE / "corpus").glob("*.json"):
        assert json.loads(path.read_text()).keys() == {"file", "command", "fault", "data"}
