"""On which device and in which dtype a model is loaded."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from abreast.checkpoint import DTYPES, Checkpoint, as_loaded, cannot_unpack
from abreast.errors import CheckpointError
from abreast.families import FAMILIES

# What a CPU calls its arithmetic in such a dtype; the last of each is ARM's.
_FEATURES = {
    torch.bfloat16: ("amx_bf16", "avx512_bf16", "bf16"),
    torch.float16: ("amx_fp16", "avx512_fp16", "fp16"),
}
_FLOAT32 = torch.float32.itemsize


def check_device(name: Any) -> None:
    """Raise CheckpointError unless there is this device here."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise CheckpointError(
            f"device '{name}' is unknown; use cpu, cuda, cuda:1 or auto"
        ) from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        kind = "CUDA device" if device.index is None else f"device '{name}'"
        raise CheckpointError(f"no {kind} here; use --device cpu")


def named_dtype(name: str) -> torch.dtype:
    """The floating-point dtype of this name. Raises AbreastError for any other name."""
    named = getattr(torch, name, None)
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise CheckpointError(f"dtype '{name}' is not one of float32, bfloat16, float16")
    return named


def loaded_dtype(checkpoint: Checkpoint, dtype: str) -> torch.dtype:
    """The dtype that `load` loads a model in; "auto" is what the config says, else the widest."""
    config = checkpoint.config
    named = config.get("dtype") or config.get("torch_dtype") if dtype == "auto" else dtype
    if isinstance(named, str) and named != "auto":  # which a config may say, too
        return named_dtype(named)
    return max((DTYPES[t.dtype] for t in checkpoint.tensors.values()), key=lambda d: d.itemsize)


def dequantised(settings: Any) -> Any:
    """What makes transformers load weights that are quantised so as plain numbers, None where
    they are not, or cannot be read by `convert` either."""
    if not settings or cannot_unpack(settings) is not None:
        return None
    import transformers

    kinds = {"mxfp4": transformers.Mxfp4Config, "fp8": transformers.FineGrainedFP8Config}
    return kinds[settings["quant_method"]](dequantize=True)


def as_converted(model: Any, checkpoint: Checkpoint) -> Any:
    """The model with those weights that were quantised rounded to bfloat16, as `convert` reads.

    A conversion, whose weights `convert` quantised itself, stays as transformers loads it.
    """
    if "abreast" in checkpoint.config:
        return model
    family = FAMILIES[checkpoint.config["model_type"]]
    tensors = as_loaded(checkpoint, family).tensors if family.matrices else {}
    for name, parameter in model.named_parameters():
        tensor = tensors.get(name)
        if tensor and any(part.block for part in (tensor, *tensor.parts)):
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


def fitting_dtype(
    checkpoint: Checkpoint,
    dtype: str,
    device: str,
    *,
    recorded: str | None = None,
    step: Callable[[str], None] = lambda message: None,
) -> str:
    """What to give `load`: `dtype`, where it is not "auto".

    "auto" becomes the checkpoint's dtype or, where that is emulated on the device, several times
    as slow, float32, if so much fits into memory; step is then told. recorded: the dtype of the run
    that goes on, which "auto" keeps.
    """
    if dtype != "auto":
        named_dtype(dtype)
        return dtype
    first = _first(device)
    if recorded is not None:
        return recorded
    if "quantization_config" in checkpoint.config:
        return "auto"
    stored = loaded_dtype(checkpoint, "auto")
    name = str(stored).removeprefix("torch.")
    if is_native(stored, first):
        return name
    elements = sum(t.nbytes // DTYPES[t.dtype].itemsize for t in checkpoint.tensors.values())
    if elements * _FLOAT32 > 0.8 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        step(f"{name} is slow on this CPU, and float32 does not fit into its memory")
        return name
    step(f"float32: this CPU has no arithmetic in {name}; --dtype {name} uses that all the same")
    return "float32"


@cache
def is_native(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a device computes in this dtype, or emulates it, several times as slow as float32.

    A CPU that does not say what it has is timed, for at most half a second.
    """
    if dtype.itemsize >= _FLOAT32 or device.type not in ("cpu", "cuda"):
        return True
    if device.type == "cuda":
        return dtype != torch.bfloat16 or torch.cuda.is_bf16_supported(including_emulation=False)
    features: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    known = [features[name] for name in _FEATURES.get(dtype, ()) if name in features]
    return any(known) if known else _is_fast(dtype)


def _is_fast(dtype: torch.dtype) -> bool:
    """Whether a matrix product in this dtype takes at most 1.5 times that in float32."""
    best = dict.fromkeys((torch.float32, dtype), float("inf"))
    matrices = {kind: torch.ones(256, 256, dtype=kind) for kind in best}
    end = time.perf_counter() + 0.5
    for round_ in range(20):
        for kind, matrix in matrices.items():
            begin = time.perf_counter()
            matrix @ matrix
            best[kind] = min(best[kind], time.perf_counter() - begin)
        if round_ and time.perf_counter() > end:
            break
    return best[dtype] <= 1.5 * best[torch.float32]


def _first(device: str) -> torch.device:
    """The device that computes; of all, the CPU only where there is no other."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    return torch.device(device)
