"""Reading and writing safetensors against the safetensors library, and atomic writes."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from abreast.checkpoint.files import read_manifest, resolve, sha256_of, write_manifest
from abreast.checkpoint.publish import held, publish, replacing, write
from abreast.checkpoint.tensors import (
    DTYPES,
    INDEX,
    SINGLE,
    NewTensor,
    lay_out,
    open_checkpoint,
    read_header,
    read_rows,
    write_shards,
)
from abreast.errors import AbreastError, CheckpointError, first_line
from abreast.plan import Plan

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
OTHER_DTYPES = {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
SAFETENSORS_NAME = {dtype: name for name, dtype in DTYPES.items()}


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 10).to(dtype)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Makes a fresh folder with every call, also within one hypothesis test."""
    base = tmp_path_factory.mktemp("scratch")
    numbers = itertools.count()

    def fresh() -> Path:
        folder = base / str(next(numbers))
        folder.mkdir()
        return folder

    return fresh


@settings(deadline=None)
@given(
    st.dictionaries(
        NAMES,
        st.tuples(SHAPES, st.sampled_from([*DTYPES.values(), *OTHER_DTYPES.values()])),
        max_size=6,
    ),
    st.data(),
)
def test_reads_what_safetensors_writes(
    scratch: Callable[[], Path], what: dict[str, Any], data: Any
) -> None:
    path = scratch() / "model.safetensors"
    tensors = {
        name: random_tensor(shape, dtype, seed)
        for seed, (name, (shape, dtype)) in enumerate(what.items())
    }
    save_file(tensors, path, metadata={"format": "pt"})
    header = read_header(path)
    assert sorted(info.name for info in header) == sorted(tensors)
    content = path.read_bytes()
    for info in header:
        tensor = tensors[info.name]
        assert (info.file, info.shape) == (path, tuple(tensor.shape))
        assert (
            info.dtype
            == {**SAFETENSORS_NAME, **{d: n for n, d in OTHER_DTYPES.items()}}[tensor.dtype]
        )
        assert content[info.offset : info.offset + info.nbytes] == raw(tensor)
        if info.dtype in DTYPES and info.shape:
            assert raw(read_rows(info)) == raw(tensor)
            flat = tensor if tensor.dim() < 2 else tensor.flatten(0, -2)
            assert read_rows(info).shape == flat.shape
            start = data.draw(st.integers(0, info.rows))
            stop = data.draw(st.integers(start, info.rows))
            rows = read_rows(info, start, stop)
            assert rows.dtype == tensor.dtype
            assert rows.shape == (stop - start, *flat.shape[1:])
            assert raw(rows) == raw(flat[start:stop])


def chunked(tensors: dict[str, torch.Tensor], rows: int) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in tensors.items():
        for chunk in (tensor.split(rows) if tensor.dim() else [tensor]) if tensor.numel() else []:
            yield name, chunk


@settings(deadline=None)
@given(
    st.dictionaries(
        NAMES, st.tuples(SHAPES, st.sampled_from(list(DTYPES.values()))), min_size=1, max_size=6
    ),
    st.integers(1, 2000),
    st.integers(1, 3),
)
def test_safetensors_reads_what_is_written(
    scratch: Callable[[], Path], what: dict[str, Any], limit: int, rows: int
) -> None:
    tensors = {
        name: random_tensor(shape, dtype, seed)
        for seed, (name, (shape, dtype)) in enumerate(what.items())
    }
    shards = lay_out(
        [NewTensor(n, SAFETENSORS_NAME[t.dtype], tuple(t.shape)) for n, t in tensors.items()], limit
    )
    folder = scratch()
    written = write_shards(folder, shards, chunked(tensors, rows))
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [*shards, *([INDEX] if len(shards) > 1 else [])]
    )
    loaded_by_name = {}
    for name, content in shards.items():
        read = load_file(folder / name)
        assert sorted(read) == sorted(new.name for new in content)
        loaded_by_name.update(read)
        whole = (folder / name).read_bytes()
        assert written[name] == {"sha256": hashlib.sha256(whole).hexdigest(), "bytes": len(whole)}
        assert sha256_of(folder / name) == written[name]["sha256"]
        assert len(whole) <= limit or len(content) == 1
        assert int.from_bytes(whole[:8], "little") % 8 == 0
    assert sorted(loaded_by_name) == sorted(tensors)
    for name, tensor in tensors.items():
        assert (
            loaded_by_name[name].dtype == tensor.dtype
            and loaded_by_name[name].shape == tensor.shape
        )
        assert raw(loaded_by_name[name]) == raw(tensor)
    if len(shards) > 1:
        index = json.loads((folder / INDEX).read_text())
        assert index["weight_map"] == {t.name: n for n, content in shards.items() for t in content}
        assert index["metadata"]["total_size"] == sum(len(raw(t)) for t in tensors.values())
    (folder / "config.json").write_text("{}")
    opened = open_checkpoint(folder)
    assert set(opened.tensors) == set(tensors)
    assert opened.nbytes == sum(len(raw(t)) for t in tensors.values())


@given(
    st.lists(st.tuples(NAMES, SHAPES), max_size=12, unique_by=lambda pair: pair[0]),
    st.integers(1, 5000),
)
def test_lay_out_keeps_order_and_limit(what: list[Any], limit: int) -> None:
    tensors = [NewTensor(name, "F32", shape) for name, shape in what]
    shards = lay_out(tensors, limit)
    assert [tensor for content in shards.values() for tensor in content] == tensors
    assert list(shards) == sorted(shards)
    if len(shards) == 1:
        assert list(shards) == [SINGLE]
    for content in shards.values():
        assert content or not tensors
        assert sum(tensor.nbytes for tensor in content) <= limit or len(content) == 1


def test_no_shard_is_needlessly_small() -> None:
    tensors = [NewTensor(f"layer.{index}", "F32", (100, 100)) for index in range(10)]
    shards = lay_out(tensors, 100_000)
    assert [len(content) for content in shards.values()] == [2, 2, 2, 2, 2]
    assert list(lay_out(tensors)) == [SINGLE]


@pytest.mark.parametrize(
    "stream",
    [
        [("other", torch.zeros(2, 2))],
        [("first", torch.zeros(3, 2))],
        [("first", torch.zeros(1, 2)), ("second", torch.zeros(1, 2))],
        [("first", torch.zeros(1, 2))],
        [],
    ],
    ids=["wrong name", "too long", "too short", "ended early", "empty"],
)
def test_stream_that_does_not_fit(tmp_path: Path, stream: list[Any]) -> None:
    shards = lay_out([NewTensor("first", "F32", (2, 2)), NewTensor("second", "F32", (1, 2))])
    with pytest.raises(CheckpointError, match="writing 'first'"):
        write_shards(tmp_path, shards, iter(stream))


def test_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(100)}, path)
    (info,) = read_header(path)
    with path.open("r+b") as file:
        file.truncate(info.offset + 40)
    assert read_rows(info, 0, 10).tolist() == [1.0] * 10
    with pytest.raises(CheckpointError, match="ended while it was read"):
        read_rows(info)


def test_publish(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with publish(out) as staging:
        assert staging.parent == tmp_path and staging != out
        (staging / "file").write_text("content")
        assert not out.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "file").read_text() == "content"
    assert out.stat().st_mode & 0o777 == 0o755
    assert (out / "file").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    "fault",
    [RuntimeError, KeyboardInterrupt, SystemExit, CheckpointError],
    ids=lambda f: f.__name__,
)
def test_publish_leaves_nothing_behind(tmp_path: Path, fault: type[BaseException]) -> None:
    def interrupted() -> None:
        with publish(tmp_path / "out") as staging:
            (staging / "folder").mkdir()
            (staging / "folder" / "file").write_text("content")
            raise fault("stop")

    with pytest.raises(fault, match="stop"):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_what_a_live_one_writes_is_not(
    tmp_path: Path,
) -> None:
    for name in (".out.partial-dead", ".other.partial-dead"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("half")
    with publish(tmp_path / "out") as staging:
        assert {path.name for path in tmp_path.iterdir()} == {staging.name, ".other.partial-dead"}
        fault = f"process {os.getpid()} is writing .*out"
        with pytest.raises(CheckpointError, match=fault), publish(tmp_path / "out"):
            pytest.fail("the block must not run")
        with publish(tmp_path / "else"):
            pass
        assert staging.is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".other.partial-dead",
        "else",
        "out",
    ]


def test_a_folder_is_held_by_one_process_and_tidied(tmp_path: Path) -> None:
    run = tmp_path / "deep" / "run"
    (run / "plans" / ".step.partial-new").mkdir(parents=True)
    (run / ".study.json.new").write_text("half")
    (run / ".hidden").write_text("mine")
    with held(run):
        assert sorted(path.name for path in run.rglob("*")) == [".hidden", "plans"]
        fault = f"process {os.getpid()} is working in .*run"
        with pytest.raises(AbreastError, match=fault), held(run):
            pytest.fail("the block must not run")
    with held(run), held(tmp_path / "new" / "folder"):
        assert (tmp_path / "new" / "folder").is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]  # what stays empty goes again
    (tmp_path / "file").write_text("")
    with held(tmp_path / "file"), held(tmp_path / "file" / "run"):
        pass  # whoever writes there says that it cannot be done


def test_writing_does_not_follow_a_link_in_the_place_of_the_staging_file(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("mine")
    (tmp_path / ".results.json.new").symlink_to(tmp_path / "outside")
    write(tmp_path / "results.json", "new")
    assert (tmp_path / "outside").read_text() == "mine"
    assert not (tmp_path / "results.json").is_symlink()


def test_publish_turns_a_full_disk_into_our_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No space left"), publish(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_publish_checks_the_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with publish(tmp_path / "small", needed_bytes=1000):
        pass
    with (
        pytest.raises(CheckpointError, match="are needed"),
        publish(tmp_path / "b", needed_bytes=1001),
    ):
        pytest.fail("the block must not run")
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


@pytest.mark.parametrize("when", ["before", "meanwhile"])
@pytest.mark.parametrize("what", ["folder", "file", "dangling link"])
def test_publish_never_replaces(tmp_path: Path, what: str, when: str) -> None:
    out = tmp_path / "out"

    def occupy() -> None:
        if what == "folder":
            out.mkdir()
        elif what == "file":
            out.write_text("mine")
        else:
            out.symlink_to(tmp_path / "nowhere")

    def attempt() -> None:
        with publish(out):
            assert when == "meanwhile"
            occupy()

    if when == "before":
        occupy()
    with pytest.raises(CheckpointError, match="exists"):
        attempt()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert out.is_symlink() == (what == "dangling link")
    assert out.is_dir() == (what == "folder")
    assert what != "file" or out.read_text() == "mine"


@pytest.mark.parametrize("name", ["absent/out", "file/out", "x" * 300, "x" * 300 + "/out", "a\0b"])
def test_publish_where_nothing_can_be_made(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError) as caught, publish(tmp_path / name):
        pytest.fail("the block must not run")
    assert len(str(caught.value).splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("model", "fault"),
    [
        ("no/such/folder", "no model at"),
        ("./absent", "no model at"),
        ("/absent", "no model at"),
        ("~no-such-user/model", "no model at"),
        ("org/", "no model at"),
        ("absent", "Hugging Face Hub does not give it"),
        ("no-such-org/no-such-model", "Hugging Face Hub does not give it"),
        ("not an id", "Hugging Face Hub does not give it"),
        ("x" * 5000, "Hugging Face Hub does not give it"),
    ],
    ids=lambda value: value[:30],
)
def test_models_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, fault: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=fault) as caught:
        resolve(model)
    assert len(str(caught.value).splitlines()) == 1


def test_resolve_finds_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/model") == (tmp_path / "model", None)
    assert resolve(tmp_path / "model") == (tmp_path / "model", None)
    with pytest.raises(CheckpointError, match="is a file"):
        resolve(tmp_path / "file")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write(path, "old ä")
    assert path.read_text(encoding="utf-8") == "old ä"

    def interrupted() -> None:
        with replacing(path) as staging:
            staging.write_bytes(b"half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        interrupted()
    assert path.read_text(encoding="utf-8") == "old ä"
    write(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    plan, entry = Plan.parse("1+2", 6), {"sha256": "0" * 64, "bytes": 1}
    record = write_manifest(
        tmp_path,
        plan,
        source={"name": "healed", "revision": None, "files": {"config.json": entry}},
        files={"config.json": {**entry, "sha256": "1" * 64}},
        architecture="AbreastLlamaForCausalLM",
        warnings=(),
        versions={},
        healed={
            "method": "refit",
            "kl_before": float("nan"),
            "source": {"name": "original", "revision": "abc", "files": {"config.json": entry}},
        },
    )
    manifest = read_manifest(tmp_path)
    assert (manifest.plan, manifest.source, manifest.revision) == (plan, "original", "abc")
    assert manifest.files == {"config.json": "1" * 64}
    assert manifest.source_files == manifest.healed_files == {"config.json": "0" * 64}
    assert manifest.healed is not None
    assert (manifest.healed["method"], manifest.healed["kl_before"]) == ("refit", None)
    assert manifest.record.keys() == record.keys()


def test_first_line_of_an_error() -> None:
    assert first_line(ValueError("\n one \n two")) == "one"
    assert first_line(ValueError()) == "ValueError"
