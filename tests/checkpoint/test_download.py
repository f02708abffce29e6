"""Models on the Hub: exactly what is asked of it, against a server that answers as it does."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import huggingface_hub
import pytest
from click.testing import CliRunner

from abreast.checkpoint import hash_entry, open_checkpoint, resolve, sha256_of
from abreast.cli.main import cli
from abreast.convert import convert, inspect_model, preview, verify
from abreast.errors import CheckpointError
from abreast.model import pace_here
from abreast.planner import CalibrationSettings
from abreast.planner.expected import expect

COMMIT, NAME = "1" * 40, "org/name"
SMALL = {"config.json", "generation_config.json", "tokenizer.json", "LICENSE", "README.md"}
SMALL |= {"model.safetensors.index.json", "additional_chat_templates/tools.jinja"}
OTHERS = {
    "consolidated.safetensors",
    "model.fp16.safetensors",
    "onnx/model.onnx",
    "onnx/config.json",
    "original/consolidated.00.pth",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "modeling_own.py",
}


class Hub(ThreadingHTTPServer):
    """Serves the files of a folder as the model org/name; keeps what was asked, but the listing."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.folder = folder
        self.whole: list[str] = []
        self.ranges: list[tuple[str, str]] = []

    @property
    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*") if path.is_file())

    def downloaded(self) -> set[str]:
        """Files that were downloaded since the last call, each once."""
        whole, self.whole = self.whole, []
        assert len(whole) == len(set(whole))
        return set(whole)


class Answers(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        names = [file.relative_to(self.server.folder).as_posix() for file in self.server.files]
        if path.startswith(f"/api/models/{NAME}/tree/"):
            sizes = [file.stat().st_size for file in self.server.files]
            entries = zip(names, sizes, strict=True)
            return self.json([{"type": "file", "path": n, "size": s, "oid": n} for n, s in entries])
        if path.startswith(f"/api/models/{NAME}"):
            rows = [{"rfilename": name} for name in names]
            return self.json({"id": NAME, "sha": COMMIT, "siblings": rows})
        name = path.partition("/resolve/")[2].partition("/")[2]
        if not path.startswith(f"/{NAME}/") or name not in names:
            return self.json({"error": "not found"}, 404)
        content, status = (self.server.folder / name).read_bytes(), 200
        if self.command == "GET" and "range" in self.headers:
            self.server.ranges.append((name, self.headers["range"]))
            first, last = self.headers["range"].removeprefix("bytes=").split("-")
            content, status = content[int(first) : int(last) + 1], 206
        elif self.command == "GET":
            self.server.whole.append(name)
        self.send(content, status, {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT})

    def json(self, data: object, status: int = 200) -> None:
        self.send(json.dumps(data).encode(), status, {"Content-Type": "application/json"})

    def send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


def online(monkeypatch: pytest.MonkeyPatch, address: str, cache: Path) -> None:
    for name, value in (
        ("HF_HUB_OFFLINE", False),
        ("ENDPOINT", address),
        ("HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"),
        ("HF_HUB_CACHE", str(cache)),
    ):
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setenv("HF_ENDPOINT", address)


@pytest.fixture
def hub(tiny_checkpoint, tmp_path, monkeypatch) -> Iterator[Hub]:
    """The server with a sharded model, a file of each sort beside it; the cache is empty."""
    folder = tmp_path / "served"
    shutil.copytree(tiny_checkpoint(sharded=True), folder)
    for name in (SMALL | OTHERS) - {path.name for path in folder.iterdir()}:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    server = Hub(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    online(monkeypatch, f"http://127.0.0.1:{server.server_port}", tmp_path / "cache")
    yield server
    server.shutdown()
    server.server_close()


def shards_of(hub: Hub) -> set[str]:
    index = json.loads((hub.folder / "model.safetensors.index.json").read_text())
    return set(index["weight_map"].values())


def test_only_what_the_index_names_is_fetched(hub):
    folder, revision = resolve(NAME)
    assert revision == COMMIT and len(shards_of(hub)) > 1
    assert hub.downloaded() == SMALL | shards_of(hub)
    opened = open_checkpoint(NAME)
    assert opened.folder == folder and opened.revision == COMMIT and hub.downloaded() == set()
    assert opened.tensors.keys() == open_checkpoint(hub.folder).tensors.keys()


def test_a_single_file_is_fetched_without_the_copies_beside_it(hub, tiny_checkpoint):
    for shard in shards_of(hub):
        (hub.folder / shard).unlink()
    (hub.folder / "model.safetensors.index.json").unlink()
    shutil.copy(tiny_checkpoint() / "model.safetensors", hub.folder)
    resolve(NAME)
    assert hub.downloaded() == SMALL - {"model.safetensors.index.json"} | {"model.safetensors"}
    assert inspect_model(NAME).shards == ("model.safetensors",) and not hub.ranges


@pytest.mark.parametrize(
    "read_headers",
    [
        lambda: inspect_model(NAME).to_dict(),
        lambda: preview(NAME, "1+2").to_dict(),
        lambda: expect(NAME, CalibrationSettings(num_windows=8, window=32)),
    ],
    ids=["inspect", "convert --dry-run", "measure --dry-run"],
)
def test_a_look_reads_headers_and_downloads_no_weights(hub, read_headers, monkeypatch):
    far = read_headers()
    assert hub.downloaded() == SMALL
    assert sorted(hub.ranges) == [(shard, "bytes=0-100000") for shard in sorted(shards_of(hub))]
    resolve(NAME)
    assert hub.downloaded() == shards_of(hub)
    hub.ranges.clear()
    assert read_headers() == far and not hub.ranges  # what is here already is read here


def test_minutes_are_unknown_before_the_weights_are_here(hub):
    (hub.folder / "tokenizer.json").unlink()  # holds nothing
    assert pace_here(NAME, 32, dtype="auto", device="cpu") is None
    assert not hub.downloaded() & shards_of(hub)
    resolve(NAME)
    assert pace_here(NAME, 32, dtype="auto", device="cpu").layers > 0


def test_a_conversion_has_the_commit_on_record(hub, tmp_path):
    (hub.folder / "tokenizer.json").unlink()  # holds nothing
    manifest = convert(NAME, "1+2", tmp_path / "out")
    assert manifest["source"]["revision"] == manifest["plan"]["revision"] == COMMIT
    assert manifest["plan"]["source"] == NAME


def test_weights_in_the_cache_have_their_hash_for_a_name(tiny_checkpoint, tmp_path, monkeypatch):
    """They are not read for it; where the name lies, `verify` says so, for it reads every byte."""
    model = tmp_path / "hub" / "models--org--name"
    cached, blobs = model / "snapshots" / COMMIT, model / "blobs"
    for folder in (cached, blobs):
        folder.mkdir(parents=True)
    source = tiny_checkpoint()
    shutil.copy(source / "config.json", cached)
    right, wrong = sha256_of(source / "model.safetensors"), "0" * 64
    recorded = {}
    for out, name, cache in (("a", right, "hub"), ("b", wrong, "hub"), ("c", wrong, "elsewhere")):
        shutil.copy(source / "model.safetensors", blobs / name)
        (cached / "model.safetensors").unlink(missing_ok=True)
        (cached / "model.safetensors").symlink_to(blobs / name)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / cache))
        files = convert(cached, "1+2", tmp_path / out)["source"]["files"]
        recorded[out] = files["model.safetensors"]["sha256"]
        assert files["config.json"] == hash_entry(source / "config.json")
        assert files["model.safetensors"]["bytes"] == (blobs / name).stat().st_size
    assert recorded == {"a": right, "b": wrong, "c": right}
    assert verify(tmp_path / "a", cached, new_tokens=2).ok
    with pytest.raises(CheckpointError, match="was not made from"):
        verify(tmp_path / "b", cached)


def test_without_the_hub_the_cache_will_do(hub, monkeypatch):
    folder, _ = resolve(NAME)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert resolve(NAME) == (folder, COMMIT)
    assert inspect_model(NAME).num_layers == 6
    next(folder.glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match=r"shard '.*' is missing from"):
        open_checkpoint(NAME)


def test_a_header_that_the_hub_does_not_give_is_one_line(hub):
    inspect_model(NAME)
    shard = sorted(shards_of(hub))[0]
    (hub.folder / shard).write_bytes(b"\xff" * 20)
    with pytest.raises(CheckpointError, match=f"does not give the header of {shard}"):
        inspect_model(NAME)


def test_pickles_on_the_hub_are_not_fetched(hub):
    for path in (*hub.folder.glob("model*"), hub.folder / "consolidated.safetensors"):
        path.unlink()
    with pytest.raises(CheckpointError, match="holds pickled weights only"):
        resolve(NAME)
    assert "pytorch_model.bin" not in hub.downloaded()


def test_a_hub_that_does_not_answer_is_not_waited_for(monkeypatch, tmp_path):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        online(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}", tmp_path)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_ETAG_TIMEOUT", 0.5)
        start = time.monotonic()
        with pytest.raises(CheckpointError, match="the Hugging Face Hub does not give it"):
            resolve(NAME)
        assert time.monotonic() - start < 10


def test_offline_is_said_at_once():
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE"):  # set for all tests
        resolve(NAME)


def test_eval_takes_the_revision_of_the_original(monkeypatch, tmp_path):
    """Of a conversion in a folder: the folder has none."""
    opened = []

    def load(model, *, revision=None, **_):
        opened.append((str(model), revision))
        if model == NAME:
            raise CheckpointError("that will do")
        return None, None

    monkeypatch.setattr("abreast.model.load", load)
    monkeypatch.setattr("abreast.model.fitting_dtype", lambda *_, **__: "float32")
    monkeypatch.setattr("abreast.checkpoint.open_checkpoint", lambda *_, **__: None)
    CliRunner().invoke(cli, ["eval", str(tmp_path), "--against", NAME, "--revision", "v1"])
    assert opened == [(str(tmp_path), "v1"), (NAME, "v1")]
