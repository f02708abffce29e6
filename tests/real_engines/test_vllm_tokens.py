"""vLLM treats conversions as their originals: the same ids, the same refusal of float16."""

from __future__ import annotations

import json
import shutil

import pytest
from made_tokenizers import KINDS, WORDS, chats, save

from abreast.convert.rewrite import convert
from abreast.data import tricky_texts
from abreast.demo import model_folder

CASES = {
    **{kind: ("llama", kind, {}) for kind in KINDS},
    "mistral": ("mistral", "prepended space", {"tokenizer_class": "LlamaTokenizer"}),
    "phi3": ("phi3", "prepended space", {"tokenizer_class": "LlamaTokenizerFast"}),
    "mistral regex": ("mistral", "llama 3", {"fix_mistral_regex": True}),
    "bundled": None,
}


@pytest.mark.parametrize("case", CASES)
def test_ids(tiny_checkpoint, tmp_path, case):
    from transformers import AutoTokenizer
    from vllm.tokenizers import get_tokenizer

    source = model_folder()
    if CASES[case] is not None:
        family, kind, settings = CASES[case]
        checkpoint = tiny_checkpoint(family, vocab_size=WORDS, num_layers=3)
        source = save(kind, shutil.copytree(checkpoint, tmp_path / "source"), **settings)
        config = json.loads((source / "config.json").read_text())
        config["transformers_version"] = "4.40.0"  # from when a regex was to be repaired
        (source / "config.json").write_text(json.dumps(config))
    convert(source, "0+1", tmp_path / "out", force=True)
    reference = AutoTokenizer.from_pretrained(source)
    texts = tricky_texts(reference)
    texts += list(chats(reference)) if reference.chat_template else []
    ids = reference(texts)["input_ids"]
    for folder in (source, tmp_path / "out"):
        tokenizer = get_tokenizer(str(folder))
        assert [tokenizer(text)["input_ids"] for text in texts] == ids


def test_float16_is_refused_as_for_the_original():
    import torch
    from vllm.config.model import _check_valid_dtype

    from abreast.engines.vllm import register

    register()
    for family in ("gemma2", "gemma3_text", "glm4"):
        for model_type in (family, f"abreast_{family}"):
            with pytest.raises(ValueError, match="does not support float16"):
                _check_valid_dtype(model_type, torch.float16)
    assert _check_valid_dtype("abreast_llama", torch.float16)
