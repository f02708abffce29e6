"""Conversions of real models: verify passes, and names every tensor in which a number changed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from abreast.convert import convert, inspect_model, verify


@pytest.mark.parametrize(("name", "plan"), [("smollm2", "8+9 10|11:1"), ("gemma3", "7+8 9|10:1")])
def test_verify(name: str, plan: str, request, tmp_path: Path) -> None:
    original, out = request.getfixturevalue(name), tmp_path / "out"
    assert inspect_model(original).warnings == ()
    convert(original, plan, out)
    result = verify(out, original, num_tokens=64, new_tokens=4)
    assert result.ok, result.faults
    assert max(result.uncached, result.cached) < result.tolerance < 1e-4
    path = out / "model.safetensors"
    weights = load_file(path)
    assert result.tensors == len(weights)
    group = f"model.layers.{plan.split('+')[0]}."
    spoilt = {n for n in weights if n.startswith(group)} | {"model.embed_tokens.weight"}
    for tensor in map(weights.get, sorted(spoilt)):
        tensor.view(-1).view(torch.int16)[tensor.numel() // 3] ^= 1  # the last bit of one number
    rows = weights[f"{group}self_attn.v_proj.weight"]
    rows[0], rows[1] = rows[1].clone(), rows[0].clone()
    save_file(weights, path, {"format": "pt"})
    manifest = json.loads((out / "abreast.json").read_text())
    manifest["files"][path.name]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (out / "abreast.json").write_text(json.dumps(manifest))
    faults = verify(out, original, num_tokens=16, new_tokens=2).faults
    assert {fault.split("'")[1] for fault in faults if fault.startswith("tensor")} == spoilt
