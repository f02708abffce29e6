"""docs/evidence.md is what its rows say; how rows are measured, in miniature."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from abreast.demo import model_folder
from abreast.errors import AbreastError
from abreast.model import token_scores
from abreast.plan import FOLDER, Plan

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import _evidence  # noqa: E402

WORDS = "the lamp of a small house on the hill was seen from every boat that came near it\n"


def test_the_page_is_what_its_rows_say() -> None:
    rows = _evidence.read_rows()
    hint = "python benchmarks/real_models.py --page"
    assert _evidence.PAGE.read_text("utf-8") == _evidence.page(rows), hint
    assert _evidence.TEXTS.read_text("utf-8") == _evidence.all_texts(rows), hint
    (table,) = _evidence.MARKED.findall(_evidence.README.read_text("utf-8"))
    assert table == _evidence.readme_table(rows), hint


def test_rows_say_what_they_rest_on() -> None:
    for file in _evidence.ROWS.glob("*-*-*.json"):
        row = json.loads(file.read_text("utf-8"))
        model, depth, _ = file.stem.split("-")
        assert row["row"] == file.stem and row["command"].endswith(f"real_models.py {file.stem}")
        assert (row["model"], row["layers"]) == _evidence.MODELS[model]
        assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in row["rests_on"].values())
        plan = Plan.load(FOLDER / f"{model}-{depth}.yaml")
        assert (plan.shorthand, plan.sha256) == (row["plan"], row["rests_on"]["model"])
        assert not re.search(r'"[^"\n]*(/root|/work|/home)', file.read_text("utf-8"))


def made_up(kind: str) -> dict[str, Any]:
    """Results of a row as `real_models.py` leaves them."""
    pair, text = [0.1234, 0.005], {"text": "One | two\n```\nthree"}
    of = {"perplexity": [9.0, 0.1], "loss": pair, "kl": pair, "agreement": [0.75, 0.01]}
    method = {"method": "planner", "plan": "1|2:1", **of, "perplexity": 9.5}
    refit = {"refit_loss": pair, "refit_kl": pair, "refit_agreement": None}
    accuracy = {"accuracy": dict.fromkeys(_evidence.TASKS, 0.5), "dtype": "float32"}
    long = {"repeated": pair}
    return {
        "rivals": {
            "original": {"perplexity": 8.0},
            "methods": [
                {**method, **refit},
                {**method, **refit, "method": "sleb", "kl": [0.5, 0.01]},
            ],
        },
        "refit": {"refit": of},
        "refit_wikitext": {"refit_wikitext": of},
        "distilled": {"distilled": of},
        "distilled_wikitext": {"distilled_wikitext": of},
        "accelerated": {"accelerated": of},
        "tasks": {"original": accuracy, "plan": {**accuracy, "above_chance": [0.9, 0.8, 1.0]}},
        "answers": {
            "original": {"loss": pair, "copied": pair},
            "plan": {"loss": pair, "copied": pair, "increase": pair, "copied_sequential": pair},
        },
        "long": {"original": long, "plan": {**long, "own_kl": pair, "kl": [pair] * 8}},
        "llamacpp": {
            "plan": {
                "refused": "cqil",
                "plan": "1+2",
                "kl": dict.fromkeys(("quantised", "grouped", "both"), pair),
                "perplexity": dict.fromkeys(("quantised", "both"), pair),
                "excess": pair,
                "tokens_per_second": [50.0, 60.0],
            }
        },
        "text": {"original": text, "plan": text},
    }[kind]


def bought(model: str) -> dict[str, Any]:
    """What benchmarks/buy.py leaves of a model whose layers are all its time."""
    times = {}
    for depth in _evidence.depths(model):
        cut_ms = 10 * depth / _evidence.MODELS[model][1]
        times[str(depth)] = {
            **{"plan": "1|2:1", "cut": "without 3"},
            **{"original_ms": 10.0, "ours_ms": cut_ms + 0.1, "cut_ms": cut_ms},
            **{
                f"{name}_ratio": [10 / ms] * 3
                for name, ms in (("ours", cut_ms + 0.1), ("cut", cut_ms))
            },
        }
    refused = {depth: {"plan": "1|2:1", "refused": "it has cqil"} for depth in times}
    return {"date": "2026-11-27", "engines": {"eager": times, "llama.cpp": refused}}


def test_a_page_of_every_kind_of_row() -> None:
    empty = _evidence.page({})
    assert all(f"`{kinds[0]}` (" in empty for kinds, _, _ in _evidence.SECTIONS.values())
    assert "not measured yet" in _evidence.page({"smollm2-buy": bought("smollm2")})
    assert "Of these not measured yet: `smollm2-25-tasks`" in _evidence.page(
        {
            name: {"date": "2026-11-26", "results": made_up("tasks")}
            for name, (_, _, kind) in _evidence.every_row().items()
            if kind == "tasks" and name != "smollm2-25-tasks"
        }
    )
    sizes = {"tokens": 4080, "chosen_on": 2048}
    rows = {
        name: {"date": "2026-11-26", "depth": depth, "results": made_up(kind), **sizes}
        for name, (_, depth, kind) in _evidence.every_row().items()
    }
    rows |= {f"{model}-buy": bought(model) for model in _evidence.MODELS}
    full = _evidence.page(rows)
    assert "Judged on 4,080 predictions" in full and "rests on 2,048 tokens" in full
    assert _evidence.MISSING not in full and "|refused: cqil;" in full
    assert (
        "## Quality at equal speed" in full
        and "llama.cpp runs none of these plans: it has cqil" in full
    )
    words = "At equal decode speed, layers abreast are the better buy at depths 28, 25, 22, 20: "
    assert words + "KL 0.123 against 0.5 of greedy (SLEB) at 1.48x, depth 20" in full
    assert "|25|8.43, 1.19 [1.19, 1.19]x|8.33, 1.20 [1.20, 1.20]x|0.1234|0.5000 SLEB|" in full
    of = rows["smollm2-buy"]["engines"]["eager"]["25"]
    of["plan"] = "3|4:1"  # not the plan whose loss is known by now
    assert "at depths 28, 22, 20: KL" in _evidence.page(rows)
    for depth in _evidence.depths("gemma3"):
        rows[f"gemma3-{depth}-llamacpp"]["results"] = {"plan": {"refused": "it norms"}}
    assert "llama.cpp runs none of these plans: it norms.\n" in _evidence.page(rows)
    for line in full.splitlines():  # every line of a table has as many cells as its headings
        if line.startswith("|left"):
            cells = len(re.findall(r"(?<!\\)\|", line))
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) == cells, line
    table = _evidence.readme_table(rows)
    assert "+ refit and distillation" in table and "the best rival, greedy (SLEB)" in table
    assert "0.90 [0.80, 1.00]" in table


@pytest.fixture
def setting(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """A random model of six layers with a plan, texts and tasks; everything as small as it gets."""
    import _measures
    import real_models

    model = tmp_path / "models" / "tiny"
    shutil.copytree(tiny_checkpoint(vocab_size=4096, max_position_embeddings=256), model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_folder() / name, model)
    monkeypatch.setitem(_evidence.MODELS, "tiny", ("a random model", 6))
    for module in (_measures, real_models):
        monkeypatch.setattr(module, "PLANS", tmp_path)
    (tmp_path / "tiny-5.yaml").write_text(Plan.parse("2|3:1", 6).to_yaml(), "utf-8")
    (tmp_path / _measures.WIKITEXT).write_text(WORDS * 100, "utf-8")
    sums = {"question": "How many are two and two?", "target": "2 + 2 = 4"}
    (tmp_path / _measures.SUMS).write_text(json.dumps(sums) + "\n" + json.dumps(sums), "utf-8")
    for name in _evidence.TASKS:
        item = {"question": "The _ is", "choices": ["lamp", "house"], "answer": 1}
        (tmp_path / f"{name}.jsonl").write_text((json.dumps(item) + "\n") * 3, "utf-8")
    sizes = _measures.Sizes(512, 3, 2, 2, 2, 64, 2, 8, 6, _measures.LITTLE)
    return _measures.Setting(
        tmp_path / "models", tmp_path, tmp_path / "work", sizes=sizes, rows=tmp_path / "rows"
    )


def test_kl_by_position_is_that_of_whole_windows(setting: Any) -> None:
    from _measures import Subject, kl_by_position

    (model, _), (original, _) = (
        Subject(setting, "tiny", 5, variant).load() for variant in ("plan", "original")
    )
    stream = Subject(setting, "tiny", 5).text(2 * 64 + 1)
    columns = kl_by_position(model, original, stream, 64, 4)
    with torch.inference_mode():
        ids = torch.tensor(np.array([stream.tokens[at : at + 65] for at in (0, 64)]))
        ours, theirs = (m(ids[:, :-1]).logits for m in (model, original))
    kl = token_scores(ours, ids[:, 1:], theirs)[..., 2].reshape(2, 4, 16).mean(2)
    assert [mean for mean, _ in columns] == pytest.approx(kl.mean(0), rel=1e-3)
    assert [error for _, error in columns] == pytest.approx(abs(kl[0] - kl[1]) / 2, rel=1e-2)


def test_repeated_grams() -> None:
    from _measures import repeated

    assert repeated([1, 2, 3, 4, 5, 6, 7, 8]) == 0
    assert repeated([1] * 13) == pytest.approx(0.9)


def test_a_row_goes_on_and_is_kept(setting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import _measures
    import real_models

    monkeypatch.setattr(real_models, "variants_of", lambda *of: ("original", "plan"))
    row = real_models.measure_row(setting, "tiny-5-answers", ["plan"])  # and what it pairs with
    assert json.loads((setting.rows / "tiny-5-answers.json").read_text("utf-8")) == row
    assert row["plan"] == "2|3:1" and set(row["rests_on"]) == {"model", _measures.SUMS}
    plan, original = row["results"]["plan"], row["results"]["original"]
    assert "items" not in plan and "copied_sequential" in plan and "increase" not in original
    difference = plan["loss"][0] - original["loss"][0]
    assert plan["increase"][0] == pytest.approx(difference, abs=1e-4)

    def no_more(*of: Any) -> Any:
        raise AssertionError("measured again")

    answers = replace(_measures.KINDS["answers"], measure=no_more)
    monkeypatch.setitem(_measures.KINDS, "answers", answers)
    assert real_models.measure_row(setting, "tiny-5-answers")["results"] == row["results"]
    (setting.data / "tiny-5.yaml").write_text(Plan.parse("2+3", 6).to_yaml(), "utf-8")
    with pytest.raises(AssertionError, match="measured again"):
        real_models.measure_row(setting, "tiny-5-answers")


def test_a_row_in_parts(setting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import real_models

    monkeypatch.setattr(real_models, "variants_of", lambda *of: ("original", "plan"))
    name, file = "tiny-5-text", setting.rows / "tiny-5-text.json"
    monkeypatch.setattr(real_models, "hardware", lambda device: {"cpu": "elsewhere"})
    part = real_models.measure_row(setting, name, ["original"])
    assert part["lacks"] == ["plan"] and list(part["results"]) == ["original"]
    assert f"`{name}` (plan)" in _evidence.page({name: part})
    monkeypatch.setattr(real_models, "hardware", lambda device: {"cpu": "here"})
    shutil.rmtree(setting.work / "parts")  # as on another machine
    rests_on = part["rests_on"]
    assert list(real_models.unfinished(setting, name, "2|3:1", rests_on)) == ["original"]
    assert not real_models.unfinished(setting, name, "2+3", rests_on)
    part["results"]["original"]["dtype"] = "float32"
    file.write_text(json.dumps(part), "utf-8")
    assert not real_models.unfinished(setting, name, "2|3:1", rests_on)
    del part["results"]["original"]["dtype"]
    file.write_text(json.dumps(part), "utf-8")
    row = real_models.measure_row(setting, name)
    assert "lacks" not in row
    assert row["machine"] == {"cpu": "here"} and "machine" not in row["results"]["plan"]
    assert row["results"]["original"]["machine"] == {"cpu": "elsewhere"} and file.is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["tasks", "long", "text", "refit", "refit_wikitext", "distilled", "accelerated"]
)
def test_other_kinds_of_row(setting: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import real_models

    if kind == "accelerated":
        np.save(setting.data / "ids.npy", np.arange(6000, dtype=np.uint16) % 4000)
        setting = replace(setting, text=(setting.data / "ids.npy",), device="cpu")
    if kind not in _evidence.HEALED:  # healed models are measured as others are
        monkeypatch.setattr(real_models, "variants_of", lambda *of: ("original", "plan"))
    row = real_models.measure_row(setting, f"tiny-5-{kind}")
    assert row["results"] and _evidence.page({f"tiny-5-{kind}": row})


def test_rows_and_plans_taken_from_rivals(setting: Any) -> None:
    import real_models
    from _measures import WIKITEXT

    from abreast.planner import CalibrationSettings, calibrate

    out = setting.work / "rivals-out"
    settings = CalibrationSettings(
        data=str(setting.half(1)), num_windows=8, window=32, dtype="float32"
    )
    identity = calibrate(setting.models / "tiny", out / "judge", settings).identity
    chosen = replace(settings, data=str(setting.half(0)), num_windows=16)
    calibrate(setting.models / "tiny", out / "calibration", chosen)
    numbers = {"kl": 0.2, "kl_stderr": 0.01, "loss_increase": 0.1, "loss_stderr": 0.02}
    numbers |= {"tokens": 248, "agreement": 0.7, "agreement_stderr": 0.01, "depth": 5}
    plans = [
        {"method": "sleb", "plan": "without 3", "refit": False, **numbers, "kl": 0.1},
        {"method": "planner", "plan": "1|2:1", "refit": False, **numbers},
        {"method": "planner", "plan": "1|2:1", "refit": True, **numbers, "kl": 0.15},
    ]
    record = {"rests_on": identity, "full_forwards": {}, "plans": plans}
    (out / "baselines.json").write_text(json.dumps(record))
    journal = out / "rivals" / "held-out"
    journal.mkdir(parents=True)
    line = {"program": "0 1|2:1 3 4 5", "batch": 0, "evaluated": 5, "sums": [[1, 31.0, 0, 0]] * 8}
    (journal / "journal-0.jsonl").write_text(json.dumps(line) + "\n")
    assert real_models.take(setting, out) == ["tiny-5-rivals"]
    row = json.loads((setting.rows / "tiny-5-rivals.json").read_text("utf-8"))
    assert row["results"]["original"]["perplexity"] == pytest.approx(np.e, abs=1e-4)
    ours, rival = row["results"]["methods"]
    assert (ours["method"], ours["refit_kl"]) == ("planner", [0.15, 0.01])
    assert ours["perplexity"] == pytest.approx(np.exp(1.1), abs=1e-4) and rival["refit_kl"] is None
    assert set(row["rests_on"]) == {"model", WIKITEXT}
    assert (row["tokens"], row["chosen_on"]) == (248, 16 * 32)
    assert Plan.load(setting.data / "tiny-5.yaml").shorthand == "2|3:1"  # not the package's rows
    (setting.data / WIKITEXT).write_text(WORDS.upper() * 100, "utf-8")
    real_models.hash_of.cache_clear()
    with pytest.raises(AbreastError, match="rests on another tokens"):
        real_models.take(setting, out)


def test_decode_speed_is_timed_once_per_engine_and_drawn(
    setting: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import buy

    from abreast.model import load

    model, out = setting.models / "tiny", setting.data / "out"
    numbers = {"kl_stderr": 0.01, "loss_increase": 0.1, "loss_stderr": 0.02, "tokens": 248}
    entries = [("planner", 5, "2+3", 0.1), ("sleb", 5, "without 3", 0.3)]
    entries += [("shortgpt", 5, "without 2", 0.2), ("planner", 4, "1|2 3+4", 0.2)]
    entries += [("sleb", 4, "without 1 3", 0.5), ("contiguous", 4, "1+2 3+4", 0.4)]
    plans = [
        {"method": method, "depth": depth, "plan": plan, "kl": kl, **numbers}
        for method, depth, plan, kl in entries
    ]
    file = setting.data / "baselines.json"
    file.write_text(json.dumps({"plans": plans}))
    seconds = {"original": 0.006, "ours": 0.005, "cut": 0.0048}
    timed: list[list[int]] = []

    def time_in(folders: Any, rounds: int, context: int) -> Any:
        models = {name: load(folder)[0] for name, folder in folders.items()}
        assert {str(model.dtype) for model in models.values()} == {"torch.float32"}
        timed.append([len(model.model.layers) for model in models.values()])
        if len(timed) == 1:  # the better of two ways to leave a layer out
            left, whole = models["cut"].model.layers, models["original"].model.layers
            for mine, theirs in zip(left, [*whole[:2], *whole[3:]], strict=True):
                assert torch.equal(mine.mlp.up_proj.weight, theirs.mlp.up_proj.weight)
        return {name: np.full(rounds, seconds[name]) for name in folders}

    monkeypatch.setitem(buy.ENGINES, "eager", (time_in, True, "transformers"))
    monkeypatch.setitem(buy.ENGINES, "llama.cpp", (time_in, True, "llama.cpp"))
    command = ["buy", str(model), "-o", str(out), "--results", str(file), "--rounds", "6"]
    monkeypatch.setattr(sys, "argv", [*command, "--engines", "eager,llama.cpp"])
    buy.main()
    assert timed == [[6, 5, 5], [6, 4, 4], [6, 5, 5]]  # llama.cpp has no cqil
    shown = capsys.readouterr().out
    assert "|5|5.00, 1.20 [1.20, 1.20]x|4.80, 1.25 [1.25, 1.25]x|0.1000|0.2000" in shown
    assert "|4|refused: " in shown and shown.count("layers abreast are the better buy") == 2
    assert all((out / f"buy-{e}.png").read_bytes()[1:4] == b"PNG" for e in ("eager", "llama.cpp"))
    buy.main()
    assert len(timed) == 3 and capsys.readouterr().out == shown
    record = json.loads((out / "buy.json").read_text("utf-8"))
    assert "machine" not in record["engines"]["eager"]["5"]
    del record["engines"]["eager"]["5"]
    (out / "buy.json").write_text(json.dumps({**record, "machine": {"cpu": "elsewhere"}}), "utf-8")
    buy.main()
    again = json.loads((out / "buy.json").read_text("utf-8"))
    assert again["engines"]["eager"]["5"]["machine"] == record["machine"]
    assert again["machine"] == {"cpu": "elsewhere"} and capsys.readouterr().out == shown
    monkeypatch.setattr(sys, "argv", [*command[:4]])
    with pytest.raises(SystemExit, match="no results: name "):
        buy.main()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["eager", "compile"])
def test_engines_of_torch_time_every_contender(setting: Any, engine: str) -> None:
    import buy

    folder = setting.models / "tiny"
    folders = {"original": folder, "ours": buy.checkpoint(folder, "1|2:1 3~4", setting.data)}
    timed = buy.ENGINES[engine][0](folders, 2, 8)
    assert {name: len(times) for name, times in timed.items()} == {"original": 2, "ours": 2}


def test_searches_on_more_windows_go_on_from_those_on_fewer(
    setting: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import windows

    from abreast.planner import measuring

    monkeypatch.setattr(windows, "WINDOW", 32)
    (setting.data / "a.txt").write_text(WORDS * 200, "utf-8")
    (setting.data / "b.txt").write_text(WORDS.upper() * 100, "utf-8")
    ran, real = [], measuring.run_programs

    def counted(model: Any, ids: Any, programs: Any, **options: Any) -> Any:
        ran.append((len(ids), len(programs)))
        return real(model, ids, programs, **options)

    monkeypatch.setattr(measuring, "run_programs", counted)
    command = ["windows", str(setting.models / "tiny"), "--data", str(setting.data / "a.txt")]
    command += ["--judge-data", str(setting.data / "b.txt"), "--windows", "8,16", "--repeat", "2"]
    command += ["--judge-windows", "8", "--depths", "5", "-o", str(setting.data / "out")]
    monkeypatch.setattr(sys, "argv", command)
    windows.main()
    table = capsys.readouterr().out
    assert re.search(r"^\| 5 \| 8 \| [\d.]+ [\d.]+ \| [\d.]+ \| [\d.]+ \|", table, re.MULTILINE)
    journals = [
        (setting.data / "out" / f"0-{count}" / "journal-0.jsonl").read_text().splitlines()
        for count in (8, 16)
    ]
    assert journals[1][: len(journals[0])] == journals[0]
    assert {json.loads(line)["batch"] for line in journals[1]} == {0, 1, 2, 3}
    ran.clear()
    windows.main()
    assert not ran and capsys.readouterr().out == table
