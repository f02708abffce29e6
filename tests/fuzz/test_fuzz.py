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
from collections import Counter
from pathlib import Path

import kill
import numpy as np
import pytest
from compared import content, same_content
from made_gguf import write_file
from mutants import every_change, wilson
from mutate_gguf import gguf_file

HERE = Path(__file__).parent


def harness(*arguments: str) -> None:
    done = subprocess.run([sys.executable, *arguments], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


@pytest.mark.slow
def test_a_minute_of_damaged_files_and_all_that_ever_failed():
    """The same ones every time, so that a change that breaks nothing does not fail; `make fuzz`
    tries others in every run."""
    harness("fuzz.py", "--minutes", "1", "--inputs", "1000", "--seed", "1")


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
chosen = {"chat": fuzz.TARGETS["chat"]}
print(len(fuzz.undamaged(chosen, origin, Path(sys.argv[1]))))
(origin / "chat.jsonl").write_text("{}")
print(*fuzz.undamaged(chosen, origin, Path(sys.argv[1])))
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
    assert same_content(line, line.replace(b"0.25", b"0.2500001"))
    for other in (b"0.26", b"0.25, 0.25"):
        assert not same_content(line, line.replace(b"0.25", other))
    assert not same_content(line, line.replace(b"1+2", b"2+3"))
    assert not same_content(line, line.replace(b"3}", b"4}"))
    header = b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'
    tensor = np.array([1, 2], "<f4")
    stored = header + tensor.tobytes()
    assert same_content(stored, header + (tensor * (1 + 1e-6)).astype("<f4").tobytes())
    assert not same_content(stored, header + (tensor + 1).astype("<f4").tobytes())


def front(other: str, kl: float, forwards: float = 1.0) -> dict:
    rows = [{"plan": "1+2", "kl": kl}, {"plan": other, "kl": 0.5}]
    held_out = [{"plan": "1+2", "kl": 0.2}]
    return {"full_forwards": {"4": forwards}, "plans": rows, "held_out": held_out}


def why(count: int, alone: str, without: str) -> str:
    head = "| group | KL alone | best plan without it | KL of that |\n|---|---|---|---|"
    row = f"| 1+2 | {alone} | {without} | 1 |"
    return f"It is the best of {count} plans of this depth.\n{head}\n{row}"


def results(plan: str, kl: float, without: str, seconds: float) -> dict:
    reason = {"group": "1+2", "kl": kl, "without": without, "extra_kl": seconds}
    speed = {"decode": {"rounds": 3, "timings": {"original": {"median": seconds}}}}
    planned = {"plan": plan, "reasons": [reason], "full_forwards": seconds}
    return {"plan": plan, "planned": planned, "quality": {"kl": kl}, "speed": speed}


def environment(cpu: str, folder: str) -> dict:
    return {"date": folder, "folder": folder, "hardware": {"cpu": cpu}}


LOG = "step,loss,seconds\n0,{},{}\n"


@pytest.mark.parametrize(
    ("name", "value", "same", "others"),
    [
        (
            *("front.json", front("2+3", 0.1), front("3+4", 0.1, 2.0)),
            [front("2+3", 0.2), {**front("2+3", 0.1), "held_out": []}],
        ),
        ("why.md", why(2, "0.1", "2+3"), why(3, "0.1", "3+4"), [why(2, "0.2", "2+3")]),
        (
            *("results.json", results("1+2", 0.1, "2+3", 1.0), results("1+2", 0.1, "3+4", 2.0)),
            [results("2+3", 0.1, "2+3", 1.0), results("1+2", 0.2, "2+3", 1.0)],
        ),
        ("environment.json", environment("a", "x"), environment("a", "y"), [environment("b", "x")]),
        ("heal.csv", LOG.format(1, 2), LOG.format(1, 3), [LOG.format(2, 2)]),
    ],
    ids=("front", "why", "results", "environment", "log"),
)
def test_of_what_a_search_says_its_choice_is_compared(name, value, same, others, tmp_path):
    def read(written):
        text = written if isinstance(written, str) else json.dumps(written)
        (tmp_path / name).write_text(text)
        return content(tmp_path / name)

    assert read(value) == read(same)
    assert all(read(value) != read(other) for other in others)


LIMITS = """
import json, sys, time
from pathlib import Path
import forked
forked.IDLE_SECONDS = 2

def waits():
    time.sleep(60)

def works():
    while time.process_time() < 4:
        pass
    raise SystemExit(0)

def takes():
    bytearray(3 << 30)
    raise SystemExit(0)

for before, addresses in ((waits, True), (works, True), (takes, True), (takes, False)):
    ended = forked.run([], Path(sys.argv[1]), before=before, addresses=addresses)
    print(json.dumps([ended.status, ended.idle, ended.seconds < 30, ended.fault]))
"""


def test_a_fork_may_not_wait_for_long_nor_take_memory(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", LIMITS, tmp_path], cwd=HERE, capture_output=True, text=True
    )
    waits, works, *takes = map(json.loads, done.stdout.splitlines())
    assert waits == [-9, True, True, "waited for more than 2 s"], done.stderr
    assert works == [0, False, True, None]
    assert takes == [[1, False, True, "traceback: MemoryError"]] * 2


def test_two_at_once_are_counted_also_if_one_is_refused(monkeypatch, tmp_path):
    def ended(mine, other):
        monkeypatch.setattr(kill, "run", lambda *_, **__: kill.Ended(mine, "", refused, 1.0, ()))
        monkeypatch.setattr(kill.os, "fork", lambda: 1)
        monkeypatch.setattr(kill.os, "waitpid", lambda *_: (1, other << 8))
        return kill.disturbed("plan", "two at once", tmp_path, random.Random(0), 1.0)

    refused = "abreast: process 7 is working in out"
    counts: Counter[str] = Counter()
    for mine, other, wrong in ((0, 0, False), (2, 0, False), (0, 2, False), (2, 2, True)):
        stopped, kind, fault = ended(mine, other)
        counts[kill.counted(kind, stopped)] += 1
        assert bool(fault) == wrong
    assert counts == {"two at once": 3, "two at once, ended well": 1}


def test_a_full_disk_is_one_on_which_nothing_is_free(monkeypatch, tmp_path):
    if not kill.mountable(tmp_path):
        pytest.skip("only root may mount a disk")
    folder = tmp_path / "case"
    folder.mkdir()
    (folder / "before").write_text("x")

    def write(words, directory, **_):
        (directory / "out").mkdir()
        try:
            for number in range(1000):
                (directory / "out" / str(number)).write_bytes(bytes(4096))
        except OSError as error:
            return kill.Ended(2, "", f"abreast: {error.strerror}", 1.0, ())

    monkeypatch.setattr(kill, "run", write)
    ended, fault = kill.disk_full("convert", folder, random.Random(0))
    assert (ended.err, fault) == ("abreast: No space left on device", None)
    assert (folder / "before").exists() and 1 < len(list((folder / "out").iterdir())) < 200
    assert not folder.with_name("case-disk").exists()


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
    with tempfile.TemporaryDirectory(dir=disk) as directory:
        done = subprocess.run(
            [sys.executable, "-c", WRITES, directory], cwd=HERE, capture_output=True, text=True
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
