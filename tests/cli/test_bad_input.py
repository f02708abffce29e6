"""Whatever is wrong with the input: one AbreastError that names the fault, and nothing written."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import random
import re
import shutil
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from abreast.checkpoint.tensors import INDEX, open_checkpoint
from abreast.convert import stream
from abreast.convert.inspect import inspect_model
from abreast.convert.rewrite import convert, preview
from abreast.errors import AbreastError
from abreast.model import load
from abreast.plan import Plan

TinyCheckpoint = Callable[..., Path]
PLAN = "1+2 3+4"
NORM = "model.layers.3.input_layernorm.weight"
MATRIX = "model.layers.3.mlp.up_proj.weight"


@pytest.fixture
def source(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> Path:
    """A checkpoint of one file, to be damaged."""
    return Path(shutil.copytree(tiny_checkpoint(), tmp_path / "source"))


@pytest.fixture
def split(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> Path:
    """A checkpoint of several files with an index, to be damaged."""
    return Path(shutil.copytree(tiny_checkpoint(sharded=True), tmp_path / "split"))


def refused(source: Path | str, out: Path, *faults: str, plan: Any = PLAN, **options: Any) -> None:
    """Converting raises AbreastError with one line that holds every fault; `out` is untouched."""
    before = out.lstat() if os.path.lexists(out) else None
    beside = sorted(out.parent.iterdir()) if out.parent.is_dir() else None
    with pytest.raises(AbreastError) as caught:
        convert(source, plan, out, **options)
    message = str(caught.value)
    assert message.strip() and len(message.splitlines()) == 1
    assert [fault for fault in faults if fault not in message] == [], message
    assert (out.lstat() if os.path.lexists(out) else None) == before
    assert (sorted(out.parent.iterdir()) if out.parent.is_dir() else None) == beside


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def reindex(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def entry(shape: list[Any], begin: Any, end: Any, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def craft(folder: Path, header: Any, data: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    (folder / "model.safetensors").write_bytes(size.to_bytes(8, "little") + text + data)


# config.json


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"model_type": "gptj"}, "model_type 'gptj' is not supported"),
        ({"model_type": "gpt2"}, "cannot be written as wide layers"),
        ({"model_type": None}, "no model_type"),
        ({"model_type": "abreast_llama"}, "converted already"),
        ({"num_hidden_layers": "6"}, "num_hidden_layers"),
        ({"num_hidden_layers": 6.0}, "num_hidden_layers"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"hidden_size": 64.0}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": -64}, "hidden_size"),
        ({"intermediate_size": [96]}, "intermediate_size"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"head_dim": 0}, "head_dim"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3 key-value heads"),
        ({"num_key_value_heads": 2.5}, "num_key_value_heads"),
        ({"head_dim": None, "num_attention_heads": 6}, "6 heads do not divide hidden_size 64"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, "auto_map"),
        ({"num_attention_heads": 8}, "self_attn.q_proj.weight"),
        ({"intermediate_size": 95}, "mlp.gate_proj.weight"),
        ({"vocab_size": 129}, "model.embed_tokens.weight"),
        ({"attention_bias": True}, "q_proj.bias"),
    ],
    ids=str,
)
def test_config_at_fault(source: Path, tmp_path: Path, changes: dict[str, Any], fault: str) -> None:
    configure(source, **changes)
    refused(source, tmp_path / "out", fault)


@pytest.mark.parametrize("count", [5, 7, 10**12])
def test_other_number_of_layers(source: Path, tmp_path: Path, count: int) -> None:
    configure(source, num_hidden_layers=count)
    fault = {5: "model.layers.5.", 7: "model.layers.6."}.get(count, "1000000000000 layers")
    refused(source, tmp_path / "out", fault)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"not JSON", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"hidden_size": ' + b"1" * 5000 + b"}", "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b'"llama"', "not a JSON object"),
        (b"null", "not a JSON object"),
        (b"{}", "no model_type"),
    ],
    ids=lambda value: repr(value)[:20],
)
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_broken_json(split: Path, tmp_path: Path, name: str, content: bytes, fault: str) -> None:
    (split / name).write_bytes(content)
    if name == INDEX and content == b"{}":
        fault = "no weight_map"
    refused(split, tmp_path / "out", name, fault)


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_folder_in_place_of_a_file(split: Path, tmp_path: Path, name: str) -> None:
    (split / name).unlink()
    (split / name).mkdir()
    refused(split, tmp_path / "out", name)


def test_no_config(source: Path, tmp_path: Path) -> None:
    (source / "config.json").unlink()
    refused(source, tmp_path / "out", "no config.json")


def test_converted_checkpoint(source: Path, tmp_path: Path) -> None:
    convert(source, PLAN, tmp_path / "once")
    refused(tmp_path / "once", tmp_path / "twice", "converted already", plan="1+2")


# which files there are


def test_no_such_model(tmp_path: Path) -> None:
    refused(tmp_path / "absent", tmp_path / "out", "no model at")


def test_file_as_model(source: Path, tmp_path: Path) -> None:
    refused(source / "model.safetensors", tmp_path / "out", "is a file")


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_never_opened(source: Path, tmp_path: Path, name: str) -> None:
    marker = tmp_path / "exploded"
    bomb = pickle.dumps(Bomb(marker))
    pickle.loads(bomb)
    assert marker.exists()  # it does go off
    marker.unlink()
    (source / "model.safetensors").unlink()
    (source / name).write_bytes(bomb)
    refused(source, tmp_path / "out", "pickled weights only")
    assert not marker.exists()


def test_no_weights(source: Path, tmp_path: Path) -> None:
    (source / "model.safetensors").unlink()
    refused(source, tmp_path / "out", "no model.safetensors")


def test_missing_shard(split: Path, tmp_path: Path) -> None:
    shard = sorted(split.glob("*.safetensors"))[2]
    shard.unlink()
    refused(split, tmp_path / "out", f"shard '{shard.name}' is missing")
    shard.mkdir()
    refused(split, tmp_path / "out", f"shard '{shard.name}' is missing")


def test_missing_index_entry(split: Path, tmp_path: Path) -> None:
    reindex(split, lambda weights: weights.pop(MATRIX))
    refused(split, tmp_path / "out", MATRIX, INDEX)


def test_index_entry_without_a_tensor(split: Path, tmp_path: Path) -> None:
    reindex(split, lambda weights: weights.update(extra=weights[MATRIX]))
    refused(split, tmp_path / "out", "'extra'", "in no shard")


def test_index_entry_in_the_wrong_shard(split: Path, tmp_path: Path) -> None:
    reindex(split, lambda weights: weights.update({MATRIX: weights["model.norm.weight"]}))
    refused(split, tmp_path / "out", MATRIX, INDEX)


def test_tensor_in_two_shards(split: Path, tmp_path: Path) -> None:
    shards = sorted(split.glob("*.safetensors"))
    first = load_file(shards[0])
    save_file({**load_file(shards[1]), **first}, shards[1])
    refused(split, tmp_path / "out", f"is in both {shards[0].name} and {shards[1].name}")


@pytest.mark.parametrize(
    "name",
    [
        *("../outside.safetensors", "a/../../outside.safetensors", "..\\outside.safetensors"),
        *("C:\\outside.safetensors", "sub/model.safetensors", ".", "..", "", "/", "model.bin"),
        *("ABSOLUTE", "a\nb.bin", 1, None, ["model.safetensors"], {}),
    ],
    ids=repr,
)
def test_shard_names_that_leave_the_folder(split: Path, tmp_path: Path, name: Any) -> None:
    outside = tmp_path / "outside.safetensors"
    shutil.copy(sorted(split.glob("*.safetensors"))[0], outside)
    (split / "sub").mkdir()
    shutil.copy(outside, split / "sub" / "model.safetensors")
    name = str(outside) if name == "ABSOLUTE" else name
    reindex(split, lambda weights: weights.update({MATRIX: name}))
    refused(split, tmp_path / "out", "not a plain .safetensors file name", repr(name))


@pytest.mark.parametrize(
    ("name", "target", "fault"),
    [
        ("tokenizer.json", "KEY", "is a link to"),
        ("LICENSE", "KEY", "is a link to"),
        ("README.md", "KEY", "is a link to"),
        ("config.json", "KEY", "is a link to"),
        ("model.safetensors", "../other.safetensors", "is a link to"),
        ("chat_template.jinja", "/dev/zero", "is a link to '/dev/zero'"),
        ("config.json", "/dev/zero", "is a link to '/dev/zero'"),
        ("additional_chat_templates", "SECRETS", "is a link to"),
        ("tokenizer_config.json", "PIPE", "is a device, pipe or socket"),
        ("config.json", "PIPE", "is a device, pipe or socket"),
        ("merges.txt", "SOCKET", "is a device, pipe or socket"),
        ("tokenizer.json", "HUGE", "has 1,000,000,000,000 bytes"),
        ("config.json", "HUGE", "has 1,000,000,000,000 bytes"),
    ],
)
def test_files_that_are_not_files_of_the_checkpoint(
    source: Path, tmp_path: Path, name: str, target: str, fault: str
) -> None:
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (secrets / "key.jinja").write_text("private")
    shutil.copy(source / "model.safetensors", tmp_path / "other.safetensors")
    path = source / name
    path.unlink(missing_ok=True)
    if target == "PIPE":
        os.mkfifo(path)
    elif target == "SOCKET":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    elif target == "HUGE":
        path.touch()
        os.truncate(path, 10**12)
    else:
        places = {"KEY": secrets / "key.jinja", "SECRETS": secrets}
        path.symlink_to(places.get(target, target))
    refused(source, tmp_path / "out", fault, name)
    with pytest.raises(AbreastError, match=re.escape(fault)):
        load(source)


def test_links_within_a_checkpoint_and_into_the_cache_of_the_hub_are_files(
    source: Path, tmp_path: Path
) -> None:
    (source / "model.safetensors").rename(source / "weights")
    (source / "model.safetensors").symlink_to("weights")
    (source / "notes").symlink_to(tmp_path / "private")  # nobody reads it
    convert(source, PLAN, tmp_path / "out")
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in source.glob("*"):
        if path.is_file():
            shutil.copy(path, blobs / path.name)
            (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    convert(snapshot, PLAN, tmp_path / "again")


# which tensors there are


def test_tensor_of_wrong_shape(source: Path, tmp_path: Path) -> None:
    change(source, lambda tensors: tensors.update({MATRIX: tensors[MATRIX][1:].clone()}))
    refused(source, tmp_path / "out", MATRIX, "[95, 64]", "[96, 64]")


@pytest.mark.parametrize("name", [MATRIX, NORM])
def test_scalar_in_place_of_a_tensor(source: Path, tmp_path: Path, name: str) -> None:
    change(source, lambda tensors: tensors.update({name: tensors[name].flatten()[0].clone()}))
    refused(source, tmp_path / "out", name, "shape []")


@pytest.mark.parametrize("name", [MATRIX, NORM, "lm_head.weight", "model.norm.weight"])
def test_missing_tensor(source: Path, tmp_path: Path, name: str) -> None:
    change(source, lambda tensors: tensors.pop(name))
    refused(source, tmp_path / "out", f"tensor '{name}' is missing")


@pytest.mark.parametrize("name", ["extra", "model.layers.6.mlp.up_proj.weight", MATRIX + "_scale"])
def test_tensor_left_over(source: Path, tmp_path: Path, name: str) -> None:
    change(source, lambda tensors: tensors.update({name: torch.ones(2)}))
    refused(source, tmp_path / "out", f"tensor '{name}'", "does not belong")


def test_no_tensors_at_all(source: Path, tmp_path: Path) -> None:
    craft(source, {}, b"")
    refused(source, tmp_path / "out", "0 tensors")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_dtype_that_cannot_be_folded(source: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    change(source, lambda tensors: tensors.update({MATRIX: tensors[MATRIX].to(dtype)}))
    refused(source, tmp_path / "out", MATRIX, "cannot be converted")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize(
    "name",
    [
        *(MATRIX, NORM, "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"),
        *("model.layers.3.self_attn.o_proj.weight", "model.layers.3.mlp.down_proj.weight"),
        *("model.layers.0.mlp.up_proj.weight", "model.layers.5.post_attention_layernorm.weight"),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_damaged_weights(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, dtype: str, name: str, value: float
) -> None:
    source = Path(shutil.copytree(tiny_checkpoint(dtype=dtype), tmp_path / "source"))
    change(source, lambda tensors: tensors[name].view(-1)[-1:].fill_(value))
    refused(source, tmp_path / "out", f"tensor '{name}' holds NaN or Inf")


@pytest.mark.parametrize("name", ["o_proj.bias", "q_proj.bias"])
def test_damaged_bias(tiny_checkpoint: TinyCheckpoint, tmp_path: Path, name: str) -> None:
    source = Path(shutil.copytree(tiny_checkpoint(biases=True), tmp_path / "source"))
    name = f"model.layers.4.self_attn.{name}"
    change(source, lambda tensors: tensors[name][:1].fill_(math.nan))
    refused(source, tmp_path / "out", f"tensor '{name}' holds NaN or Inf")


@pytest.mark.parametrize("plan", ["1+2 3+4", "1|2 3|4:1"])
@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("starcoder2", "input_layernorm.bias"),
        ("starcoder2", "mlp.c_fc.weight"),
        ("starcoder2", "mlp.c_fc.bias"),
        ("phi3", "self_attn.qkv_proj.weight"),
        ("qwen3", "self_attn.k_norm.weight"),
        ("gemma2", "input_layernorm.weight"),
        ("gemma2", "post_feedforward_layernorm.weight"),
        ("olmo2", "self_attn.q_norm.weight"),
    ],
)
def test_damaged_weights_of_other_families(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, family: str, name: str, plan: str
) -> None:
    kinds = {"layer_types": ["full_attention"] * 6} if family == "gemma2" else {}
    origin = tiny_checkpoint(family, head_dim=16, biases=family == "starcoder2", **kinds)
    source = Path(shutil.copytree(origin, tmp_path / "source"))
    name = f"model.layers.3.{name}"
    change(source, lambda tensors: tensors[name].view(-1)[:1].fill_(math.nan))
    refused(source, tmp_path / "out", f"tensor '{name}' holds NaN or Inf", plan=plan)


def test_opposite_infinities_do_not_cancel(source: Path, tmp_path: Path) -> None:
    change(
        source, lambda tensors: tensors[MATRIX][0, :2].copy_(torch.tensor([math.inf, -math.inf]))
    )
    refused(source, tmp_path / "out", f"tensor '{MATRIX}' holds NaN or Inf")


def test_overflow_after_folding(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_checkpoint(dtype="float16"), tmp_path / "source"))
    change(source, lambda tensors: tensors[MATRIX].fill_(1000))
    gain = "model.layers.3.post_attention_layernorm.weight"
    change(source, lambda tensors: tensors[gain].fill_(1000))
    refused(source, tmp_path / "out", "mlp.up_proj.weight", "range of float16", "bfloat16")
    convert(source, PLAN, tmp_path / "wide", dtype="bfloat16")
    convert(source, "1+2", tmp_path / "alone")  # not folded, so nothing overflows


def test_overflow_of_a_cast(source: Path, tmp_path: Path) -> None:
    change(source, lambda tensors: tensors["lm_head.weight"][:1].fill_(1e5))
    refused(source, tmp_path / "out", "'lm_head.weight'", "range of float16", dtype="float16")


def test_large_weights_whose_sum_overflows_are_fine(source: Path, tmp_path: Path) -> None:
    change(source, lambda tensors: tensors["lm_head.weight"].fill_(3e38))
    convert(source, PLAN, tmp_path / "out")


# the safetensors file


def test_truncated_at_any_point(source: Path, tmp_path: Path) -> None:
    path = source / "model.safetensors"
    size = path.stat().st_size
    header = int.from_bytes(path.read_bytes()[:8], "little")
    points = {0, 1, 7, 8, 9, 7 + header, 8 + header, 9 + header, size - 1}
    points |= set(random.Random(0).sample(range(size), 60))
    points |= set(random.Random(1).sample(range(header), 30))
    for point in sorted(points, reverse=True):
        os.truncate(path, point)
        refused(source, tmp_path / "out", "model.safetensors")


def test_bytes_after_the_last_tensor(source: Path, tmp_path: Path) -> None:
    with (source / "model.safetensors").open("ab") as file:
        file.write(b"\0" * 8)
    refused(source, tmp_path / "out", "file not fully covered")


def survives(folder: Path) -> bool:
    """Whether a checkpoint is accepted; any exception but AbreastError fails the test."""
    try:
        preview(folder, PLAN)
    except AbreastError as error:
        message = str(error)
    else:
        return True
    assert message.strip() and len(message.splitlines()) == 1
    return False


@pytest.mark.parametrize("name", ["a shard", INDEX, "config.json"])
def test_flipped_bytes(split: Path, name: str) -> None:
    path = sorted(split.glob("*.safetensors"))[1] if name == "a shard" else split / name
    whole = path.read_bytes()
    end = len(whole)
    if path.suffix == ".safetensors":
        end = 8 + int.from_bytes(whole[:8], "little")
    dice = random.Random(name)
    accepted = 0
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(dice.choice([1, 1, 1, 2, 5])):
            damaged[dice.randrange(end)] = dice.choice([dice.randrange(256), *b'{}[]",:0-9e.\\'])
        path.write_bytes(damaged)
        accepted += survives(split)
    path.write_bytes(whole)
    assert survives(split)
    assert accepted < 200 if name == "config.json" else accepted < 20


WRONG = [
    None,
    True,
    False,
    0,
    -1,
    1,
    6.0,
    1e400,
    "",
    "6",
    "x",
    [],
    [1],
    {},
    {"a": 1},
    10**9,
    10**30,
]


@pytest.mark.parametrize("family", ["llama", "qwen2", "smollm3", "gemma3_text"])
def test_any_value_of_any_config_key(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, family: str
) -> None:
    source = Path(shutil.copytree(tiny_checkpoint(family), tmp_path / "source"))
    path = source / "config.json"
    config = json.loads(path.read_text())
    if family == "qwen2":
        config.update(use_sliding_window=True, sliding_window=8)
    if family != "smollm3":
        config.pop("layer_types", None)
    extra = ["layer_types", "quantization_config", "auto_map", "torch_dtype"]
    extra += ["no_rope_layer_interval", "sliding_window_pattern", "per_layer_config"]
    for key in [*config, *extra]:
        for value in WRONG:
            path.write_text(json.dumps({**config, key: value}))
            survives(source)
    path.write_text(json.dumps({**config, "layer_types": ["full_attention"] * 6}))
    assert survives(source) == (family != "smollm3")  # where layer 3 has no RoPE


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 100_000_001, 1000])
def test_header_of_absurd_length(source: Path, tmp_path: Path, length: int) -> None:
    craft(source, {"a": entry([1], 0, 4)}, b"\0" * 4, length=length)
    refused(source, tmp_path / "out", "model.safetensors", "not a whole safetensors file")


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"[" * 100_000,
        b'{"a": {"shape": [' + b"9" * 5000 + b"]}}",
        b"\xff\xff",
        b"[]",
        b"1",
        {"a": entry([1], 0, 4), "b": entry([1], 0, 4)},
        {"a": entry([2], 0, 8), "b": entry([1], 4, 8)},
        {"a": entry([1], 0, 4), "b": entry([1], 8, 12)},
        {"a": entry([1], 4, 8)},
        {"a": entry([2], 0, 8)},
        {"a": entry([4], 0, 16)},
        {"a": entry([2**62], 0, 2**64)},
        {"a": entry([3], 0, 8)},
        {"a": entry([2**64, 2**64], 0, 12)},
        {"a": entry([1], 8, 4)},
        {"a": entry([3], 0, 12, "F7")},
        {"a": entry([3], 0, 12, None)},  # type: ignore[arg-type]
        {"a": entry([-3], 0, -12)},
        {"a": entry([3.0], 0, 12)},
        {"a": entry(["3"], 0, 12)},
        {"a": entry([3], 0.0, 12)},
        {"a": {**entry([3], 0, 12), "data_offsets": [0, 4, 12]}},
        {"a": {**entry([3], 0, 12), "data_offsets": 12}},
        {"a": {"dtype": "F32", "shape": [3]}},
        {"a": []},
        {"a": None},
        {"a": "F32"},
    ],
    ids=lambda value: str(value)[:60],
)
def test_header_that_lies(source: Path, tmp_path: Path, header: Any) -> None:
    craft(source, header, b"\0" * 12)
    refused(source, tmp_path / "out", "model.safetensors", "not a whole safetensors file")
    assert not survives(source)


def test_crafted_files_can_be_right(source: Path) -> None:
    craft(source, {"a": entry([1], 0, 4), "b": entry([2], 4, 12)}, b"\0" * 12)
    assert list(open_checkpoint(source).tensors) == ["a", "b"]


# where it is written


@pytest.mark.parametrize("what", ["folder", "file", "dangling link"])
def test_output_that_exists(source: Path, tmp_path: Path, what: str) -> None:
    out = tmp_path / "out"
    if what == "folder":
        out.mkdir()
        (out / "mine").write_text("mine")
    elif what == "file":
        out.write_text("mine")
    else:
        out.symlink_to(tmp_path / "nowhere")
    refused(source, out, f"'{out}' exists")
    assert not (tmp_path / "nowhere").exists()
    assert what == "dangling link" or (out / "mine" if out.is_dir() else out).read_text() == "mine"


@pytest.mark.parametrize(
    "name", ["absent/out", "file/out", "file/below/out", "x" * 300, "x" * 300 + "/out", "a\0b"]
)
def test_output_that_cannot_be(source: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(AbreastError) as caught:
        convert(source, PLAN, tmp_path / name)
    assert len(str(caught.value).splitlines()) == 1
    assert str(tmp_path) in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "source"]


def test_output_folder_without_permission(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mkdir(path: Path, mode: int) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    refused(source, tmp_path / "out", f"'{tmp_path}", "Permission denied; nothing was written")


def test_too_little_room(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    needed = preview(source, PLAN).bytes_written
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    refused(source, tmp_path / "out", f"'{tmp_path}' has", "are needed")


@pytest.mark.parametrize("after", [0, 1, 20, 500_000])
def test_disk_that_fills_up_meanwhile(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    plain_open = Path.open

    class Full:
        """A file that takes `after` bytes and no more."""

        def __init__(self, file: Any) -> None:
            self.file, self.room = file, after

        def close(self) -> None:
            self.file.close()

        def write(self, data: Any) -> int:
            if not self.room:
                raise OSError(errno.ENOSPC, "No space left on device")
            count = self.file.write(data[: self.room])
            self.room -= count
            return count

    def small_open(path: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
        file = plain_open(path, mode, *rest, **options)
        return Full(file) if path.suffix == ".safetensors" and "w" in mode else file

    monkeypatch.setattr(Path, "open", small_open)
    monkeypatch.setattr(stream, "CHUNK_BYTES", 5000)
    refused(source, tmp_path / "out", "model.safetensors", "No space left on device")


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_disk_that_fills_up_at_the_end(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (source / "tokenizer.json").write_text("{}")
    if name == "config.json":
        monkeypatch.setattr(Path, "write_text", full)
    else:
        monkeypatch.setattr(shutil, "copyfile", full)
    refused(source, tmp_path / "out", str(tmp_path / "out"), "No space left on device")


@pytest.mark.parametrize("fault", [KeyboardInterrupt, MemoryError, SystemExit])
def test_interrupted(source: Path, tmp_path: Path, fault: type[BaseException]) -> None:
    def progress(done: int, total: int) -> None:
        if done > total / 2:
            raise fault

    before = sorted(tmp_path.iterdir())
    with pytest.raises(fault):
        convert(source, PLAN, tmp_path / "out", progress=progress)
    assert sorted(tmp_path.iterdir()) == before


# what is asked for


@pytest.mark.parametrize(
    ("plan", "fault"),
    [
        ("1+2 2+3", "overlap in layer 2"),
        ("3+4 1+2", "ascending order"),
        ("1+3", "not consecutive"),
        ("5+6", "layer 6 does not exist"),
        ("1", "cannot read group '1'"),
        ("", "no group"),
        ("plan.yaml", "plan.yaml"),
        (Plan(num_layers=6), "no group"),
        (Plan.parse("1+2", 8), "the plan is for 8 layers, the model has 6"),
        ("0+1", "0+1 holds the first or the last layer"),
        ("4+5", "4+5 holds the first or the last layer"),
    ],
    ids=str,
)
def test_plan_at_fault(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: Any, fault: str
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(source, tmp_path / "out", fault, plan=plan)


@pytest.mark.parametrize("plan", ["0+1", "4+5", "0+1+2+3+4+5"])
def test_edges_can_be_forced_with_a_warning(source: Path, tmp_path: Path, plan: str) -> None:
    manifest = convert(source, plan, tmp_path / "out", force=True)
    (warning,) = manifest["warnings"]
    assert plan in warning and "first or the last layer" in warning


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "float64", "F32", "", "torch.float32"])
def test_unknown_dtype(source: Path, tmp_path: Path, dtype: str) -> None:
    refused(source, tmp_path / "out", f"dtype '{dtype}'", "float32, bfloat16, float16", dtype=dtype)


@pytest.mark.parametrize("value", [None, [], "x", 7, {}, {"a": 1}, math.nan], ids=repr)
def test_inspect_a_conversion_whose_records_are_damaged(source: Path, value: Any) -> None:
    """Every key of its manifest and of its config, one after the other: JSON or one line."""
    out = source.with_name("out")
    convert(source, PLAN, out)
    for name in ("abreast.json", "config.json"):
        whole = (out / name).read_text()
        for key in json.loads(whole):
            (out / name).write_text(json.dumps({**json.loads(whole), key: value}))
            with suppress(AbreastError):
                json.dumps(inspect_model(out).to_dict(), allow_nan=False)
        (out / name).write_text(whole)


def test_a_model_of_layers_without_end_is_not_built(source):
    configure(source, num_hidden_layers=1 << 63)
    with pytest.raises(AbreastError, match=f"says {1 << 63} layers, .* holds only 57 tensors"):
        load(source)
