"""A minute of the fuzz harness and some kills, with the corpus of what ever failed; and the ledger.

The harnesses fork, so each is a process of its own.
"""

from __future__ import annotations

import ast
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from kill import alike
from made_gguf import write_file
from mutants import every_change, wilson
from mutate_gguf import gguf_file

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


WHOLE = """
import sys
from pathlib import Path
import fuzz
from forked import warm_up
warm_up()
origin = Path(sys.argv[1], "origin")
fuzz.prepare(origin)
fuzz.TARGETS = {"chat": fuzz.TARGETS["chat"]}
print(len(fuzz.undamaged(origin, Path(sys.argv[1]))))
(origin / "chat.jsonl").write_text("{}")
print(*fuzz.undamaged(origin, Path(sys.argv[1])))
"""


@pytest.mark.slow
def test_what_fails_undamaged_is_no_sample(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", WHOLE, tmp_path], cwd=HERE, capture_output=True, text=True
    )
    none, one = done.stdout.splitlines()
    assert none == "0" and one.startswith("chat, undamaged: abreast: "), done.stderr


def test_damaged_gguf_files_differ_and_parse_as_far_as_they_should(tiny_checkpoint, tmp_path):
    whole = write_file(tmp_path / "whole.gguf", "llama", tiny_checkpoint("llama")).read_bytes()
    made = {gguf_file(whole, random.Random(seed)) for seed in range(200)}
    assert len(made) > 190 and sum(data == whole for data in made) <= 1
    assert all(data.startswith(whole[:8]) for data in made)


def test_numbers_are_compared_up_to_rounding_and_everything_else_exactly():
    line = b'{"kl": 0.25, "plan": "1+2", "count": 3}'
    assert alike(line, line.replace(b"0.25", b"0.2500001"))
    for other in (b"0.26", b"0.25, 0.25"):
        assert not alike(line, line.replace(b"0.25", other))
    assert not alike(line, line.replace(b"1+2", b"2+3"))
    assert not alike(line, line.replace(b"3}", b"4}"))
    header = b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'
    tensor = np.array([1, 2], "<f4")
    stored = header + tensor.tobytes()
    assert alike(stored, header + (tensor * (1 + 1e-6)).astype("<f4").tobytes())
    assert not alike(stored, header + (tensor + 1).astype("<f4").tobytes())


CODE = """
def f(values: list[int], seed: int = 0) -> bool:
    '''Not a statement.'''
    if len(values) > 3 and not seed:
        raise ValueError(values[-1])
    values[0] = 2 ** 2
    return True
"""


def test_mutants_change_what_runs_and_nothing_else():
    tree = ast.parse(CODE)
    texts = []
    for number, (_, (what, _)) in enumerate(every_change(tree)):
        other = ast.parse(CODE)
        list(every_change(other))[number][1][1]()
        texts.append(ast.unparse(ast.fix_missing_locations(other)))
        assert what and texts[-1] != ast.unparse(tree)
    assert len(set(texts)) == len(texts)
    joined = "\n".join(texts)
    for part in (
        *("len(values) >= 3", "len(values) <= 3", "> 4", "or not", "if not (len", "values[+1]"),
        *("2 * 2", "return None", "return False", "seed: int=1", "values[1] = 2 ** 2", "pass"),
    ):
        assert part in joined, part
    assert all("list[int]" in text and "Not a statement" in text for text in texts)


def test_the_interval_of_a_share():
    """Against the quadratic equation that it solves: |p - share| = z sqrt(p (1 - p) / n)."""
    for bound in wilson(340, 400):
        assert abs(bound - 0.85) == pytest.approx(1.959964 * (bound * (1 - bound) / 400) ** 0.5)


@pytest.mark.slow
def test_mutants_are_noticed_and_kept():
    """Of the same seed the second call tries nothing again."""
    words = ("mutants.py", "-n", "3", "--seed", "7", "--modules", "abreast.evaluate.statistics")
    for _ in range(2):
        harness(*words)


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
        usual = {"date", "commit", "harness", "seed", "counts", "faults"}
        assert line.keys() - {"killed", "survivors", "memory", "seconds"} == usual
        assert all(isinstance(count, int) for count in line["counts"].values())


def test_the_corpus_can_be_replayed():
    for path in (HERE / "corpus").glob("*.json"):
        assert json.loads(path.read_text()).keys() == {"file", "command", "fault", "data"}
