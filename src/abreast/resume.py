"""Checkpoints of a training run: written whole or not at all, and only what changes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

if TYPE_CHECKING:
    from accelerate import Accelerator


def keep_only(
    accelerator: Accelerator,
    weights: Mapping[str, nn.Parameter],
    best: dict[str, torch.Tensor],
) -> None:
    """Let accelerate's checkpoints hold these weights, and `best`, instead of whole models.

    Of a large model with adapters the rest would be nearly all, and it never changes.
    """

    def save(models: list[Any], states: list[Any], folder: str) -> None:
        states.clear()
        if accelerator.is_main_process:
            now = {n: p.detach().to("cpu").contiguous() for n, p in weights.items()}
            save_file(now, Path(folder) / "weights.safetensors")
            save_file(best, Path(folder) / "best.safetensors")

    def load(models: list[Any], folder: str) -> None:
        models.clear()
        now = load_file(Path(folder) / "weights.safetensors")
        best.update(load_file(Path(folder) / "best.safetensors"))
        with torch.no_grad():
            for name, parameter in weights.items():
                parameter.copy_(now[name])

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def save_checkpoint(accelerator: Accelerator, work: Path, step: int) -> None:
    """Write a checkpoint; the one before it stays, older ones go."""
    staging = work / ".partial"
    if accelerator.is_main_process:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(staging))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        final = work / f"step-{step:08d}"
        shutil.rmtree(final, ignore_errors=True)
        os.replace(staging, final)
        for old in sorted(work.glob("step-*"))[:-2]:
            shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def last_checkpoint(work: Path) -> Path | None:
    return max(work.glob("step-*"), default=None)
