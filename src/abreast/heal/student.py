"""The model as it is trained: trainable weights, optimisers, sharding, and checkpoints of them.

A sharded model is spread over the processes of a run (torch's FSDP2). The pieces that are gathered
for a call are those that grouped execution calls: every attention and every FFN. Whole layers would
not do, because the last member of a group calls the submodules of the others, whose layers hand
their input through. Norms, embeddings and head are one more piece, held whole while the model runs.

Checkpoints are our own: accelerate's and torch's pickle the optimiser's state, and accelerate's
hold whole models, of which adapters are a small part and the rest never changes.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from abreast.errors import AbreastError, install
from abreast.heal.recipe import Recipe
from abreast.model import branches_of, decoder_layers

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel


def make_trainable(model: PreTrainedModel, members: Sequence[int], recipe: Recipe) -> Any:
    """The model with the recipe's weights trainable, for LoRA in peft's wrapper.

    members: the grouped layers.
    """
    if recipe.checkpointing:
        set_checkpointing(model, True)
    layers = decoder_layers(model)
    if recipe.train != "lora":
        model.requires_grad_(recipe.train == "all")
        for member in members:
            layers[member].requires_grad_(True)
        return model
    peft = need("peft")
    linear = {
        name.rsplit(".", 1)[-1]
        for name, module in layers[members[0]].named_modules()
        if isinstance(module, nn.Linear)
    }
    recipe.check_targets(linear)
    config = peft.LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha or recipe.lora_rank,
        target_modules=sorted(recipe.lora_targets or linear),
        layers_to_transform=list(members if recipe.lora_layers == "groups" else range(len(layers))),
        layers_pattern="layers",
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, config)


def set_checkpointing(model: PreTrainedModel, on: bool) -> None:
    """Recompute activations in the backward pass, or keep them."""
    # transformers renames these methods in version 6 and warns from 5.2x on.
    verb = "enable" if on else "disable"
    arguments = ({"use_reentrant": False},) if on else ()
    renamed = getattr(model, f"activation_checkpointing_{verb}", None)
    (renamed or getattr(model, f"gradient_checkpointing_{verb}"))(*arguments)


def optimizers_of(student: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Optimisers that share the trainable weights; embeddings and head never go to Muon.

    In their groups "scale" is what the recipe's learning rate is multiplied by.
    """
    matrices: dict[float, dict[str, Any]] = {}
    rest: dict[float, dict[str, Any]] = {}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            scale = size_of(parameter) if recipe.is_relative else 1.0
            suits = recipe.optimizer == "muon" and parameter.dim() == 2 and ".layers." in name
            groups = matrices if suits else rest
            groups.setdefault(scale, {"params": [], "scale": scale})["params"].append(parameter)
    decay = recipe.weight_decay
    optimizers: list[torch.optim.Optimizer] = []
    if rest:
        optimizers.append(
            torch.optim.AdamW([*rest.values()], betas=recipe.betas, weight_decay=decay)
        )
    if matrices:
        # Steps of AdamW's size (Moonlight, arXiv 2502.16982, section 2.2): one rate suits both.
        optimizers.append(
            torch.optim.Muon(
                [*matrices.values()], weight_decay=decay, adjust_lr_fn="match_rms_adamw"
            )
        )
    return optimizers


def size_of(parameter: nn.Parameter) -> float:
    """Root mean square, at least 0.001 (Adafactor's), to the nearest power of the root of 2, so
    that many weights share a call of the optimiser."""
    mean = float(full(parameter.detach().float().square().mean()))
    if not math.isfinite(mean):
        return 1.0  # a broken model is refused before the first step
    return float(2 ** (round(math.log2(max(mean, 1e-6))) / 2))


def shard(model: PreTrainedModel, device: torch.device) -> None:
    """Leave of every parameter of `model` this process's share, on `device`; in place, for good.

    From then on the parameters are DTensors, split along their first dimension, and all processes
    must call the model, and equally often. Needs an initialised process group, and weights that are
    the same on all processes. Raises AbreastError for a model that is sharded already.
    """
    if isinstance(model, FSDPModule):
        raise AbreastError("the model is sharded over the processes already; load it again")
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    names = branches_of(model)
    for layer in decoder_layers(model):
        for name in (names.attention, names.mlp):
            fully_shard(getattr(layer, name), mesh=mesh)
    # Left to itself, the root would stay whole after a forward pass that no backward pass follows.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def align(model: PreTrainedModel) -> None:
    """Give every process the main one's weights: those of refit may differ in bits."""
    for parameter in model.parameters():
        distributed.broadcast(parameter.data, src=0)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's share, sharing memory; of a tensor that is not sharded, all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor. All processes must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True)
class Checkpoints:
    """The last two checkpoints of a training run in `work`, each written whole or not at all.

    weights: the trainable ones, by name. sharded: every process writes its share of all tensors,
    and the main process the rest; else the main process writes everything.
    """

    work: Path
    accelerator: Accelerator
    weights: Mapping[str, nn.Parameter]
    optimizers: Sequence[torch.optim.Optimizer]
    sharded: bool

    def save(self, step: int, state: Mapping[str, Any], best: Mapping[str, torch.Tensor]) -> None:
        """Write weights and optimisers as they are, with the JSON-ready state and the best weights.

        All processes must call it.
        """
        staging = self.work / ".step.partial-new"
        is_main = self.accelerator.is_main_process
        if is_main:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            (staging / "state.json").write_text(json.dumps(state), encoding="utf-8")
        self.accelerator.wait_for_everyone()
        if is_main or self.sharded:
            names: dict[torch.Tensor, str] = {p: name for name, p in self.weights.items()}
            moments = {
                f"{names[parameter]}/{key}": value
                for optimizer in self.optimizers
                for parameter, values in optimizer.state.items()
                for key, value in values.items()
            }
            try:
                self._write(staging, "weights", self.weights)
                self._write(staging, "best", best)
                self._write(staging, "optimizer", moments)
            except BaseException:
                shutil.rmtree(staging, ignore_errors=True)
                raise
        self.accelerator.wait_for_everyone()
        if is_main:
            final = self.work / f"step-{step:08d}"
            shutil.rmtree(final, ignore_errors=True)
            os.replace(staging, final)
            for old in sorted(self.work.glob("step-*"))[:-2]:
                shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def load(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
        """Restore weights and optimisers from the last checkpoint; return its state and best
        weights, or None where there is no checkpoint."""
        folder = max(self.work.glob("step-*"), default=None)
        if folder is None:
            return None
        saved = load_file(self._path(folder, "weights"))
        with torch.no_grad():
            for name, parameter in self.weights.items():
                local(parameter).copy_(saved[name])
        moments: dict[str, dict[str, torch.Tensor]] = {}
        for entry, value in load_file(self._path(folder, "optimizer")).items():
            name, _, key = entry.rpartition("/")
            like = self.weights[name]
            moments.setdefault(name, {})[key] = _spread_like(value, like) if value.dim() else value
        names = {parameter: name for name, parameter in self.weights.items()}
        for optimizer in self.optimizers:
            order = [p for group in optimizer.param_groups for p in group["params"]]
            state = {n: moments[names[p]] for n, p in enumerate(order) if names[p] in moments}
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return state, load_file(self._path(folder, "best"))

    def _path(self, folder: Path, name: str) -> Path:
        suffix = f"-{self.accelerator.process_index}" if self.sharded else ""
        return folder / f"{name}{suffix}.safetensors"

    def _write(self, folder: Path, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        shares = {key: local(t.detach()).to("cpu").contiguous() for key, t in tensors.items()}
        save_file(shares, self._path(folder, name))


def _spread_like(share: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The tensor, spread as `parameter` is, of which this process has `share`."""
    if not isinstance(parameter, DTensor):
        return share
    return DTensor.from_local(
        share,
        parameter.device_mesh,
        parameter.placements,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def need(package: str) -> Any:
    """Import a package of the heal extra. Raises AbreastError without it."""
    try:
        return import_module(package)
    except ImportError:
        raise AbreastError(f"healing by training needs '{package}': {install('heal')}") from None
