"""GGUF files become checkpoints that compute what the originals do, or are refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from made_gguf import CASES, ROWS, alphabet, pieces, write_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from abreast.checkpoint import open_checkpoint, read_rows
from abreast.cli.main import cli
from abreast.engines.llamacpp import import_gguf
from abreast.errors import AbreastError


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(2 * 40).reshape(2, 40) * 7 % ROWS
    with torch.inference_mode():
        return model(ids).logits


@pytest.mark.parametrize("case", CASES)
def test_imported_models_compute_what_the_originals_do(case, tiny_checkpoint, tmp_path):
    architecture, family, settings = CASES[case]
    original = tiny_checkpoint(family, num_layers=6, **settings)
    file = write_file(tmp_path / "model.gguf", architecture, original)
    record = import_gguf(file, tmp_path / "out")
    assert (record["family"], record["dtype"], record["quantized"]) == (family, "float32", False)
    expected, actual = logits(original), logits(tmp_path / "out")
    # gains minus one are rounded once
    assert (actual - expected).abs().max() <= 2e-5 * expected.abs().max()
    inspected = CliRunner().invoke(cli, ["inspect", str(tmp_path / "out")])
    assert inspected.exit_code == 0, inspected.output


def test_quantised_weights_become_bfloat16_and_the_user_is_told(tiny_checkpoint, tmp_path):
    original = tiny_checkpoint("llama")
    file = write_file(tmp_path / "m.gguf", "llama", original, kinds={"ffn": "Q8_0"})
    options = ["import", str(file), "-o", str(tmp_path / "out"), "--json"]
    before = CliRunner().invoke(cli, [*options, "--dry-run"])
    assert before.exit_code == 0 and not (tmp_path / "out").exists()
    done = CliRunner().invoke(cli, options)
    assert done.exit_code == 0 and done.stdout == before.stdout
    assert "quantised (Q8_0, F32)" in done.stderr and "not those before" in done.stderr
    record = json.loads(done.stdout)
    assert (record["dtype"], record["quantized"], record["chat_template"]) == (
        "bfloat16",
        True,
        True,
    )
    made = open_checkpoint(tmp_path / "out")
    assert {tensor.dtype for tensor in made.tensors.values()} == {"BF16"}
    assert made.nbytes == record["bytes"]
    assert "quantization_config" not in made.config
    gate = read_rows(made.tensors["model.layers.3.mlp.gate_proj.weight"])
    expected = read_rows(open_checkpoint(original).tensors["model.layers.3.mlp.gate_proj.weight"])
    stored = gguf.quantize(expected.numpy(), gguf.GGMLQuantizationType.Q8_0)
    values = gguf.dequantize(stored, gguf.GGMLQuantizationType.Q8_0)
    assert torch.equal(gate, torch.from_numpy(values).bfloat16())


def test_tokenizer_and_ends_of_generation_are_the_files(tiny_checkpoint, tmp_path):
    def two_templates(facts, tensors):
        facts["tokenizer.chat_template.tool_use"] = "tools"

    file = write_file(tmp_path / "m.gguf", "llama", tiny_checkpoint("llama"), two_templates)
    import_gguf(file, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    a, ab, space = (alphabet().index(token) for token in ("a", "ab", "\u0120"))
    assert tokenizer("aab a</s>")["input_ids"] == [97, a, ab, space, a, 98]
    assert tokenizer.decode([a, ab, space, a]) == "aab a"
    assert tokenizer.apply_chat_template([{"content": "hi"}], tokenize=False) == "hi"
    assert tokenizer.chat_template["tool_use"] == "tools"
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())[
        "eos_token_id"
    ] == [98, 99]


@pytest.mark.parametrize(("prefix", "bos"), [(True, None), (False, False)])
def test_sentencepiece_follows_the_scores(tiny_checkpoint, tmp_path, prefix, bos):
    def change(facts, tensors):
        pieces(facts, tensors)
        facts["tokenizer.ggml.add_space_prefix"] = prefix
        if bos is not None:
            facts["tokenizer.ggml.add_bos_token"] = bos

    file = write_file(tmp_path / "m.gguf", "llama", tiny_checkpoint("llama"), change)
    import_gguf(file, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    # "bc" is made before "ab", a piece of spaces is looked for first, 0x2F falls back to a byte
    spelled = [*(["<s>"] if bos is None else []), *(["\u2581a"] if prefix else ["a"]), "bc"]
    text = "abc  /"
    after = [*(["\u2581"] if prefix else []), "<0x2F>"]
    assert tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]) == [*spelled, "  ", *after]


def changed(key: str, value: Any) -> Any:
    return lambda facts, tensors: facts.update({key: value})


REFUSED: dict[str, tuple[Any, str]] = {
    "pieces": (changed("split.count", 3), "one of 3 pieces; join them first"),
    "no count of pieces": (changed("split.count", "two"), "one of two pieces"),
    "mmproj": (changed("general.type", "mmproj"), "holds no language model, it is of type mmproj"),
    "imatrix": (changed("general.type", "imatrix"), "of type imatrix"),
    "architecture": (changed("general.architecture", "rwkv6"), "architecture rwkv6, which cannot"),
    "clip": (changed("general.architecture", "clip"), "architecture clip, which cannot"),
    "vocabulary only": (lambda facts, tensors: tensors.clear(), "holds no language model"),
    "no embedding": (lambda f, t: t.pop("token_embd.weight"), "holds no language model"),
    "experts": (changed("llama.expert_count", 8), "says llama.expert_count = 8, not known here"),
    "longrope": (
        lambda f, t: f.update(
            {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 4.0}
        ),
        "RoPE scaling of kind longrope",
    ),
    "partial rotation": (changed("llama.rope.dimension_count", 8), "rotates 8 of 16 dimensions"),
    "other frequencies": (
        lambda f, t: t.update({"rope_freqs.weight": np.linspace(1, 9, 8, dtype=np.float32)}),
        "in another way than Llama 3 does",
    ),
    "uneven layers": (changed("llama.attention.head_count", [4, 4, 4, 4, 4, 2]), "different shape"),
    "a tensor more": (
        lambda f, t: t.update({"blk.0.attn_q_norm.weight": np.ones(16, np.float32)}),
        "'blk.0.attn_q_norm.weight'",
    ),
    "a tensor less": (
        lambda f, t: t.pop("blk.5.ffn_up.weight"),
        "'blk.5.ffn_up.weight' is missing",
    ),
    "another shape": (changed("llama.feed_forward_length", 100), "its metadata say"),
    "no size": (lambda f, t: f.pop("llama.embedding_length"), "no valid llama.embedding_length"),
    "no number": (changed("llama.attention.head_count_kv", "two"), "llama.attention.head_count_kv"),
    "no end of layers": (changed("llama.block_count", 65_535), "65535 layers, it holds only 57"),
    "a flat embedding": (
        lambda f, t: t.update({"token_embd.weight": t["token_embd.weight"].reshape(-1)}),
        "'token_embd.weight' in",
    ),
    "no epsilon": (
        lambda f, t: f.pop("llama.attention.layer_norm_rms_epsilon"),
        "no valid llama.attention.layer_norm_rms_epsilon",
    ),
    "splitting": (changed("tokenizer.ggml.pre", "default"), "splits text into words in a way"),
    "tokenizer": (changed("tokenizer.ggml.model", "bert"), "tokenizer of kind bert"),
    "merges": (changed("tokenizer.ggml.merges", ["a \u1234"]), "the tokenizer in"),
    "special token": (changed("tokenizer.ggml.bos_token_id", 500), "the tokenizer in"),
    "a panic": (changed("tokenizer.ggml.tokens", alphabet()[:70]), "the tokenizer in"),
    "end of a turn": (changed("tokenizer.ggml.eot_token_id", ""), "eot_token_id is no number"),
    "too many tokens": (
        lambda f, t: f.update({"tokenizer.ggml.tokens": [*alphabet(), "more"]}),
        "129 tokens, its embedding 128 rows",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_imported_is_refused_by_name(case, tiny_checkpoint, tmp_path):
    change, message = REFUSED[case]
    file = write_file(tmp_path / "m.gguf", "llama", tiny_checkpoint("llama"), change)
    for dry_run in (True, False):
        with pytest.raises(AbreastError) as error:
            import_gguf(file, tmp_path / "out", dry_run=dry_run)
        assert message in str(error.value) and "m.gguf" in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == {"m.gguf"}


def test_damaged_and_missing_files_are_refused(tiny_checkpoint, tmp_path):
    whole = write_file(tmp_path / "whole.gguf", "llama", tiny_checkpoint("llama"))
    data, bad, out = whole.read_bytes(), tmp_path / "bad.gguf", tmp_path / "out"
    damaged = [data[:length] for length in (0, 3, 5, 30, 400, 3000)]
    damaged += [b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60), data[:8] + b"\xff" * 40]
    for content in damaged:
        bad.write_bytes(content)
        with pytest.raises(AbreastError, match=r"bad\.gguf' is not a (whole )?GGUF file"):
            import_gguf(bad, out)
    bad.write_bytes(data[:-1000])
    with pytest.raises(AbreastError, match=r"ends before tensor '[a-z_.0-9]+' does"):
        import_gguf(bad, out)
    bad.write_bytes(b"GGUF" + struct.pack("<I", 1) + data[8:])
    with pytest.raises(AbreastError, match="of GGUF version 1"):
        import_gguf(bad, out)
    for model, message in (
        (tmp_path / "absent.gguf", "no file"),
        (tmp_path, "is a folder"),
        ("ORG/NAME", "no file"),
        ("ORG/NAME:model.gguf", "the Hugging Face Hub does not give"),
    ):
        with pytest.raises(AbreastError, match=message):
            import_gguf(model, out)
    with pytest.raises(AbreastError, match="dtype 'int8' is not one of"):
        import_gguf(whole, out, dtype="int8")
    assert not out.exists()
    out.mkdir()
    with pytest.raises(AbreastError, match="exists; name a new folder"):
        import_gguf(whole, out)
    assert list(out.iterdir()) == []
