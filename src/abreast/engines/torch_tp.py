"""Converted checkpoints in the processes of torchrun, each holding a part of every layer.

Single layers and groups that are one wide layer (lp) are stock layers: transformers' own tensor
parallel plan splits them, two all-reduces each. Rank r of p then holds exactly member r of a group
of p.

Groups whose FFNs see a band of attentions (cqil) need one all-reduce (arXiv 2404.06709, section
3.1). Every rank runs one whole member: with as many ranks as members, rank r takes member r; with m
times as many, m neighbouring ranks share a member and sum its attention among themselves. One
all-reduce at the end of the group adds the members' attention and FFN outputs. With bypass distance
d > 0 a rank first sends its attention output to the next d members.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from abreast.checkpoint import Checkpoint, open_checkpoint
from abreast.errors import AbreastError
from abreast.families import CONVERTIBLE
from abreast.model import load, named_dtype
from abreast.modeling import CqilForward
from abreast.targets import TORCH_TP, layers_of, refusals

WIDE_NORMS = ("q_norm", "k_norm", "query_layernorm", "key_layernorm")


class ParallelError(AbreastError):
    """A model that cannot be split over this many processes."""


def launched() -> bool:
    """Whether torchrun started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def load_parallel(
    model: str | Path, *, dtype: str | torch.dtype = "auto", device: str = "cpu"
) -> Any:
    """Load an original or converted checkpoint split over all processes; returns this one's part.

    Call it in every process that torchrun started. Logits, caches and generation are those of the
    whole model, the same in every process. device: cpu (gloo) or cuda (NCCL, one GPU per process).
    A single process loads the whole model. Code inside checkpoints never runs. Raises ParallelError
    for a number of processes that the layers cannot be divided by, AbreastError as `load`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    world = int(os.environ.get("WORLD_SIZE", "1"))
    checkpoint = open_for(model, world)
    if world == 1:
        return load(model, dtype=dtype, device=device)[0]
    if isinstance(dtype, str) and dtype != "auto":
        dtype = named_dtype(dtype)
    config = AutoConfig.from_pretrained(checkpoint.folder)
    if find_spec("accelerate") is None:
        raise ParallelError("transformers splits models with accelerate; pip install accelerate")
    on_gpu = device.startswith("cuda")
    if torch.cuda.is_available() != on_gpu:
        # transformers takes the accelerator wherever it sees one.
        raise ParallelError(
            "no CUDA device here; use --device cpu"
            if on_gpu
            else "to use the CPU beside a GPU, hide the GPU: CUDA_VISIBLE_DEVICES=''"
        )
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo")
    loaded = AutoModelForCausalLM.from_pretrained(
        checkpoint.folder, dtype=dtype, **_parallel_arguments(_tensor_parallel_plan(config), world)
    ).eval()
    sharers = _process_groups(checkpoint.config, world)
    for layer in loaded.base_model.layers:
        if isinstance(layer, CqilForward):
            keep_own_member(layer, sharers)
        else:
            _keep_own_gains(layer, world)
    return loaded


def open_for(model: str | Path, world: int) -> Checkpoint:
    """The checkpoint, if `world` processes can share its layers. Raises AbreastError."""
    checkpoint = open_checkpoint(model)
    check_degree(checkpoint.config, world)
    return checkpoint


def check_degree(config: Mapping[str, Any], world: int) -> None:
    """Raise ParallelError where `world` processes cannot share the layers of a config.json."""
    family = CONVERTIBLE.get(str(config.get("model_type")).removeprefix("abreast_"))
    for reason in refusals(TORCH_TP, config, family, degree=world):
        raise ParallelError(reason)


def _parallel_arguments(plan: Any, world: int) -> dict[str, Any]:
    """Arguments of from_pretrained for a plan, as the installed transformers names them."""
    try:
        from transformers.distributed import DistributedConfig

        return {"distributed_config": DistributedConfig(tp_size=world, tp_plan=plan)}
    except (ImportError, TypeError):
        warnings.filterwarnings("ignore", message=".*tp_plan.*", category=FutureWarning)
        return {"tp_plan": plan}


def _tensor_parallel_plan(config: Any) -> dict[str, str]:
    """The family's own plan, and the embedding split by vocabulary.

    Models that keep members apart have no plan of their own, and not every version of transformers
    splits the embedding; spelled out here, all models are split in the same way.
    """
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM._model_mapping[type(config)]
    inner = getattr(config, "base_model_tp_plan", None)
    if not inner:
        raise ParallelError(
            f"transformers has no tensor parallel plan for {config.model_type}; use 1 process"
        )
    prefix = stock.base_model_prefix
    return {
        f"{prefix}.embed_tokens": "embedding_rowwise",
        **{f"{prefix}.{name}": style for name, style in inner.items()},
        **(getattr(stock, "_tp_plan", None) or {}),
    }


def _process_groups(config: Mapping[str, Any], world: int) -> dict[int, Any]:
    """By number of ranks that share a member: the process group of this rank's member."""
    groups: dict[int, Any] = {}
    shares = {world // layer.members for layer in layers_of(config) if layer.band is not None}
    for share in sorted(shares - {1}, reverse=True):
        for first in range(0, world, share):
            # Every process has to take part in making every group.
            ranks = list(range(first, first + share))
            group = dist.new_group(ranks)
            if dist.get_rank() in ranks:
                groups[share] = group
    return groups


class OneMember:
    """Mixed into a family's decoder layer that holds one member of a cqil group, or a part of it.

    One all-reduce at the end adds the members' attention and FFN outputs over the ranks.
    """

    self_attn: Any
    mlp: Any
    input_layernorm: Any
    before: Any  # the norm before the FFN
    scale: float
    bypass: int
    member: int  # this rank's, of `members`; `share` ranks have the same one
    members: int
    share: int
    first: bool  # of those that share the member: its attention counts once
    sharers: Any  # their process group

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        x_BLD = hidden_states
        a_BLD = self.self_attn(self.input_layernorm(x_BLD), *args, **kwargs)[0]
        if self.scale != 1.0:
            a_BLD = a_BLD * self.scale
        if self.share > 1:
            dist.all_reduce(a_BLD, group=self.sharers)
        y_BLD = x_BLD + a_BLD
        if self.bypass:
            for seen_BLD in self.exchange(a_BLD):
                y_BLD = y_BLD + seen_BLD
        out_BLD = self.mlp(self.before(y_BLD))
        if self.scale != 1.0:
            out_BLD = out_BLD * self.scale
        if self.first:
            out_BLD = out_BLD + a_BLD
        dist.all_reduce(out_BLD)
        return x_BLD + out_BLD

    def exchange(self, a_BLD: torch.Tensor) -> list[torch.Tensor]:
        """Send this member's attention output to the next members; return the previous ones'."""
        rank, member, share = dist.get_rank(), self.member, self.share
        a_BLD = a_BLD.contiguous()
        operations, received = [], []
        for distance in range(1, self.bypass + 1):
            if member + distance < self.members:
                operations.append(dist.P2POp(dist.isend, a_BLD, rank + distance * share))
            if member >= distance:
                received.append(torch.empty_like(a_BLD))
                operations.append(dist.P2POp(dist.irecv, received[-1], rank - distance * share))
        for work in dist.batch_isend_irecv(operations) if operations else ():
            work.wait()
        return received


def keep_own_member(layer: Any, sharers: Mapping[int, Any]) -> None:
    """Reduce a cqil group that was loaded under the family's plan to this rank's member.

    Rows of q, k, v, gate and up and columns of down lie member by member, so the rank already holds
    its own. The members' output projections lie one below the other but were split along their
    inputs: they are gathered and split again. Afterwards all matrices are plain local ones.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    output = layer.self_attn.o_proj
    whole = _whole(output.weight)
    members = whole.shape[0] // layer.self_attn.config.hidden_size
    share = world // members
    member, part = divmod(rank, share)
    for module in layer.modules():
        _unhook(module)
    own = whole.view(members, -1, whole.shape[1])[member]
    bias = None
    if output.bias is not None and part == 0:
        bias = _whole(output.bias).view(members, -1)[member]
    layer.self_attn.o_proj = _linear(own.chunk(share, dim=1)[part], bias)
    out = "c_proj" if hasattr(layer.mlp, "c_proj") else "down_proj"
    for holder in (layer.self_attn, layer.mlp):
        holder.__class__ = type(holder).mixed_of[0]  # runs its own modules again
        for name, module in list(holder.named_children()):
            if not isinstance(module, nn.Linear) or name == "o_proj":
                continue
            rows_bias: torch.Tensor | None = None
            if module.bias is not None:
                rows_bias = _rows(module.bias, rank, world)
            if name == out and rank > 0:
                rows_bias = None  # a sum over all members, to be added once
            elif name == out and module.bias is not None:
                rows_bias = _whole(module.bias)
            setattr(holder, name, _linear(_local(module.weight), rows_bias))
    _keep_own_gains(layer, world)
    layer.before = getattr(layer, layer.norms[1])
    layer.scale = getattr(layer, "residual_multiplier", 1.0)
    layer.member, layer.members, layer.share, layer.first = member, members, share, part == 0
    layer.sharers = sharers.get(share)
    layer.__class__ = type(type(layer).__name__, (OneMember, type(layer)), {})


def _keep_own_gains(layer: Any, world: int) -> None:
    """Keep this rank's heads in norms that have a gain for every head of a group."""
    for name in WIDE_NORMS:
        norm = getattr(layer.self_attn, name, None)
        if norm is not None and norm.weight.dim() > 1:
            weight = _rows(norm.weight, dist.get_rank(), world)
            norm.weight = nn.Parameter(weight.clone(), requires_grad=False)


def _unhook(module: nn.Module) -> None:
    """Remove what transformers installed to communicate around a module."""
    module.__dict__.pop("forward", None)
    module._forward_pre_hooks.clear()
    module._forward_hooks.clear()


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.contiguous().clone(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return linear


def _local(tensor: Any) -> torch.Tensor:
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach()


def _whole(tensor: Any) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def _rows(tensor: Any, rank: int, world: int) -> torch.Tensor:
    """This rank's rows of a tensor that is whole, or already this rank's part."""
    if hasattr(tensor, "to_local") and tensor.to_local().shape != tensor.shape:
        return _local(tensor)
    return _whole(tensor).chunk(world)[rank]
