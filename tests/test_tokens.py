"""What is written reads text as the original does: the same ids, whoever loads it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from made_tokenizers import KINDS, WORDS, chats, made, save
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from abreast.checkpoint import hash_entry
from abreast.cli.main import cli
from abreast.convert.rewrite import convert
from abreast.convert.verification import verify
from abreast.data import TRICKY, check_tokenizers, tricky_texts
from abreast.errors import AbreastError
from abreast.model.grouping import load_tokenizer

# Families in which transformers does not take the class that tokenizer_config.json names, and some
# in which it does.
FAMILIES = (
    *("llama", "mistral", "phi3", "granite", "nemotron", "ernie4_5", "ministral", "qwen2"),
    *("gemma3_text", "starcoder2"),
)
CASES = [
    *((family, "prepended space", {"tokenizer_class": "LlamaTokenizer"}) for family in FAMILIES),
    *((family, "prepended space", {}) for family in ("mistral", "gemma3_text", "qwen2")),
    *(("llama", kind, {}) for kind in KINDS),
    ("llama", "no prepended space", {"tokenizer_class": "GemmaTokenizer"}),
    ("gemma3_text", "no prepended space", {"tokenizer_class": None}),
    ("mistral", "gpt-2", {"tokenizer_class": "LlamaTokenizer"}),
    ("phi3", "llama 3", {"tokenizer_class": "GPT2Tokenizer"}),
    ("qwen2", "qwen", {"tokenizer_class": "Qwen2Tokenizer"}),
    ("mistral", "llama 3", {"fix_mistral_regex": True}),
]
READ = """
import json, sys
from transformers import AutoTokenizer
answers = []
for trust in (False, True):
    ids = {}
    for folder, texts in json.load(open(sys.argv[1])).items():
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
        ids[folder] = tokenizer(texts)["input_ids"], tokenizer.padding_side
    answers.append(ids)
print(json.dumps(answers))
"""


def original(tiny_checkpoint: Any, folder: Path, family: str, kind: str, **settings: Any) -> Path:
    shutil.copytree(tiny_checkpoint(family, vocab_size=WORDS, num_layers=3), folder)
    if "fix_mistral_regex" in settings:
        edit(folder / "config.json", transformers_version="4.40.0")
    return save(kind, folder, **settings)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.slow
def test_conversions_read_as_their_originals_do(tiny_checkpoint, tmp_path):
    """In a process that knows nothing of abreast, without remote code and with it."""
    expected, texts = {}, {}
    for number, (family, kind, settings) in enumerate(CASES):
        source = original(tiny_checkpoint, tmp_path / f"{number}", family, kind, **settings)
        out = str(tmp_path / f"{number}-converted")
        convert(source, "0+1", out, force=True)
        tokenizer = AutoTokenizer.from_pretrained(source)
        texts[out] = [*tricky_texts(tokenizer), *chats(tokenizer)]
        expected[out] = [tokenizer(texts[out])["input_ids"], tokenizer.padding_side]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path / "texts.json")],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [expected, expected]


@pytest.mark.parametrize("family", ["mistral", "llama"])
def test_class_and_file_that_disagree(tiny_checkpoint, tmp_path, family):
    """LlamaTokenizer builds a tokenizer of its own; for mistral, transformers does not take it."""
    settings = {"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": {}}
    source = original(tiny_checkpoint, tmp_path / "a", family, "prepended space", **settings)
    convert(source, "0+1", tmp_path / "out", force=True)
    ours, theirs = (load_tokenizer(folder) for folder in (tmp_path / "out", source))
    assert ours(list(TRICKY))["input_ids"] == theirs(list(TRICKY))["input_ids"]
    assert ours.padding_side == theirs.padding_side
    # the file says which one it is to those who read nothing else
    alone = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert [e.ids for e in alone.encode_batch(TRICKY)] == theirs(list(TRICKY))["input_ids"]
    assert verify(tmp_path / "out", source).ok


def test_models_that_read_differently_are_not_compared(tiny_checkpoint, tmp_path):
    source = original(tiny_checkpoint, tmp_path / "a", "llama", "prepended space")
    convert(source, "0+1", tmp_path / "out", force=True)
    # As older versions wrote it: the same vocabulary, another reading.
    path = tmp_path / "out" / "tokenizer.json"
    edit(path, normalizer=json.loads(made("no prepended space"))["normalizer"])
    manifest = tmp_path / "out" / "abreast.json"
    record = json.loads(manifest.read_text())
    record["files"]["tokenizer.json"] = hash_entry(path)
    manifest.write_text(json.dumps(record))
    for command in ("eval", "verify"):
        words = [command, str(tmp_path / "out"), "--against", str(source)]
        error = CliRunner().invoke(cli, words).exception
        assert isinstance(error, AbreastError)
        assert "read ' ' as different tokens" in str(error)
        assert "\n" not in str(error)


def test_tokenizers_must_share_their_vocabulary_and_marks(tmp_path):
    def tokenizer(*tokens: Any) -> Any:
        base = Tokenizer.from_str(made("gpt-2"))
        base.add_tokens(list(tokens))
        return PreTrainedTokenizerFast(tokenizer_object=base)

    check_tokenizers(tokenizer("<a>", "<b>"), tokenizer("<a>", "<b>"))
    with pytest.raises(AbreastError, match="4 entries differ"):
        check_tokenizers(tokenizer("<a>", "<b>"), tokenizer("<b>", "<a>"))
    for mark in ("lstrip", "rstrip", "single_word"):
        with pytest.raises(AbreastError, match="read 'x<b>y <b> "):
            check_tokenizers(tokenizer("<b>"), tokenizer(AddedToken("<b>", **{mark: True})))


def test_tokenizer_that_cannot_be_loaded_is_refused(tiny_checkpoint, tmp_path):
    source = original(tiny_checkpoint, tmp_path / "a", "llama", "gpt-2")
    (source / "tokenizer.json").write_text("{}")
    with pytest.raises(AbreastError, match="cannot be loaded"):
        convert(source, "0+1", tmp_path / "out", force=True)
    assert not (tmp_path / "out").exists()
