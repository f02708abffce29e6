"""Every text path starts windows as the tokenizer starts a text, against plain loops."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from abreast.cli.main import main
from abreast.data import TokenStream, load_tokens
from abreast.errors import AbreastError
from abreast.evaluate import compare, perplexity, sample
from abreast.heal import heal
from abreast.heal.recipe import Recipe
from abreast.heal.train import distill
from abreast.model import grouped, load
from abreast.optimize import Checks, optimize
from abreast.plan import Plan
from abreast.planner import Budget, CalibrationSettings, calibrate, find_plan, measure
from abreast.runs import read_journal
from abreast.study import Changes, StudySettings, study

LETTERS = "abcdefghijklmnopqrstuvwxyz"
BEFORE = {"none": [], "one": [126], "two": [127, 126]}
WINDOW, WINDOWS = 16, 8
PLAN = Plan.parse("2+3", 6)


@pytest.fixture(scope="module")
def folders(tiny_checkpoint, tmp_path_factory) -> dict[str, Path]:
    """A random model, with a tokenizer that puts nothing, one token or two before a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    made = {}
    for name, ids in BEFORE.items():
        made[name] = tmp_path_factory.mktemp(name) / "model"
        family = "gemma3_text" if name == "one" else "llama"
        shutil.copytree(tiny_checkpoint(family), made[name])
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:126]
        tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.add_special_tokens(["<s>", "<g>"])
        special = {"<s>": 126, "<g>": 127}
        names = [{126: "<s>", 127: "<g>"}[i] for i in ids]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*names, "$A"], special_tokens=list(special.items())
        )
        (made[name] / "tokenizer.json").write_text(tokenizer.to_str())
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
        (made[name] / "tokenizer_config.json").write_text(json.dumps(settings))
        (made[name] / "generation_config.json").write_text("{}")
    return made


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(np.random.default_rng(0).choice(list(LETTERS), 1000)))
    return path


@pytest.fixture(params=BEFORE)
def begins(request) -> str:
    return request.param


def plain(folder: Path, text: Path, plan: Plan | None = None) -> list[tuple[torch.Tensor, ...]]:
    """Per window: log-probabilities from the first that is scored on, the tokens that are scored
    (none for the last), the hidden states.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    before = tokenizer("")["input_ids"]
    ids = tokenizer(text.read_text())["input_ids"][len(before) :]
    step, windows = WINDOW - len(before), []
    for start in range(0, WINDOWS * step, step):
        row = torch.tensor([before + ids[start : start + step]])
        first = max(1, len(before))
        with torch.no_grad():
            if plan is None:
                out = model(row, output_hidden_states=True)
            else:
                with grouped(model, plan):
                    out = model(row, output_hidden_states=True)
        logp = out.logits[0, first - 1 :].log_softmax(-1)
        states = torch.stack([state[0, len(before) :] for state in out.hidden_states])
        windows.append((logp, row[0, first:], states))
    return windows


def losses(windows: list[tuple[torch.Tensor, ...]]) -> list[float]:
    return [float(functional.nll_loss(logp[:-1], ids)) for logp, ids, _ in windows]


def divergences(under: Any, original: Any, end: int | None = -1) -> list[float]:
    pairs = [(a[0][:end], b[0][:end]) for a, b in zip(under, original, strict=True)]
    kl = functional.kl_div
    return [float(kl(a, b, log_target=True, reduction="batchmean")) for a, b in pairs]


def settings(text: Path, **options: Any) -> CalibrationSettings:
    sizes = {"num_windows": WINDOWS, "window": WINDOW, "batch_size": 3, "screen": 1, "keep": 1}
    return CalibrationSettings(data=str(text), dtype="float32", **{**sizes, **options})


def test_perplexity_is_that_of_a_plain_loop(folders, text, begins):
    model, tokenizer = load(folders[begins])
    step = WINDOW - len(BEFORE[begins])
    stream = load_tokens(tokenizer, str(text), max_tokens=WINDOWS * step)
    assert list(stream.prefix) == BEFORE[begins]
    expected = losses(plain(folders[begins], text))
    for batch_size in (1, 3):
        result = perplexity(model, stream, window=WINDOW, stride=WINDOW, batch_size=batch_size)
        assert result.windows["tokens"].tolist() == [WINDOW - max(1, WINDOW - step)] * WINDOWS
        assert result.nll == pytest.approx(np.mean(expected), abs=1e-5)
        assert (result.windows["nll"] / result.windows["tokens"]) == pytest.approx(
            expected, abs=1e-5
        )


def test_overlapping_windows_score_every_token_of_the_text_once(folders, text):
    model, tokenizer = load(folders["one"])
    stream = load_tokens(tokenizer, str(text), max_tokens=100)
    result = perplexity(model, stream, window=WINDOW, stride=5)
    assert result.num_tokens == 100
    assert perplexity(model, stream, window=WINDOW, stride=WINDOW).num_tokens == 100


def test_divergence_is_that_of_a_plain_loop(folders, text, begins):
    model, tokenizer = load(folders[begins], plan=PLAN)
    original, _ = load(folders[begins])
    step = WINDOW - len(BEFORE[begins])
    stream = load_tokens(tokenizer, str(text), max_tokens=WINDOWS * step)
    under, alone = plain(folders[begins], text, PLAN), plain(folders[begins], text)
    comparison = compare(model, original, stream, window=WINDOW, stride=WINDOW, batch_size=3)
    assert comparison.kl == pytest.approx(np.mean(divergences(under, alone)), rel=1e-4)
    agreed = [
        (a[:-1].argmax(-1) == b[:-1].argmax(-1)).float().mean()
        for (a, *_), (b, *_) in zip(under, alone, strict=True)
    ]
    assert comparison.top1_agreement == pytest.approx(np.mean(agreed), abs=1e-6)
    assert comparison.kl_by_position[0].start == (2 if begins == "two" else 0)
    assert comparison.kl_by_position[-1].end == WINDOW - 1


def test_measured_costs_are_those_of_a_plain_loop(folders, text, begins, tmp_path):
    stats = measure(calibrate(folders[begins], tmp_path / "run", settings(text)))
    alone, under = plain(folders[begins], text), plain(folders[begins], text, PLAN)
    assert stats.loss == pytest.approx(np.mean(losses(alone)), abs=1e-5)
    cost = stats.groups[PLAN.groups[0]]
    assert cost.kl == pytest.approx(np.mean(divergences(under, alone)), rel=1e-4)
    assert cost.tokens == WINDOWS * (WINDOW - max(1, len(BEFORE[begins])))
    states = torch.cat([states for *_, states in alone], dim=1)
    cosine = torch.cosine_similarity(states[1], states[2], dim=-1).mean()
    assert stats.similarity[1, 2] == pytest.approx(float(cosine), abs=1e-5)


def test_study_scores_as_a_plain_loop(folders, text, begins, tmp_path):
    settings = StudySettings(str(text), num_windows=WINDOWS, window=WINDOW, dtype="float32")
    studied = study(folders[begins], tmp_path, Changes(("parallel",), 2), settings)
    assert studied.loss == pytest.approx(np.mean(losses(plain(folders[begins], text))), abs=1e-5)
    under = np.mean(losses(plain(folders[begins], text, PLAN)))
    assert next(row.loss for row in studied.rows if row.start == 2) == pytest.approx(
        under, abs=1e-5
    )


def test_healing_judges_the_text_only_and_records_how_it_began(folders, text, begins, tmp_path):
    healed = heal(
        folders[begins],
        PLAN,
        tmp_path / "out",
        method="refit",
        data=str(text),
        tokens=64 * WINDOW,
        window=WINDOW,
        work=tmp_path / "work",
    )
    assert healed.data.get("prefix", []) == BEFORE[begins]
    before = json.loads((tmp_path / "out" / "abreast.json").read_text())["healed"]["data"]
    assert before.get("prefix", []) == BEFORE[begins]
    if begins == "none":
        return
    with pytest.raises(
        AbreastError, match=r"begin with token .*, and now they would begin without"
    ):
        heal(
            folders[begins],
            PLAN,
            tmp_path / "other",
            method="refit",
            data=str(text),
            add_bos=False,
            tokens=64 * WINDOW,
            window=WINDOW,
            work=tmp_path / "work",
        )


@pytest.mark.parametrize("objective", ["kl", "lm"])
def test_training_takes_no_loss_on_the_prefix(folders, text, begins, tmp_path, objective):
    pytest.importorskip("accelerate")
    alone, under = plain(folders[begins], text), plain(folders[begins], text, PLAN)
    model, tokenizer = load(folders[begins])
    step, prefix = WINDOW - len(BEFORE[begins]), BEFORE[begins]
    tokens = load_tokens(tokenizer, str(text)).tokens[: WINDOWS * step].reshape(WINDOWS, step)
    windows = np.hstack([np.tile(np.array(prefix, dtype=np.int64), (WINDOWS, 1)), tokens])
    recipe = Recipe(steps=1, objective=objective, bf16=False, train="all", batch_size=4)
    windows = np.concatenate([windows, windows[:1], windows[:1]])  # at least ten; one is held out
    teacher, _ = load(folders[begins])
    options = {"prefix": len(prefix), "recipe": recipe, "teacher": teacher}
    distilled = distill(model, PLAN, windows, tmp_path, **options)
    if objective == "lm":
        assert distilled.before == pytest.approx(losses(under)[0], abs=1e-5)
        return
    # What follows the window's last token is compared as well.
    assert distilled.before == pytest.approx(divergences(under, alone, None)[0], rel=1e-4)


def test_prompts_of_samples_begin_as_texts_do(folders, text, monkeypatch):
    model, tokenizer = load(folders["two"])
    stream, prompts = load_tokens(tokenizer, str(text)), []
    generate = model.generate

    def noted(prompt: torch.Tensor, **options: Any) -> Any:
        prompts.append(prompt[0].tolist())
        return generate(prompt, **options)

    monkeypatch.setattr(model, "generate", noted)
    samples = sample(model, model, tokenizer, stream, count=2, prompt_tokens=8, new_tokens=8)
    assert [prompt[:2] for prompt in prompts] == [[127, 126]] * 4
    assert [len(prompt) for prompt in prompts] == [10] * 4
    assert samples[0]["prompt"].replace(" ", "") == text.read_text()[:8]


def test_windows_measured_otherwise_are_refused_by_name(folders, text, tmp_path):
    run = tmp_path / "run"
    first = calibrate(folders["one"], run, settings(text, add_bos=False))
    measure(first)
    record = json.loads((run / "measure.json").read_text())
    assert "prefix" not in record["identity"]  # as runs before there was a choice
    message = "begin without a beginning-of-text token, and now they would begin with token 126; "
    with pytest.raises(AbreastError, match=f"{message}choose a new folder, or go on with --no-add"):
        calibrate(folders["one"], run, settings(text))
    lines = len(read_journal(run))
    measure(calibrate(folders["one"], run, settings(text, add_bos=False)))
    assert len(read_journal(run)) == lines
    with pytest.raises(AbreastError, match="with other tokens"):
        calibrate(folders["one"], run, settings(text, add_bos=False, seed=1, num_windows=9))
    options = StudySettings(str(text), num_windows=2, window=8)
    study(folders["one"], tmp_path / "study", Changes(("prune",)), options)
    other = replace(options, add_bos=False)
    with pytest.raises(AbreastError, match=r"a study on texts that begin with .* --add-bos"):
        study(folders["one"], tmp_path / "study", Changes(("prune",)), other)


def test_a_window_must_hold_text(folders, text, tmp_path):
    model, tokenizer = load(folders["two"])
    with pytest.raises(AbreastError, match="window is 2; it needs at least 3 tokens"):
        perplexity(model, load_tokens(tokenizer, str(text)), window=2, stride=1)
    with pytest.raises(AbreastError, match="window is 2 with 2 tokens before the text"):
        calibrate(folders["two"], tmp_path, settings(text, window=2))
    outside = TokenStream(np.arange(50), "x", 1, 50, prefix=(128,))
    with pytest.raises(AbreastError, match="outside the vocabulary"):
        perplexity(model, outside)


def test_command_line_says_and_decides_how_texts_begin(folders, text, monkeypatch, capsys):
    def evaluated(*options: str) -> dict[str, Any]:
        monkeypatch.setattr(
            "sys.argv", ["abreast", "eval", str(folders["one"]), *options, "--json"]
        )
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        return json.loads(capsys.readouterr().out)

    options = ("--data", str(text), "--window", str(WINDOW), "--stride", str(WINDOW))
    natural, without, forced = (
        evaluated(*options, *flag) for flag in ((), ("--no-add-bos",), ("--add-bos",))
    )
    assert natural == forced
    assert (natural["data"]["prefix"], without["data"]["prefix"]) == ([126], [])
    assert natural["data"]["sha256"] != without["data"]["sha256"]
    assert natural["result"]["nll"] != without["result"]["nll"]


@pytest.mark.parametrize("verb", ["eval", "measure", "plan", "optimize", "study", "heal"])
def test_every_verb_that_reads_text_has_the_option(verb):
    from abreast.cli.main import cli

    shown = CliRunner().invoke(cli, [verb, "--help"]).output
    assert "--add-bos / --no-add-bos" in shown


@pytest.mark.slow
def test_optimize_evaluates_as_it_measured(folders, text, tmp_path):
    calibration = calibrate(folders["one"], tmp_path / "calibration", settings(text))
    planned = find_plan(calibration, tmp_path, Budget(depth=5))
    checks = Checks(str(text), 500, WINDOW, rounds=2, context=8, new_tokens=2)
    optimized = optimize(folders["one"], tmp_path, planned, checks=checks, report=False)
    model, tokenizer = load(folders["one"])
    stream = load_tokens(tokenizer, str(text), max_tokens=500)
    expected = perplexity(model, stream, window=WINDOW, stride=WINDOW)
    assert optimized.quality["num_tokens"] == expected.num_tokens == 500
    assert optimized.quality["reference"]["nll"] == pytest.approx(expected.nll, abs=1e-5)
