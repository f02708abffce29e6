"""What `abreast import` takes a GGUF file for is what llama.cpp takes it for."""

from __future__ import annotations

import pytest
import torch
from llamacpp_server import post, serve
from made_gguf import CASES, write_file
from test_llamacpp import ask

from abreast.data import TRICKY
from abreast.demo import model_folder
from abreast.engines.llamacpp.tokenizer import SPLITS, make_tokenizer
from abreast.engines.llamacpp.vocabulary import read_vocabulary
from abreast.model import load


@pytest.mark.parametrize("case", CASES)
def test_files_of_every_architecture_say_what_their_originals_say(case, tiny_checkpoint, tmp_path):
    """tests/engines/test_import.py has them imported and compared with the same originals."""
    architecture, family, settings = CASES[case]
    original = tiny_checkpoint(family, num_layers=6, **settings)
    file = write_file(tmp_path / "model.gguf", architecture, original)
    model, _ = load(original, dtype="float32")
    server, prompt = serve(file), [97, 5, 17, 80, 41, 3, 66, 12, 9, 30]
    for length in (1, 4, 10):
        best = ask(server, prompt[:length], 1, 10)[0]["top_logprobs"]
        with torch.inference_mode():
            logprobs = model(torch.tensor([prompt[:length]])).logits[0, -1].log_softmax(-1)
        worst = max(abs(logprobs[entry["id"]].item() - entry["logprob"]) for entry in best)
        # llama.cpp looks GELU up in a table of float16, which these random layers amplify
        assert worst < (2e-2 if architecture.startswith("gemma") else 1e-3)


@pytest.mark.parametrize("pre", SPLITS)
def test_text_is_split_as_in_llamacpp(pre, tiny_checkpoint, tmp_path):
    reported = {}
    own = read_vocabulary(model_folder(), 4096)

    def bundled(facts, tensors):
        facts.update(
            {
                "tokenizer.ggml.pre": pre,
                "tokenizer.ggml.tokens": list(own.tokens),
                "tokenizer.ggml.token_type": list(own.types),
                "tokenizer.ggml.merges": list(own.merges),
                "tokenizer.ggml.bos_token_id": 0,
                "tokenizer.ggml.eos_token_id": 0,
            }
        )
        facts.pop("tokenizer.ggml.add_bos_token")
        facts.pop("tokenizer.ggml.eot_token_id")
        reported.update(facts)

    file = write_file(tmp_path / "m.gguf", "llama", tiny_checkpoint(vocab_size=4096), bundled)
    tokenizer, server = make_tokenizer(reported, "m.gguf", 4096), serve(file)
    for text in TRICKY:
        request = {"content": text, "add_special": True, "parse_special": True}
        assert tokenizer(text)["input_ids"] == post(server, "/tokenize", request)["tokens"], text
