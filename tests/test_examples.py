"""The programs in examples/ run, on a model with the bundled tokenizer that is quick to measure."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from abreast.demo import model_folder

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def small_model(tiny_checkpoint, tmp_path: Path) -> Path:
    plain = tiny_checkpoint(num_layers=6, vocab_size=4096, tied=True, hidden_size=32)
    folder = tmp_path / "model"
    shutil.copytree(plain, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_folder() / name, folder)
    return folder


def run_example(name: str, *arguments: object) -> None:
    words = [str(EXAMPLES / name), *map(str, arguments)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        runpy.run_path(words[0], run_name="__main__")


@pytest.mark.slow
def test_plan_and_convert(small_model: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "converted"
    run_example("plan_and_convert.py", small_model, "--depth", 5, "--windows", 8, "--out", out)
    assert json.loads((out / "abreast.json").read_text())["plan"]["groups"]
    printed = capsys.readouterr().out
    assert "expected KL" in printed and "held-out KL" in printed


@pytest.mark.slow
def test_custom_objective(small_model: Path, capsys) -> None:
    run_example("custom_objective.py", small_model, "--depth", 5, "--windows", 8)
    by_kl, cautious = capsys.readouterr().out.splitlines()
    assert by_kl.startswith("by KL: ") and cautious.startswith("by KL+2se: ")


@pytest.mark.slow
def test_one_gpu_3b(small_model: Path, tmp_path: Path, capsys) -> None:
    out, small = tmp_path / "shallow", ("--windows", 8, "--tokens", 4096, "--max-kl", 10)
    text = ("--data", "stdlib-train", "--device", "cpu")
    run_example("one_gpu_3b.py", small_model, *text, *small, "--out", out)
    assert json.loads((out / "abreast.json").read_text())["healed"]["method"] == "refit"
    printed = capsys.readouterr().out
    assert "same next token" in printed and printed.endswith(f"vllm serve {out}\n")


def test_every_example_has_a_test() -> None:
    served = EXAMPLES.parent / "tests/real_engines/test_transformers_serve.py"
    tests = Path(__file__).read_text() + served.read_text()
    assert [path.name for path in EXAMPLES.glob("*.py") if f'"{path.name}"' not in tests] == []
