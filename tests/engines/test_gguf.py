"""GGUF files read back; what cannot be written is refused. Running them: tests/engines."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from made_tokenizers import WORDS, save
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from abreast.checkpoint.tensors import open_checkpoint
from abreast.convert.rewrite import convert
from abreast.demo import model_folder
from abreast.engines.llamacpp import writer
from abreast.engines.llamacpp.deci import lay_out_gguf
from abreast.engines.llamacpp.vocabulary import BY_HASH, fingerprint, read_vocabulary
from abreast.engines.llamacpp.writer import KINDS, check_quantizer, export, quantize
from abreast.errors import AbreastError
from abreast.families.table import CONVERTIBLE
from abreast.plan import Plan


def save_tokenizer(folder: Path, **state: Any) -> Path:
    """The smallest byte-level tokenizer there is: 128 of the 256 bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:128]
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    data = {**json.loads(tokenizer.to_str()), **state}
    (folder / "tokenizer.json").write_text(json.dumps(data))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def tiny(tiny_checkpoint, tmp_path):
    """A copy of a tiny checkpoint with a tokenizer."""

    def make(family: str = "llama", plan: str = "", **options: Any) -> Path:
        source, folder = tiny_checkpoint(family, **options), tmp_path / "source"
        if plan:
            convert(source, plan, folder)
        else:
            shutil.copytree(source, folder)
        return save_tokenizer(folder)

    return make


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def test_metadata_and_shapes_of_a_converted_model(tiny, tmp_path):
    source = tiny(plan="1+2+3", head_dim=24, tied=True, biases=True, dtype="bfloat16")
    made = export(source, tmp_path / "model.gguf")
    fields, tensors = read(tmp_path / "model.gguf")
    expected = {
        "general.architecture": "deci",
        "general.file_type": 32,
        "abreast.plan": "1+2+3",
        "abreast.original_layers": 6,
        "deci.block_count": 4,
        "deci.attention.head_count": [4, 12, 4, 4],
        "deci.attention.head_count_kv": [2, 6, 2, 2],
        "deci.feed_forward_length": [96, 288, 96, 96],
        "deci.attention.key_length": 24,
        "deci.attention.value_length": 24,
        "deci.rope.dimension_count": 24,
        "deci.rope.freq_base": 10000.0,
        "deci.context_length": 512,
        "deci.embedding_length": 64,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ messages }}",
    }
    assert {name: fields[name] for name in expected} == expected
    assert len(fields["tokenizer.ggml.tokens"]) == 128
    assert (
        made["heads"] == [4, 12, 4, 4] and made["bytes"] == (tmp_path / "model.gguf").stat().st_size
    )
    shapes = {name: tuple(int(n) for n in tensor.shape) for name, tensor in tensors.items()}
    assert shapes["blk.1.attn_q.weight"] == (64, 12 * 24)
    assert shapes["blk.1.attn_k.bias"] == (6 * 24,)
    assert shapes["blk.1.attn_output.bias"] == (64,)
    assert shapes["blk.1.ffn_down.weight"] == (288, 64)
    assert "output.weight" not in tensors
    types = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert types["blk.1.attn_q.weight"] == "BF16" and types["blk.1.attn_q.bias"] == "F32"
    assert len(tensors) == 2 + 4 * (9 + 7)


def test_values_survive_and_heads_are_reordered(tiny, tmp_path, monkeypatch):
    source = tiny("seed_oss", plan="1+2", head_dim=16, biases=True)
    export(source, tmp_path / "model.gguf")
    _, tensors = read(tmp_path / "model.gguf")
    checkpoint = open_checkpoint(source)
    sources = {name: writer.read_rows(tensor) for name, tensor in checkpoint.tensors.items()}
    for piece in lay_out_gguf(checkpoint).pieces:
        got = torch.from_numpy(np.array(tensors[piece.name].data))
        expected = sources[piece.source][piece.start : piece.stop]
        if piece.head_dim:
            assert piece.name.split(".")[2] in ("attn_q", "attn_k")
            # dimensions 0, 8, 1, 9, ... of every head of 16
            order = torch.arange(16).view(2, 8).T.reshape(-1)
            expected = expected.view(-1, 16, *expected.shape[1:])[:, order].reshape(expected.shape)
        assert torch.equal(got, expected), piece.name
    monkeypatch.setattr(writer, "CHUNK_BYTES", 1000)  # a few rows at a time
    export(source, tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "model.gguf").read_bytes()


def test_packed_matrices_are_split(tiny, tmp_path):
    source = tiny("phi3", plan="1+2", sliding_window=None)
    export(source, tmp_path / "model.gguf")
    _, tensors = read(tmp_path / "model.gguf")
    packed = writer.read_rows(
        open_checkpoint(source).tensors["model.layers.1.self_attn.qkv_proj.weight"]
    )
    assert np.array_equal(tensors["blk.1.attn_v.weight"].data, packed[128 + 64 :].numpy())
    assert tuple(tensors["blk.1.ffn_up.weight"].shape) == (64, 192)


def test_granite_multipliers_fold_in(tiny, tmp_path):
    scales = {
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.25,
        "attention_multiplier": 0.125,
        "logits_scaling": 8.0,
    }
    source = tiny("granite", tied=True, **scales)
    export(source, tmp_path / "model.gguf")
    _, tensors = read(tmp_path / "model.gguf")
    sources = open_checkpoint(source).tensors
    embedding = writer.read_rows(sources["model.embed_tokens.weight"]).numpy()
    down = writer.read_rows(sources["model.layers.0.mlp.down_proj.weight"]).numpy()
    assert np.array_equal(tensors["token_embd.weight"].data, embedding * 12)
    assert np.array_equal(tensors["output.weight"].data, embedding / 8)
    assert np.array_equal(tensors["blk.0.ffn_down.weight"].data, down / 4)
    query = next(p for p in lay_out_gguf(open_checkpoint(source)).pieces if "attn_q" in p.name)
    assert query.scale == 0.125 * 16**0.5


def test_llama3_frequencies_are_those_of_transformers(tiny):
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    source = tiny(head_dim=32, rope_parameters=rope)
    factors = torch.tensor(lay_out_gguf(open_checkpoint(source)).rope_factors)
    own, _ = ROPE_INIT_FUNCTIONS["llama3"](AutoConfig.from_pretrained(source), "cpu")
    plain = 1.0 / 500.0 ** (torch.arange(0, 32, 2) / 32)
    assert len(set(factors.tolist())) > 3
    torch.testing.assert_close(plain / factors, own)


def test_old_keys_of_rope_are_read(tiny):
    source = tiny()
    edit(source, rope_parameters=None, rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2})
    layout = lay_out_gguf(open_checkpoint(source))
    assert layout.rope_theta == 5e5 and layout.rope == {"type": "linear", "factor": 2.0}


def test_a_sliding_window_shortens_the_context(tiny):
    source = tiny("mistral", sliding_window=100)
    layout = lay_out_gguf(open_checkpoint(source))
    assert layout.context == 100 and "100 tokens instead of 512" in layout.warnings[0]
    edit(source, sliding_window=None)
    assert lay_out_gguf(open_checkpoint(source)).context == 512


def test_a_name_tells_nothing_wrong(tiny, tmp_path, monkeypatch):
    """llama.cpp takes any model whose name holds phi-3 for one with Phi 3's tokenizer."""
    source = tiny().rename(tmp_path / "My-Phi-3-mini")
    export(source, tmp_path / "model.gguf")
    assert read(tmp_path / "model.gguf")[0]["general.name"] == "My-Phi 3-mini"
    monkeypatch.chdir(source.rename(tmp_path / "plain"))
    export(".", tmp_path / "again.gguf")
    assert read(tmp_path / "again.gguf")[0]["general.name"] == "plain"


def test_every_kind_of_quantisation_has_llama_cpps_number():
    assert all(f"MOSTLY_{kind}" in gguf.LlamaFileType.__members__ for kind in KINDS)


@pytest.mark.parametrize(
    "family", ["mixtral", "bert", *(name for name, row in CONVERTIBLE.items() if row.deci_lacks)]
)
def test_families_that_do_not_fit_are_refused(tiny, tmp_path, family):
    source = tiny()
    edit(source, model_type=family)
    with pytest.raises(AbreastError, match=rf"a {family} cannot be written for llama.cpp.*vLLM"):
        export(source, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_act": "gelu"}, "gated by gelu"),
        ({"partial_rotary_factor": 0.5}, "50% of every head"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "no RoPE scaling of kind longrope"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "of kind dynamic"),
        ({"rope_parameters": {**YARN, "beta_fast": 16}}, "of kind yarn with beta_fast"),
        ({"rope_parameters": {**YARN, "truncate": False}}, "of kind yarn with truncate"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_parameters makes no"),
        ({"rope_parameters": {**YARN, "factor": "four"}}, "rope_parameters makes no sense"),
        ({"rope_parameters": [1]}, "rope_parameters makes no sense"),
        ({"per_layer_config": {"one": {}}}, "per_layer_config makes no sense"),
        ({"per_layer_config": {"1": 5}}, "per_layer_config makes no sense"),
        ({"per_layer_config": {"1": {"num_attention_heads": 8}}}, "do not belong together"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised already"),
        ({"intermediate_size": 100}, "do not belong together"),
        ({"vocab_size": 130}, "do not belong together"),
        ({"num_hidden_layers": 5}, "does not belong to a llama of 5 layers"),
        ({"num_hidden_layers": 7}, "is missing"),
        ({"max_position_embeddings": None}, "max_position_embeddings"),
    ],
)
def test_configs_that_do_not_fit_are_refused(tiny, tmp_path, changes, said):
    source = tiny()
    edit(source, **changes)
    with pytest.raises(AbreastError, match=said):
        export(source, tmp_path / "model.gguf")
    assert os.listdir(tmp_path) == ["source"]


def test_wirings_that_are_no_stock_layer_are_refused(tiny_checkpoint, tmp_path):
    source = tiny_checkpoint()
    convert(source, "1+2 3|4", tmp_path / "cqil")
    with pytest.raises(AbreastError, match=r"cqil groups .*convert with an lp plan"):
        export(tmp_path / "cqil", tmp_path / "model.gguf")
    convert(source, Plan.parse("1+2", num_layers=6), tmp_path / "exact", prefill="sequential")
    with pytest.raises(AbreastError, match="convert without --prefill sequential"):
        export(tmp_path / "exact", tmp_path / "model.gguf")


def test_places_that_cannot_be_written_are_refused(tiny, tmp_path):
    source = tiny()
    with pytest.raises(AbreastError, match="exists; name a new file"):
        export(source, source / "config.json")
    with pytest.raises(AbreastError, match="exists; name a new file"):
        export(source, source)
    with pytest.raises(AbreastError, match="does not exist; create it first"):
        export(source, tmp_path / "nowhere" / "model.gguf")
    with pytest.raises(AbreastError, match="does not exist; create it first"):
        export(source, source / "config.json" / "model.gguf")
    with pytest.raises(AbreastError, match="dtype 'int8'"):
        export(source, tmp_path / "model.gguf", dtype="int8")
    if Path("/proc/self").is_dir():
        with pytest.raises(AbreastError, match=r"cannot write in|free"):
            export(source, "/proc/self/model.gguf")


def test_a_full_disk_leaves_nothing(tiny, tmp_path, monkeypatch):
    source = tiny()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 0))
    with pytest.raises(AbreastError, match=r"0.0 GB free, 0.1 GB are needed"):
        export(source, tmp_path / "model.gguf")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.undo()
    monkeypatch.setattr(writer, "read_rows", full)
    with pytest.raises(AbreastError, match="No space left on device; nothing was written"):
        export(source, tmp_path / "model.gguf")
    assert os.listdir(tmp_path) == ["source"]


def test_damaged_weights_are_found(tiny_checkpoint, tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    source = tiny()
    weights = load_file(source / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][5, 5] = 1e6
    save_file(weights, source / "model.safetensors")
    with pytest.raises(AbreastError, match=r"up_proj.weight' holds NaN or Inf, or exceeds"):
        export(source, tmp_path / "model.gguf", dtype="float16")
    assert os.listdir(tmp_path) == ["source"]
    export(source, tmp_path / "model.gguf", dtype="bfloat16")


def test_tokenizers_that_do_not_fit_are_refused(tiny, tmp_path):
    source = tiny()
    whole = json.loads((source / "tokenizer.json").read_text())
    for changes, said in (
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}, "kind WordLevel"),
        ({"model": {**whole["model"], "vocab": {"a": 200}}}, "token 200, the embedding only 128"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "splits text into words"),
        ({"pre_tokenizer": {**whole["pre_tokenizer"], "add_prefix_space": True}}, "splits text"),
        ({"normalizer": {"type": "Lowercase"}}, "splits text into words"),
        ({"model": {**whole["model"], "byte_fallback": True}}, "before it looks for pieces"),
    ):
        save_tokenizer(source, **changes)
        with pytest.raises(AbreastError, match=said):
            read_vocabulary(source, 128)
    (source / "tokenizer.json").write_text("{")
    with pytest.raises(AbreastError, match="cannot be loaded"):
        read_vocabulary(source, 128)
    (source / "tokenizer.json").unlink()
    with pytest.raises(AbreastError, match="has no tokenizer"):
        export(source, tmp_path / "model.gguf")


def drop_a_merge(folder: Path) -> None:
    path = folder / "tokenizer.json"
    state = json.loads(path.read_text())
    merges = state["model"]["merges"]
    state["model"]["merges"] = [pair for pair in merges if pair != ["▁th", "e"]]
    path.write_text(json.dumps(state))


@pytest.mark.parametrize(
    ("kind", "token", "named"),
    [
        ("qwen", AddedToken("<m>", lstrip=True), "token '<m>' (lstrip, normalized)"),
        ("gpt-2", AddedToken("<m>", rstrip=True, special=True), "token '<m>' (rstrip)"),
        ("llama 3", AddedToken("<m>", single_word=True), "token '<m>' (single_word, normalized)"),
        ("prepended space", AddedToken("<m>"), "token '<m>' (normalized)"),
        ("prepended space", None, "does not join all that make '▁the'"),
    ],
)
def test_what_llama_cpp_reads_otherwise_is_named(tmp_path, kind, token, named):
    save(kind, tmp_path, (lambda made: made.add_tokens([token])) if token else None)
    if token is None:
        drop_a_merge(tmp_path)
    with pytest.raises(AbreastError, match=re.escape(named)):
        read_vocabulary(tmp_path, WORDS)


def test_texts_of_tokens_differ(tmp_path):
    save("qwen", tmp_path, lambda made: made.add_tokens(["[PAD599]", "the"]))
    vocabulary = read_vocabulary(tmp_path, WORDS)
    assert len(set(vocabulary.tokens)) == WORDS
    assert vocabulary.tokens[-1] == "[PAD_599]"
    assert "NFC" in vocabulary.warnings[0]


def test_rows_without_a_token_are_filled(tiny):
    vocabulary = read_vocabulary(tiny(), 140)
    assert vocabulary.tokens[128:130] == ("[PAD128]", "[PAD129]")
    assert set(vocabulary.types[128:]) == {5} and set(vocabulary.types[:128]) == {1}


def test_a_known_tokenizer_is_recognised_by_its_hash(tiny, monkeypatch):
    from transformers import AutoTokenizer

    source = tiny()
    bytes_only = json.loads((source / "tokenizer.json").read_text())["pre_tokenizer"]
    monkeypatch.setitem(BY_HASH, fingerprint(AutoTokenizer.from_pretrained(source)), "smollm")
    assert read_vocabulary(source, 128).pre == "gpt-2"  # what its steps say
    digits = {"type": "Digits", "individual_digits": False}
    unknown = {"type": "Sequence", "pretokenizers": [digits, bytes_only]}
    save_tokenizer(source, pre_tokenizer=unknown)
    fingerprints = fingerprint(AutoTokenizer.from_pretrained(source))
    assert len(fingerprints) == 64
    monkeypatch.setitem(BY_HASH, fingerprints, "smollm")
    assert read_vocabulary(source, 128).pre == "smollm"


def program(folder: Path, text: str) -> None:
    path = folder / "llama-quantize"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_quantiser_is_looked_for_first(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(AbreastError, match="quantisation 'Q9' is not one of Q4_0, "):
        check_quantizer("Q9")
    with pytest.raises(AbreastError, match="pip install llama-cpp-python"):
        export(tmp_path / "absent", tmp_path / "model.gguf", quantization="Q8_0")


def test_quantiser_that_fails_leaves_nothing(tiny, tmp_path, monkeypatch):
    source, tools = tiny(), tmp_path / "tools"
    tools.mkdir()
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    program(tools, "echo hello; echo 'tensor is odd' >&2; exit 3")
    with pytest.raises(AbreastError, match="quantiser failed: tensor is odd"):
        export(source, tmp_path / "model.gguf", quantization="Q8_0")
    program(tools, "exit 0")
    with pytest.raises(AbreastError, match="quantiser failed: exit status 0"):
        quantize(source / "config.json", tmp_path / "model.gguf", "Q8_0")
    program(tools, 'cp "$1" "$2"; echo $3 >> "$2"')
    made = export(source, tmp_path / "model.gguf", quantization="Q8_0")
    assert made["quantization"] == "Q8_0"
    assert (tmp_path / "model.gguf").read_bytes().endswith(b"Q8_0\n")
    assert sorted(os.listdir(tmp_path)) == ["model.gguf", "model.gguf.Modelfile", "source", "tools"]


def test_ollama_gets_chatml_and_no_other_template():
    text = writer.ollama_modelfile("m.gguf", "{{ '<|im_start|>' }}")
    assert 'TEMPLATE """{{- range .Messages }}<|im_start|>{{ .Role }}\n' in text
    assert text.endswith('<|im_start|>assistant\n"""\nPARAMETER stop "<|im_end|>"\n')
    for other in (None, "[INST]"):
        assert writer.ollama_modelfile("m.gguf", other) == "FROM ./m.gguf\n"


def test_the_verb(tmp_path, monkeypatch, capsys):
    from click.testing import CliRunner

    from abreast.cli.main import cli

    out = tmp_path / "model.gguf"
    done = CliRunner().invoke(cli, ["export", str(model_folder()), "--gguf", str(out), "--json"])
    assert done.exit_code == 0
    printed = json.loads(done.stdout)
    assert printed["layers"] == 16 and printed["bytes"] == out.stat().st_size
    assert Path(printed["modelfile"]).read_text().startswith("FROM ./model.gguf\n")
    monkeypatch.setitem(sys.modules, "gguf", None)
    done = CliRunner().invoke(cli, ["export", str(model_folder()), "--gguf", f"{out}2"])
    assert isinstance(done.exception, AbreastError)
    assert re.search("-m pip install .*gguf", str(done.exception))
