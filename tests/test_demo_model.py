"""The bundled model: complete, small, loadable, and a language model of what it has not seen."""

from __future__ import annotations

import json
import math
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from abreast.data import CALIBRATION, HELD_OUT, load_tokens

FOLDER = Path(str(resources.files("abreast") / "demo_model"))
CONFIG = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
WINDOW = min(1024, CONFIG["max_position_embeddings"])


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def windows(tokenizer: Any, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets, spread over all held-out modules: their difficulty varies widely."""
    stream = load_tokens(tokenizer, HELD_OUT).tokens
    last = (len(stream) - 1) // WINDOW - 1
    starts = WINDOW * np.linspace(0, last, num_tokens // WINDOW).astype(int)
    rows = stream[starts[:, None] + np.arange(WINDOW + 1)]
    return rows[:, :-1], rows[:, 1:]


@torch.no_grad()
def loss(model: Any, inputs: np.ndarray, targets: np.ndarray) -> float:
    """Mean negative log-likelihood of the targets, nats."""
    logits = model(torch.from_numpy(inputs), use_cache=False).logits.flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, torch.from_numpy(targets).flatten()).item()


def bigram_loss(stream: np.ndarray, inputs: np.ndarray, targets: np.ndarray) -> float:
    """The same of an add-alpha bigram counted on `stream`, with the best of many alphas.

    The pseudo-counts are spread as the unigram, which is far better than spreading them evenly.
    """
    size = CONFIG["vocab_size"]
    unigram = np.bincount(stream, minlength=size) + 1.0
    unigram /= unigram.sum()
    pairs = np.bincount(stream[:-1] * size + stream[1:], minlength=size * size)
    seen = np.bincount(stream[:-1], minlength=size)[inputs]
    count = pairs[inputs * size + targets]
    return min(
        -float(np.log((count + alpha * unigram[targets]) / (seen + alpha)).mean())
        for alpha in (1, 3, 10, 30, 100, 300, 1000)
    )


def test_folder_is_complete_and_small() -> None:
    names = {file.name for file in FOLDER.iterdir()}
    assert names >= {
        "README.md",
        "config.json",
        "generation_config.json",
        "loss.png",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.log",
    }
    assert sum(file.stat().st_size for file in FOLDER.iterdir() if file.is_file()) <= 40_000_000
    assert (FOLDER / "loss.png").stat().st_size < 60_000


def test_card_has_a_licence_and_says_what_the_model_is() -> None:
    yaml = pytest.importorskip("yaml")
    _, front, text = (FOLDER / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    fields = yaml.safe_load(front)
    assert fields["license"] == "apache-2.0"
    assert fields["library_name"] == "transformers"
    assert f"windows of {WINDOW} tokens" in text


def test_shape_and_dtype() -> None:
    from safetensors import safe_open

    assert CONFIG["architectures"] == ["LlamaForCausalLM"]
    assert CONFIG["num_hidden_layers"] >= 16
    assert CONFIG["dtype"] == "bfloat16"
    assert CONFIG["vocab_size"] == 4096
    with safe_open(FOLDER / "model.safetensors", framework="pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118


def test_weights_are_all_used_and_all_there() -> None:
    from transformers import AutoModelForCausalLM

    _, report = AutoModelForCausalLM.from_pretrained(FOLDER, output_loading_info=True)
    assert not any(report.values()), report


def test_tokenizer_round_trips_and_marks_the_end_of_text(tokenizer: Any) -> None:
    assert len(tokenizer) == CONFIG["vocab_size"]
    assert tokenizer.eos_token_id == CONFIG["eos_token_id"] == 0
    text = "def f(x):\n\treturn {'é': x ** 2}  # ∑\r\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.slow
def test_held_out_perplexity_is_five_times_below_a_bigrams(model: Any, tokenizer: Any) -> None:
    inputs, targets = windows(tokenizer, 8192)
    counted = load_tokens(tokenizer, CALIBRATION, max_tokens=600_000)
    assert counted.num_bytes > 1_500_000
    ours = loss(model, inputs, targets)
    assert math.exp(ours) < 20
    assert math.exp(bigram_loss(counted.tokens, inputs, targets) - ours) > 5
