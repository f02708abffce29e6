"""Token ids of the real tokenizers: the originals', their conversions', their exports'."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import pytest
from made_tokenizers import chats

from abreast.convert.rewrite import convert
from abreast.data import check_tokenizers, tricky_texts
from abreast.engines.llamacpp.writer import export
from abreast.errors import AbreastError
from abreast.model.grouping import load_tokenizer


@pytest.fixture(scope="module")
def small(smollm2, gemma3, tiny_checkpoint, tmp_path_factory) -> dict[str, Path]:
    """A tiny llama with the tokenizer of each model."""
    folders = {}
    for model, size in ((smollm2, 49152), (gemma3, 262144)):
        folder = tmp_path_factory.mktemp("small") / model.name
        shutil.copytree(tiny_checkpoint(vocab_size=size, num_layers=3), folder)
        for path in model.glob("*token*"):
            shutil.copyfile(path, folder / path.name)
        for path in model.glob("chat_template*"):
            shutil.copyfile(path, folder / path.name)
        folders[model.name] = folder
    return folders


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_conversion_reads_the_same(small, smollm2, gemma3, tmp_path, name):
    convert(small[name], "0+1", tmp_path / "out", force=True)
    original = load_tokenizer({"smollm2": smollm2, "gemma3": gemma3}[name])
    check_tokenizers(load_tokenizer(tmp_path / "out"), original)


def test_export_of_smollm2_has_the_vocabulary_of_its_own_gguf(smollm2, gguf_files, tmp_path):
    export(smollm2, tmp_path / "model.gguf")
    ours, theirs = (
        {
            name: field.contents()
            for name, field in gguf.GGUFReader(path).fields.items()
            if name.startswith("tokenizer.")
        }
        for path in (tmp_path / "model.gguf", gguf_files["smollm2"])
    )
    assert not ours.pop("tokenizer.ggml.add_eos_token")
    assert ours == theirs


def test_export_of_gemma3_is_refused(gemma3, tmp_path):
    with pytest.raises(AbreastError, match=r"llama\.cpp") as caught:
        export(gemma3, tmp_path / "model.gguf")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_llama_cpp_reads_the_same(small, gguf_files, tmp_path, name):
    """The export, and the file that the model came from."""
    pytest.importorskip("xllamacpp", reason="llama.cpp is in .venv-gguf only")
    from llamacpp_server import post, serve

    export(small[name], tmp_path / "model.gguf")
    tokenizer = load_tokenizer(small[name])
    texts = [(text, True) for text in tricky_texts(tokenizer)[:400]]
    if tokenizer.chat_template:
        texts += [(text, False) for text in chats(tokenizer)]
    ids = [tokenizer(text, add_special_tokens=special)["input_ids"] for text, special in texts]
    for path in (tmp_path / "model.gguf", gguf_files[name]):
        server = serve(path)
        for (text, special), own in zip(texts, ids, strict=True):
            if path == gguf_files[name] and "▁" in text:
                continue  # there, Gemma's tokens of spaces are no marks in text
            request = {"content": text, "add_special": special, "parse_special": True}
            assert post(server, "/tokenize", request)["tokens"] == own, (path.name, text)
