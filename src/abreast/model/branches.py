"""The branches of a decoder layer by themselves: what its attention and what its FFN add."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from abreast.families import Branches
from abreast.model.forward import parameters
from abreast.plan import Norms


def lacks(layer: nn.Module, branches: Branches) -> str | None:
    """A submodule that a layer of this kind must have and does not, None if it has all."""
    if branches.mixers:
        names = (*branches.mixers, *branches.ffns)
        some = any(isinstance(getattr(layer, name, None), nn.Module) for name in names)
        return None if some else names[0]
    names = (branches.attention, branches.mlp, *branches.before_attention)
    names += branches.after_attention + branches.after_mlp
    names += () if is_parallel(layer, branches) else branches.before_mlp
    lacking = (n for n in names if not isinstance(getattr(layer, n, None), nn.Module))
    return next(lacking, None)


def is_parallel(layer: nn.Module, branches: Branches) -> bool:
    """Whether the FFN of a layer reads the layer's input."""
    parallel = branches.parallel
    return bool(attrgetter(parallel)(layer)) if isinstance(parallel, str) else parallel


def by_name(layer: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a layer's forward after the hidden states, all by name."""
    names = parameters(type(layer).forward)[2:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def tensor_of(returned: Any) -> torch.Tensor:
    """The hidden states that a layer or submodule returned, whatever it returned with them."""
    first: torch.Tensor = returned[0] if isinstance(returned, tuple) else returned
    return first


@dataclass(eq=False)
class GroupMember:
    """A layer of a group in one forward pass; its branches take and give [batch, length, hidden].

    members: the layers of the group. forward: the layer's own, as it was before it was grouped.
    arguments: what the model handed it beside the hidden states. norms: see `grouping.apply`.
    last_matrix: of the FFN, for norms "split".
    """

    layer: nn.Module
    members: Sequence[nn.Module]
    branches: Branches
    forward: Callable[..., Any]
    arguments: Mapping[str, Any]
    norms: Norms
    last_matrix: str
    in_tuples: set[nn.Module] = field(default_factory=set)  # what returns more than hidden states

    @property
    def normed(self) -> nn.Module:
        """The layer whose norms stand before the branches."""
        return self.members[0] if self.norms == "shared" else self.layer

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        layer, names = self.layer, self.branches
        if names.mixers:
            with ExitStack() as hooks:
                for mixer in self._parts(names.mixers):
                    hooks.enter_context(mixer.register_forward_hook(self._note))
                return self._added(names.ffns, x)
        for name in names.before_attention:
            x = getattr(self.normed, name)(x)
        # By position, because families disagree on the name.
        out = getattr(layer, names.attention)(x, **self.arguments)[0]
        for name in names.after_attention:
            out = getattr(layer, name)(out)
        return self._scaled(out)

    def feed(self, y: torch.Tensor) -> torch.Tensor:
        layer, names = self.layer, self.branches
        if names.mixers:
            return self._added(names.mixers, y)
        mlp = getattr(layer, names.mlp)
        if self.norms == "split":
            inputs = [_before_mlp(member, names, y) for member in self.members]
            out = _by_parts(mlp, getattr(mlp, self.last_matrix), inputs)
        else:
            # GPT-OSS adds its router's scores.
            out = tensor_of(mlp(_before_mlp(self.normed, names, y)))
        for name in names.after_mlp:
            out = getattr(layer, name)(out)
        return self._scaled(out)

    def _scaled(self, out: torch.Tensor) -> torch.Tensor:
        scale = self.branches.scale
        return out * getattr(self.layer, scale) if scale else out

    def _parts(self, names: Sequence[str]) -> Iterator[nn.Module]:
        parts = (getattr(self.layer, name, None) for name in names)
        return (part for part in parts if part is not None)

    def _note(self, mixer: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, tuple):
            self.in_tuples.add(mixer)

    def _added(self, silent: Sequence[str], x: torch.Tensor) -> torch.Tensor:
        """What the layer adds to x, as it rounds sums, while these of its submodules give zeros."""
        with ExitStack() as stack:
            for part in self._parts(silent):
                stack.enter_context(_silenced(part, part in self.in_tuples))
            out = tensor_of(self.forward(x, **self.arguments))
        return out - x.to(out.device)


@contextmanager
def _silenced(module: nn.Module, in_tuple: bool) -> Iterator[None]:
    """Inside, a submodule computes nothing and gives zeros, or the residual that it adds to."""
    names = parameters(type(module).forward)[1:]

    def zeros(*args: Any, **kwargs: Any) -> Any:
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        x, residual = arguments[names[0]], arguments.get("residual")
        if residual is None:
            width = getattr(module, "out_features", x.shape[-1])
            residual = x.new_zeros(*x.shape[:-1], width)
        return (residual, None) if in_tuple else residual

    before = vars(module).get("forward")  # accelerate's
    module.forward = zeros  # type: ignore[assignment,unused-ignore]
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _before_mlp(layer: nn.Module, branches: Branches, y: torch.Tensor) -> torch.Tensor:
    for name in branches.before_mlp:
        norm = getattr(layer, name)
        # A parallel StableLM layer has no second norm: its FFN reads the attention's.
        y = norm(y) if norm is not None else getattr(layer, branches.before_attention[0])(y)
    return y


def _by_parts(mlp: nn.Module, last: nn.Module, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """The FFN whose intermediate values are cut into parts, the r-th computed from inputs[r].

    last: its last matrix, which reads the intermediate values; those before it are independent of
    each other.
    """
    computed: list[torch.Tensor] = []

    def put_together(_: nn.Module, entering: tuple[torch.Tensor, ...]) -> Any:
        parts = entering[0].tensor_split(len(inputs), dim=-1)
        computed.append(parts[len(computed)])
        return (torch.cat(computed, dim=-1),) if len(computed) == len(inputs) else None

    with last.register_forward_pre_hook(put_together):
        return [mlp(entering) for entering in inputs][-1]
