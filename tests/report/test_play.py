"""What the playground rests on: runs read, answers generated in turn, and where they part."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from abreast.cli.main import main
from abreast.errors import AbreastError
from abreast.model.grouping import grouped, load
from abreast.plan import Plan
from abreast.planner.objective import Cost
from abreast.report.answers import (
    Answer,
    Sampler,
    Segments,
    Settings,
    answers,
    encode,
    open_models,
    parting,
    segments,
)
from abreast.report.guard import Guard
from abreast.report.panels import about, agreement, complaint, front_picture, heading, panel
from abreast.report.playground import build_page, serve
from abreast.report.records import Choice, Choices, read_choices

PROMPT = "abc abc"


@pytest.fixture(scope="module")
def models(playable_run):
    return open_models(read_choices(playable_run))


@pytest.fixture
def run(playable_run, tmp_path):
    """A copy of the run to spoil."""
    shutil.copytree(playable_run, tmp_path / "run")
    return tmp_path / "run"


def last(models, choice, settings=None, prompt=PROMPT):
    ids = encode(models, prompt)
    *_, final = answers(models, choice, ids, settings or Settings(max_new_tokens=12))
    return final


@pytest.mark.parametrize(
    ("left", "right", "position"),
    [
        ((), (), None),
        ((1, 2), (1, 2), None),
        ((1, 2), (1, 2, 3), None),
        ((1,), (2,), 0),
        ((1, 2, 3), (1, 4, 3), 1),
        ((1, 2), (1, 3, 2), 1),
    ],
)
def test_parting(left, right, position):
    assert parting(left, right) == parting(right, left) == position


def test_segments_never_cut_a_character():
    def decode(tokens):
        return bytes(tokens).decode("utf-8", errors="replace")

    tokens = "añb€".encode()
    assert segments(decode, tokens, None) == Segments("añb€")
    assert segments(decode, tokens, 0) == Segments("", "a", "ñb€")
    assert segments(decode, tokens, 2) == Segments("a", "ñ", "b€")  # its second byte differs
    for position in range(len(tokens)):
        parts = segments(decode, tokens, position)
        assert parts.same + parts.first + parts.rest == "añb€"


def test_run_offers_original_conversion_and_grouped_plans(playable_run, models):
    run = models.run
    assert run.depths == (4, 5, 6) and run.first == 4 and run.num_layers == 6
    assert [choice.way for choice in run.at(4)] == ["converted checkpoint", "grouped in memory"]
    assert [choice.way for choice in run.at(5)] == ["grouped in memory"]
    assert [choice.way for choice in run.at(6)] == ["the original again"]
    rows = json.loads((playable_run / "front.json").read_text())["plans"]
    for choice in run.at(4):
        assert choice.plan.depth == 4 and choice.speedup is None
        cheapest = min(row["kl"] for row in rows if len(row["plan"].split()) == 2)
        assert choice.cost.kl == cheapest


def test_a_conversion_is_offered_whether_its_depth_is_in_the_front_or_not(run):
    rows = json.loads((run / "front.json").read_text())
    rows["plans"] = [row for row in rows["plans"] if len(row["plan"].split()) == 1]
    (run / "front.json").write_text(json.dumps(rows))
    choices = read_choices(run)
    assert choices.depths == (4, 5, 6) and choices.first == 4
    assert [choice.way for choice in choices.at(4)] == ["converted checkpoint", "grouped in memory"]
    assert choices.at(4)[0].cost is None


def test_depths_without_a_plan_give_the_nearest():
    plans = [Plan(num_layers=8), Plan.parse("2+3+4", 8), Plan.parse("1+2+3 4+5+6", 8)]
    run = Choices("m", tuple(Choice(plan) for plan in plans))
    assert run.first == 4
    made = replace(run, choices=(*run.choices, Choice(plans[1], folder=Path("converted"))))
    assert made.first == 6
    assert [run.at(depth)[0].plan.depth for depth in (8, 7, 6, 5, 4, 1)] == [8, 6, 6, 4, 4, 4]


def test_healed_conversions_and_other_plans_are_offered_and_a_profile_predicts(run):
    source = run / "plans" / "depth-4-x" / "converted"
    healed = source.with_name("converted-both-0")
    shutil.copytree(source, healed)
    manifest = json.loads((healed / "abreast.json").read_text())
    record = {"method": "both", "kl_before": 0.5, "kl_after": 0.25, "weights": manifest["files"]}
    (healed / "abreast.json").write_text(json.dumps({**manifest, "healed": record}))
    shutil.copytree(source, run / "plans" / "other" / "converted")
    groups = [{"layers": [1, 2, 3]}]
    other = {**manifest, "plan": {"num_layers": 6, "groups": groups}}
    (run / "plans" / "other" / "converted" / "abreast.json").write_text(json.dumps(other))
    profile = {"about": "here", "single": 1.0, "groups": {"lp 2": 1.25}, "rest": 2.0}
    (run / "profile.json").write_text(json.dumps({"rests_on": {}, "profile": profile}))
    choices = read_choices(run)
    first, second, third, fourth = choices.at(4)
    assert first.way == "converted and healed (both)" and second.way == "converted checkpoint"
    assert (third.plan.shorthand, third.cost, third.speedup) == ("1+2+3", None, None)
    assert fourth.way == "grouped in memory" and fourth.speedup == pytest.approx(8 / 6.5)
    assert "0.50000 → 0.25000" in about(choices, first)
    assert "not measured" in about(choices, third) and "rests on: here" in about(choices, fourth)


def test_original_answers_as_generate_does(models):
    ids = torch.tensor([encode(models, PROMPT)])
    stock = models.original.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    for choice in (*models.run.at(6), *models.run.at(5)):
        original, other = last(models, choice)
        assert list(original.tokens) == stock.tolist()
        with grouped(models.original, choice.plan):
            expected = models.original.generate(ids, max_new_tokens=12, do_sample=False)
        assert list(other.tokens) == expected[0, ids.shape[1] :].tolist()
    assert parting(original.tokens, other.tokens) is not None  # so grouping was seen


def test_conversion_answers_as_the_plan_grouped(models):
    converted, in_memory = models.run.at(4)
    assert models.of(in_memory) is models.original
    assert models.of(converted) is models.of(converted) is not models.original
    assert last(models, converted)[1].tokens == last(models, in_memory)[1].tokens


def test_only_one_conversion_is_held(run):
    copied = run / "plans" / "depth-4-x" / "converted-copy"
    shutil.copytree(run / "plans" / "depth-4-x" / "converted", copied)
    models = open_models(read_choices(run))
    one, two, _ = models.run.at(4)
    first = models.of(one)
    models.of(two)
    assert models.of(one) is not first


def test_sampling_uses_the_same_noise_on_both_sides(models):
    (again,) = models.run.at(6)
    settings = Settings(max_new_tokens=24, temperature=1.0, seed=3)
    original, other = last(models, again, settings)
    assert original.tokens == other.tokens == last(models, again, settings)[0].tokens
    assert original.tokens != last(models, again, replace(settings, seed=4))[0].tokens
    greedy = last(models, again, replace(settings, temperature=0.0))[0].tokens
    assert original.tokens != greedy
    assert last(models, again, replace(settings, top_p=1e-6))[0].tokens == greedy


def test_draws_follow_the_distribution(models):
    logits = torch.tensor([0.0, 1.0, 2.0])
    sampler = Sampler(Settings(temperature=2.0))
    counts = torch.bincount(
        torch.tensor([sampler.choose(logits) for _ in range(4000)]), minlength=3
    )
    expected = (logits / 2).softmax(0)
    # four standard errors of a share of 4000 draws are at most 0.032
    assert torch.allclose(counts / 4000, expected, atol=0.032)


def test_an_answer_ends_while_the_other_goes_on(models):
    (choice,) = models.run.at(5)
    settings = Settings(max_new_tokens=24, temperature=1.0)
    original, other = last(models, choice, settings)
    end = next(token for token in original.tokens[5:] if token not in other.tokens)
    ended = replace(models, ends=frozenset([end]))
    ended_early, full = last(ended, choice, settings)
    assert (
        ended_early.ended
        and ended_early.tokens == original.tokens[: original.tokens.index(end) + 1]
    )
    assert not full.ended and full.tokens == other.tokens


def test_answers_stop_where_the_context_ends(models):
    assert models.limit == 512
    (again,) = models.run.at(6)
    original, other = last(models, again, Settings(max_new_tokens=50), prompt="a" * 505)
    assert len(original.tokens) == len(other.tokens) == 7
    with pytest.raises(AbreastError, match="the prompt has 512 tokens, the model holds 512"):
        encode(models, "a" * 512)


def test_each_clock_runs_during_its_own_steps_only(models, monkeypatch):
    converted, _ = models.run.at(4)
    slow = models.of(converted)
    forward = slow.forward

    def sleepy(*args, **kwargs):
        time.sleep(0.03)
        return forward(*args, **kwargs)

    monkeypatch.setattr(slow, "forward", sleepy)
    start = time.perf_counter()
    original, other = last(models, converted, Settings(max_new_tokens=8))
    wall = time.perf_counter() - start
    assert other.decode >= 7 * 0.03 and other.prefill >= 0.03
    assert original.decode + original.prefill <= wall - 8 * 0.03
    assert other.tokens_per_second == pytest.approx(7 / other.decode)


def test_no_speed_before_the_second_token():
    assert str(Answer((1,), 0.1).tokens_per_second) == "nan"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "number of new tokens cannot be 0"),
        ({"temperature": -1}, "temperature cannot be -1"),
        ({"temperature": float("nan")}, "temperature cannot be nan"),
        ({"top_p": 0}, "top-p cannot be 0"),
        ({"top_p": 1.5}, "top-p cannot be 1.5"),
        ({"seed": -1}, "seed cannot be -1"),
    ],
)
def test_senseless_settings_are_refused(settings, message):
    with pytest.raises(AbreastError, match=message):
        Settings(**settings)


def test_prompts_that_cannot_be_run(models):
    with pytest.raises(AbreastError, match="the prompt is empty"):
        encode(models, "")
    broken = SimpleNamespace(
        apply_chat_template=lambda *_, **__: (_ for _ in ()).throw(ValueError("no\nuser"))
    )
    with pytest.raises(AbreastError, match=r"refuses it \(no user\)"):
        encode(replace(models, tokenizer=broken), "a", chat=True)


def test_chat_template_wraps_the_prompt_without_a_second_bos(models):
    seen = {}

    def tokenizer(text, **options):
        seen.update(options, text=text)
        return {"input_ids": [1]}

    tokenizer.apply_chat_template = lambda messages, **_: f"<{messages[0]['content']}>"
    assert encode(replace(models, tokenizer=tokenizer), "hi", chat=True) == [1]
    assert seen == {"text": "<hi>", "add_special_tokens": False}


def test_weights_that_overflow_give_one_line(run, models):
    (choice,) = models.run.at(5)
    broken, _ = load(models.run.model)
    with torch.no_grad():
        broken.lm_head.weight.fill_(torch.nan)
    with pytest.raises(AbreastError, match="not finite"):
        last(replace(models, original=broken), choice)


def spoil(run, damage):
    if damage == "no front":
        (run / "front.json").unlink()
    elif damage == "nothing measured":
        (run / "front.json").unlink()
        (run / "calibration" / "stats.safetensors").unlink()
    elif damage == "empty":
        shutil.rmtree(run)
        run.mkdir()
    elif damage == "damaged":
        (run / "front.json").write_text('{"plans": [{"plan": 3}]}')
    elif damage == "no statistics":
        (run / "calibration" / "stats.safetensors").unlink()
    elif damage == "bad conversion":
        (run / "plans" / "depth-4-x" / "converted" / "abreast.json").write_text("{}")
    elif damage == "bad profile":
        (run / "profile.json").write_text("{}")
    elif damage == "other checkpoint":
        (run / "config.json").write_text("{}")
    elif damage == "absent":
        shutil.rmtree(run)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("absent", "no folder '.*run'; give the folder that `abreast plan`"),
        ("empty", "is not a run: .*; give the folder that `abreast plan`"),
        ("no front", r"half finished, it has no front.json; go on with `abreast plan .*bold"),
        ("nothing measured", "go on with `abreast plan .*bold.* -o .* --depth N`"),
        ("no statistics", "no statistics at .* run `abreast measure` first"),
        ("damaged", "front.json' is damaged; delete it and run the command"),
        ("bad conversion", "abreast.json' is not the record of a conversion; convert again"),
        ("bad profile", "profile.json' is damaged; delete it"),
        ("other checkpoint", "is a checkpoint that abreast did not make"),
    ],
)
def test_folders_that_cannot_be_played(run, damage, message):
    spoil(run, damage)
    with pytest.raises(AbreastError, match=message):
        read_choices(run)


def test_a_model_that_moved_is_asked_for(run, tmp_path, playable_run, tiny_checkpoint):
    model = read_choices(run).model
    moved = tmp_path / "moved"
    shutil.copytree(model, moved)
    assert read_choices(run, str(moved)).model == str(moved)
    with pytest.raises(AbreastError, match=r"original is gone: .*Say where it is with --against"):
        read_choices(run, str(tmp_path / "a" / "b"))
    with pytest.raises(AbreastError, match="has 8 layers, the run's original 6"):
        read_choices(run, str(tiny_checkpoint(num_layers=8)))
    with pytest.raises(AbreastError, match="its weights differ; name the right one"):
        read_choices(run, str(tiny_checkpoint(seed=1)))


def test_a_conversion_without_a_run_is_played_against_its_source(run, tiny_checkpoint):
    folder = run / "plans" / "depth-4-x" / "converted"
    choices = read_choices(folder)
    assert choices.depths == (4, 6) and choices.at(4)[0].folder == folder
    assert choices.model == read_choices(run).model
    with pytest.raises(AbreastError, match="is not the original of the conversion, its weights"):
        read_choices(folder, str(tiny_checkpoint(seed=1)))
    models = open_models(choices)
    assert last(models, choices.at(4)[0])[1].tokens
    assert front_picture(choices, choices.at(4)[0]) == ""


def test_everything_from_outside_is_escaped():
    evil = "<script>x</script>"
    plan = Plan.parse("2+3", 8)
    choice = Choice(plan, Cost(0.1, 0.01, 0.1, 0.01, 100), 1.2, healed={"method": evil})
    run = Choices(evil, (Choice(Plan(num_layers=8)), choice), evil)
    answer = Answer((1, 2), 0.1, 0.1, True)
    texts = (
        heading(run),
        about(run, choice),
        complaint(evil),
        panel("Original", "", answer, Segments(evil, evil, evil), 1, running=False),
        agreement((answer, answer), 1, (evil, evil), running=False),
    )
    for text in texts:
        assert "<script" not in text and "&lt;script" in text


def test_pictures_of_a_front_without_spread():
    cost = Cost(0.0, float("nan"), 0.0, float("nan"), 1)
    run = Choices("m", (Choice(Plan(num_layers=4)), Choice(Plan.parse("1+2", 4), cost)))
    for choice in run.choices:
        picture = front_picture(run, choice)
        assert "nan" not in picture and "ab-ring" in picture


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, None),
        ({"host": "localhost:7860"}, None),
        ({"host": "rebound.example:7860"}, 400),
        ({"host": "127.0.0.1.example:7860"}, 400),
        ({"origin": "http://127.0.0.1:7860"}, None),
        ({"origin": "http://127.0.0.1:9999"}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"path": "/assets/index.js"}, None),
        ({"path": "/gradio_api/file=/etc/passwd"}, 404),
        ({"path": "/gradio_api/file/etc/passwd"}, 404),
        ({"path": "/gradio_api/upload", "method": "POST", "content-length": "9"}, 404),
        ({"path": "/gradio_api/proxy=http://example.org"}, 404),
        ({"path": "/gradio_api/component_server", "method": "POST"}, 404),
        ({"path": "/gradio_api/run/predict", "method": "POST"}, 413),
        ({"path": "/gradio_api/queue/join", "method": "POST", "content-length": "100"}, None),
        ({"path": "/gradio_api/run/predict", "method": "POST", "content-length": "100"}, None),
        ({"path": "/gradio_api/run/other", "method": "POST", "content-length": "100"}, 404),
        ({"path": "/gradio_api/queue/join", "method": "POST", "content-length": "9999999"}, 413),
        ({"path": "/gradio_api/queue/join", "method": "POST"}, 413),
        ({"path": "/gradio_api/queue/join", "method": "POST", "content-length": "-1"}, 413),
    ],
    ids=str,
)
def test_the_guard_lets_through_what_the_page_asks_for(changes, status):
    request = {"host": "127.0.0.1:7860", "path": "/", "method": "GET", **changes}
    path, method = request.pop("path"), request.pop("method")
    headers = [(name.encode(), value.encode()) for name, value in request.items()]
    scope = {"type": "http", "path": path, "method": method, "headers": headers}
    assert Guard(None).refusal(scope) == status


@pytest.mark.parametrize(
    ("kind", "reached"), [("websocket", False), ("lifespan", True), ("http", True)]
)
def test_the_guard_lets_no_websocket_reach_the_page(kind, reached):
    calls, sent = [], []

    async def page(scope, receive, send):
        calls.append(scope["type"])

    async def send(message):
        sent.append(message["type"])

    headers = [(b"host", b"127.0.0.1:7860")]
    scope = {"type": kind, "path": "/", "method": "GET", "headers": headers}
    asyncio.run(Guard(page)(scope, None, send))
    assert (calls, sent) == (([kind], []) if reached else ([], ["websocket.close"]))


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize(
    "prompt", ["half \ud800", "\udfff", "x" * 100_001, "\0", "a\u202eb", "{{ 1 / 0 }}", "\x7f" * 99]
)
def test_odd_prompts_get_an_answer_or_one_line(models, prompt, chat):
    with suppress(AbreastError):
        assert encode(models, prompt, chat=chat)


def test_a_template_may_raise_anything(models):
    tokenizer = SimpleNamespace(apply_chat_template=lambda *_, **__: 1 / 0)
    with pytest.raises(AbreastError, match="template refuses it"):
        encode(replace(models, tokenizer=tokenizer), "abc", chat=True)


@pytest.mark.slow
def test_a_hundred_requests_and_cancellations_leave_the_page_working(models):
    blocks = build_page(models)
    address = serve(blocks)
    try:
        calls = [c for c in blocks.config["dependencies"] if len(c["inputs"]) == 8]

        def post(path, body):
            data = json.dumps(body).encode()
            headers = {"content-type": "application/json"}
            request = urllib.request.Request(f"{address}gradio_api/{path}", data, headers)
            with suppress(urllib.error.HTTPError), urllib.request.urlopen(request) as answer:
                return json.loads(answer.read() or b"null")

        def ask(session, prompt="abc"):
            data = [prompt, models.run.first, 0, 4, 0, 1, 0, False]
            body = {"data": data, "fn_index": calls[0]["id"], "session_hash": session}
            return post("queue/join", body)

        def one(number):
            event = ask(f"s{number}", "abc" * number)
            if event and number % 2:
                body = {"event_id": event["event_id"], "session_hash": f"s{number}"}
                post("cancel", {**body, "fn_index": calls[0]["id"]})

        with ThreadPoolExecutor(100) as pool:
            list(pool.map(one, range(100)))
        deadline = time.monotonic() + 120
        while not ask("last"):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        with urllib.request.urlopen(f"{address}gradio_api/queue/data?session_hash=last") as lines:
            assert any(b"Done" in line for line in lines)
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{address}gradio_api/file=/etc/passwd")
    finally:
        blocks.close(verbose=False)


@pytest.fixture
def command(monkeypatch, capsys):
    """Calls `abreast play` in this process: (exit status, stderr)."""
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["abreast", "play", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        return int(left.value.code or 0), capsys.readouterr().err

    return call


def test_command_without_gradio_says_what_to_install(command, monkeypatch, playable_run):
    monkeypatch.setitem(sys.modules, "gradio", None)
    status, err = command(playable_run)
    assert status == 2 and err.count("\n") == 1 and "-m pip install 'gradio" in err


@pytest.mark.slow
def test_command_refuses_what_it_cannot_serve(command, tmp_path, playable_run):
    status, err = command(tmp_path)
    assert status == 2 and err.count("\n") == 1 and "is not a run" in err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, err = command(playable_run, "--port", port, "--no-browser")
    assert status == 2 and f"port {port} cannot be used; choose another with --port" in err
    assert command(playable_run, "--port", 0)[0] == 2
