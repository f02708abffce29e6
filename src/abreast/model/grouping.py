"""Run a plan on a loaded transformers model: in memory, reversible, nothing copied.

The members of a group keep their own weights, norms and places in the KV cache; only the order of
execution changes. Each member's `forward` is replaced on the instance: all but the last hand their
input through and leave behind what the model passed them (mask, positions, cache), and the last
one runs the whole group. So every member attends under its own mask, and the model's own loop,
hooks and caches stay untouched.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn

from abreast.errors import AbreastError
from abreast.families import BRANCHES, Branches
from abreast.plan import Group, Plan

Prefill = Literal["grouped", "sequential"]
_MARK = "_abreast_replaced"


class GroupingError(AbreastError):
    """A model on which a plan cannot run."""


@contextmanager
def grouped(
    model: nn.Module, plan: Plan | str, *, prefill: Prefill = "grouped"
) -> Iterator[nn.Module]:
    """Run `model` under `plan` inside the block, and as it was after it.

    model: any loaded transformers causal language model of a known family; its weights are neither
    copied nor changed. plan: a Plan or its shorthand. Both wirings, groups of any size.
    prefill: as for `apply`. Raises as `apply`.
    """
    apply(model, plan, prefill=prefill)
    try:
        yield model
    finally:
        remove(model)


def apply(model: nn.Module, plan: Plan | str, *, prefill: Prefill = "grouped") -> None:
    """Make `model` run under `plan` until `remove`.

    A group computes, for its common input x of shape [batch, length, hidden], the attention
    branches a_k(x), the FFN inputs y_j = x + sum of the a_k that wiring lets member j see (all for
    lp: arXiv 2502.02790, section 3; members j-d..j for cqil: arXiv 2404.06709, section 3.2, with
    the bypass in the FFN's input only), and returns x + sum_k a_k(x) + sum_j f_j(y_j).
    In families whose FFN reads the layer's input, wirings make no difference.

    prefill: "sequential" runs every forward over more than one token in the original order, exactly
    as the unchanged model, and only single tokens, that is decoding, under the plan.

    Raises GroupingError for an unknown family, a submodule that is not found, a model without
    weights or already grouped, and PlanError for a plan of another number of layers; the model is
    then left as it was.
    """
    layers = decoder_layers(model)
    if isinstance(plan, str):
        plan = Plan.parse(plan, len(layers))
    plan.check_layers(len(layers))
    if prefill not in get_args(Prefill):
        raise GroupingError(f"prefill '{prefill}' is not one of {', '.join(get_args(Prefill))}")
    if hasattr(model, _MARK):
        raise GroupingError("the model is grouped already; remove that plan first")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise GroupingError("the model is on the meta device and has no weights; load it first")
    branches = branches_of(model)
    for group in plan.groups:
        for layer in group.layers:
            _check_submodules(layers[layer], layer, branches)
    # Whatever stood on the instances before, as accelerate's dispatching does, comes back later.
    replaced = [
        (layers[layer], layers[layer].__dict__.get("forward"))
        for group in plan.groups
        for layer in group.layers
    ]
    for group in plan.groups:
        _install([layers[layer] for layer in group.layers], group, branches, prefill)
    setattr(model, _MARK, replaced)


def remove(model: nn.Module) -> None:
    """Undo `apply`. Raises GroupingError when the model is not grouped."""
    replaced = getattr(model, _MARK, None)
    if replaced is None:
        raise GroupingError("the model is not grouped; there is no plan to remove")
    for layer, forward in replaced:
        del layer.forward
        if forward is not None:
            layer.forward = forward
    delattr(model, _MARK)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a transformers causal language model. Raises GroupingError."""
    base = getattr(model, "base_model", model)
    for holder in (base, getattr(base, "language_model", None)):
        layers = getattr(holder, "layers", None)
        if isinstance(layers, nn.ModuleList) and len(layers):
            return layers
    raise GroupingError(
        f"{type(model).__name__} has no list of decoder layers 'layers' in its base model; "
        "give a decoder language model"
    )


def branches_of(model: nn.Module) -> Branches:
    """The names of a decoder layer's submodules. Raises GroupingError for an unknown family."""
    config = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if config is not None else None
    model_type = getattr(text, "model_type", None)
    if model_type not in BRANCHES:
        raise GroupingError(
            f"model_type '{model_type}' cannot run grouped; known are {', '.join(sorted(BRANCHES))}"
        )
    return BRANCHES[model_type]


def _check_submodules(layer: nn.Module, index: int, branches: Branches) -> None:
    names = (
        *(branches.attention, branches.mlp),
        *(branches.before_attention + branches.after_attention + branches.after_mlp),
        *(() if _is_parallel(layer, branches) else branches.before_mlp),
    )
    for name in names:
        if not isinstance(getattr(layer, name, None), nn.Module):
            raise GroupingError(
                f"layer {index} ({type(layer).__name__}) has no submodule '{name}'; "
                "this version of the architecture cannot run grouped"
            )


def _is_parallel(layer: nn.Module, branches: Branches) -> bool:
    if isinstance(branches.parallel, str):
        return bool(getattr(layer, branches.parallel))
    return branches.parallel


def _install(
    members: Sequence[nn.Module], group: Group, branches: Branches, prefill: Prefill
) -> None:
    left_behind: list[dict[str, Any]] = [{} for _ in members]

    def forward_of(place: int) -> Callable[..., torch.Tensor]:
        stock: Callable[..., torch.Tensor] = members[place].forward
        names = list(inspect.signature(type(members[place]).forward).parameters)[2:]

        def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if prefill == "sequential" and hidden_states.shape[1] > 1:
                return stock(hidden_states, *args, **kwargs)
            left_behind[place] = {**dict(zip(names, args, strict=False)), **kwargs}
            if place < len(members) - 1:
                return hidden_states
            last = members[place]
            run = partial(_run, members, group.ffn_sees, branches)
            # Recent versions of transformers checkpoint in the class's `forward`, which this one
            # stands before; earlier ones in `__call__`, around this one.
            checkpointing = last.training and getattr(last, "gradient_checkpointing", False)
            if checkpointing and type(last).__call__ is nn.Module.__call__:
                given = [_without_cache(k) for k in left_behind]
                checkpoint: Any = last._gradient_checkpointing_func
                return checkpoint(partial(run, given), hidden_states)
            return run(left_behind, hidden_states)

        return forward

    for member, forward in [(m, forward_of(place)) for place, m in enumerate(members)]:
        member.forward = forward  # type: ignore[assignment,unused-ignore]


def _without_cache(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Recomputing a layer would write to the cache twice; stock layers leave it out as well."""
    cache = {"past_key_values": None, "layer_past": None, "use_cache": False}
    return {**kwargs, **{name: off for name, off in cache.items() if name in kwargs}}


def _run(
    members: Sequence[nn.Module],
    visibility: Sequence[Sequence[bool]],
    branches: Branches,
    kwargs: Sequence[dict[str, Any]],
    x: torch.Tensor,
) -> torch.Tensor:
    attended = [
        _attend(member, branches, x, given) for member, given in zip(members, kwargs, strict=True)
    ]
    out = x + sum(attended[1:], attended[0])
    seen_by: dict[tuple[bool, ...], torch.Tensor] = {(True,) * len(members): out}
    for member, visible in zip(members, visibility, strict=True):
        if _is_parallel(member, branches):
            y = x
        else:
            key = tuple(visible)
            if key not in seen_by:
                seen = [a for a, shown in zip(attended, visible, strict=True) if shown]
                seen_by[key] = x + sum(seen[1:], seen[0])
            y = seen_by[key]
        out = out + _feed(member, branches, y)
    return out


def _attend(
    layer: nn.Module, branches: Branches, x: torch.Tensor, kwargs: dict[str, Any]
) -> torch.Tensor:
    for name in branches.before_attention:
        x = getattr(layer, name)(x)
    # By position, because families disagree on the name; keyword arguments as the model gave them.
    out = getattr(layer, branches.attention)(x, **kwargs)[0]
    for name in branches.after_attention:
        out = getattr(layer, name)(out)
    return out * getattr(layer, branches.scale) if branches.scale else out


def _feed(layer: nn.Module, branches: Branches, y: torch.Tensor) -> torch.Tensor:
    for name in branches.before_mlp:
        norm = getattr(layer, name)
        # A parallel StableLM layer has no second norm: its FFN reads the attention's.
        y = norm(y) if norm is not None else getattr(layer, branches.before_attention[0])(y)
    out = getattr(layer, branches.mlp)(y)
    for name in branches.after_mlp:
        out = getattr(layer, name)(out)
    return out * getattr(layer, branches.scale) if branches.scale else out
