"""Which text fits the model: the default, what the model writes itself, chats, and their record."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from made_tokenizers import save as save_tokenizer
from safetensors import safe_open

from abreast.cli.main import cli
from abreast.convert import convert
from abreast.data import CALIBRATION, HELD_OUT, load_tokens
from abreast.engines.vllm import VllmFailure
from abreast.errors import AbreastError
from abreast.model import load
from abreast.planner import CalibrationSettings, calibrate
from abreast.report import read_run
from abreast.report.page import text_rows
from abreast.runs import own_text, text, token_stream
from abreast.runs.own_text import ROWS, writing_seconds

WIKITEXT = "hub:Salesforce/wikitext@wikitext-2-raw-v1"
WINDOW = 32
ARTICLES = {split: [f" = {split} = \n", " words of it \n" * 80] for split in ("train", "test")}


def hub(monkeypatch: pytest.MonkeyPatch, reach: bool) -> None:
    """A Hub that has wikitext, or none; the data set lies in no cache."""

    def load_dataset(name: str, of: str, *, split: str, streaming: bool) -> list[dict[str, str]]:
        if not reach:
            raise ConnectionError("Couldn't reach it")
        assert (name, of) == ("Salesforce/wikitext", "wikitext-2-raw-v1")
        return [{"text": row} for row in ARTICLES[split]]

    module = ModuleType("datasets")
    vars(module).update(load_dataset=load_dataset, config=SimpleNamespace(HF_HUB_OFFLINE=True))
    module.__spec__ = SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "datasets", module)


@pytest.fixture
def model(tiny_checkpoint, tmp_path) -> Path:
    """A model whose tokenizer begins texts with a token, ends them with another and knows chats."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint(vocab_size=640, eos_token_id=2), folder)
    save_tokenizer("llama 3", folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2]}')
    return folder


class Read:
    """Reads streams for a model, and counts how often it had to write."""

    def __init__(self, model: Path) -> None:
        self.model, self.said, self.loaded = model, list[str](), 0
        self.original, self.tokenizer = load(model)

    def __call__(self, data: str = "auto", **options: Any) -> Any:
        def author() -> Any:
            self.loaded += 1
            return self.original

        reading = {"max_tokens": 256, "window": WINDOW, "seed": 0, "add_bos": None, **options}
        reading = {"author": author, "step": self.said.append, **reading}
        return token_stream(data, self.tokenizer, self.model, **reading)


@pytest.fixture
def read(model) -> Read:
    return Read(model)


def test_the_default_is_wikitext_where_the_hub_has_it(read, tmp_path, monkeypatch):
    hub(monkeypatch, reach=True)
    trained, judged = read(folder=tmp_path), read(role="judge", folder=tmp_path, option="--eval")
    assert (trained.source, judged.source) == (f"{WIKITEXT}:train", f"{WIKITEXT}:test")
    assert trained.parts[0].beginnings[0].startswith("= train = words of it")
    assert not read.loaded
    assert read.said == [
        f"the text to {role} on is wikitext-2 ({WIKITEXT}:{part}); name your own with {of} FILE"
        for role, part, of in (("calibrate", "train", "--data"), ("judge", "test", "--eval"))
    ]
    record = json.loads((tmp_path / "text" / "judge.json").read_text())
    assert record["source"] == judged.source and record["sha256"] == judged.sha256


def test_healing_is_on_python_s_source_as_well(read, tmp_path, monkeypatch):
    hub(monkeypatch, reach=True)
    healed = read(folder=tmp_path, mixed=True)
    assert healed.source == f"{WIKITEXT}:train,{CALIBRATION}"
    assert [part.tokens > 256 / 3 for part in healed.parts] == [True, True]
    assert "half wikitext-2, half Python's source" in read.said[0]


@pytest.mark.parametrize("growth", [0.0, 0.001])
def test_the_time_to_write_counts_that_steps_grow_slower(growth):
    """Each reads the cache: the first of 1,024 steps may take a sixth of the time of the last."""
    step_seconds = 0.2 + growth * np.arange(1024)
    ended = np.cumsum(step_seconds)[:128]
    assert writing_seconds(ended, 1024) == pytest.approx(step_seconds.sum(), rel=0.03)
    assert writing_seconds([0.0], 1) == 0 and writing_seconds([0.0, 0.5], 3) == 1.5


def test_elsewhere_it_is_half_the_model_s_own_and_half_python_s(read, tmp_path, monkeypatch):
    hub(monkeypatch, reach=False)
    trained, judged = read(folder=tmp_path), read(role="judge", folder=tmp_path)
    assert trained.source == f"self,{CALIBRATION}" and judged.source == f"self,{HELD_OUT}"
    for stream in (trained, judged):
        own, other = (part.tokens for part in stream.parts)
        assert own + other == len(stream) == 256 and abs(own - other) < WINDOW
    assert "half what the model itself writes" in read.said[0]
    assert "wikitext-2 is out of reach; name your own with --data FILE" in read.said[0]
    assert read.said[1].startswith("the model writes its own text, about ")
    # every second window is of one source, and none serves twice
    windows = [s.tokens[: 256 // 31 * 31].reshape(-1, 31) for s in (trained, judged)]
    library = load_tokens(read.tokenizer, CALIBRATION, max_tokens=128).tokens
    assert (np.concatenate(windows[0][1::2]) == library[: 4 * 31]).all()
    assert not {*map(bytes, windows[0])} & {*map(bytes, windows[1])}


def test_what_the_model_wrote_is_read_again(read, tmp_path, monkeypatch):
    hub(monkeypatch, reach=False)
    first, again = read(folder=tmp_path), read(folder=tmp_path)
    assert read.loaded == 1 and again.sha256 == first.sha256 and again.parts == first.parts
    assert read("self,stdlib-train").sha256 == first.sha256 and read.loaded == 2
    page = (tmp_path / "text" / "calibrate.txt").read_text()
    assert page.startswith("--- 1 ---\n") and first.parts[0].beginnings[0].split()[0] in page
    assert read(folder=tmp_path, seed=1).sha256 != first.sha256 and read.loaded == 3
    (tmp_path / "text" / "calibrate.safetensors").write_bytes(b"\xff" * 99)
    assert read(folder=tmp_path).sha256 == first.sha256 and read.loaded == 4


def test_texts_of_the_version_before_serve(read, tmp_path):
    """A run of version 1, which drew from the whole distribution, goes on with what it wrote."""
    new = read("self", folder=tmp_path)
    file = tmp_path / "text" / "calibrate.safetensors"
    with safe_open(file, framework="np") as saved:
        identity = json.loads(saved.metadata()["identity"])
        texts = np.split(saved.get_tensor("tokens"), saved.get_tensor("ends"))[:-1]
    other = [np.roll(text, 1) for text in texts]
    own_text.save_texts(file, {**identity, "version": 1}, other, read.tokenizer)
    assert read("self", folder=tmp_path).sha256 != new.sha256 and read.loaded == 1
    own_text.save_texts(file, {**identity, "version": 1}, other[:1], read.tokenizer)
    half = read("self", folder=tmp_path)
    assert (half.tokens[: len(other[0])] == other[0]).all() and read.loaded == 2
    with safe_open(file, framework="np") as saved:
        assert json.loads(saved.metadata()["identity"])["version"] == 1


def test_interrupted_writing_goes_on(read, tmp_path, monkeypatch):
    options = {"max_tokens": 3 * ROWS * WINDOW, "folder": tmp_path / "run"}
    whole = read("self", **options | {"folder": None})
    written, real = [], own_text._write

    def broken(model: Any, task: Any, **options: Any) -> Any:
        written.append(task.seeds[0])
        if len(written) == 2:
            raise KeyboardInterrupt
        return real(model, task, **options)

    monkeypatch.setattr(own_text, "_write", broken)
    with pytest.raises(KeyboardInterrupt):
        read("self", **options)
    assert read("self", **options).sha256 == whole.sha256
    assert written[0] != written[1] == written[2]


def test_a_run_keeps_to_its_first_default(read, tmp_path, monkeypatch):
    hub(monkeypatch, reach=False)
    first = read(folder=tmp_path)
    hub(monkeypatch, reach=True)
    assert read(folder=tmp_path).sha256 == first.sha256
    read(folder=tmp_path / "other")
    hub(monkeypatch, reach=False)
    with pytest.raises(AbreastError, match="'Salesforce/wikitext' is not in the cache"):
        read(folder=tmp_path / "other")


def test_without_the_package_it_says_so(read, monkeypatch):
    monkeypatch.setattr(text, "find_spec", lambda name: None)
    assert read(author=None).source == CALIBRATION
    assert "wikitext-2 needs the package 'datasets'" in read.said[0]


@pytest.mark.parametrize("common", [600, 3], ids=["among all", "sorted"])
def test_it_is_drawn_from_the_nucleus(read, monkeypatch, common):
    monkeypatch.setattr(own_text, "_COMMON", common)
    monkeypatch.setattr(own_text, "is_native", lambda dtype, device: False)
    numbers = {"prefix": (0,), "rows": 20_000, "length": 3, "first": 0, "seed": 0, "role": "judge"}
    task = own_text.task_of(read.original, read.tokenizer, **numbers)
    texts = own_text._write(read.original, task, batches=1, step=read.said.append)
    with torch.no_grad():
        logits = read.original(torch.tensor([[0]])).logits[0, -1]
    logits[2], logits[len(read.tokenizer) :] = -torch.inf, -torch.inf
    expected = np.sort(logits.softmax(-1).numpy())[::-1]
    outside = expected.cumsum() - expected >= own_text.NUCLEUS
    least = expected[~outside].min()
    expected = logits.softmax(-1).numpy()
    expected = np.where(expected >= least, expected, 0)
    expected /= expected.sum()
    counts = Counter(int(t[0]) for t in texts[::2])
    assert outside.any() and set(counts) <= {*np.flatnonzero(expected).tolist()}
    for token in expected.argsort()[-5:]:
        assert counts[int(token)] / 10_000 == pytest.approx(expected[token], rel=0.25)
    first, other = (
        {read.tokenizer(words, add_special_tokens=False)["input_ids"][0] for words in beginnings}
        for beginnings in (own_text._BEGINNINGS["judge"], own_text._BEGINNINGS["calibrate"])
    )
    assert {int(t[0]) for t in texts[1::2]} == first != other


def test_texts_end_where_the_model_ends_them(read, monkeypatch):
    rows, real = [], own_text._write
    spy = lambda m, task, **options: (rows.append(len(task.seeds)), real(m, task, **options))[1]  # noqa: E731
    monkeypatch.setattr(own_text, "_write", spy)
    with torch.no_grad():
        read.original.lm_head.weight[2] = 0
        read.original.model.norm.weight *= 0.01  # all tokens are nearly as likely
    stream = read("self", max_tokens=500, window=128)
    lengths = np.diff([-1, *np.flatnonzero(stream.tokens == 2)])
    assert stream.tokens.max() < len(read.tokenizer)
    assert len(lengths) and lengths.min() >= own_text.LEAST_TOKENS and lengths.max() <= 128
    assert rows[0] == 4 and len(rows) > 1 and rows[-1] < 4  # no more than what was missing


def test_a_model_is_not_judged_on_its_own_text(read, model, tmp_path, monkeypatch):
    hub(monkeypatch, reach=False)
    out = tmp_path / "out"
    convert(model, "1+2", out)
    size = ["--max-tokens", "200", "--window", "32", "--stride", "32", "--json"]
    alone = CliRunner().invoke(cli, ["eval", str(out), *size], catch_exceptions=False)
    assert json.loads(alone.stdout)["data"]["source"] == HELD_OUT
    assert "the text to judge on is Python's source (stdlib)" in alone.stderr
    refused = CliRunner().invoke(cli, ["eval", str(out), "--data", "self", *size])
    assert "no model is judged on text of its own" in str(refused.exception)
    paired = [*("eval", str(out), "--against", str(model)), *size, "-o", str(tmp_path / "kept")]
    printed = json.loads(CliRunner().invoke(cli, paired, catch_exceptions=False).stdout)
    by_original = read(role="judge", max_tokens=200)
    assert printed["data"]["sha256"] == by_original.sha256
    assert (tmp_path / "kept" / "text" / "judge.safetensors").is_file()


def test_large_caches_leave_room_for_fewer_texts(read, monkeypatch):
    config = read.original.config
    row = 2 * WINDOW * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    for most, rows in ((100 * row, ROWS), (20 * row, 20), (row, own_text.LEAST_ROWS)):
        monkeypatch.setattr(own_text, "MOST_CACHE", most)
        assert own_text.rows_at_once(read.original.float(), WINDOW) == rows


def test_caches_of_sliding_layers_are_counted_as_they_grow(tiny_checkpoint, monkeypatch):
    model, _ = load(tiny_checkpoint("gemma3_text", sliding_window=8), dtype="float32")
    config = model.config
    kept = [8 if "sliding" in kind else WINDOW for kind in config.layer_types]
    assert 0 < kept.count(8) < len(kept)
    row = 2 * sum(kept) * config.num_key_value_heads * config.head_dim * 4
    monkeypatch.setattr(own_text, "MOST_CACHE", 20 * row)
    assert own_text.rows_at_once(model, WINDOW) == 20


def test_writing_leaves_the_weights_alone(read, monkeypatch):
    monkeypatch.setattr(own_text, "is_native", lambda dtype, device: True)
    before = {name: p.clone() for name, p in read.original.float().named_parameters()}
    computed = []
    read.original.lm_head.register_forward_hook(lambda *call: computed.append(call[2].dtype))
    read("self")
    assert torch.bfloat16 in computed
    assert all(torch.equal(p, before[n]) for n, p in read.original.named_parameters())


def test_texts_that_ended_leave_the_others_as_they_are(read, monkeypatch):
    """The same words whether the model goes on reading ended texts or not."""
    monkeypatch.setattr(own_text, "is_native", lambda dtype, device: False)

    def likeliest(logits: torch.Tensor, known: int, barred: list[int], _: Any) -> list[int]:
        logits[:, barred] = -torch.inf
        logits[:, 2] += 2.0  # texts end at different times
        return logits[:, :known].argmax(dim=-1).tolist()

    monkeypatch.setattr(own_text, "_drawn", likeliest)
    dropped, keep_rows = list[int](), own_text.keep_rows

    def counted(cache: Any, rows: torch.Tensor) -> bool:
        dropped.append(len(rows))
        return keep_rows(cache, rows)

    monkeypatch.setattr(own_text, "keep_rows", counted)
    fewer = read("self", max_tokens=20 * WINDOW)
    monkeypatch.setattr(own_text, "keep_rows", lambda cache, rows: False)
    assert read("self", max_tokens=20 * WINDOW).sha256 == fewer.sha256
    assert dropped and min(dropped) < 20


def in_vllm(monkeypatch: pytest.MonkeyPatch, go_on: Any) -> list[dict[str, Any]]:
    """vLLM seems to be here, and continues texts with `go_on`; what it was started with."""
    started: list[dict[str, Any]] = []

    @contextmanager
    def writer(folder: Path, **options: Any) -> Iterator[Any]:
        started.append({"folder": folder, **options})
        yield go_on

    monkeypatch.setattr(own_text, "find_spec", lambda name: name)
    monkeypatch.setattr(own_text, "writer", writer)
    monkeypatch.setattr(own_text, "WORTH_VLLM", 100)
    monkeypatch.setattr(own_text, "VLLM_DEVICES", ("cpu",))
    return started


def test_where_vllm_is_it_writes(read, tmp_path, monkeypatch):
    asked: list[Any] = []

    def go_on(prompts: Any, samplings: Any) -> list[list[int]]:
        asked.append((prompts, samplings))
        return [[7] * 9 + [639, 7] for _ in samplings]  # 639 is no token of the tokenizer

    started = in_vllm(monkeypatch, go_on)
    stream = read("self", folder=tmp_path)
    assert read("self", folder=tmp_path).sha256 == stream.sha256 and len(started) == 1
    device = torch.device("cpu")
    dtype = "bfloat16" if own_text.is_native(torch.bfloat16, device) else "float32"
    options = {"length": WINDOW, "at_once": 256, "device": "cpu", "dtype": dtype}
    assert started == [{"folder": read.model, **options}] and read.said == [
        "the model writes its own text in vLLM"
    ]
    (prompts, samplings), *_ = asked
    task = own_text.task_of(
        read.original,
        read.tokenizer,
        prefix=stream.prefix,
        rows=len(prompts),
        length=WINDOW - len(stream.prefix),
        first=0,
        seed=0,
        role="calibrate",
    )
    assert prompts == [[*task.start, *forced] for forced in task.forced]
    assert [sampling.seed for sampling in samplings] == task.seeds
    text = task.forced[1] + [7] * 9 + task.closing
    assert (own_text._write_in_vllm(go_on, task)[1] == text).all()
    read("self", max_tokens=99)
    assert len(started) == 1  # its start would take longer


def test_where_vllm_fails_transformers_writes(read, monkeypatch):
    def go_on(prompts: Any, samplings: Any) -> list[list[int]]:
        raise VllmFailure("vLLM cannot write: no memory")

    expected = read("self").sha256
    in_vllm(monkeypatch, go_on)
    assert read("self").sha256 == expected
    assert "vLLM cannot write: no memory; so it writes in transformers" in read.said


def test_logits_that_are_not_finite_are_named(read):
    with torch.no_grad():
        read.original.lm_head.weight[:] = torch.nan
    with pytest.raises(AbreastError, match="not finite"):
        read("self")


MESSAGES = [
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "ünïcode?"}],
]


@pytest.mark.parametrize("kind", ["llama 3", "prepended space"])
def test_chats_are_rendered_by_the_template(model, tmp_path, kind):
    read = Read(save_tokenizer(kind, model))
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    lines = [{"messages": MESSAGES[0]}, {"messages": MESSAGES[1]}, {"conversations": turns}]
    path = tmp_path / "a, b.jsonl"
    path.write_text("\n\n".join(map(json.dumps, lines)))
    stream = read(f"chat:{path}", max_tokens=10_000)
    order = np.random.default_rng(0).permutation(3)
    expected = []
    for index in order:
        rendered = read.tokenizer.apply_chat_template(MESSAGES[index % 2])["input_ids"]
        expected += rendered[1:] if rendered[:1] == list(stream.prefix) else rendered
        if read.tokenizer.eos_token_id not in rendered[-2:]:
            expected.append(read.tokenizer.eos_token_id)
    assert stream.tokens.tolist() == expected and stream.num_documents == 3
    assert len(stream.prefix) == 1 and stream.prefix[0] not in expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{]", "line 2 is not JSON; write one"),
        ("[1]", "line 2 has no messages; write a list"),
        ('{"messages": []}', "line 2 has no messages"),
        ('{"messages": [{"role": "user"}]}', "line 2 has no messages"),
        ('{"conversations": [{"from": 3, "value": "x"}]}', "line 2 has no messages"),
        ('{"messages": [{"role": "user", "content": "x"}], "tools": [{}]}', None),
        (None, "holds no conversation; name a longer file"),
        ("no file", "no file '.*chats.jsonl' of conversations"),
        ("no template", "has no chat template to render"),
    ],
)
def test_chats_that_cannot_be_rendered_are_refused(read, tmp_path, line, message):
    path = tmp_path / "chats.jsonl"
    if line != "no file":
        good = json.dumps({"messages": MESSAGES[0]})
        path.write_text("\n" if line is None else f"{good}\n{line}\n")
    if line == "no template":
        read.tokenizer.chat_template = None
    if message is None:
        read.tokenizer.chat_template = "{{ raise_exception('odd\nmessage') if tools else '' }}"
        message = r"the chat template refuses '.*', line 2 \(odd\); mend the line"
    with pytest.raises(AbreastError, match=message) as caught:
        read(f"self,chat:{path}")
    assert "\n" not in str(caught.value) and not read.loaded


def test_chat_stands_beside_data(model, tmp_path, monkeypatch):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": MESSAGES[0]}) + "\n")
    size = ["--max-tokens", "200", "--window", "16", "--stride", "16", "--json"]
    for data in ([], ["--data", "stdlib"]):
        words = ["eval", str(model), *data, "--chat", str(path), *size]
        corpora = json.loads(CliRunner().invoke(cli, words, catch_exceptions=False).stdout)
        corpora = corpora.get("corpora", [corpora])
        assert [corpus["data"]["source"] for corpus in corpora] == [*data[1:], f"chat:{path}"]
    size = ["--windows", "8", "--window", "16", "--max-length", "2", "--no-plots"]
    words = ["study", str(model), "-o", str(tmp_path / "study"), "--data", "stdlib", *size]
    words += ["--chat", str(path), "--interventions", "prune"]
    assert CliRunner().invoke(cli, words, catch_exceptions=False).exit_code == 0
    record = json.loads((tmp_path / "study" / "text" / "judge.json").read_text())
    assert [part["source"] for part in record["parts"]] == ["stdlib", f"chat:{path}"]


@pytest.mark.parametrize("data", ["stdlib,stdlib", "auto,self"])
def test_mixtures_that_make_no_sense_are_refused(read, data):
    with pytest.raises(AbreastError, match="mend it"):
        read(data)


def test_a_text_too_short_is_refused_before_anything_is_computed(model, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("A few words, and no more.")
    out, plan = str(tmp_path / "out"), ["--plan", "1+2"]
    arguments = [str(model), "--data", "stdlib", "--depth", "5", "--windows", "8", "--window", "64"]
    for words in (
        ["eval", str(model), "--data", "stdlib", "--data", str(path)],
        ["measure", str(model), "--data", str(path)],
        ["plan", *arguments, "--baselines", "--baseline-data", str(path)],
        ["optimize", *arguments, "--baseline-data", "stdlib", "--eval-data", str(path)],
        ["study", str(model), "--data", str(path)],
        ["heal", str(model), *plan, "--data", str(path)],
    ):
        error = CliRunner().invoke(cli, [*words, "-o", out]).exception
        assert isinstance(error, AbreastError) and "\n" not in str(error)
        assert re.search("name a (longer )?text|give at least 512", str(error)), error
        assert not list(Path(out).rglob("journal*"))
        shutil.rmtree(out, ignore_errors=True)


def test_the_report_shows_what_the_text_was_like(read, model, tmp_path, monkeypatch):
    hub(monkeypatch, reach=False)
    settings = CalibrationSettings(num_windows=8, window=WINDOW)
    calibrate(model, tmp_path / "calibration", settings)
    rows = text_rows(read_run(tmp_path))
    assert [row[:4] for row in rows] == [
        ("calibration", "self", "132", "52%"),
        ("calibration", CALIBRATION, "124", "48%"),
    ]
    record = tmp_path / "calibration" / "text" / "calibrate.json"
    record.write_text(record.read_text().replace('"num_bytes"', '"bytes"'))
    with pytest.raises(AbreastError, match="is damaged"):
        read_run(tmp_path)
