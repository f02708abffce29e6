"""A minute of the fuzz harness and some kills, with the corpus of what ever failed; and the ledger.

The harnesses fork, so each is a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
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


def test_the_ledger_says_what_was_run_and_when():
    for text in (HERE / "ledger.jsonl").read_text().splitlines():
        line = json.loads(text)
        assert line.keys() == {"date", "commit", "harness", "seed", "counts", "faults"}
        assert all(isinstance(count, int) for count in line["counts"].values())


def test_the_corpus_can_be_replayed():
    for path in (HERE / "corpus").glob("*.json"):
        assert json.loads(path.read_text()).keys() == {"file", "command", "fault", "data"}
