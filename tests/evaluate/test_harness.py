"""Tasks of the lm-evaluation-harness: against the harness's own models, resumed, refused."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from abreast.checkpoint import open_checkpoint
from abreast.cli.main import main
from abreast.convert.rewrite import convert
from abreast.demo import model_folder
from abreast.errors import AbreastError
from abreast.evaluate import tasks as harness
from abreast.evaluate.accuracy import (
    Answers,
    above_chance_kept,
    mean_kept,
    paired_scores,
    pool,
    score_task,
)
from abreast.evaluate.statistics import mcnemar, metric_stderr
from abreast.evaluate.tasks import FOLDER, OFFLINE, evaluate_tasks, find_tasks
from abreast.model import fitting_dtype
from abreast.model.grouping import load_tokenizer
from abreast.plan import Plan

SUITE = (
    *("python_attribute", "python_brackets", "python_entry"),
    *("python_last_name", "python_line_end", "python_next_line"),
)
PLAN = "1+2 3+4"


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with the bundled model's tokenizer."""
    made = tiny_checkpoint(vocab_size=4096, max_position_embeddings=256)
    copied = Path(shutil.copytree(made, tmp_path_factory.mktemp("model") / "tiny"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_folder() / name, copied)
    return copied


def items_of(out: Path, task: str) -> list[dict[str, Any]]:
    (path,) = out.glob(f"*/{task}.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(autouse=True)
def no_list_of_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """simple_evaluate records the environment by running `pip list`, which takes seconds."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)


def theirs(folder: Path, task: str, limit: int, batch_size: int) -> dict[str, Any]:
    """What the harness gets with its own `hf` model, nothing of ours but the task files."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "dtype": "float32"},
        tasks=[task],
        task_manager=TaskManager(include_path=str(FOLDER), include_defaults=False),
        batch_size=batch_size,
        device="cpu",
        limit=limit,
    )
    assert results is not None
    return results


def without_fractions(items: Any) -> tuple[Any, list[float]]:
    """Items with every fraction left out, and the fractions."""
    fractions: list[float] = []
    rest = json.loads(
        json.dumps(items, default=str), parse_float=lambda text: fractions.append(float(text))
    )
    return rest, fractions


def same_as_the_harness(folder: Path, out: Path, limit: int, batch_size: int) -> None:
    tasks = find_tasks([OFFLINE], limit=limit)
    assert tuple(sorted(tasks.loaded)) == SUITE
    ours = evaluate_tasks(folder, tasks, out=out, batch_size=batch_size, dtype="float32")
    for name in SUITE:
        reference = theirs(folder, name, limit, batch_size)
        expected, fractions = without_fractions(reference["samples"][name])
        found, found_fractions = without_fractions(items_of(out, name))
        assert found == expected and len(expected) == limit
        # a product of fewer logits at a time may round otherwise in its last bit
        assert found_fractions == pytest.approx(fractions, abs=1e-5)
        for metric, values in ours.tasks[name].metrics.items():
            score = reference["results"][name][f"{metric},none"]
            if metric == "perplexity":
                assert values["converted"] == pytest.approx(score, rel=1e-5)
            else:
                assert values["converted"] == score
                stderr = reference["results"][name][f"{metric}_stderr,none"]
                assert values["converted_stderr"] == pytest.approx(stderr)


@pytest.mark.slow
def test_scores_are_those_of_the_harness_item_for_item(folder: Path, tmp_path: Path) -> None:
    same_as_the_harness(folder, tmp_path, limit=4, batch_size=3)


@pytest.mark.slow
def test_scores_of_the_bundled_model_are_those_of_the_harness(tmp_path: Path) -> None:
    same_as_the_harness(model_folder(), tmp_path, limit=24, batch_size=8)


def test_another_model_has_other_answers(folder: Path, tmp_path: Path) -> None:
    tasks = find_tasks(["python_brackets"], limit=4)
    evaluate_tasks(folder, tasks, plan=PLAN, out=tmp_path, dtype="float32")
    expected = theirs(folder, "python_brackets", 4, 1)["samples"]["python_brackets"]
    assert items_of(tmp_path, "python_brackets") != json.loads(json.dumps(expected, default=str))


def test_grouped_and_converted_models_give_the_same_answers(folder: Path, tmp_path: Path) -> None:
    convert(folder, PLAN, tmp_path / "converted")
    tasks = find_tasks(["python_next_line", "python_line_end"], limit=5)
    runs = {"grouped": (folder, PLAN), "converted": (tmp_path / "converted", None)}
    evaluations = {
        name: evaluate_tasks(model, tasks, plan=plan, out=tmp_path / f"of-{name}", dtype="float32")
        for name, (model, plan) in runs.items()
    }
    assert evaluations["grouped"].tasks == evaluations["converted"].tasks
    one, two = (items_of(tmp_path / f"of-{name}", "python_next_line") for name in runs)
    for mine, other in zip(one, two, strict=True):
        scores = [[score for score, _ in item["filtered_resps"]] for item in (mine, other)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-3)


def test_a_comparison_of_a_model_with_itself(folder: Path, tmp_path: Path) -> None:
    tasks = find_tasks(["python_brackets", "python_last_name"], limit=8)
    evaluation = evaluate_tasks(folder, tasks, against=folder, out=tmp_path, dtype="float32")
    row = evaluation.tasks["python_brackets"]
    assert (row.metric, row.num_items, row.num_fewshot, row.truncated) == ("acc", 8, 0, 0)
    assert (row.only_original, row.only_converted, row.p_value, row.test) == (0, 0, 1, "mcnemar")
    assert row.converted == row.original
    assert evaluation.above_chance_kept in (None, 1) and evaluation.above_chance_interval in (
        None,
        (1, 1),
    )
    assert row.kept == 1 if row.original else row.kept is None
    words = evaluation.tasks["python_last_name"]
    assert words.metric == "acc" and set(words.metrics) == {"acc", "perplexity"}
    assert words.metrics["perplexity"]["kept"] == words.metrics["perplexity"]["p_value"] == 1
    assert words.metrics["perplexity"]["test"] == "sign flips"
    # One model, asked once: the second asking found the first one's answers.
    assert len(list(tmp_path.glob("*/python_brackets.json"))) == 1


def test_what_is_recorded(folder: Path, tmp_path: Path) -> None:
    import lm_eval

    tasks = find_tasks(["python_entry", "python_brackets"], num_fewshot=2, limit=3)
    options: dict[str, Any] = {"against": folder, "out": tmp_path, "batch_size": 2}
    recorded = evaluate_tasks(folder, tasks, plan=PLAN, add_bos=False, **options).to_dict()
    assert json.loads((tmp_path / "tasks.json").read_text()) == recorded
    settings = recorded["settings"]
    assert settings["dtype"] == fitting_dtype(open_checkpoint(folder), "auto", "cpu")
    expected = {"limit": 3, "batch_size": 2, "add_bos": False, "seed": 0}
    assert {key: settings[key] for key in expected} == expected
    assert settings["versions"]["lm_eval"] == lm_eval.__version__
    models = settings["model"], settings["plan"], settings["against"]
    assert models == (str(folder), PLAN, str(folder))
    # The task that says 0 in its file keeps that.
    shots = {name: about["num_fewshot"] for name, about in settings["tasks"].items()}
    assert shots == {"python_entry": 2, "python_brackets": 0}
    assert recorded["tasks"]["python_entry"]["num_fewshot"] == 2
    for row in recorded["tasks"].values():
        for key in ("metric", "original", "original_stderr", "converted", "converted_stderr"):
            assert row[key] is not None
        assert {"kept", "p_value", "num_items"} <= set(row)
    # What was saved is enough to do the paired test again.
    ours, old = (
        [json.loads(line)["acc"] for line in (tmp_path / folder_name / "python_entry.jsonl").open()]
        for folder_name in sorted(
            (path.parent.name for path in tmp_path.glob("*/answers.json")),
            key=lambda n: (
                json.loads((tmp_path / n / "answers.json").read_text())["identity"]["plan"] is None
            ),
        )
    )
    lost = sum(a < b for a, b in zip(ours, old, strict=True))
    won = sum(a > b for a, b in zip(ours, old, strict=True))
    row = recorded["tasks"]["python_entry"]
    assert (row["only_original"], row["only_converted"]) == (lost, won)
    assert row["p_value"] == mcnemar(lost, won)


def test_fingerprints_tell_prompts_apart() -> None:
    def of(**options: Any) -> str:
        return find_tasks(["python_entry"], **options).fingerprints["python_entry"]

    assert of(limit=3) == of(limit=3)
    others = [of(limit=4), of(limit=3, seed=1), of(limit=3, num_fewshot=2)]
    assert len({of(limit=3), *others}) == 4


def test_resumes_per_task_and_shares_the_original(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads, messages = [], []
    original = harness.load

    def counted(model: Any, **options: Any) -> Any:
        loads.append(options["plan"] and options["plan"].shorthand)
        return original(model, **options)

    monkeypatch.setattr(harness, "load", counted)
    tasks = find_tasks(["python_brackets", "python_entry"], limit=3)
    options: dict[str, Any] = {"against": folder, "out": tmp_path, "step": messages.append}
    first = evaluate_tasks(folder, tasks, plan=PLAN, **options)
    assert loads == [None, PLAN] and len(messages) == 4
    assert evaluate_tasks(folder, tasks, plan=PLAN, **options) == first
    assert len(loads) == 2 and len(messages) == 4
    # A task that was interrupted: its lines are there, its scores are not.
    scores = [*tmp_path.glob("*/python_entry.json")]
    assert len(scores) == 2
    scores[0].unlink()
    assert evaluate_tasks(folder, tasks, plan=PLAN, **options) == first
    assert len(loads) == 3 and len(messages) == 5
    evaluate_tasks(folder, tasks, plan="2+3", **options)
    assert loads[3:] == ["2+3"]
    evaluate_tasks(folder, tasks, plan="2+3", batch_size=2, **options)
    assert loads[4:] == [None, "2+3"]  # other settings, other answers


def test_local_files_groups_and_folders(folder: Path, tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    for path in FOLDER.glob("*brackets*"):
        shutil.copy(path, tmp_path)
    text = (tmp_path / "python_brackets.yaml").read_text()
    for name in ("mine", "other"):
        lines = text.replace("python_brackets", name).replace("tag: offline", "")
        (tmp_path / f"{name}.yaml").write_text(lines)
    (tmp_path / "python_brackets.yaml").unlink()
    (tmp_path / "both.yaml").write_text("group: both\ntask: [mine, other]\n")
    tasks = find_tasks([str(tmp_path / "mine.yaml")], limit=3)
    assert list(tasks.rows) == ["mine"]
    alone = evaluate_tasks(folder, tasks)
    assert alone.tasks["mine"].original is None and alone.kept_mean is None

    manager = TaskManager(include_path=[str(tmp_path)], include_defaults=False)
    patched = pytest.MonkeyPatch()
    patched.setattr("lm_eval.tasks.TaskManager", lambda **_: manager)  # not 14,000 other files
    with patched.context():
        tasks = find_tasks(["both"], include_path=[tmp_path], limit=3)
        patched.undo()
    assert tasks.rows == {"both": ("mine", "other")}
    pooled = evaluate_tasks(folder, tasks, against=folder).tasks["both"]
    assert pooled.num_items == 6
    assert pooled.converted == pytest.approx(alone.tasks["mine"].converted)


def test_prompts_that_are_cut_are_counted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    short = Path(shutil.copytree(folder, tmp_path / "short"))
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 60}))
    tasks = find_tasks(["python_brackets", "python_entry"], limit=4)
    scores = evaluate_tasks(short, tasks, step=said.append).tasks
    assert scores["python_entry"].truncated == 4
    assert any("python_entry: 4 items are longer than 60 tokens" in line for line in said)


def test_answers_longer_than_the_model_are_refused(folder: Path, tmp_path: Path) -> None:
    for path in FOLDER.glob("*line_end*"):
        shutil.copy(path, tmp_path)
    file = tmp_path / "python_line_end.yaml"
    file.write_text(file.read_text().replace("max_gen_toks: 16", "max_gen_toks: 256"))
    with pytest.raises(AbreastError, match="up to 256 tokens, the model holds 256"):
        evaluate_tasks(folder, find_tasks([str(file)], limit=2))


def test_a_model_without_a_tokenizer_is_refused(tiny_checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(AbreastError, match="no tokenizer"):
        evaluate_tasks(tiny_checkpoint(), find_tasks(["python_entry"], limit=1))


def test_a_folder_of_something_else_is_left_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("x")
    with pytest.raises(AbreastError, match="choose a new folder"):
        evaluate_tasks(folder, find_tasks(["python_entry"], limit=1), out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(AbreastError, match="pip install datasets lm-eval"):
        find_tasks([OFFLINE])


@pytest.mark.parametrize(
    ("yaml", "fault"),
    [
        ("task: x\ndataset_path: some-one/some-data\n", "not in the cache"),
        ("task: [\n", "cannot be used"),
        ("task: x\noutput_type: nonsense\n", "nonsense"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, yaml: str, fault: str) -> None:
    file = tmp_path / "task.yaml"
    file.write_text(yaml)
    with pytest.raises(AbreastError, match=fault) as caught:
        find_tasks([str(file)])
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"names": ["/nowhere/task.yaml"]}, "no task file"),
        ({"names": [""]}, "no task to run"),
        ({"names": [OFFLINE], "limit": 0}, "--limit"),
        ({"names": [OFFLINE], "num_fewshot": -1}, "--num-fewshot"),
        ({"names": [OFFLINE], "include_path": ["/nowhere"]}, "--include-path"),
    ],
)
def test_senseless_requests_are_refused(options: dict[str, Any], fault: str) -> None:
    with pytest.raises(AbreastError, match=fault):
        find_tasks(**options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "fault"),
    [("arc_esy", "did you mean arc_easy"), ("arc_easy", "not in the cache")],
)
def test_unknown_and_distant_tasks_are_refused_before_the_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], task: str, fault: str
) -> None:
    # The model does not exist, so loading it first would be the other error.
    monkeypatch.setattr(sys, "argv", ["abreast", "eval", "/nowhere", "--tasks", task])
    with pytest.raises(SystemExit) as left:
        main()
    printed = capsys.readouterr()
    assert left.value.code == 2 and fault in printed.err and len(printed.err.splitlines()) == 1


def test_command_line(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["abreast", "eval", str(folder), *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        printed = capsys.readouterr()
        return int(left.value.code or 0), printed.out, printed.err

    monkeypatch.setenv("COLUMNS", "120")  # an untrained model's perplexities are long numbers
    Plan.parse(PLAN, 6).save(tmp_path / "plan.yaml")
    plan = ("--plan", str(tmp_path / "plan.yaml"))
    few = ("--tasks", "python_entry, python_last_name", "--limit", "3", *plan)
    status, out, _ = run(*few, "--against", str(folder), "--json")
    assert status == 0
    assert json.loads(out)["settings"]["plan"] == PLAN
    assert set(json.loads(out)["tasks"]) == {"python_entry", "python_last_name"}
    status, out, _ = run(*few, "--against", str(folder))
    assert status == 0 and "only one" in out and "perplexity" in out
    status, out, _ = run(*few)
    assert status == 0 and "score" in out
    status, _, err = run("--limit", "3")
    assert status == 2 and "--limit goes with --tasks" in err


# The arithmetic, by hand.


def answers(*, higher: bool = True, **items: list[Any]) -> Answers:
    metrics = {}
    for name, values in items.items():
        value = float(np.mean(values))
        metrics[name] = {
            "value": value,
            "stderr": metric_stderr(value, values),
            "higher_is_better": higher,
        }
    return Answers("1", 0, 0, metrics, dict(items))


def test_what_is_kept_and_its_error() -> None:
    old = answers(acc=[1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0])
    new = answers(acc=[1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0])
    score = paired_scores(new, old, "acc")
    assert (score["only_original"], score["only_converted"]) == (3, 1)
    assert score["p_value"] == pytest.approx(2 * (1 + 4) / 16)
    assert score["kept"] == pytest.approx(4 / 6)
    # Against resampled items.
    rng = np.random.default_rng(0)
    a, b = rng.integers(2, size=(2, 400)) | rng.integers(2, size=400)
    drawn = rng.integers(400, size=(4000, 400))
    spread = (a[drawn].sum(1) / b[drawn].sum(1)).std()
    one, two = answers(acc=a.astype(float).tolist()), answers(acc=b.astype(float).tolist())
    assert paired_scores(one, two, "acc")["kept_stderr"] == pytest.approx(spread, rel=0.05)


def test_kept_where_lower_is_better_and_where_nothing_was_right() -> None:
    worse, better = answers(higher=False, loss=[2.0, 4.0]), answers(higher=False, loss=[1.0, 2.0])
    score = paired_scores(worse, better, "loss")
    assert score["kept"] == pytest.approx(0.5) and score["test"] == "sign flips"
    none, some = answers(acc=[0.0, 0.0]), answers(acc=[1.0, 0.0])
    assert paired_scores(some, none, "acc")["kept"] is None
    row = score_task("t", some, none, 0)
    assert row.original == 0 and row.kept is None and mean_kept({"t": row}) == (None, None)


def test_accuracy_above_chance_that_is_kept() -> None:
    """By hand, and the interval against items drawn one task at a time; both models alike."""
    rng = np.random.default_rng(1)
    sizes, chance = {"a": 300, "b": 200}, {"a": 0.25, "b": 0.5}
    old = {task: (rng.random(size) < 0.8).astype(float) for task, size in sizes.items()}
    new = {task: was * (rng.random(len(was)) < 0.95) for task, was in old.items()}
    ours, theirs = ({t: answers(acc=v.tolist()) for t, v in of.items()} for of in (new, old))
    scores = {task: score_task(task, ours[task], theirs[task], 0) for task in sizes}
    guess = {task: np.full(size, chance[task]) for task, size in sizes.items()}
    fraction, within = above_chance_kept(scores, ours, theirs, guess)

    def share(drawn: dict[str, np.ndarray]) -> float:
        top, bottom = (sum(of[t][drawn[t]].mean() - chance[t] for t in sizes) for of in (new, old))
        return float(top / bottom)

    assert fraction == pytest.approx(share({task: np.arange(size) for task, size in sizes.items()}))
    draws = [{t: rng.integers(n, size=n) for t, n in sizes.items()} for _ in range(2000)]
    assert within == pytest.approx(np.percentile(list(map(share, draws)), [2.5, 97.5]), abs=0.01)
    assert above_chance_kept(scores, theirs, theirs, guess) == (1.0, (1.0, 1.0))
    guessing = {task: np.ones(size) for task, size in sizes.items()}
    assert above_chance_kept(scores, ours, theirs, guessing) == (None, None)
    assert above_chance_kept(scores, ours, {}, guess) == (None, None)


def test_the_mean_that_is_kept() -> None:
    old, new = answers(acc=[1.0, 1.0, 1.0, 0.0]), answers(acc=[1.0, 0.0, 1.0, 0.0])
    rows = {"a": score_task("a", new, old, 0), "b": score_task("b", old, old, 0)}
    mean, stderr = mean_kept(rows)
    assert mean == pytest.approx((2 / 3 + 1) / 2)
    assert stderr == pytest.approx((rows["a"].kept_stderr or 0) / 2)


def test_standard_errors_of_what_the_harness_aggregates() -> None:
    logs = np.random.default_rng(0).normal(-2, 1, size=50)
    error = logs.std(ddof=1) / math.sqrt(50)
    assert metric_stderr(float(logs.mean()), logs.tolist()) == pytest.approx(error)
    ppl = float(np.exp(-logs.mean()))
    assert metric_stderr(ppl, logs.tolist()) == pytest.approx(ppl * error)
    pairs = [[float(x), 3.0] for x in logs]
    bits = float(-logs.mean() / 3 / math.log(2))
    assert metric_stderr(bits, pairs) == pytest.approx(error / 3 / math.log(2))
    assert metric_stderr(123.0, logs.tolist()) is None  # some other aggregate
    assert metric_stderr(0.5, ["a", "b"]) is None


def test_groups_pool_items_of_the_metrics_that_all_have() -> None:
    pooled = pool([answers(acc=[1.0, 0.0], f1=[0.5, 0.7]), answers(acc=[1.0, 1.0])])
    assert list(pooled.metrics) == ["acc"]
    assert pooled.metrics["acc"]["value"] == 0.75 and pooled.items["acc"] == [1.0, 0.0, 1.0, 1.0]
    with pytest.raises(AbreastError, match="share no metric"):
        score_task("g", pool([answers(f1=[0.5, 0.7]), answers(acc=[1.0, 1.0])]), None, 0)


# The suite.


def rows_of(task: str) -> list[dict[str, Any]]:
    path = FOLDER / f"{task.removeprefix('python_')}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_suite_is_small_and_sound() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) < 300_000
    tokenizer = load_tokenizer(model_folder())
    for task in SUITE:
        rows = rows_of(task)
        assert len(rows) >= 160 and len({row["text"] for row in rows}) == len(rows)
        for row in rows:
            options = row.get("choices", [row.get("target")])
            assert len(set(options)) == len(options) and all(options)
            assert row.get("answer", 0) < len(options)
            texts = [row["text"], *(row["text"] + option for option in options)]
            before, *after = (tokenizer(text)["input_ids"] for text in texts)
            # The harness scores what the answer adds, so no token may span the two.
            if not row["text"].endswith("\n"):
                assert all(ids[: len(before)] == before for ids in after), row["text"]
            assert max(map(len, after)) <= 256 - 16
        if "choices" in rows[0]:
            share = np.bincount([row["answer"] for row in rows], minlength=4) / len(rows)
            assert share.min() > 0.15


@pytest.mark.slow
def test_the_bundled_model_is_clearly_above_chance(tmp_path: Path) -> None:
    """Three standard errors and more; what it is on all items is in docs/evaluation.md."""
    tasks = find_tasks([OFFLINE], limit=60)
    scores = evaluate_tasks(model_folder(), tasks, batch_size=16, dtype="float32").tasks
    for name, row in scores.items():
        chance = 0.25 if name in ("python_brackets", "python_entry", "python_next_line") else 0.0
        assert row.converted - 3 * (row.converted_stderr or 0) > chance, name
        assert row.truncated == 0


@pytest.mark.slow
def test_optimize_leaves_the_scores_beside_the_conversion(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = "--windows 8 --window 32 --per-group 1 --max-tokens 600 --rounds 1 --no-baselines"
    words = f"optimize {folder} -o {tmp_path} --depth 5 {small} --no-plots".split()
    options = ["--tasks", "python_entry", "--limit", "2"]
    monkeypatch.setattr(sys, "argv", ["abreast", *words, *options])
    with pytest.raises(SystemExit) as left:
        main()
    assert not left.value.code
    (file,) = tmp_path.glob("plans/*/tasks.json")
    scores = json.loads(file.read_text())
    assert {"tasks", "kept_mean", "settings"} <= set(scores)
    row = scores["tasks"]["python_entry"]
    assert row["num_items"] == 2 and row["original"] is not None and "p_value" in row
    assert json.loads((tmp_path / "results.json").read_text())["tasks"] == scores
