"""Model cards, and what may go to the Hub: against a small server that answers as the Hub does."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from click.testing import CliRunner
from made_run import LAYERS, NAME, TASKS, make_run

from abreast.checkpoint.files import hash_entry
from abreast.cli.main import cli
from abreast.errors import AbreastError
from abreast.report.card import MARK, card, code, serving, write_card
from abreast.report.records import read_conversion, read_run

EVIL = "org/<script>alert(1)</script>|`x`"


@pytest.fixture(scope="module")
def made(tiny_checkpoint, tmp_path_factory) -> Path:
    """A finished run about a model on the Hub. Not to be changed."""
    folder = tmp_path_factory.mktemp("made") / "run"
    return make_run(folder, tiny_checkpoint(num_layers=LAYERS), "org/model-3B")


@pytest.fixture
def out(made, tmp_path) -> Path:
    """A converted folder of a run of its own, that may be spoilt."""
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run" / "plans" / NAME / "converted"


def metadata(text: str) -> dict:
    return yaml.safe_load(text.split("---")[1])


def test_a_card(out):
    path = write_card(read_conversion(out))
    assert path == out / "README.md"
    text = path.read_text(encoding="utf-8")
    data = huggingface_hub.ModelCard.load(path).data
    assert data.base_model == "org/model-3B" and data.library_name == "transformers"
    assert {"abreast", "lp-wiring", "cqil-wiring"} <= set(data.tags)
    results = {(r.dataset_name, r.metric_type): r.metric_value for r in data.eval_results}
    assert results["stdlib", "kl"] == 0.0625
    assert results["first_task", "acc"] == TASKS["first_task"]["converted"]
    assert data.model_name == "model-3B-abreast-6"
    for seen in (
        "`2+3 5\\|6`",
        "0.0625 ± 0.0012 nats",
        "faster by 1.25x",
        "| `first_task` | `acc` | 0.600 ± 0.020 | 0.570 ± 0.020 | 95.0% |",
        "vllm serve OUT",
        "python -m abreast.engines.transformers serve OUT",
        "Not llama.cpp: cqil groups are no layers of llama.cpp",
        json.loads((out / "abreast.json").read_text())["files"]["model.safetensors"]["sha256"],
    ):
        assert seen in text, seen


def test_a_card_without_results(out, tmp_path):
    shutil.copytree(out, tmp_path / "alone")
    text = card(read_conversion(tmp_path / "alone"))
    assert text.count("Not measured.") == 2 and "model-index" not in metadata(text)


def rename(out: Path, source: str) -> None:
    manifest = json.loads((out / "abreast.json").read_text())
    manifest["source"]["name"] = source
    (out / "abreast.json").write_text(json.dumps(manifest))


def test_licence_and_language_come_from_the_original(out, tmp_path):
    original = tmp_path / "the original"
    original.mkdir()
    head = "license: other\nlicense_name: own\nlicense_link: LICENSE\nlanguage: [en, de]\ntags: [x]"
    (original / "README.md").write_text(f"---\n{head}\n---\n# It\n")
    rename(out, str(original))
    data = metadata(card(read_conversion(out)))
    assert (data["license"], data["license_name"], data["language"]) == (
        "other",
        "own",
        ["en", "de"],
    )
    assert "base_model" not in data and "x" not in data["tags"]  # a folder is nothing on the Hub
    text = card(read_conversion(out))
    assert str(tmp_path) not in text and "`the original` with" in text
    (original / "README.md").write_text("---\nlicense: [\n---\n")
    assert "license" not in metadata(card(read_conversion(out)))


def test_names_are_shown_as_text(out):
    rename(out, EVIL)
    text = card(read_conversion(out))
    assert "base_model" not in metadata(text)
    body = text.split("---", 2)[2]
    assert "`` org/<script>alert(1)</script>\\|`x` ``" in body
    outside = "".join(body.split("``")[::2])  # code spans show what is in them
    assert "<script" not in outside and "<script" not in text.split("---")[1]


@pytest.mark.parametrize(
    ("text", "span"), [("a", "`a`"), ("a\nb|c", "`a b\\|c`"), ("a`b``c", "``` a`b``c ```")]
)
def test_code_spans(text, span):
    assert code(text) == span


def test_a_card_of_somebody_else_is_kept(out):
    (out / "README.md").write_text("# Mine\n")
    assert write_card(read_conversion(out)) is None
    assert (out / "README.md").read_text() == "# Mine\n"
    (out / "README.md").write_text(f"# Old\n\n{MARK}\n")
    assert write_card(read_conversion(out)) is not None


def test_a_format_is_loaded_by_its_engine(out):
    config = json.loads((out / "config.json").read_text())
    config["abreast"]["format"] = "mlx"
    (out / "config.json").write_text(json.dumps(config))
    conversion = read_conversion(out)
    assert [engine for engine, _ in serving("OUT", conversion)[0]] == ["mlx-lm"]
    text = card(conversion)
    assert "mlx_lm.server --model OUT --trust-remote-code" in text
    assert "```python\nimport abreast\n" in text and "AutoModelForCausalLM" not in text


def test_llama_cpp_is_named_for_lp_plans_only(made, tmp_path):
    conversion = read_run(made).last
    commands, (note,) = serving("OUT", conversion)
    assert [engine for engine, _ in commands] == ["vLLM", "transformers"]
    assert note.startswith("Not llama.cpp:") and "convert with an lp plan" in note
    config = json.loads((conversion.target / "config.json").read_text())
    for entry in config["per_layer_config"].values():
        entry.pop("abreast_bypass", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    commands, notes = serving("my out", replace(conversion, target=tmp_path))
    assert "abreast export 'my out'" in dict(commands)["llama.cpp"] and not notes


def test_the_card_does_not_spoil_the_conversion(out, tiny_checkpoint):
    from abreast.convert.verification import verify

    write_card(read_conversion(out))
    assert verify(out, tiny_checkpoint(num_layers=LAYERS), num_tokens=16, new_tokens=4).ok


def call(*arguments: object) -> str:
    return CliRunner().invoke(cli, [*map(str, arguments)], catch_exceptions=False).stdout


def test_dry_run_lists_what_would_go(out):
    (out / "notes.txt").write_text("mine")
    printed = json.loads(call("push", out, "org/name", "--dry-run", "--json"))
    assert {"config.json", "model.safetensors", "abreast.json", "README.md"} <= set(
        printed["files"]
    )
    assert printed["left_out"] == ["notes.txt"] and printed["bytes"] == sum(
        printed["files"].values()
    )
    assert not (out / "README.md").exists()
    assert "org/name (private)" in call("push", out, "org/name", "--dry-run")
    assert "org/name (public)" in call("push", out, "org/name", "--dry-run", "--public")
    write_card(read_conversion(out))
    assert printed["files"]["README.md"] == (out / "README.md").stat().st_size


def test_what_older_versions_copied_does_not_go(out):
    """They recorded every file that lay beside the original's weights."""
    (out / "hf_token.txt").write_text("hf_secret")
    manifest = json.loads((out / "abreast.json").read_text())
    manifest["files"]["hf_token.txt"] = hash_entry(out / "hf_token.txt")
    manifest["files"]["../hf_token.txt"] = hash_entry(out / "hf_token.txt")
    (out / "abreast.json").write_text(json.dumps(manifest))
    printed = json.loads(call("push", out, "org/name", "--dry-run", "--json"))
    assert "model.safetensors" in printed["files"] and "generation_config.json" in printed["files"]
    assert not any("token" in name for name in printed["files"])
    assert printed["left_out"] == ["hf_token.txt"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda out: (out / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda out: (out / "config.json").write_text("{}"), "config.json is not the one recorded"),
        (lambda out: (out / "abreast.json").write_text("{}"), "not the record of a conversion"),
        (lambda out: (out / "abreast.json").unlink(), "holds no abreast.json"),
    ],
)
def test_what_is_no_whole_conversion_does_not_go(out, spoil, message):
    spoil(out)
    with pytest.raises(AbreastError, match=message):
        call("push", out, "org/name", "--dry-run")


@pytest.mark.parametrize("change", [{"versions": 3}, {"source": 3}, {"revision": [1]}])
def test_a_record_of_other_types_is_refused(out, change):
    manifest = json.loads((out / "abreast.json").read_text())
    source = {"source": "name", "revision": "revision"}
    ((key, value),) = change.items()
    (manifest["source"] if key in source else manifest)[source.get(key, key)] = value
    (out / "abreast.json").write_text(json.dumps(manifest))
    with pytest.raises(AbreastError, match="not the record of a conversion"):
        call("push", out, "org/name", "--dry-run")


@pytest.mark.parametrize("repo", ["name", "a/b/c", "org/na me", "org/", "../x", "org/näme"])
def test_names_that_cannot_be(out, repo):
    with pytest.raises(AbreastError, match="cannot be a repository"):
        call("push", out, repo, "--dry-run")


class Hub(ThreadingHTTPServer):
    """Answers what creating a repository and uploading small files ask; keeps what it was sent."""

    daemon_threads = True

    def __init__(self, refuse: bool) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.refuse = refuse
        self.created: list[dict] = []
        self.files: dict[str, bytes] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, data: object, status: int = 200) -> None:
        body = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        sha = {"sha": "0" * 40, "id": "org/name", "siblings": []}
        self.answer({"error": "none"} if "/tree/" in self.path else sha)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        address = f"{self.server.address}/org/name"
        if self.server.refuse:
            return self.answer({"error": "You don't have the rights to create a model"}, 403)
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            return self.answer({"url": address})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            kind = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            modes = [{"path": f["path"], **kind} for f in files]
            return self.answer({"files": modes})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.files[line["value"]["path"]] = content
            done = {"commitUrl": f"{address}/commit/{'1' * 40}", "commitOid": "1" * 40}
            return self.answer({**done, "success": True})
        return self.answer({"error": f"not expected: {self.path}"}, 404)


@pytest.fixture
def hub(request, monkeypatch) -> Iterator[Hub]:
    """The server, running; the client believes that it is the Hub."""
    server = Hub(refuse=getattr(request, "param", False))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    online(monkeypatch, server.address)
    yield server
    server.shutdown()
    server.server_close()


def online(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setenv("HF_TOKEN", "hf_made_up")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)


def test_push(out, hub):
    (out / "notes.txt").write_text("mine")
    address = call("push", out, "org/name")
    assert address.strip() == f"{hub.address}/org/name"
    assert hub.created[0]["name"] == "name" and hub.created[0]["organization"] == "org"
    assert hub.created[0].get("private") is True or hub.created[0].get("visibility") == "private"
    listed = json.loads((out / "abreast.json").read_text())["files"]
    assert set(hub.files) == {*listed, "abreast.json", "README.md"}
    assert all(hub.files[name] == (out / name).read_bytes() for name in hub.files)


@pytest.mark.parametrize("hub", [True], indirect=True)
def test_the_hub_refuses(out, hub):
    with pytest.raises(AbreastError, match="refuses 'org/name'") as caught:
        call("push", out, "org/name")
    assert "403" in str(caught.value) and not hub.files


def test_no_token(out, monkeypatch, tmp_path):
    online(monkeypatch, "http://127.0.0.1:9")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(AbreastError, match="no token for the Hugging Face Hub"):
        call("push", out, "org/name")


def test_no_network(out, monkeypatch):
    online(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(AbreastError, match=r"127\.0\.0\.1:9|was not uploaded"):
        call("push", out, "org/name")


def test_a_hub_that_does_not_answer_is_not_waited_for(out, monkeypatch):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        online(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_ETAG_TIMEOUT", 0.5)
        start = time.monotonic()
        with pytest.raises(AbreastError, match=r"no connection to http://127.* try again|was not"):
            call("push", out, "org/name")
        assert time.monotonic() - start < 10


def test_offline(out):
    assert huggingface_hub.constants.HF_HUB_OFFLINE  # set for all tests
    with pytest.raises(AbreastError, match="HF_HUB_OFFLINE is set; unset it to push"):
        call("push", out, "org/name")
