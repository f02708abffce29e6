"""What plans are scored on: the original's own answers, tasks, the worst of several texts."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from abreast.cli.main import main
from abreast.data import Part, TokenStream
from abreast.errors import AbreastError
from abreast.model import cache_name, cache_of
from abreast.model.grouping import grouped, load
from abreast.plan import Plan
from abreast.planner import scoring
from abreast.planner.calibration import calibrate
from abreast.planner.find import find_plan
from abreast.planner.front import Budget, Stats
from abreast.planner.measuring import measure, score
from abreast.planner.objective import Scoring
from abreast.planner.settings import CalibrationSettings
from abreast.runs import read_journal

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"
LAYERS = 6


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """Where to find short chats: 40, of which every second one asks what another asks."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    with path.open("w") as file:
        for i in range(40):
            turns = [{"role": role, "content": f"{i % 20}"} for role in ("user", "assistant")]
            file.write(json.dumps({"messages": turns}) + "\n")
    return f"chat:{path}"


@pytest.fixture(scope="module")
def chatty(tiny_checkpoint, tmp_path_factory):
    """A factory of tiny checkpoints with a chat template."""

    def made(family="llama", **config):
        folder = tmp_path_factory.mktemp("chatty") / family
        shutil.copytree(tiny_checkpoint(family, tokenizer=True, **config), folder)
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TEMPLATE}))
        return folder

    return made


def run(model, out, *, part=(0, 1), stream=None, **options):
    settings = {"num_windows": 8, "window": 40, "batch_size": 3, "max_group": 2}
    names = ("score", "prefill", "texts", "score_tasks")
    chosen = Scoring(**{name: options.pop(name) for name in names if name in options})
    settings |= {"wirings": ("lp",), "keep": 0.6, **options, "scoring": chosen}
    return calibrate(model, out, CalibrationSettings(**settings), part=part, stream=stream)


def answers_of(calibration):
    """(prompt, answer) of every window."""
    for ids, scored in zip(calibration.tokens, calibration.sample.scored, strict=True):
        begin, count = int(scored.argmax()), int(scored.sum())
        assert scored[begin : begin + count].all()
        yield torch.tensor(ids[None, :begin]), torch.tensor(ids[None, begin : begin + count])


def teacher_forced(model, prompt, answer):
    """Log-probabilities of an answer's tokens, the prompt read first, then all of it at once."""
    with torch.inference_mode():
        first = model(prompt, use_cache=True)
        rest = model(answer[:, :-1], **{cache_name(model): cache_of(first)}).logits
    return torch.cat([first.logits[:, -1:], rest], 1).log_softmax(-1)


@pytest.mark.parametrize(
    ("family", "prefill"),
    [
        ("llama", "grouped"),
        ("llama", "sequential"),
        ("gpt_neox", "sequential"),
        ("gemma3_text", "sequential"),
    ],
)
def test_answers_cost_what_the_grouped_model_makes_of_them(
    chatty, chats, tmp_path, family, prefill
):
    folder = chatty(family)
    calibration = run(folder, tmp_path / "run", score="answers", data=chats, prefill=prefill)
    plans = [Plan.parse(p, LAYERS) for p in ("1+2", "1|2 3+4", "2~3~4")]
    costs = score(calibration, plans)
    model, _ = load(folder)
    for plan, cost in zip(plans, costs, strict=True):
        divergences, losses = [], []
        for prompt, answer in answers_of(calibration):
            theirs = teacher_forced(model, prompt, answer)
            with grouped(model, plan, prefill=prefill):
                ours = teacher_forced(model, prompt, answer)
            divergences += (theirs.exp() * (theirs - ours)).sum(-1)[0].tolist()
            losses += (theirs - ours).gather(-1, answer[..., None])[0, :, 0].tolist()
        assert cost.tokens == len(losses) == calibration.sample.scored.sum()
        assert cost.kl == pytest.approx(np.mean(divergences), rel=1e-3, abs=1e-6) != 0
        assert cost.loss_increase == pytest.approx(np.mean(losses), rel=1e-3, abs=1e-5)


def test_answers_are_the_likeliest_tokens_and_kept(chatty, chats, tmp_path, monkeypatch):
    folder = chatty()
    real, written = scoring._answer, []

    def breaking(model, *arguments):
        if len(written) == 10:
            raise KeyboardInterrupt
        written.append(real(model, *arguments))
        return written[-1]

    monkeypatch.setattr(scoring, "_answer", breaking)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "run", score="answers", data=chats, num_windows=12)
    monkeypatch.setattr(scoring, "_answer", lambda *a: (written.append(0), real(*a))[1])
    calibration = run(folder, tmp_path / "run", score="answers", data=chats, num_windows=12)
    assert len(written) == 10 + 4  # eight of the ten were on disk
    model, _ = load(folder)
    for prompt, answer in answers_of(calibration):
        assert answer.shape[1] == 10  # no token ends a text here, and a quarter of the window is 10
        output = model.generate(prompt, max_new_tokens=10, do_sample=False, pad_token_id=0)
        assert (output[:, prompt.shape[1] :] == answer).all()
    monkeypatch.setattr(scoring, "_answer", None)
    again = run(folder, tmp_path / "run", score="answers", data=chats, num_windows=12)
    assert (again.tokens == calibration.tokens).all()


def test_chats_are_asked_up_to_their_first_answer_and_never_in_two_parts(chatty, chats, tmp_path):
    seen, options = [], {"score": "answers", "data": chats}
    for number in range(2):
        calibration = run(chatty(), tmp_path / f"run-{number}", part=(number, 2), **options)
        tokenizer = load(calibration.checkpoint)[1]
        seen.append({tokenizer.decode(prompt[0]) for prompt, _ in answers_of(calibration)})
    assert not seen[0] & seen[1] and all(len(prompts) == 8 for prompts in seen)
    assert seen[0] | seen[1] <= {f"<user>{i}<answer>" for i in range(20)}
    with pytest.raises(AbreastError, match=r"there are 4 prompts behind the 16 .* --chat FILE"):
        run(chatty(), tmp_path / "x", part=(2, 3), **options)


def test_tasks_cost_the_margin_of_the_right_choice(tiny_checkpoint, tmp_path):
    folder = tiny_checkpoint(tokenizer=True)
    options = {"score": "tasks", "score_tasks": ("python_brackets",), "window": 512}
    calibration = run(folder, tmp_path / "run", **options, part=(0, 2))
    plan = Plan.parse("2+3", LAYERS)
    (cost,) = score(calibration, [plan])
    model, _ = load(folder)
    lines, accuracies = [], []
    for mode in (None, plan):
        if mode:
            model = load(folder, plan=plan)[0]
        margins, hits, sample = [], [], calibration.sample
        for item in range(sample.num_items):
            logp = {True: [], False: []}
            for window in np.flatnonzero(sample.items == item):
                places = np.flatnonzero(sample.scored[window])
                ids = torch.tensor(sample.tokens[window][None, : places[-1] + 1])
                with torch.inference_mode():
                    scores = model(ids).logits[0].log_softmax(-1)
                total = sum(float(scores[at - 1, ids[0, at]]) for at in places)
                logp[bool(sample.right[window])].append(total)
            assert len(logp[True]) == 1 and len(logp[False]) == 3
            margins.append(logp[True][0] - np.log(np.mean(np.exp(logp[False]))))
            hits.append(logp[True][0] > max(logp[False]))
        lines.append(np.array(margins))
        accuracies.append(hits)
    lost = lines[0] - lines[1]
    assert cost.margin_loss == pytest.approx(lost.mean(), rel=1e-3, abs=1e-5)
    assert cost.margin_stderr == pytest.approx(lost.std(ddof=1) / 8**0.5, rel=1e-3)
    assert calibration.objective.value(cost) == cost.margin_loss
    right = np.array(accuracies) - 1 / 4
    if right[0].sum() > 0:
        assert cost.accuracy_kept == pytest.approx(right[1].sum() / right[0].sum())
    else:
        assert cost.accuracy_kept is None
    stats = measure(replace(calibration, settings=replace(calibration.settings, screen=1)))
    assert dict(Stats.load(tmp_path / "run" / "stats.safetensors").groups) == dict(stats.groups)
    other = run(folder, tmp_path / "other", **options, part=(1, 2))
    rows = [{row.tobytes() for row in c.tokens[:, :40]} for c in (calibration, other)]
    assert not rows[0] & rows[1]


def test_worst_of_several_texts(tiny_checkpoint, tmp_path):
    random = np.random.default_rng(0)
    one, two = random.integers(128, size=(2, 4, 32))
    two[:] = 5
    tokens = np.stack([one, two], 1).reshape(-1)
    parts = tuple(Part(name, 128, 1, 128, ()) for name in ("one", "two"))
    stream = TokenStream(tokens, "one,two", 2, 256, (), parts)
    folder, plan = tiny_checkpoint(), Plan.parse("1+2", LAYERS)
    costs = []
    for name, texts in (("mean", "mean"), ("worst", "worst")):
        calibration = run(folder, tmp_path / name, window=32, stream=stream, texts=texts)
        costs += score(calibration, [plan])
    lines = read_journal(tmp_path / "worst")
    sums = np.concatenate([line["sums"] for _, line in sorted(lines.items())])
    means = sums[::2, 2].sum() / (4 * 31), sums[1::2, 2].sum() / (4 * 31)
    assert costs[0].kl == pytest.approx(np.mean(means))
    assert costs[1].kl == pytest.approx(max(means)) and costs[1].tokens == 4 * 31
    assert means[0] != pytest.approx(means[1])
    assert calibration.objective.name == "worst KL"
    short = (Part("one", 160, 1, 160, ()), Part("two", 96, 1, 96, ()))
    stream = TokenStream(tokens, "one,two", 2, 256, (), short)
    with pytest.raises(AbreastError, match=r"'two' has 96 tokens of the 128 .* longer text"):
        run(folder, tmp_path / "short", window=32, stream=stream, texts="worst")


def test_what_cannot_be_scored_is_refused_at_once(chatty, tiny_checkpoint, tmp_path, monkeypatch):
    plain = tiny_checkpoint(tokenizer=True)
    out = tmp_path / "run"
    monkeypatch.setattr("abreast.planner.calibration.load", None)
    text = tmp_path / "text.txt"
    text.write_text("some words " * 500)
    with pytest.raises(AbreastError, match=r"no chat template .* use --score kl"):
        run(plain, out, score="answers")
    with pytest.raises(AbreastError, match="--score answers reads chats; give them with --chat"):
        run(chatty(), out, score="answers", data=str(text))
    with pytest.raises(AbreastError, match="--score tasks reads no text; leave out --data"):
        run(plain, out, score="tasks", data=str(text))
    with pytest.raises(AbreastError, match=r"0 prompts of its own \(\d+ do not fit --window 16\)"):
        run(chatty(), out, score="answers", window=16)
    with pytest.raises(AbreastError, match=r"there are 0 questions with choices, .* --score-tasks"):
        run(plain, out, score="tasks", score_tasks=("python_attribute",))
    for name in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(AbreastError, match="pip install datasets lm-eval"):
        run(plain, out, score="tasks")
    assert not out.exists()


def test_a_run_is_never_continued_under_another_score(chatty, chats, tmp_path):
    folder = chatty()
    run(folder, tmp_path / "run", score="answers", data=chats)
    with pytest.raises(AbreastError, match=r"other .*sequential; choose a new folder"):
        run(folder, tmp_path / "run", score="answers", data=chats, prefill="sequential")
    text = TokenStream(np.arange(2048) % 128, "text", 1, 2048)
    with pytest.raises(AbreastError, match=r"other .*score"):
        run(folder, tmp_path / "run", stream=text)


def test_plan_by_answers(chatty, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    words = ["abreast", "plan", str(chatty()), "-o", str(out), "--depth", "5", "--score", "answers"]
    words += ["--windows", "8", "--window", "80", "--max-group", "2", "--no-plots"]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit, match="0"):
        main()
    assert "searched answer KL" in capsys.readouterr().out
    assert (out / "plan.yaml").is_file()
    assert "costs answer KL" in (out / "why.md").read_text()
    texts = [folder / "text" for folder in (out / "calibration", out / "judge")]
    answers = [path for folder in texts for path in folder.glob("answers*.safetensors")]
    assert len(answers) == 2 and len({path.read_bytes() for path in answers}) == 2


def test_search_by_tasks_takes_the_plan_of_the_least_margin_lost(tiny_checkpoint, tmp_path):
    options = {"score": "tasks", "score_tasks": ("python_brackets",), "window": 512}
    calibration = run(tiny_checkpoint(tokenizer=True), tmp_path / "calibration", **options)
    planned = find_plan(calibration, tmp_path, Budget(depth=5))
    costs = planned.front.plans
    assert planned.plan == min(costs, key=lambda plan: costs[plan].margin_loss)
    json.loads((tmp_path / "front.json").read_text(), parse_constant=pytest.fail)
