"""Searches as a user runs them: judged on text that they do not see, repeated, foretold."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from abreast.data import TokenStream
from abreast.errors import AbreastError
from abreast.model import Pace
from abreast.planner import (
    Budget,
    CalibrationSettings,
    Profile,
    Search,
    calibrate,
    find_plan,
    measuring,
    score,
    search_texts,
)
from abreast.planner.engines import ENGINES
from abreast.planner.find import per_engine
from abreast.planner.front import explain
from abreast.planner.measuring import full_forwards, measured_plans
from abreast.report.records import read_run

WINDOW, WINDOWS, LAYERS = 32, 8, 8
SIZES = ("--windows", WINDOWS, "--window", WINDOW, "--no-plots", "--per-group", 1)


@pytest.fixture
def texts(tiny_checkpoint, tmp_path):
    """A calibration of pairs in two wirings, and another part of the same text."""
    tokens = np.random.default_rng(0).integers(128, size=2 * WINDOWS * WINDOW)
    stream = TokenStream(tokens, "random", 1, tokens.size)
    settings = CalibrationSettings(
        num_windows=WINDOWS, window=WINDOW, max_group=2, wirings=("lp", "ff")
    )
    return [
        calibrate(
            tiny_checkpoint(num_layers=LAYERS),
            tmp_path / name,
            settings,
            stream=stream,
            part=(number, 2),
        )
        for number, name in enumerate(("calibration", "held-out"))
    ]


def test_a_plan_costs_what_it_costs_on_held_out_text(texts, tmp_path):
    calibration, held_out = texts
    messages = []
    planned = find_plan(
        calibration, tmp_path, Budget(depth=6), held_out=held_out, step=messages.append
    )
    [searched], [expected] = score(calibration, [planned.plan]), score(held_out, [planned.plan])
    assert (planned.searched, planned.expected) == (searched, expected) and searched != expected
    assert planned.to_dict()["optimism"] == searched.kl - expected.kl
    best = planned.front.best()
    assert [*planned.front.held_out] == [*best.values()] and [*best] == [7, 6]
    assert planned.to_dict()["front"][1]["kl"] == expected.kl
    page = explain(planned.plan, planned.front)
    assert f"tokens of held-out text this plan costs KL {expected.kl:.5f}" in page
    assert f"{searched.kl - expected.kl:+.5f} against held-out text" in page
    run = read_run(tmp_path)
    assert [row.cost for row in run.front] == [planned.front.held_out[p] for p in best.values()]
    ahead = r"full forward passes over 256 tokens down to 6 stages, (about \d+|less than a) minute"
    assert re.search(ahead, messages[0])
    find_plan(calibration, tmp_path, Budget(depth=6), held_out=held_out, step=messages.append)
    assert any("of which earlier calls made" in message for message in messages)


def test_a_limit_on_quality_has_to_hold_on_held_out_text(texts, tmp_path):
    calibration, held_out = texts
    planned = find_plan(calibration, tmp_path, Budget(depth=6), held_out=held_out)
    limits = {cost.kl for cost in planned.front.held_out.values()}
    limited = find_plan(calibration, tmp_path, Budget(max_kl=min(limits)), held_out=held_out)
    assert limited.expected.kl == min(limits)
    with pytest.raises(AbreastError, match="no plan has a KL of at most"):
        find_plan(calibration, tmp_path, Budget(max_kl=min(limits) / 2), held_out=held_out)


def test_a_limit_on_quality_makes_predicted_time_short(texts, tmp_path):
    """Of times made up here, ff saves a tenth of what lp does: what costs less is no better."""
    calibration, held_out = texts
    profile = Profile("made up", 1.0, {"lp 2": 1.0, "ff 2": 1.9}, 0.5)
    deep = find_plan(calibration, tmp_path, Budget(depth=6))
    limit = 1.01 * max(cost.kl for cost in deep.front.plans.values())
    planned = find_plan(
        calibration, tmp_path, Budget(max_kl=limit), held_out=held_out, profile=profile
    )
    front = planned.front.efficient()
    times = [profile.latency(plan) for plan in front]
    losses = [planned.front.plans[plan].kl for plan in front]
    assert times == sorted(times, reverse=True) and losses == sorted(losses)
    assert [*planned.front.held_out] == front
    rows = planned.to_dict()["front"]
    assert [row["predicted_seconds"] for row in rows] == times
    assert "plans for its time (made up)" in explain(planned.plan, planned.front)
    meeting = [p for p, cost in planned.front.held_out.items() if cost.kl <= limit]
    assert profile.latency(planned.plan) == min(map(profile.latency, meeting))
    assert all(
        any(profile.latency(p) <= profile.latency(q) and c.kl <= d.kl for p, c in pairs(planned))
        for q, d in pairs(planned)
    )
    slow = Profile("a slow link", 1.0, {"lp 2": 2.5, "ff 2": 2.0}, 0.5)
    with pytest.raises(AbreastError, match=r"no group is faster .*\(a slow link\)"):
        find_plan(calibration, tmp_path, Budget(max_kl=limit), profile=slow)


def pairs(planned):
    return [(plan, planned.front.plans[plan]) for plan in planned.front.plans]


def test_plans_for_several_machines(tiny_checkpoint, tmp_path, run):
    """8 layers make 16 exchanges and 2 around them; three cqil pairs and two layers 7 and 2."""
    model = tiny_checkpoint(num_layers=LAYERS, tokenizer=True)
    (tmp_path / "text.txt").write_text("".join(chr(97 + i * i % 26) for i in range(9000)))
    command = ("plan", model, "-o", tmp_path / "run", "--data", tmp_path / "text.txt", *SIZES)
    command += ("--max-group", 3, "--wirings", "lp,cqil", "--max-kl", 9, "--ranks", 2)
    status, out, err = run(*command, "--link", 1000, "--json")
    assert status == 0, err
    printed = json.loads(out)
    assert printed["plan"] == "1|2 3|4 5|6" and 1.9 < printed["predicted_speedup"] < 2
    assert {*printed["front"][0]} >= {"predicted_seconds", "depth"}
    status, out, err = run(*command, "--link", 5, "--unpaired", "replicate")
    assert status == 0, err
    assert "best plan of each time" in out and "2xH100, link of 5 us" in out and "fastest: " in out
    status, _, err = run(*command, "--link", 1000, "--unpaired", "replicate")
    assert status == 2 and "no group is faster than its layers" in err
    status, out, _ = run("inspect", model, "--hardware", "2xM3Ultra-Thunderbolt")
    assert status == 0 and "7 stages, decode: shard" in out and "fastest: on one device" in out
    status, _, err = run(*command, "--ranks", 1, "--link", 5)
    assert status == 2 and "--ranks 1 with --link 5.0 makes no sense" in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("search", "cqil"),
    [
        ({}, False),
        ({"hardware": "H100"}, False),
        ({"hardware": "2xM3Ultra-RDMA"}, True),
        ({"ranks": 4}, True),
        ({"ranks": 2, "link": 300.0}, True),
    ],
)
def test_several_devices_are_offered_what_exchanges_least(search, cqil):
    offered = Search(**search).wired(CalibrationSettings()).wirings
    assert {*offered} - {"cqil"} == {"lp", "cqil-full", "ff"} and ("cqil" in offered) == cqil
    named = CalibrationSettings(wirings=("lp",))
    wired = Search(**search).wired(named)
    assert wired.wirings == named.wirings and (wired.degree > 1) == cqil


def test_the_verb_offers_cqil_where_a_plan_is_for_several_devices(tiny_checkpoint, tmp_path, run):
    command = ("plan", tiny_checkpoint(num_layers=LAYERS), "-o", tmp_path / "run", *SIZES)
    command += ("--max-group", 2, "--depth", 6, "--dry-run", "--json")
    counts = []
    for machine in ((), ("--hardware", "H100"), ("--ranks", 2, "--link", 300)):
        status, out, err = run(*command, *machine)
        assert status == 0, err
        counts.append(json.loads(out)["candidates"])
    pairs = LAYERS - 3
    assert counts == [3 * pairs, 3 * pairs, 4 * pairs]


def test_plans_are_screened_on_a_part_of_the_text(texts, tmp_path):
    calibration, _ = texts
    find_plan(calibration, tmp_path, Budget(depth=5))
    lines = [
        json.loads(line)
        for line in (calibration.folder / "journal-0.jsonl").read_text().splitlines()
    ]
    batches = {}
    for line in lines:
        if len(line["program"].split()) < LAYERS - 1:
            batches.setdefault(line["program"], set()).add(line["batch"])
    counts = [len(seen) for seen in batches.values()]
    assert set(counts) == {1, len(calibration.batches)}
    assert counts.count(len(calibration.batches)) == 2 * 3  # the three best of both depths
    assert sum(full_forwards(calibration).values()) > 0


def test_searches_on_several_texts(tiny_checkpoint, tmp_path, run):
    model = tiny_checkpoint(num_layers=LAYERS, tokenizer=True)
    (tmp_path / "text.txt").write_text("".join(chr(97 + i * i % 26) for i in range(9000)))
    command = ("plan", model, "-o", tmp_path / "run", "--data", tmp_path / "text.txt", *SIZES)
    options = ("--max-group", 2, "--wirings", "lp", "--depth", 7)
    status, out, _ = run(*command, *options, "--dry-run", "--baselines", "--repeat", 2)
    assert status == 0 and not (tmp_path / "run").exists()
    assert re.search(r"2 searches, each about \d+ full .*, down to 7 stages", out)
    assert re.search(r"here +(about \d+|less than a) minutes?, by a window that was timed now", out)
    assert re.search(
        r"baselines +at most \d+ full .* to judge, (about \d+|less than a) minute", out
    )
    status, out, err = run(*command, *options, "--repeat", 2, "--json")
    assert status == 0, err
    first, second = json.loads(out)["searches"]
    assert first["plan"] == json.loads(out)["plan"] and second["depth"] == 7
    seen = set()
    for name in ("calibration", "repeat-2/calibration", "judge"):
        seen.add(
            json.loads((tmp_path / "run" / name / "measure.json").read_text())["identity"]["tokens"]
        )
    assert len(seen) == 3
    assert first["expected"]["tokens"] == second["expected"]["tokens"]
    status, out, _ = run(*command, *options, "--repeat", 2)
    assert status == 0 and "search 2" in out and "differ by" in out
    status, _, err = run(*command, *options, "--repeat", 100)
    assert status == 2 and "name a text of at least" in err and "\n" not in err.strip()


def test_minutes_are_those_of_all_searches_and_of_a_window_here(
    tiny_checkpoint, tmp_path, run, monkeypatch
):
    pace = Pace(layers=0.03, logits=0.01)
    monkeypatch.setattr("abreast.model.pace.pace_of", lambda *arguments: pace)
    model = tiny_checkpoint(num_layers=LAYERS, tokenizer=True)
    command = ("plan", model, "-o", tmp_path / "run", *SIZES, "--depth", 6, "--dry-run", "--json")
    expected = json.loads(run(*command, "--repeat", 1000)[1])
    assert expected["searches"] == 1000 and expected["least_depth"] == 6
    seconds = 1000 * pace.seconds(WINDOWS, expected["likely"], expected["scored"])
    assert expected["minutes"] == pytest.approx(seconds / 60, rel=0.01)
    assert pace.seconds(3, 2, 1) == pytest.approx(6 * pace.layers + 3 * pace.logits)


def test_an_engine_that_loads_none_is_refused_before_anything_is_measured(
    tiny_checkpoint, tmp_path, run
):
    model = tiny_checkpoint(num_layers=LAYERS, tokenizer=True)
    options = ("--wirings", "cqil-full", "--for", "llama.cpp", "--depth", 7, "--data", "stdlib")
    status, _, err = run("plan", model, "-o", tmp_path / "run", *SIZES, *options)
    assert status == 2 and "llama.cpp loads no such group" in err
    assert not (tmp_path / "run").exists()


def test_every_engine_is_told_the_best_plan_that_it_loads(tiny_checkpoint, tmp_path):
    tokens = np.random.default_rng(0).integers(128, size=2 * WINDOWS * WINDOW)
    stream = TokenStream(tokens, "random", 1, tokens.size)

    def searched(*wirings):
        settings = CalibrationSettings(
            num_windows=WINDOWS, window=WINDOW, max_group=2, wirings=wirings
        )
        texts = [
            calibrate(
                tiny_checkpoint(num_layers=LAYERS),
                tmp_path / "-".join(wirings) / str(number),
                settings,
                stream=stream,
                part=(number, 2),
            )
            for number in range(2)
        ]
        planned = find_plan(texts[0], tmp_path, Budget(depth=6), held_out=texts[1], per_group=1)
        return per_engine(planned, *texts), texts

    planned, (calibration, held_out) = searched("ff", "lp")
    best = planned.front.best()
    for name in ("vllm", "transformers", "sglang", "torch_tp", "vllm:deci", "mlx-lm:mlx"):
        assert planned.engines[name] == tuple((p, planned.front.judged(p)) for p in best.values())
    stock, in_order = planned.engines["llama.cpp"], planned.engines["vllm:deci-ff"]
    assert planned.engines["mlx-lm:openelm"] == stock and not planned.not_for
    for plans, wiring in ((stock, "lp"), (in_order, "ff")):
        assert [plan.depth for plan, _ in plans] == [*best] == [7, 6]
        assert {group.wiring for plan, _ in plans for group in plan.groups} == {wiring}
        assert [score(held_out, [plan])[0] for plan, _ in plans] == [cost for _, cost in plans]
        few = calibration.batches[:1]  # a quarter of the text
        for plan, _ in plans:
            loaded = [p for p in measured_plans(calibration, least=1) if p.depth == plan.depth]
            loaded = [p for p in loaded if {group.wiring for group in p.groups} == {wiring}]
            costs = [cost.kl for cost in score(calibration, loaded, batches=few)]
            assert score(calibration, [plan], batches=few)[0].kl == min(costs)
    other = searched("cqil-full")[0]
    assert "llama.cpp" not in other.engines and "cqil groups" in other.not_for["llama.cpp"]
    assert set(other.engines) | set(other.not_for) == set(ENGINES)


def test_the_verb_shows_the_best_plan_of_each_depth_per_engine(tiny_checkpoint, tmp_path, run):
    model = tiny_checkpoint(num_layers=LAYERS, tokenizer=True)
    (tmp_path / "text.txt").write_text("".join(chr(97 + i * i % 26) for i in range(9000)))
    command = ("plan", model, "-o", tmp_path / "run", "--data", tmp_path / "text.txt", *SIZES)
    command += ("--max-group", 2, "--depth", 6)
    status, out, err = run(*command, "--json")
    assert status == 0, err
    engines = json.loads(out)["engines"]
    assert set(engines) == set(ENGINES)
    assert all([row["depth"] for row in rows] == [7, 6] for rows in engines.values())
    assert all("~" in row["plan"] and "+" not in row["plan"] for row in engines["vllm:deci-ff"])
    status, out, _ = run(*command)
    table = out.split("the best plan of each depth that each engine loads")[1]
    for name, rows in engines.items():
        assert name in table and all(row["plan"] in table for row in rows)
    status, out, _ = run(*command, "--for", "mlx-lm:openelm,vllm:deci")
    assert status == 0 and "that each engine loads" not in out
    assert re.search(r"^plan +\d\+\d \d\+\d$", out, re.MULTILINE)
    status, _, err = run(*command, "--for", "vllm:deci,onnx")
    assert status == 2 and "engine 'onnx' is unknown; choose from transformers, " in err


def test_both_texts_of_a_search_share_one_model(tiny_checkpoint, tmp_path):
    model = tiny_checkpoint(num_layers=LAYERS, tokenizer=True)
    settings = CalibrationSettings("stdlib", num_windows=WINDOWS, window=WINDOW)
    calibration, held_out = search_texts(model, tmp_path, settings)
    assert calibration.model is held_out.model


def test_an_interrupted_run_goes_on_with_everything_asked_for(
    tiny_checkpoint, tmp_path, run, monkeypatch
):
    model = tiny_checkpoint(num_layers=LAYERS, tokenizer=True)
    (tmp_path / "text.txt").write_text("".join(chr(97 + i * i % 26) for i in range(9000)))
    real = measuring.run_programs

    def searched(name, stop=None):
        left = [stop]

        def until(*args, **options):
            for result in real(*args, **options):
                if left[0] is not None:
                    left[0] -= 1
                    if left[0] < 0:
                        raise AbreastError("stopped")
                yield result

        monkeypatch.setattr(measuring, "run_programs", until)
        command = ("plan", model, "-o", tmp_path / name, "--data", tmp_path / "text.txt", *SIZES)
        command += ("--max-group", 2, "--depth", 7, "--repeat", 2, "--baselines", "--for", "vllm")
        status, out, err = run(*command, "--json")
        if stop is not None:
            assert status == 2 and "stopped" in err
            return None
        assert status == 0, err
        record = json.loads(out)
        rows = [(r["method"], r["plan"], r["refit"], r["kl"]) for r in record["baselines"]]
        return [(s["plan"], s["expected"], s["searched"]) for s in record["searches"]], rows

    whole = searched("whole")
    for stop in (3, 20, 60, 60):
        searched("parts", stop)
    searches, rows = searched("parts")
    assert searches == whole[0]
    assert [row[:3] for row in rows] == [row[:3] for row in whole[1]]
    assert [row[3] for row in rows] == pytest.approx([row[3] for row in whole[1]], rel=1e-4)


def test_all_texts_of_repeated_searches_are_looked_at_first(tiny_checkpoint, tmp_path, run):
    model = tiny_checkpoint(num_layers=LAYERS, tokenizer=True)
    letters = "".join(chr(97 + i * i % 26) for i in range(2000))
    (tmp_path / "text.txt").write_text(letters[:400])
    (tmp_path / "other.txt").write_text(letters)
    command = ("plan", model, "-o", tmp_path / "run", "--data", tmp_path / "text.txt", *SIZES)
    command += ("--held-out-data", tmp_path / "other.txt", "--max-group", 2, "--depth", 7)
    status, _, err = run(*command, "--repeat", 3)
    assert status == 2 and "behind the 8 that were searched on" in err
    assert not [*(tmp_path / "run").rglob("journal*")]
    status, _, err = run(*command)
    assert status == 0, err
