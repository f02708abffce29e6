"""What a model writes itself, in vLLM: the likeliest tokens are those that transformers writes."""

from __future__ import annotations

from typing import Any

import pytest

from abreast.demo import model_folder
from abreast.engines.vllm import Sampling, VllmFailure, writer
from abreast.model import load
from abreast.runs import own_text, token_stream

SIZE = {"max_tokens": 600, "window": 48, "seed": 0, "add_bos": None}


def test_it_is_what_transformers_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    folder, said = model_folder(), list[str]()
    model, tokenizer = load(folder, dtype="float32")
    monkeypatch.setattr(own_text, "NUCLEUS", 1e-6)
    monkeypatch.setattr(own_text, "is_native", lambda dtype, device: False)

    def written() -> list[int]:
        options: dict[str, Any] = {**SIZE, "author": lambda: model, "step": said.append}
        return token_stream("self", tokenizer, folder, **options).tokens.tolist()

    expected = written()
    assert "vLLM" not in " ".join(said)
    monkeypatch.setattr(own_text, "WORTH_VLLM", 1)
    monkeypatch.setattr(own_text, "VLLM_DEVICES", ("cpu",))
    assert written() == expected
    assert said[-1] == "the model writes its own text in vLLM"


def test_why_it_cannot_write_is_said() -> None:
    options = {"length": 32, "at_once": 8, "device": "cuda", "dtype": "float32"}
    with (
        writer(model_folder(), **options) as go_on,
        pytest.raises(VllmFailure, match=r"^vLLM cannot write: .*built for cpu, not for cuda$"),
    ):
        go_on([[1]], [Sampling(0, 8, 0, 0.95, (2,))])
