"""Text as two real models read it, against a plain loop of transformers."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from abreast.data import load_tokens
from abreast.evaluate import perplexity
from abreast.model import load

WINDOWS, WINDOW = 8, 256
TEXT = Path(os.environ.get("ABREAST_REAL_TEXT") or argparse.__file__)  # any text of 10 KB will do


@pytest.mark.parametrize(("name", "begins"), [("smollm2", []), ("gemma3", [2])])
def test_loss_is_that_of_a_plain_loop(name: str, begins: list[int], request) -> None:
    folder = request.getfixturevalue(name)
    ids = AutoTokenizer.from_pretrained(folder)(TEXT.read_text("utf-8"))["input_ids"]
    assert ids[: len(begins)] == begins
    text = ids[len(begins) :]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    step, losses = WINDOW - len(begins), []
    for start in range(0, WINDOWS * step, step):
        window = torch.tensor([begins + text[start : start + step]])
        with torch.no_grad():
            losses.append(float(model(input_ids=window, labels=window).loss))
    del model
    ours, tokenizer = load(folder, dtype="float32")
    stream = load_tokens(tokenizer, str(TEXT), max_tokens=WINDOWS * step)
    result = perplexity(ours, stream, window=WINDOW, stride=WINDOW)
    assert result.num_tokens == WINDOWS * (WINDOW - 1)
    assert result.nll == pytest.approx(sum(losses) / WINDOWS, abs=1e-5)
    if begins:  # without its first token it predicts far worse, and must not be measured so
        plain = load_tokens(tokenizer, str(TEXT), max_tokens=2 * WINDOW, add_bos=False)
        without = perplexity(ours, plain, window=WINDOW, stride=WINDOW)
        assert without.nll > sum(losses[:2]) / 2 + 0.3
