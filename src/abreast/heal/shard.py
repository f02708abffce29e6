"""A model spread over the processes of a run (torch's FSDP2), each of which keeps its share.

The pieces that are gathered for a call are those that grouped execution calls: every attention and
every FFN. Whole layers would not do, because the last member of a group calls the submodules of the
others, whose layers hand their input through. Norms, embeddings and head are one more piece, held
whole while the model runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from abreast.errors import AbreastError
from abreast.model import branches_of, decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def shard(model: PreTrainedModel, device: torch.device) -> None:
    """Leave of every parameter of `model` this process's share, on `device`; in place, for good.

    From then on the parameters are DTensors, cut along their first dimension, and all processes
    must call the model, and equally often. Needs an initialised process group, and weights that are
    the same on all processes. Raises AbreastError for a model that is sharded already.
    """
    if isinstance(model, FSDPModule):
        raise AbreastError("the model is spread over the processes already; load it again")
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    names = branches_of(model)
    for layer in decoder_layers(model):
        for name in (names.attention, names.mlp):
            fully_shard(getattr(layer, name), mesh=mesh)
    # Left to itself, the root would stay whole after a forward pass that no backward pass follows.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def align(model: PreTrainedModel) -> None:
    """Give every process the main one's weights, as DDP does: those of refit may differ in bits."""
    for parameter in model.parameters():
        distributed.broadcast(parameter.data, src=0)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's share, sharing memory; of a tensor that is not sharded, all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor. All processes must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread_like(share: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The tensor, spread as `parameter` is, of which this process has `share`."""
    if not isinstance(parameter, DTensor):
        return share
    layout = (parameter.device_mesh, parameter.placements)
    return DTensor.from_local(share, *layout, shape=parameter.shape, stride=parameter.stride())
