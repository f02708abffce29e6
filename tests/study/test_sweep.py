"""The sweep against naive runs, its files, and what it refuses."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from abreast.cli.main import cli
from abreast.data import TokenStream
from abreast.demo import model_folder
from abreast.errors import AbreastError
from abreast.model import Pace, grouped, load
from abreast.plan import Plan
from abreast.speed.hardware import hardware_of
from abreast.speed.prediction import Setting, speedup
from abreast.speed.shape import read_config
from abreast.study import Changes, Grid, StudySettings, study_cost, sweep

LAYERS, WINDOW = 6, 12
SETTINGS = StudySettings(num_windows=3, window=WINDOW, batch_size=2)
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tiny_checkpoint) -> Path:
    return tiny_checkpoint()


def stream(vocabulary: int = 128) -> TokenStream:
    tokens = np.random.default_rng(0).integers(vocabulary, size=3 * WINDOW)
    return TokenStream(tokens, source="random", num_documents=1, num_bytes=len(tokens))


def log_probabilities(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.from_numpy(stream().tokens).view(-1, WINDOW)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return logits.double().log_softmax(-1)


def test_every_row_equals_a_naive_run(folder, tmp_path):
    result = sweep(folder, tmp_path / "out", Grid(), SETTINGS, stream=stream())
    # sizes 2, 3, 4: 5 + 3 + 1, 4 + 1 and 3 plans, in four wirings
    assert len(result.rows) == 4 * (9 + 5 + 3)
    assert [row.wiring for row in result.rows] == sorted(
        (row.wiring for row in result.rows), key=["lp", "cqil", "cqil-full", "ff"].index
    )
    model, _ = load(folder)
    labels = torch.from_numpy(stream().tokens).view(-1, WINDOW)[:, 1:, None]
    before = log_probabilities(model)
    original = -before.gather(-1, labels).mean((1, 2)).numpy()
    assert result.loss == pytest.approx(original.mean(), abs=TOLERANCE)
    for row in result.rows:
        plan = Plan.parse(row.plan, LAYERS)
        assert len(plan.groups) == row.groups and plan.depth == row.depth
        assert {len(group.layers) for group in plan.groups} == {row.size}
        members = [layer for group in plan.groups for layer in group.layers]
        assert members == list(range(row.first, row.last + 1))
        with grouped(model, plan):
            under = log_probabilities(model)
        losses = -under.gather(-1, labels).mean((1, 2)).numpy()
        kl = (before.exp() * (before - under)).sum(-1).mean(-1).numpy()
        assert row.loss == pytest.approx(losses.mean(), abs=TOLERANCE), row
        assert row.perplexity == pytest.approx(np.exp(losses.mean()), rel=TOLERANCE)
        assert row.loss_increase == pytest.approx((losses - original).mean(), abs=2 * TOLERANCE)
        error = np.std(losses - original, ddof=1) / 3**0.5
        assert row.loss_stderr == pytest.approx(error, abs=2 * TOLERANCE)
        assert row.kl == pytest.approx(kl.mean(), abs=TOLERANCE)
        assert row.kl_stderr == pytest.approx(np.std(kl, ddof=1) / 3**0.5, abs=TOLERANCE)
        same = (under.argmax(-1) == before.argmax(-1)).double().mean()
        assert row.same_top == pytest.approx(float(same), abs=1e-9)
    names = {row.plan: row.cqil for row in result.rows}
    assert names["1|2 3|4"] == "P2 D0 S1 E5" and names["1|2|3:2"] == "P3 D2 S1 E4"
    assert names["1+2 3+4"] is None


class Stop(Exception):
    pass


def test_an_interrupted_sweep_goes_on_to_the_same_files(folder, tmp_path):
    grid = Grid(sizes=(2, 3), wirings=("lp", "ff"))

    def stop_at(limit: int) -> Callable[[int, int], None]:
        def progress(done: int, total: int) -> None:
            if done >= limit:
                raise Stop

        return progress

    whole = sweep(folder, tmp_path / "whole", grid, SETTINGS, stream=stream())
    for limit in (7, 30):
        with pytest.raises(Stop):
            sweep(
                *(folder, tmp_path / "cut", grid, SETTINGS),
                stream=stream(),
                progress=stop_at(limit),
            )
        assert not (tmp_path / "cut" / "sweep.csv").exists()
    resumed = sweep(folder, tmp_path / "cut", grid, SETTINGS, stream=stream())
    assert resumed.rows == whole.rows
    files = [(tmp_path / name / "sweep.csv").read_bytes() for name in ("cut", "whole")]
    assert files[0] == files[1]
    # A larger grid adds only what is new.
    larger = replace(grid, wirings=("lp", "cqil", "ff"))
    sweep(folder, tmp_path / "cut", larger, SETTINGS, stream=stream())
    again = sweep(
        *(folder, tmp_path / "cut", larger, SETTINGS), stream=stream(), progress=stop_at(0)
    )
    assert {row.wiring for row in again.rows} == {"lp", "cqil", "ff"}
    with pytest.raises(AbreastError, match="a sweep with other norms"):
        sweep(folder, tmp_path / "cut", grid, replace(SETTINGS, norms="split"), stream=stream())


def test_what_it_takes_is_known_before(folder, tmp_path):
    said: list[str] = []
    grid = Grid(sizes=(2,), wirings=("lp",), max_groups=2, min_depth=5)
    expected = study_cost(folder, grid, SETTINGS)
    assert expected.changed == 5  # one group: min_depth leaves no second one
    result = sweep(folder, tmp_path / "out", grid, SETTINGS, stream=stream(), step=said.append)
    (words,) = said
    assert re.fullmatch(rf"{expected.text}, (about \d+|less than a) minutes? here", words)
    for devices in (("cpu",), ("cpu", "cpu")):  # two workers share the cores
        foretold = study_cost(folder, grid, replace(SETTINGS, devices=devices), Pace(30.0, 6.0))
        seconds = SETTINGS.num_windows * (30.0 * expected.full_forwards + 6.0 * 6)
        assert foretold.seconds == pytest.approx(seconds)
        assert foretold.text == f"{expected.text}, about {round(seconds / 60)} minutes here"
    batches = 2
    # the reference runs once more at the head of every batch's programs, and is shared
    assert result.spent / LAYERS / batches == pytest.approx(expected.full_forwards)
    assert study_cost(folder, Changes(("prune",), 2), SETTINGS).changed == 5


def test_files_and_speed(folder, tmp_path):
    grid = Grid(sizes=(2,), wirings=("lp", "cqil"), max_groups=1, hardware="2xA100-NVLink")
    calls: list[Any] = []

    def timer(model: Path, groups: Any, out: Path, dtype: str) -> Callable[[Plan], float]:
        calls.append((model, [group.shorthand for group in groups], out))
        return lambda plan: 0.001 * plan.depth

    result = sweep(folder, tmp_path / "out", grid, SETTINGS, stream=stream(), timer=timer)
    groups = [f"{i}{sign}{i + 1}" for sign in "+|" for i in range(5)]
    assert calls == [(folder, groups, tmp_path / "out")]
    with open(tmp_path / "out" / "sweep.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == [
        *("wiring", "size", "groups", "first", "last", "depth", "plan", "cqil"),
        *("loss", "loss_increase", "loss_stderr", "perplexity", "kl", "kl_stderr"),
        *("same_top", "same_top_stderr"),
        *("predicted_ms", "predicted_speedup", "measured_ms", "measured_speedup"),
    ]
    config, setting = read_config(folder), Setting(hardware_of("2xA100-NVLink"))
    for line, row in zip(lines, result.rows, strict=True):
        assert line["plan"] == row.plan and line["cqil"] == (row.cqil or "")
        expected = speedup(config, Plan.parse(row.plan, LAYERS), setting)
        assert row.predicted_speedup == pytest.approx(expected)
        assert float(line["measured_ms"]) == pytest.approx(5)
        assert row.measured_speedup == pytest.approx(6 / 5)
    record = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert record["identity"] == result.identity and record["num_layers"] == LAYERS
    assert json.dumps(result.to_dict(), allow_nan=False)
    # Two devices split three members as they split layers.
    triple = replace(grid, sizes=(3,), wirings=("cqil",))
    rows = sweep(folder, tmp_path / "out", triple, SETTINGS, stream=stream()).rows
    assert all(row.predicted_speedup > 1 for row in rows)


@pytest.mark.skipif(
    find_spec("pyarrow") is None and find_spec("polars") is None, reason="nothing writes parquet"
)
def test_parquet_has_what_the_csv_has(folder, tmp_path):
    grid = Grid(sizes=(2,), wirings=("lp", "cqil"), max_groups=1, parquet=True)
    sweep(folder, tmp_path / "out", grid, SETTINGS, stream=stream())
    path = tmp_path / "out" / "sweep.parquet"
    if find_spec("pyarrow") is not None:
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(path).to_pylist()
    else:
        import polars

        rows = polars.read_parquet(path).to_dicts()
    with open(tmp_path / "out" / "sweep.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(rows[0]) == list(lines[0]) and len(rows) == len(lines) == 10
    for row, line in zip(rows, lines, strict=True):
        for name, value in row.items():
            if isinstance(value, float):
                assert float(line[name]) == pytest.approx(value, rel=1e-7)
            else:
                assert line[name] == str("" if value is None else value)


def test_parquet_without_its_package_is_refused_before_the_work(folder, tmp_path, monkeypatch):
    for name in ("pyarrow", "polars"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(AbreastError, match="--parquet needs pyarrow or polars: pip install"):
        sweep(folder, tmp_path / "out", Grid(parquet=True), SETTINGS, stream=stream())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": (1, 2)}, "the least size is 1; give at least 2"),
        ({"sizes": ()}, "the least size is 0"),
        ({"sizes": (7,)}, "no plan of 6 layers has such sizes"),
        ({"min_depth": 6}, "no plan of 6 layers"),
        ({"wirings": ("lp", "lq")}, "wiring 'lq' is unknown; choose from lp"),
        ({"max_groups": 0}, "the most groups is 0"),
        ({"min_depth": 0}, "the least depth is 0"),
        ({"hardware": "Z80"}, "unknown hardware 'Z80'"),
    ],
)
def test_mistakes_are_named_and_nothing_is_made(folder, tmp_path, changes, message):
    with pytest.raises(AbreastError, match=message) as caught:
        sweep(folder, tmp_path / "out", replace(Grid(), **changes), SETTINGS, stream=stream())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--sweep --interventions prune", "--interventions goes without --sweep"),
        ("--sizes 2", "--sizes goes with --sweep"),
        ("--tasks offline", "--tasks goes with --sweep"),
        ("--timed", "--timed goes with --sweep"),
        ("--sweep --limit 3", "--limit goes with --tasks"),
        ("--sweep --sizes two", "--sizes 'two' cannot be read; write whole numbers"),
        ("--sweep --dry-run --windows 0", "the number of windows is 0"),
    ],
)
def test_options_that_do_not_go_together(folder, tmp_path, words, message):
    command = ["study", str(folder), "-o", str(tmp_path / "out"), "--no-plots", *words.split()]
    with pytest.raises(AbreastError, match=message):
        CliRunner().invoke(cli, command, catch_exceptions=False)
    assert not (tmp_path / "out").exists()


def test_tasks_without_the_harness_are_refused_before_the_work(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "lm_eval.tasks", raising=False)
    command = ["study", str(folder), "-o", str(tmp_path / "out"), "--sweep", "--no-plots"]
    with pytest.raises(AbreastError, match="pip install datasets lm-eval"):
        CliRunner().invoke(cli, [*command, "--tasks", "offline"], catch_exceptions=False)
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_it_takes_and_shows_the_best(tiny_checkpoint, tmp_path):
    text = tmp_path / "text.md"
    text.write_text("layers abreast " * 40)
    folder = tiny_checkpoint(tokenizer=True)
    common = ["study", str(folder), "-o", str(tmp_path / "out"), "--sweep", "--data", str(text)]
    common += ["--sizes", "2", "--wirings", "cqil", "--windows", "2", "--window", "16"]
    minutes = r", (about \d+|less than a) minutes?"
    printed = CliRunner().invoke(cli, [*common, "--dry-run"], catch_exceptions=False).output
    assert printed.startswith("9 changed models, ")
    assert re.search(f"over 2 windows of 16 tokens{minutes} here\n$", printed)
    plain = [*common[:4], "--baselines", "5,4", "--dry-run"]
    both = CliRunner().invoke(cli, plain, catch_exceptions=False).output
    assert re.search(f"\nrivals: at most .* to judge{minutes}\n$", both)
    assert not (tmp_path / "out").exists()
    shown = CliRunner().invoke(cli, common, catch_exceptions=False)
    assert printed.rpartition(", ")[0] in shown.stderr
    assert "P2 D0 S0 E6" in shown.stdout and "9 plans: " in shown.stdout
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {
        "cqil-2.png",
        "perplexity.png",
    }


@pytest.mark.slow
def test_tasks_and_their_picture(tmp_path):
    pytest.importorskip("lm_eval")
    from abreast.evaluate import evaluate_tasks, find_tasks
    from abreast.report import draw_sweep

    folder, out = model_folder(), tmp_path / "out"
    tasks = find_tasks(["python_brackets", "python_next_line"], limit=2)
    grid = Grid(sizes=(15,), wirings=("lp",))
    result = sweep(folder, out, grid, SETTINGS, tasks=tasks, stream=stream())
    names = [f"task_{name}" for name in tasks.rows]
    with open(out / "sweep.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0])[-len(names) :] == names
    row = result.rows[1]
    assert row.first == 1 and len(result.rows) == 2
    alone = evaluate_tasks(folder, tasks, plan=row.plan)
    assert row.tasks == {name: score.converted for name, score in alone.tasks.items()}
    assert result.tasks.keys() == row.tasks.keys()
    draw_sweep(result.rows, result.num_layers, out)
    assert (out / "task-python_brackets.png").is_file()
