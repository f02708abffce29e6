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
from torch.utils._pytree import tree_map_only

from abreast.heal.shard import local, spread_like

if TYPE_CHECKING:
    from accelerate import Accelerator


def keep_only(
    accelerator: Accelerator,
    weights: Mapping[str, nn.Parameter],
    best: dict[str, torch.Tensor],
    sharded: torch.optim.Optimizer | None = None,
) -> None:
    """Let accelerate's checkpoints hold these weights, and `best`, instead of whole models.

    Of a large model with adapters the rest would be nearly all, and it never changes.
    sharded: the optimiser, where weights are spread over the processes. Each then writes its share
    of all three, because what accelerate keeps of an optimiser is the main process's.
    """
    mine = "" if sharded is None else f"-{accelerator.process_index}"

    def save(models: list[Any], states: list[Any], folder: str) -> None:
        states.clear()
        if accelerator.is_main_process or sharded is not None:
            now = {n: local(p.detach()).to("cpu").contiguous() for n, p in weights.items()}
            save_file(now, Path(folder) / f"weights{mine}.safetensors")
            save_file(best, Path(folder) / f"best{mine}.safetensors")
        if sharded is not None:
            shares = tree_map_only(torch.Tensor, local, sharded.state_dict())
            torch.save(shares, Path(folder) / f"optimizer{mine}.pt")

    def load(models: list[Any], folder: str) -> None:
        models.clear()
        now = load_file(Path(folder) / f"weights{mine}.safetensors")
        best.update(load_file(Path(folder) / f"best{mine}.safetensors"))
        with torch.no_grad():
            for name, parameter in weights.items():
                local(parameter).copy_(now[name])
        if sharded is not None:
            shares = torch.load(Path(folder) / f"optimizer{mine}.pt", map_location="cpu")
            _load_shares(sharded, shares)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _load_shares(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, moments in state["state"].items():
        for name, value in moments.items():
            if value.dim():  # not the count of steps
                moments[name] = spread_like(value, parameters[number])
    optimizer.load_state_dict(state)


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
