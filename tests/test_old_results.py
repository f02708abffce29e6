"""What the flat package of November 2026 wrote still loads, verifies and resumes.

tests/old holds three conversions of tiny random models with their originals, and a run folder that
`abreast optimize` left, all written before the package was moved into chapters.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from abreast import load, verify
from abreast.cli.main import main
from abreast.plan import Plan

OLD = Path(__file__).with_name("old")
CHECKPOINTS = sorted(path.name for path in (OLD / "checkpoints").iterdir())
COMMAND = (
    "abreast optimize model -o out --depth 4 --data text.md --eval-data text.md "
    "--baseline-data text.md --windows 8 --window 64 --rounds 2 --max-tokens 2000 "
    "--dtype float32 --no-plots --no-report --json "
    "--max-group 2 --wirings lp --batch-size 16"  # what were the defaults
)
IDS = torch.arange(3, 43)[None]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_old_checkpoint_loads_and_verifies(name):
    folder = OLD / "checkpoints" / name
    assert verify(folder / "converted", folder / "original").ok


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_old_code_in_a_checkpoint_agrees_with_ours(name, tmp_path, monkeypatch):
    """Without abreast a checkpoint runs the modeling file that it carries."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = OLD / "checkpoints" / name / "converted"
    carried = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    ours, _ = load(folder)
    with torch.inference_mode():
        assert torch.equal(carried(IDS).logits, ours(IDS).logits)


def test_old_run_resumes_without_doing_anything_again(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    shutil.copytree(OLD / "run", run)
    front = run / "out" / "front.json"
    made = {path: path.read_bytes() for path in sorted((run / "out").rglob("*")) if path.is_file()}
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.chdir(run)
    monkeypatch.setattr(sys, "argv", COMMAND.split())
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    printed, said = capsys.readouterr()
    for work in ("convert", "verify", "compare", "time ", "continue"):
        assert f"abreast: {work}" not in said
    result = json.loads(printed)
    assert result["plan"] == json.loads(made[run / "out" / "results.json"])["plan"]
    rewritten = {"environment.json", "README.md", "why.md", "results.json"}
    more = {"front.json", "plan.yaml", "baselines.json"}  # than earlier versions wrote
    for path, content in made.items():
        assert path.name in rewritten | more or path.read_bytes() == content, path
    before, now = (json.loads(text) for text in (made[front], front.read_bytes()))
    assert all(
        any(row.items() <= again.items() for again in now["plans"]) for row in before["plans"]
    )
    plan = next((run / "out" / "plans").glob("*/plan.yaml"))
    assert Plan.load(plan).sha256 == now["identity"]["model"]
    assert set(made[plan].splitlines()) <= set(plan.read_bytes().splitlines())
