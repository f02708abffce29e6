"""The PNG files of plan, study, heal and bench."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from made_run import LAYERS, PLAN, make_front

from abreast.cli.main import cli
from abreast.errors import AbreastError
from abreast.heal.least_squares import Fit, Refit
from abreast.heal.train import Distilled, Point
from abreast.plan import Plan
from abreast.planner.find import Planned
from abreast.planner.front import Profile
from abreast.report.drawings import draw_bench, draw_front, draw_healing, draw_study
from abreast.rivals import Measured
from abreast.speed.timing import BenchResult, Contender, Job, Measurement, Report, timings
from abreast.study.interventions import StudyRow


def pictures(folder: Path) -> list[str]:
    """The names of the PNG files in a folder that holds nothing else."""
    for path in folder.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG"), path
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("compared", [False, True])
def test_front(tmp_path, compared):
    front, plan = make_front("org/model"), Plan.parse(PLAN, LAYERS)
    profile = Profile("made up", 1.0, {"lp 2": 1.5, "cqil:0 2": 1.5}, 2.0)
    planned = Planned(
        plan, (), front.plans[plan], front.plans[plan], front, profile if compared else None
    )
    rows = [
        Measured(method, p.depth, p.shorthand, cost, speedup=profile.speedup(p))
        for method in ("planner", "random")
        for p, cost in front.plans.items()
    ]
    draw_front(planned, rows if compared else [], tmp_path)
    assert pictures(tmp_path) == ["pareto-speed.png", "pareto.png"][1 - compared :]


@pytest.mark.parametrize("num_layers", [4, 20])  # with numbers in the cells, and without
def test_study(tmp_path, num_layers):
    rows = [
        StudyRow(name, start, end, num_layers - end + start, None, 3.0, increase, 0.1, 20.0)
        for name in ("prune", "shuffle")
        for start, end, increase in ((0, 1, -0.01), (0, 2, 30.0), (1, 2, 0.05), (2, 3, np.nan))
    ]
    draw_study(rows, num_layers, tmp_path)
    assert pictures(tmp_path) == ["depth_curve.png", "prune.png", "shuffle.png"]


def test_healing(tmp_path):
    refit = Refit(
        (Fit((1, 2), "qkv", 0.1, 0.2, 0.1), Fit((1, 2), "out", None, 0.0, 0.0)), 1, 1, 1, 9
    )
    points = tuple(
        Point(i, i, 0.1, np.nan if i == 0 else 1 / i, 0.9, 1.0, 1.0, "model") for i in range(3)
    )
    distilled = Distilled(points, 1, 0.9, 0.9, 30, "all steps done", False, 1.0, 1.0)
    for name, parts in {
        "a": (refit, distilled),
        "b": (refit, None),
        "c": (None, distilled),
    }.items():
        draw_healing(*parts, tmp_path / f"{name}.png")
    assert pictures(tmp_path) == ["a.png", "b.png", "c.png"]


def test_bench(tmp_path):
    seconds = {name: 0.01 * (1 + np.arange(8)) for name in ("original", "abreast")}
    timed = timings(Measurement(seconds, {"original": 64, "abreast": 64}))
    sizes = (1, 128, 0, 8, 2, 0, "cpu", "float32", 2)
    results = tuple(
        BenchResult(task, "original", *sizes, timed, seconds) for task in ("prefill", "decode")
    )
    job = Job((Contender("original", "a"), Contender("abreast", "b")), ())
    draw_bench(Report(job, results, ()), tmp_path / "bench.png")
    assert pictures(tmp_path) == ["bench.png"]


@pytest.mark.parametrize(
    ("words", "otherwise"),
    [
        ("study no/model -o OUT", "use --no-plots"),
        ("plan no/model -o OUT --depth 5", "use --no-plots"),
        ("heal no/model --plan 1+2 -o OUT", "use --no-plots"),
        ("bench no/model -o OUT", "leave -o out"),
    ],
)
def test_a_missing_package_is_reported_before_the_work(tmp_path, monkeypatch, words, otherwise):
    monkeypatch.setitem(sys.modules, "altair", None)
    arguments = words.replace("OUT", str(tmp_path / "out")).split()
    with pytest.raises(AbreastError, match=rf"pip install .*jinja2.*, or {otherwise}"):
        CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert not (tmp_path / "out").exists()
