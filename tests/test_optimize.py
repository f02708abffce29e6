"""Plans from budgets, and the whole job: artefacts, resuming, replanning, and what is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest

import abreast.optimize as optimizing
from abreast.cli.forecast import forecast, resumed
from abreast.data import TokenStream
from abreast.errors import AbreastError
from abreast.optimize import Checks, Healing, optimize, original_of
from abreast.plan import Group, Plan
from abreast.planner.calibration import calibrate
from abreast.planner.find import Planned, find_plan, keep_accuracy
from abreast.planner.front import Budget, Front, Profile, Stats, explain, kind_of, reasons
from abreast.planner.measuring import full_forwards
from abreast.planner.objective import Cost
from abreast.planner.profiling import (
    ProfileSettings,
    estimated_profile,
    measured_profile,
    profile_here,
)
from abreast.planner.settings import CalibrationSettings
from abreast.report.records import read_run
from abreast.speed import bench

WINDOW, WINDOWS, LAYERS = 32, 8, 8
QUICK = Checks("stdlib", max_tokens=300, window=64, rounds=1, context=8, new_tokens=2)


def text(seed: int = 0) -> TokenStream:
    tokens = np.random.default_rng(seed).integers(128, size=WINDOWS * WINDOW)
    return TokenStream(tokens, "random", 1, WINDOWS * WINDOW)


@pytest.fixture
def folder(tiny_checkpoint):
    return tiny_checkpoint(num_layers=LAYERS)


def calibration(folder, out, **options):
    settings = {"num_windows": WINDOWS, "window": WINDOW, "batch_size": 4, "keep": 0.6}
    settings |= {"max_group": 2, "wirings": ("lp",), **options}
    return calibrate(folder, out / "calibration", CalibrationSettings(**settings), stream=text())


def cost(kl: float, loss: float = 0.0) -> Cost:
    return Cost(kl, kl / 10, loss, 0.001, 1000)


def front() -> Front:
    """Four measured plans of eight layers, costs made up."""
    plans = {
        Plan.parse("2+3", 8): cost(0.01, 0.01),
        Plan.parse("5+6", 8): cost(0.03, 0.02),
        Plan.parse("2+3 5+6", 8): cost(0.05, 0.06),
        Plan.parse("1+2 3+4 5+6", 8): cost(0.4, 0.5),
    }
    groups = {Group(layers=(i, i + 1)): cost(0.01 * i) for i in range(1, 6)}
    square = np.full((9, 9), 0.9)
    stats = Stats({}, "model", 8, 3.0, groups, square, square, square[0], square[:8, :8], 1.0)
    return Front(stats, plans, {7: 2.0})


PROFILE = Profile("made up", single=1.0, groups={"lp 2": 1.25}, rest=2.0)


def test_budgets_choose():
    points = front()

    def choose(**budget):
        return [p.shorthand for p in points.choose(Budget(**budget), PROFILE, best=3)]

    assert choose(depth=7) == ["2+3", "5+6"]
    assert choose(max_kl=0.06) == ["2+3 5+6"]
    assert choose(max_kl=0.02) == ["2+3"]
    assert choose(max_ppl_increase=0.03) == ["2+3", "5+6"]
    assert choose(max_ppl_increase=0.99) == ["1+2 3+4 5+6"]
    assert choose(speedup=10 / 8.6) == ["2+3 5+6"]  # 10 -> 6 * 1 + 2 * 1.25 + 2 for depth 6
    assert choose(speedup=1.2) == ["1+2 3+4 5+6"]


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (
            {"depth": 3},
            "depth 3 cannot be reached from 8 layers with these groups; the nearest is 5",
        ),
        ({"depth": 8}, "depth 8 cannot be reached .*; the nearest is 7"),
        ({"max_kl": 0.001}, "no plan has a KL of at most 0.001; the least is 0.01"),
        ({"max_ppl_increase": 0.001}, r"by at most 0.10%; the least is 1.01%"),
        ({"speedup": 3.0}, "no plan is predicted to be 3x faster; the most is 1.29x"),
    ],
)
def test_impossible_budgets_name_the_nearest(budget, message):
    with pytest.raises(AbreastError, match=message):
        front().choose(Budget(**budget), PROFILE)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"depth": 7, "max_kl": 0.1}, "give one budget only"),
        ({"depth": 0}, "--depth 0 must be more than 0"),
        ({"max_kl": float("nan")}, "--max-kl nan must be more than 0"),
        ({"max_ppl_increase": -0.1}, "--max-ppl-increase -0.1 must be more than 0"),
        ({"speedup": 1.0}, "--speedup 1 must be more than 1"),
        ({"keep_quality": 1.5}, "--keep-quality 1.5 is a share"),
        ({"keep_quality": 0.9, "depth": 7}, "give one budget only"),
    ],
)
def test_senseless_budgets_are_refused(budget, message):
    with pytest.raises(AbreastError, match=message):
        Budget(**budget)


def test_the_deepest_cut_that_keeps_enough_accuracy(monkeypatch):
    shares = {7: 0.99, 6: 0.97, 5: 0.99}
    judged = []

    def score(calibration, plans, **_):
        judged.append(plans[0].depth)
        share = shares[plans[0].depth]
        return [replace(cost(0.0), accuracy_kept=share, kept_stderr=0.01)]

    monkeypatch.setattr(import_module("abreast.planner.find"), "score", score)
    questions = SimpleNamespace(sample=SimpleNamespace(num_items=10))
    best = front().best()
    planned = Planned(best[7], (), cost(0), cost(0), front(), None)
    choose = lambda share: keep_accuracy(planned, questions, share)  # noqa: E731
    assert (choose(0.98).plan, judged) == (best[7], [7, 6])  # nothing behind the first that fails
    chosen = choose(0.96)
    assert (chosen.plan, chosen.on_tasks.accuracy_kept) == (best[6], 0.97)
    assert chosen.expected == chosen.searched == front().plans[best[6]]
    assert judged[2:] == [7, 6]  # the plan of 5 stages has a KL of 0.4
    with pytest.raises(AbreastError, match=r"no plan keeps 99.5% .* on 10 questions"):
        choose(0.995)
    shares[7] = None
    with pytest.raises(AbreastError, match="no better than chance on these tasks"):
        choose(0.9)


def test_a_forecast_adds_up_and_a_later_call_says_what_is_there(tiny_checkpoint, tmp_path, run):
    model = tiny_checkpoint(num_layers=LAYERS, tokenizer=True)
    settings = CalibrationSettings("stdlib", num_windows=8, window=32, wirings=("lp",))
    loaded = original_of(model, QUICK)
    few, many = (
        forecast(loaded, model, tmp_path, settings, QUICK, depth=depth, per_group=1)
        for depth in (7, 5)
    )
    assert few.text == 0.0 and min(few.search, few.checks, few.timing) > 0 and many.search > 0
    assert re.fullmatch(r"all of it takes about 1 minutes \(text 0, search 0, .*\)", few.words)
    written = replace(settings, data="self")
    assert forecast(loaded, model, tmp_path, written, QUICK, depth=7, per_group=1).text > 0
    assert resumed(tmp_path) is None
    out = tmp_path / "run"
    command = ("optimize", model, "-o", out, *SMALL, "--depth", 7, "--per-group", 1, "--no-plots")
    few = ("--rounds", 1, "--eval-data", "stdlib", "--max-tokens", 300, "--no-report")
    status, _, err = run(*command, *few)
    assert status == 0 and re.search(r"all of it takes about \d+ minutes", err)
    status, _, err = run(*command, *few)
    assert status == 0 and "all of it takes" not in err
    assert re.search(r"goes on in '.*', where \d+ measurements and 1 conversions are", err)


def test_dry_runs_say_how_long_it_takes_and_write_nothing(tiny_checkpoint, tmp_path, run):
    model, out = tiny_checkpoint(num_layers=LAYERS, tokenizer=True), tmp_path / "out"
    status, text, _ = run(
        "optimize", model, "-o", out, *SMALL, "--no-report", "--dry-run", "--json"
    )
    assert status == 0 and json.loads(text).keys() == {"text", "search", "checks", "timing"}
    short = ("--window", 16, "--batch-size", 2, "--micro-batch", 1, "--steps", 10, "--no-plots")
    heal = ("heal", model, "--plan", "2+3", "-o", out, *short, "--dry-run")
    status, text, _ = run(*heal)
    assert status == 0, text
    assert "8 -> 7 stages: 2+3" in text and "65,536 tokens of text" in text
    assert re.search(r"tokens/s end to end; 10 steps take about \d", text)
    status, text, _ = run(*heal, "--method", "refit", "--json")
    assert json.loads(text).keys() == {"plan", "refit"}
    assert not out.exists() and not (tmp_path / "out.work").exists()
    status, _, err = run("heal", model, "--plan", "2+9", "-o", out, "--dry-run", "--no-plots")
    assert status == 2 and len(err.strip().splitlines()) == 1


def test_a_short_text_is_refused_before_the_model_writes_one(tiny_checkpoint, tmp_path, run):
    model, out = tiny_checkpoint(num_layers=LAYERS, tokenizer=True), tmp_path / "out"
    (tmp_path / "short.txt").write_text("layers abreast")
    command = ("optimize", model, "-o", out, "--data", tmp_path / "short.txt", "--window", 32)
    status, _, err = run(*command, "--windows", 8, "--depth", 7, "--no-report", "--no-plots")
    assert status == 2 and re.search("gives 0 windows|less than one window", err)
    assert not [*out.rglob("*.safetensors")] and len(err.strip().splitlines()) == 1


def test_a_speed_up_needs_a_profile_that_knows_the_groups():
    with pytest.raises(AbreastError, match="needs a latency profile"):
        front().choose(Budget(speedup=1.1))
    other = Profile("made up", single=1.0, groups={"cqil:0 2": 1.0}, rest=0.0)
    with pytest.raises(AbreastError, match="no group of kind 'lp 2'"):
        front().choose(Budget(speedup=1.1), other)
    assert kind_of(Group(layers=(1, 2, 3), wiring="cqil", bypass=2)) == "cqil:2 3"


def test_reasons_name_the_best_plan_without_the_group():
    points = front()
    rows = reasons(Plan.parse("2+3", 8), points)
    assert [(row["group"], row["rank"], row["without"]) for row in rows] == [("2+3", 2, "5+6")]
    assert rows[0]["extra_kl"] == pytest.approx(0.02)
    page = explain(Plan.parse("2+3 5+6", 8), points)
    assert "none measured" in page and "| 2+3 | 0.02000 ± 0.00200 | 2 of 5 |" in page


def test_search_goes_as_deep_as_the_budget_needs(folder, tmp_path):
    planned = find_plan(calibration(folder, tmp_path), tmp_path, Budget(depth=6))
    assert planned.plan.depth == 6 and set(planned.front.best()) == {7, 6}
    least = min(cost.kl for cost in planned.front.stats.groups.values())
    limited = find_plan(calibration(folder, tmp_path), tmp_path, Budget(max_kl=least * 1.01))
    assert limited.plan.depth == 7 and limited.expected.kl <= least * 1.01


@pytest.mark.parametrize(("depth", "nearest"), [(1, 5), (4, 5), (8, 7)])
def test_a_depth_out_of_reach_is_refused_before_measuring(folder, tmp_path, depth, nearest):
    calibrated = calibration(folder, tmp_path)
    with pytest.raises(AbreastError, match=f"depth {depth} cannot .* nearest is {nearest} "):
        find_plan(calibrated, tmp_path, Budget(depth=depth))
    assert sum(full_forwards(calibrated).values()) == 0


def test_another_budget_measures_nothing_again(folder, tmp_path, monkeypatch):
    first = find_plan(calibration(folder, tmp_path), tmp_path, Budget(depth=5))
    monkeypatch.setattr(
        import_module("abreast.planner.calibration"), "load", None
    )  # not even loaded
    again = find_plan(calibration(folder, tmp_path), tmp_path, Budget(depth=6))
    assert again.plan == first.front.best()[6]
    assert sum(again.front.full_forwards.values()) == sum(first.front.full_forwards.values())


def measured(out) -> dict[str, float]:
    return {row["plan"]: row["kl"] for row in json.loads((out / "front.json").read_text())["plans"]}


def test_a_budget_that_needs_less_depth_loses_no_plan(folder, tmp_path):
    find_plan(calibration(folder, tmp_path), tmp_path, Budget(depth=5))
    deep = measured(tmp_path)
    again = find_plan(calibration(folder, tmp_path), tmp_path, Budget(depth=7))
    assert measured(tmp_path) == deep and again.plan.depth == 7
    assert {LAYERS - plan.count("+") for plan in deep} == set(again.front.best()) == {7, 6, 5}


def test_other_wirings_join_the_front_and_are_not_chosen_for_those_who_do_not_ask(
    folder, tmp_path, monkeypatch
):
    one = find_plan(calibration(folder, tmp_path), tmp_path, Budget(depth=6))
    before = measured(tmp_path)
    other = calibration(folder, tmp_path, wirings=("cqil",))
    two = find_plan(other, tmp_path, Budget(depth=6))
    assert {group.wiring for plan in two.front.plans for group in plan.groups} == {"cqil"}
    assert measured(tmp_path).items() > before.items()
    assert set(one.front.stats.groups) < set(two.front.stats.groups)
    monkeypatch.setattr(import_module("abreast.planner.calibration"), "load", None)
    back = find_plan(calibration(folder, tmp_path), tmp_path, Budget(depth=6))
    assert back.plan == one.plan and set(back.front.stats.groups) == set(two.front.stats.groups)
    assert reasons(back.plan, back.front)[0]["candidates"] == len(two.front.stats.groups)


def test_same_seed_same_plan_byte_for_byte(folder, tmp_path):
    for name in ("one", "two"):
        find_plan(calibration(folder, tmp_path / name), tmp_path / name, Budget(depth=5))
    one, two = ((tmp_path / name / "front.json").read_bytes() for name in ("one", "two"))
    assert one == two


def test_refining_takes_at_most_five_forward_passes_per_group(folder, tmp_path):
    """At each depth, counted in layers really run; candidates alone count at their depth."""
    planned = find_plan(calibration(folder, tmp_path), tmp_path, Budget(depth=5))
    assert all(planned.front.full_forwards[depth] <= 5 * (LAYERS - depth) for depth in (6, 5))


def test_profile_of_other_hardware(folder):
    kinds = [Group(layers=(1, 2)), Group(layers=(1, 2), wiring="cqil")]
    profile = estimated_profile(folder, kinds, "2xA100-NVLink")
    assert profile.single < profile.groups["lp 2"] < 2 * profile.single
    assert 1 < profile.speedup(Plan.parse("1+2 3+4", LAYERS)) < LAYERS / (LAYERS - 2)
    with pytest.raises(AbreastError, match="9xABACUS"):
        estimated_profile(folder, kinds, "9xABACUS")


@pytest.fixture
def timed(folder, tmp_path, monkeypatch):
    """`measured_profile` of a model of 8 layers, from these seconds per token."""
    module = import_module("abreast.planner.profiling")
    loaded = {"config": SimpleNamespace(model_type="none")}
    monkeypatch.setattr(module, "load", lambda *_, **__: (SimpleNamespace(**loaded), None))
    monkeypatch.setattr(module, "decoder_layers", lambda _: [None] * LAYERS)

    def call(**seconds: float) -> Profile:
        rows = {name: SimpleNamespace(median=16 * s) for name, s in seconds.items()}
        rows["lp 2"] = rows.pop("pairs")
        monkeypatch.setattr(module, "bench", lambda *_, **__: SimpleNamespace(timings=rows))
        settings = ProfileSettings("float32", "cpu", rounds=6, context=8, seed=0)
        return measured_profile(folder, [Group(layers=(1, 2))], tmp_path, settings)

    return call


def test_a_profile_adds_up_to_what_was_timed(timed):
    profile = timed(whole=10.0, half=6.0, pairs=9.5)
    assert (profile.single, profile.rest, profile.groups) == (1.0, 2.0, {"lp 2": 1.5})
    whole, plan = Plan(num_layers=LAYERS), Plan.parse("1+2", LAYERS)
    assert (profile.latency(whole), profile.latency(plan)) == (10.0, 9.5)
    noisy = timed(whole=8.0, half=3.5, pairs=7.5)  # less than half for half of the layers
    assert (noisy.rest, noisy.latency(whole), noisy.latency(plan)) == (0.0, 8.0, 7.5)


@pytest.mark.parametrize(
    ("seconds", "kind"),
    [
        ({"whole": 8.0, "half": 8.5, "pairs": 7.0}, "one layer"),
        ({"whole": 8.0, "half": 4.0, "pairs": 5.9}, "lp 2"),
        ({"whole": float("nan"), "half": 4.0, "pairs": 7.0}, "one layer"),
    ],
)
def test_a_profile_of_noise_is_refused(timed, seconds, kind):
    with pytest.raises(AbreastError, match=f"too noisy to predict speed: {kind} would take no"):
        timed(**seconds)


def test_a_profile_with_more_kinds_is_taken_and_one_of_noise_is_not(folder, tmp_path, monkeypatch):
    module, made = import_module("abreast.planner.profiling"), []

    def measure(_, groups, *__, **___):
        made.append({kind_of(group) for group in groups})
        return Profile("now", 1.0, dict.fromkeys(made[-1], 1.2), 0.5)

    monkeypatch.setattr(module, "measured_profile", measure)
    both = calibration(folder, tmp_path, wirings=("lp", "cqil"))
    assert set(profile_here(both, {"lp 2", "cqil:0 2"}, tmp_path).groups) == {"lp 2", "cqil:0 2"}
    calibrated = calibration(folder, tmp_path)
    profile_here(calibrated, {"lp 2"}, tmp_path)
    assert made == [{"lp 2", "cqil:0 2"}]
    record = json.loads((tmp_path / "profile.json").read_text())
    record["profile"]["groups"]["lp 2"] = -0.1  # as earlier versions wrote it
    (tmp_path / "profile.json").write_text(json.dumps(record))
    assert read_run(tmp_path).profile is None
    assert profile_here(calibrated, {"lp 2"}, tmp_path).groups == {"lp 2": 1.2}
    profile_here(calibrated, {"lp 2"}, tmp_path, rounds=8)  # what was timed in more rounds will do
    assert len(made) == 2


@pytest.mark.slow
def test_a_conversion_of_every_kind_is_timed(folder, tmp_path, monkeypatch):
    module = import_module("abreast.planner.profiling")

    def time_layers(models, **options):
        bench(models, **options)  # they run; how long they take is made up, for machines are noisy
        layers = {name: len(model.model.layers) for name, model in models.items()}
        rows = {name: SimpleNamespace(median=16.0 * count) for name, count in layers.items()}
        return SimpleNamespace(timings=rows)

    monkeypatch.setattr(module, "bench", time_layers)
    kinds = [Group(layers=(1, 2)), Group(layers=(3, 4)), Group(layers=(1, 2), wiring="cqil")]
    settings = ProfileSettings("float32", "cpu", rounds=1, context=8, seed=0)
    profile = measured_profile(folder, kinds, tmp_path, settings)
    assert (profile.single, profile.groups, profile.rest) == (
        1.0,
        {"lp 2": 1.0, "cqil:0 2": 1.0},
        0.0,
    )
    assert not list(tmp_path.iterdir())


class Counted:
    """Counts the calls of functions that it replaces."""

    def __init__(self, monkeypatch, *names: str) -> None:
        self.calls: list[str] = []
        for name in names:
            real = getattr(optimizing, name)
            monkeypatch.setattr(optimizing, name, self._wrap(name, real))

    def _wrap(self, name, real):
        def call(*arguments, **options):
            self.calls.append(name)
            return real(*arguments, **options)

        return call


def test_whole_job_resumes_from_its_files(tiny_checkpoint, tmp_path, monkeypatch):
    model = tiny_checkpoint(tokenizer=True)
    counted = Counted(monkeypatch, "convert", "verify", "compare", "bench")
    made = calibrate(
        model, tmp_path / "calibration", CalibrationSettings("stdlib", num_windows=8, window=32)
    )
    planned = find_plan(made, tmp_path, Budget(depth=5), per_group=1)
    options = {"checks": QUICK, "command": ["abreast", "optimize", "and so on"]}
    result = optimize(model, tmp_path, planned, **options)
    assert counted.calls == ["convert", "verify", "compare", "bench", "bench"]
    run = read_run(tmp_path)
    assert run.last is not None and not run.others and run.command.endswith("'and so on'")
    lacking = {part.what.split()[1] for part in run.missing()}
    assert lacking == {"comparison"}  # nobody asked for it
    assert "and so on" in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "perplexity" in (run.last.target / "README.md").read_text(encoding="utf-8")
    assert result.verification["ok"] is True
    written = Plan.load(f"{result.folder}/plan.yaml")
    assert written.groups == planned.plan.groups and written.source == str(model)
    assert written.sha256 == made.identity["model"]
    assert "# Why" in next((tmp_path / "plans").rglob("why.md")).read_text()
    again = optimize(model, tmp_path, planned, **options)
    assert counted.calls[5:] == [] and again.to_dict() == result.to_dict()
    assert json.loads((tmp_path / "results.json").read_text())["quality"] == result.quality
    optimize(model, tmp_path, planned, checks=replace(QUICK, max_tokens=400))
    assert counted.calls[5:] == ["compare"]


@pytest.mark.slow
def test_the_plan_that_heals_best_is_kept(tmp_path, monkeypatch):
    from abreast.demo import model_folder

    counted = Counted(monkeypatch, "heal", "convert")
    made = calibrate(
        model_folder(),
        tmp_path / "calibration",
        CalibrationSettings("stdlib", num_windows=8, window=64),
    )
    planned = find_plan(made, tmp_path, Budget(depth=14), per_group=2, best=2)
    assert len(planned.others) == 1 and planned.others[0].depth == 14
    options = {"checks": QUICK}
    healing = Healing("refit", "stdlib-train", candidates=2, tokens=4000)
    result = optimize(model_folder(), tmp_path, planned, healing=healing, **options)
    assert counted.calls == ["heal", "heal"]
    assert set(result.healed) == {planned.plan.shorthand, planned.others[0].shorthand}
    assert result.plan == min(result.healed, key=lambda plan: result.healed[plan]["kl_after"])
    assert all(kl["kl_after"] <= kl["kl_before"] for kl in result.healed.values())
    again = optimize(model_folder(), tmp_path, planned, healing=healing, **options)
    assert again.to_dict() == result.to_dict() and counted.calls == ["heal", "heal"]
    plain = optimize(model_folder(), tmp_path, planned, **options)
    assert plain.converted != result.converted and plain.healed == {}


SMALL = (
    *("--data", "stdlib", "--windows", 8, "--window", 32, "--batch-size", 8),
    *("--max-group", 2, "--wirings", "lp"),
)


@pytest.mark.slow
def test_command_line(run, tmp_path):
    from abreast.demo import model_folder

    model, out = model_folder(), tmp_path / "run"
    status, text, _ = run("measure", model, "-o", out, *SMALL, "--dry-run", "--json")
    assert status == 0 and json.loads(text)["candidates"] == 13 and not out.exists()
    status, text, _ = run("measure", model, "-o", out, *SMALL, "--json")
    assert status == 0 and len(json.loads(text)["groups"]) == 13
    budget = ("--depth", 14, "--per-group", 1, "--baselines", "--baseline-data", "stdlib")
    status, text, _ = run("plan", model, "-o", out, *SMALL, *budget, "--json")
    assert status == 0 and json.loads(text)["depth"] == 14
    written = Plan.load(out / "plan.yaml")
    assert (written.depth, written.source) == (14, str(model)) and len(written.sha256) == 64
    assert (out / "pareto.png").read_bytes().startswith(b"\x89PNG")
    status, text, err = run("plan", model, "-o", out, *SMALL, "--depth", 3, "--per-group", 0)
    assert status == 2 and re.search("depth 3 cannot be reached .* the nearest is 9", err)
    assert len(err.strip().splitlines()[-1]) < 200
    status, text, err = run("plan", model, "-o", out, *SMALL, "--per-group", 0, "--no-plots")
    assert status == 0 and "budget: the deepest cut with a KL of at most 0.1 nats" in err
    assert len(re.findall("^->", text, re.M)) == 1  # of the table of plans, the chosen one
    few = (
        "--rounds",
        1,
        "--eval-data",
        "stdlib",
        "--max-tokens",
        300,
        "--no-baselines",
        "--no-plots",
        "--per-group",
        1,
    )
    status, text, _ = run("optimize", model, "-o", out, *SMALL, "--depth", 14, *few)
    assert status == 0 and "held-out KL" in text
    status, _, err = run("optimize", model, "-o", out, *SMALL, "--depth", 14, "--windows", 9, *few)
    assert status == 2 and "with other" in err
