"""Every number of a conversion is proven: whatever is changed in it, `verify` names the tensor."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from abreast.checkpoint.loaded import as_loaded
from abreast.checkpoint.tensors import TensorInfo, open_checkpoint, read_rows
from abreast.convert.refold import Refold
from abreast.convert.rewrite import convert
from abreast.families.table import CONVERTIBLE, family_of
from abreast.plan import Plan

DEMO = Path(str(resources.files("abreast") / "demo_model"))
GROUPS = "5+6 9|10"  # stages 5 and 8 of the conversion
Change = Callable[[str, torch.Tensor], torch.Tensor]


def refold_of(out: Path, original: Path, plan: str) -> Refold:
    source = open_checkpoint(original)
    family = family_of(source.config)
    source = as_loaded(source, family)
    parsed = Plan.parse(plan, source.config["num_hidden_layers"])
    return Refold(open_checkpoint(out), source, family, parsed)


def write(tensor: TensorInfo, values: torch.Tensor) -> None:
    with tensor.file.open("r+b") as file:
        file.seek(tensor.offset)
        file.write(values.contiguous().view(-1).view(torch.uint8).numpy().tobytes())


def spoilt(refold: Refold, change: Change) -> set[str]:
    """Apply a change to every tensor of the conversion; return the names of those it changed."""
    names = set()
    for name, tensor in refold.made.tensors.items():
        old = read_rows(tensor)
        new = change(name, old.clone())
        assert (new.shape, new.dtype) == (old.shape, old.dtype)
        if not torch.equal(old, new):
            names.add(name)
            write(tensor, new)
    return names


def accused(refold: Refold) -> set[str]:
    return {fault.split("'")[1] for fault in refold.faults()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Refold, bytes]:
    """A conversion of the bundled model, and the content of its weights' file."""
    out = tmp_path_factory.mktemp("trained") / "out"
    convert(DEMO, GROUPS, out)
    refold = refold_of(out, DEMO, GROUPS)
    assert list(refold.misfits()) == list(refold.faults()) == []
    return refold, (out / "model.safetensors").read_bytes()


def of_members(name: str, tensor: torch.Tensor) -> bool:
    return name.startswith(("model.layers.5.", "model.layers.8.")) and tensor.dim() == 2


def one_bit(name: str, tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(-1).view(torch.int16)[-1] ^= 1
    return tensor


def one_row(name: str, tensor: torch.Tensor) -> torch.Tensor:
    tensor[-1] = tensor[0]
    return tensor


def members_swapped(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if not of_members(name, tensor):
        return tensor
    side = 1 if tensor.shape[1] > 192 else 0  # o and down, where they are joined
    return torch.cat(tensor.chunk(2, side)[::-1], side)


def heads_permuted(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if ".self_attn." not in name:
        return tensor
    side = 1 if name.endswith("o_proj.weight") else 0
    first, second, *rest = tensor.split(48, side)
    return torch.cat([second, first, *rest], side)


def norms_mixed_up(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The first member's columns folded with the second one's norm."""
    readers = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    if not of_members(name, tensor) or not name.split(".")[-2].endswith(readers):
        return tensor
    source = open_checkpoint(DEMO).tensors
    layer = 5 if name.startswith("model.layers.5.") else 9
    norm = "post_attention_layernorm" if ".mlp." in name else "input_layernorm"
    short = name.split(".", 3)[3]
    weight = read_rows(source[f"model.layers.{layer}.{short}"]).float()
    gain = read_rows(source[f"model.layers.{layer + 1}.{norm}.weight"]).float()
    tensor[: len(weight)] = (weight * gain).to(tensor.dtype)
    return tensor


@pytest.mark.parametrize(
    ("change", "least"),
    # Every tensor; all but folded norms; 7 matrices of 2 groups; 4 of 14 layers; 5 of 2 groups.
    [
        (one_bit, 128),
        (one_row, 100),
        (members_swapped, 14),
        (heads_permuted, 56),
        (norms_mixed_up, 10),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_trained_weights(trained: tuple[Refold, bytes], change: Change, least: int) -> None:
    refold, content = trained
    refold.made.tensors["model.norm.weight"].file.write_bytes(content)
    names = spoilt(refold, change)
    assert len(names) >= least
    assert accused(refold) == names


KINDS: dict[str, dict[str, Any]] = {
    "llama": {"biases": True},
    "qwen2": {},
    "phi3": {},
    "gemma3_text": {"layer_types": ["full_attention"] * 6},
    "olmo2": {},
    "cohere": {"use_qk_norm": True},
    "phi": {},
    "starcoder2": {},
    "nemotron": {},
    "qwen2_moe": {},
    "gpt_oss": {"layer_types": ["full_attention"] * 6},
    "ernie4_5_moe": {},
}


@pytest.mark.parametrize("plan", ["1+2+3", "1|2 3|4:1", "1~2 3+4"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", KINDS)
def test_every_kind_of_tensor(tiny_checkpoint, tmp_path, family, stored, plan) -> None:
    if "~" in plan and CONVERTIBLE[family].parallel:
        plan = plan.replace("~", "+")
    original, out = tiny_checkpoint(family, dtype=stored, **KINDS[family]), tmp_path / "out"
    cast = "float16" if plan == "1+2+3" and stored == "float32" else None
    convert(original, plan, out, dtype=cast)
    refold = refold_of(out, original, plan)
    assert list(refold.misfits()) == list(refold.faults()) == []

    def one_number(name: str, tensor: torch.Tensor) -> torch.Tensor:
        flat = tensor.view(-1)
        flat[0] = torch.nextafter(flat[0], flat[0] * 0 - 9) if tensor.itemsize == 4 else flat[0] - 1
        return tensor

    assert spoilt(refold, one_number) == set(refold.made.tensors) == accused(refold)


@pytest.mark.parametrize("family", ["gemma3_text", "olmo2", "phi3"])
def test_members_that_change_places(tiny_checkpoint, tmp_path, family) -> None:
    original, out = tiny_checkpoint(family, **KINDS[family]), tmp_path / "out"
    convert(original, "1+2", out)
    refold = refold_of(out, original, "1+2")

    def swapped(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat(tensor.chunk(2)[::-1]) if name.startswith("model.layers.1.") else tensor

    names = spoilt(refold, swapped)
    assert len(names) >= 4
    assert accused(refold) == names


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_rounding_is_torchs(dtype: str) -> None:
    """Every bit pattern of half precision, the middle between each two, and what is beside it."""
    from abreast.convert.numbers import rounded, widened

    kind = {"BF16": torch.bfloat16, "F16": torch.float16}[dtype]
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(kind)
    halves = halves[halves.isfinite()]
    exact = widened(halves.view(torch.int16).numpy().view(np.uint16), dtype)
    assert np.array_equal(exact, halves.float().numpy())
    upwards = torch.sort(halves.float().double()).values
    middle = ((upwards[1:] + upwards[:-1]) / 2).float()
    for values in (middle, torch.nextafter(middle, middle + 9), torch.nextafter(middle, -middle)):
        made = rounded(values.numpy(), dtype)
        assert np.array_equal(made.view(np.int16), values.to(kind).view(torch.int16).numpy())
