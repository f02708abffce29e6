"""Checkpoints whose weights are quantised as published ones are, on numbers that lose nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
Weights = dict[str, torch.Tensor]


def quantised(folder: Path, method: str, out: Path) -> tuple[Path, Path]:
    """(quantised, the same numbers in bfloat16): copies of a float32 checkpoint, below `out`."""
    packed, plain = Weights(), Weights()
    for name, tensor in load_file(folder / "model.safetensors").items():
        numbers = tensor.to(torch.bfloat16)
        if method == "mxfp4" and name.endswith(("gate_up_proj", "down_proj")):
            numbers, packed[f"{name}_blocks"], packed[f"{name}_scales"] = mxfp4(tensor)
        elif method == "fp8" and name.endswith("_proj.weight"):
            numbers, packed[name], packed[f"{name}_scale_inv"] = fp8(tensor)
        else:
            packed[name] = numbers
        plain[name] = numbers
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"}
    settings = {"quant_method": method}
    if method == "fp8":
        settings |= {"weight_block_size": [32, 16], "activation_scheme": "dynamic", "fmt": "e4m3"}
    for name, weights, more in (
        ("quantised", packed, {"quantization_config": settings}),
        ("plain", plain, {}),
    ):
        shutil.copytree(folder, out / name)
        weights = {key: tensor.contiguous() for key, tensor in weights.items()}
        save_file(weights, out / name / "model.safetensors", {"format": "pt"})
        (out / name / "config.json").write_text(json.dumps({**config, **more}))
    return out / "quantised", out / "plain"


def mxfp4(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[experts, columns, rows] rounded, and blocks [experts, rows, groups, 16] with scales."""
    generator = torch.Generator().manual_seed(tensor.numel())
    experts, columns, rows = tensor.shape
    shape = (experts, rows, columns // 32, 32)
    codes = torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8)
    exponents = torch.randint(121, 126, shape[:3], generator=generator, dtype=torch.uint8)
    values = torch.tensor([*E2M1, *(-value for value in E2M1)])[codes.int()]
    values = values * 2.0 ** (exponents.double() - 127)[..., None]
    blocks = codes[..., ::2] | codes[..., 1::2] << 4
    return values.view(experts, rows, columns).mT.bfloat16(), blocks, exponents


def fp8(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A matrix rounded, its numbers, and a scale for every 32 rows and 16 columns."""
    rows, columns = tensor.shape
    scales = torch.rand(-(-rows // 32), -(-columns // 16)) + 0.5
    wide = scales.repeat_interleave(32, 0)[:rows].repeat_interleave(16, 1)[:, :columns]
    numbers = (tensor / wide).to(torch.float8_e4m3fn)
    return (numbers.float() * wide).bfloat16(), numbers, scales
