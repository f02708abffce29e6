"""The report: what it says of whole, half-finished and wrong runs; that it needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_run import LAYERS, NAME, PLAN, SAMPLES, add_plan, make_run, save, speed

from abreast.errors import AbreastError
from abreast.evaluate.text import first_difference, sample
from abreast.plan import Group, Plan
from abreast.planner import DEFAULT_KL_IS
from abreast.planner.objective import KL, Cost
from abreast.report import page as reporting
from abreast.report.charts import depth_chart, number, painted
from abreast.report.diagram import describe, draw_plan, draw_stage
from abreast.report.page import numbers, speed_rows, write_report
from abreast.report.records import read_conversion, read_run
from abreast.rivals import Measured
from abreast.speed.timing import MIN_ROUNDS

EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def made(tiny_checkpoint, tmp_path_factory) -> Path:
    """A finished run about a model whose name and data are HTML. Not to be changed."""
    folder = tmp_path_factory.mktemp("made") / "run"
    return make_run(folder, tiny_checkpoint(num_layers=LAYERS), f"org/{EVIL}", f"hub:{EVIL}")


@pytest.fixture
def run(made, tmp_path) -> Path:
    """A copy that may be spoilt."""
    return Path(shutil.copytree(made, tmp_path / "run"))


class Page(HTMLParser):
    """The text outside scripts and styles, the scripts, and every address that is referred to."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.policy = ""
        self._within: list[str] = []
        self._text: list[str] = []
        self.feed(html)
        self.text = " ".join(" ".join(self._text).split())

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag == "script" and attributes.get("type") is None:
            self.scripts.append("")
        if tag in ("script", "style", "title", "pre", "td"):
            self._within.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "action", "data")]
        self.ids += [v for k, v in attrs if k == "id"]
        if attributes.get("http-equiv") == "Content-Security-Policy":
            self.policy = attributes["content"]

    def handle_endtag(self, tag):
        if self._within and self._within[-1] == tag:
            self._within.pop()

    def handle_data(self, data):
        if "script" in self._within:
            self.scripts[-1:] = [self.scripts[-1] + data] if self.scripts else []
        elif "style" not in self._within:
            self._text.append(data)


def test_a_whole_run(made, tmp_path):
    start = time.process_time()
    path = write_report(made, tmp_path / "out")
    assert time.process_time() - start < 10
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert len(html) < 5e6
    assert not {part.what for part in read_run(made).missing()}
    assert "not complete" not in page.text
    for seen in (
        "8 layers in 6 stages",
        "+0.1000 ± 0.0020 nats [0.0900, 0.1100]",  # bootstrap
        "0.0625 ± 0.0012 nats [0.0600, 0.0650]",
        "KL divergence by position",
        "first_task",
        "faster by 1.25x",
        "abreast optimize 'org/<script>alert(1)</script>' -o 'my run' --depth 6",
        "The first difference, marked, is at token 3.",
        "Both wrote the same 2 tokens.",
        "Not llama.cpp: cqil groups are no layers of llama.cpp",
    ):
        assert seen in page.text, seen
    assert len(page.ids) == len(set(page.ids))
    folder = tmp_path / "out"
    drawn = ["buy-kl", "depth-kl", "depth-loss", "groups-kl"]
    drawn += ["plan", "position-kl", "speed", "tasks"]
    assert sorted(p.stem for p in folder.glob("*.png")) == drawn
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in folder.glob("*.png"))
    results = json.loads((folder / "results.json").read_text(), parse_constant=pytest.fail)
    assert results["last"]["plan"] == PLAN and results["last"]["quality"]["kl"] == 0.0625
    assert len(results["groups"]) == 6 and sum(row["chosen"] for row in results["groups"]) == 2


def test_the_page_needs_nothing_else(made, tmp_path):
    page = Page(write_report(made, tmp_path / "out").read_text(encoding="utf-8"))
    assert page.addresses and all(a.startswith(("#", "data:")) for a in page.addresses)
    assert "default-src 'none'" in page.policy and "unsafe-eval" not in page.policy
    script_policy = re.search("script-src ([^;]*)", page.policy).group(1)
    digests = [hashlib.sha256(script.encode()).digest() for script in page.scripts]
    named = {f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests}
    assert len(page.scripts) == 2 and named == set(script_policy.split())


def test_names_are_shown_as_text(run, tmp_path):
    tasks = json.loads((run / "plans" / NAME / "tasks.json").read_text())
    tasks["tasks"] = {EVIL: tasks["tasks"]["first_task"]}
    save(run / "plans" / NAME / "tasks.json", tasks)
    text = {"source": "self", "tokens": 30, "documents": 1, "num_bytes": 90, "beginnings": [EVIL]}
    (run / "calibration" / "text").mkdir()
    save(run / "calibration" / "text" / "calibrate.json", {"parts": [text, text]})
    html = write_report(run, tmp_path / "out").read_text(encoding="utf-8")
    assert "<script>alert" not in html and "</script>alert" not in html
    page = Page(html)
    assert f"org/{EVIL}: 8 layers" in page.text and SAMPLES[0]["prompt"].split()[-1] in page.text
    for seen in ("calibration", "self", "50%", "3.00", f"“{EVIL}”"):
        assert seen in page.text
    specs = re.search(r'<script type="application/json" id="specs">(.*?)</script>', html, re.S)
    assert "alert(1)" in specs.group(1) and "<" not in specs.group(1)
    assert EVIL in json.dumps(json.loads(specs.group(1)))


@pytest.mark.parametrize(
    ("gone", "missing"),
    [
        ("results.json", []),
        ("environment.json", ["the record of the machine"]),
        ("baselines.json", ["the comparison with the published ways"]),
        ("front.json", ["the plans measured as a whole"]),
        ("calibration/stats.safetensors", ["what each group costs alone"]),
        (f"plans/{NAME}/quality.json", ["the quality on held-out text"]),
        (f"plans/{NAME}/speed.json", ["the timing"]),
        (f"plans/{NAME}/samples.json", ["text that both models wrote"]),
        (f"plans/{NAME}/verify.json", ["the verification"]),
        (f"plans/{NAME}/tasks.json", []),  # only made when asked for
        (f"plans/{NAME}/converted", ["the converted checkpoint"]),
        ("plans", ["a plan", "the converted checkpoint", "the timing"]),
    ],
)
def test_half_finished_runs_say_what_is_missing(run, tmp_path, gone, missing, monkeypatch):
    path = run / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    monkeypatch.setattr(reporting, "png", lambda spec: b"")  # drawn in another test
    page = Page(write_report(run, tmp_path / "out").read_text(encoding="utf-8"))
    for what in missing:
        assert what in page.text
    assert ("This run is not complete" in page.text) == bool(missing)
    assert "abreast optimize" in page.text


def test_a_run_that_was_only_begun(tmp_path):
    (tmp_path / "calibration").mkdir()
    save(tmp_path / "calibration" / "measure.json", {"identity": {}})
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "This run is not complete" in page.text and not page.scripts
    assert f"abreast optimize MODEL -o {tmp_path} --depth DEPTH" in page.text


def test_wrong_folders(tmp_path, run):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for folder, message in (
        ("nowhere", "no folder"),
        ("empty", "is not a run: it holds neither"),
        ("file", "no folder"),
    ):
        with pytest.raises(AbreastError, match=message):
            write_report(tmp_path / folder)
    with pytest.raises(AbreastError, match="is a file; name a folder"):
        write_report(run, tmp_path / "file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(AbreastError, match="something else than a report"):
        write_report(run, tmp_path / "full")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("results.json", "{"),
        ("front.json", '{"plans": [{}]}'),
        ("front.json", "[]"),
        ("baselines.json", '{"plans": [{"kl": "much"}]}'),
        (f"plans/{NAME}/quality.json", '{"result": 7}'),
        (f"plans/{NAME}/speed.json", '{"result": {}}'),
    ],
)
def test_damaged_files_are_named(run, name, text):
    (run / name).write_text(text)
    with pytest.raises(AbreastError, match=f"{Path(name).name}' is damaged; delete it"):
        write_report(run)
    assert not (run / "report").exists()


def test_a_damaged_manifest_is_named(run):
    (run / "plans" / NAME / "converted" / "abreast.json").write_text("\x00")
    with pytest.raises(AbreastError, match=r"abreast.json' cannot be read: not valid JSON"):
        write_report(run)


def test_the_other_plans_of_a_run(run, tmp_path):
    add_plan(run, "1+2 3+4 5+6", "depth-5-other")
    read = read_run(run)
    assert read.last.folder.name == NAME and len(read.others) == 1
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert "Other plans in this run" in page.text and "1+2 3+4 5+6" in page.text
    (run / "results.json").unlink()
    assert read_run(run).last.folder.name == "depth-5-other"  # the one planned last


def test_a_report_is_replaced(run):
    first = write_report(run)
    (run / "environment.json").unlink()
    assert write_report(run) == first
    assert "This run is not complete" in first.read_text(encoding="utf-8")
    assert not list(first.parent.glob(".*"))


def test_the_verdict_is_one_of_cost_and_gain(run):
    last = read_run(run).last
    quality = {"nll_difference": 0.02, "kl": 0.03, "top1_agreement": 0.9}
    decode = {**last.speed["decode"], "rounds": 12}
    (name,) = {*decode["timings"]} - {"original"}

    def verdict(low: float, **changed: float) -> str:
        timing = {**decode["timings"][name], "ratio": 1.2, "ratio_low": low, "ratio_high": 1.3}
        timed = {**decode, "timings": {**decode["timings"], name: timing}}
        return reporting.verdict_of(
            replace(last, quality={**quality, **changed}, speed={"decode": timed})
        )

    assert verdict(1.1).endswith("Use it: this is no more than " + DEFAULT_KL_IS + ".")
    assert "costs +0.020 nats per token (KL 0.030), 10% of next tokens change" in verdict(1.1)
    assert "decoding is 1.20x as fast [1.10, 1.30] here" in verdict(1.1)
    assert "Heal it before you use it, or cut less" in verdict(1.1, kl=0.5)
    assert "not shown to be faster here" in verdict(0.9)
    assert reporting.verdict_of(replace(last, speed=None)).startswith("Not judged yet")


def test_no_speed_is_claimed_from_few_rounds(run):
    save(run / "plans" / NAME / "speed.json", {"rests_on": {}, "result": speed(rounds=2)})
    assert reporting.MIN_ROUNDS == MIN_ROUNDS
    assert "speed" not in {chart.name for chart in reporting._charts(read_run(run))}
    last = read_run(run).last
    tiles, about = reporting._tiles(last), f"about {speed_rows(last)[1]['ratio']:.2f}x"
    assert ("decode speed", about, "too few rounds to say: 2; use at least 6") in tiles


def test_numbers_that_are_not_finite(run):
    record = json.loads((run / "baselines.json").read_text())
    record["plans"][0]["kl_stderr"] = float("nan")
    save(run / "baselines.json", record)
    assert numbers(read_run(run))["baselines"][0]["kl_stderr"] is None
    write_report(run)


def test_missing_packages_are_named(run, monkeypatch):
    monkeypatch.setattr(reporting, "find_spec", lambda name: None if name == "altair" else name)
    with pytest.raises(AbreastError, match=r"needs altair: \S+ -m pip install .*jinja2"):
        write_report(run)


def test_optimize_asks_for_the_packages_first(monkeypatch):
    from click.testing import CliRunner

    from abreast.cli.main import cli

    monkeypatch.setattr(reporting, "find_spec", lambda name: None)
    arguments = ["optimize", "no/such/model", "-o", "nowhere", "--depth", "6", "--no-plots"]
    with pytest.raises(AbreastError, match="the report needs"):
        CliRunner().invoke(cli, arguments, catch_exceptions=False)
    with pytest.raises(AbreastError, match="no model at 'no/such/model'"):
        CliRunner().invoke(cli, [*arguments, "--no-report"], catch_exceptions=False)
    assert not Path("nowhere").exists()


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [
        (0.02346, 0.00123, "0.0235 ± 0.0012"),
        (12.345, 1.6, "12.3 ± 1.6"),
        (1234.5, 33.0, "1234 ± 33"),
        (0.5, None, "0.5"),
        (None, 0.1, "unknown"),
    ],
)
def test_numbers_get_the_digits_that_their_error_allows(value, stderr, text):
    assert number(value, stderr) == text


def test_a_bar_that_reaches_zero_stays_on_a_logarithmic_axis():
    costs = Cost(0.01, 0.02, 0.0, 0.0, 9), Cost(-1e-9, float("nan"), 0.0, 0.0, 9)
    rows = [Measured("planner", 5, "1+2", cost) for cost in costs]
    chart = depth_chart(rows, KL, "1+2")
    values = next(iter(chart.spec["datasets"].values())) if "datasets" in chart.spec else None
    values = values or chart.spec["layer"][0]["data"]["values"]
    assert [point["low"] > 0 for point in values] == [True, True]
    assert values[0]["low"] == pytest.approx(0.001) and values[0]["high"] == pytest.approx(0.05)
    assert "var(--" not in painted(chart.spec)


@pytest.mark.parametrize("text", ["1+2", "1+2+3", "1|2", "1|2|3", "1|2|3:1", "1|2|3|4:2", "1~2~3"])
def test_the_picture_shows_every_wire(text):
    group = Plan.parse(text, 8).groups[0]
    drawing = draw_stage(group.layers, group)
    size = len(group.layers)
    seen = 2 * size if group.shares_ffn_input else sum(map(sum, group.ffn_sees))
    seen -= (size - 1) * group.is_in_order  # only the last attention leads to the sum
    assert drawing.count('class="wire"') == 2 * size + seen
    assert drawing.count("<rect") == 2 * size
    assert ("<circle" in drawing) == (group.wiring in ("lp", "ff"))


def test_stages_in_words():
    assert describe((3,), None) == "layer 3 alone"
    assert describe((3, 4), Group(layers=(3, 4))).startswith("layers 3 and 4 abreast, lp:")
    bypassed = Group(layers=(3, 4, 5), wiring="cqil", bypass=1)
    assert "layers 3, 4 and 5 abreast, cqil with bypass 1" in describe((3, 4, 5), bypassed)


def test_a_large_plan_is_drawn_in_lines():
    plan = Plan.parse("10+11+12+13", 80)
    drawing = draw_plan(plan, reporting.LIGHT)
    assert float(re.search(r'width="([\d.]+)"', drawing).group(1)) <= 1220
    assert drawing.count("<g ") == plan.depth


def test_a_conversion_outside_a_run(made, tmp_path):
    shutil.copytree(made / "plans" / NAME / "converted", tmp_path / "alone")
    conversion = read_conversion(tmp_path / "alone")
    assert conversion.plan.shorthand == PLAN and conversion.quality is None
    assert read_conversion(made / "plans" / NAME / "converted").quality["kl"] == 0.0625
    with pytest.raises(AbreastError, match=r"holds no abreast\.json"):
        read_conversion(tmp_path)


@pytest.mark.parametrize(
    ("ours", "theirs", "position"),
    [
        ([1, 2], [1, 2], None),
        ([1, 2], [1, 3], 1),
        ([1, 2], [1], 1),
        ([], [1], 0),
        ([2, 3, 4], [9, 3, 4], 0),
    ],
)
def test_first_difference(ours, theirs, position):
    assert first_difference(ours, theirs) == position


@pytest.mark.slow
def test_samples_of_two_models():
    from abreast.data import load_tokens
    from abreast.demo import model_folder
    from abreast.model.grouping import load

    model, tokenizer = load(model_folder(), dtype="float32")
    other, _ = load(model_folder(), plan="2+3 5+6 8+9 11+12", dtype="float32")
    stream = load_tokens(tokenizer, max_tokens=2000)
    sizes = {"count": 2, "prompt_tokens": 16, "new_tokens": 12}
    same = sample(model, model, tokenizer, stream, **sizes)
    assert [answer["first_difference"] for answer in same] == [None, None]
    assert all(answer["shared"] == len(answer["original"]) > 0 for answer in same)
    samples = sample(model, other, tokenizer, stream, **sizes)
    assert [answer["prompt"] for answer in samples] == [answer["prompt"] for answer in same]
    assert any(answer["first_difference"] is not None for answer in samples)
    for answer in samples:
        shared = answer["shared"]
        assert answer["original"][:shared] == answer["converted"][:shared]
    assert (
        max(len(answer["prompt"]) for answer in sample(model, model, tokenizer, stream, count=1))
        > 16
    )


def test_charts_are_of_what_the_search_made_small(made):
    read = read_run(made)
    margins = [
        replace(row, cost=replace(row.cost, margin_loss=-0.25, margin_stderr=0.1))
        for row in read.baselines
    ]
    stats = replace(read.stats, identity={"score": "tasks"})
    charts = reporting._charts(replace(read, stats=stats, baselines=tuple(margins)))
    (chart,) = [chart for chart in charts if chart.name == "depth-margin lost"]
    assert chart.columns[-1] == "margin of the right choice lost, nats per item"
    assert "-0.25" in chart.rows[0][-1] and "depth-kl" not in {chart.name for chart in charts}
    assert {chart.name for chart in reporting._charts(read)} >= {"depth-kl", "depth-loss"}
