"""How the parts that ranks have of a model run together: exchanges, and groups by member."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import combinations
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from abreast.errors import AbreastError, first_line
from abreast.families import Family
from abreast.model import GroupMember, by_name, cache_in
from abreast.plan import Group

MINUTES = 5.0  # that processes wait for each other at the start


class ParallelError(AbreastError):
    """A model that cannot be split over this many processes, or a process that went away."""


class together:
    """Names the cause where an exchange fails: another process ended."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise ParallelError(
                f"rank {rank_and_world()[0]} lost the connection to the other processes; see which "
                f"of them ended first, and why ({first_line(error)})"
            ) from None


def rank_and_world() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def meet(backend: str) -> None:
    """Connect the processes, once. Raises ParallelError where they do not come together."""
    if dist.is_initialized():
        return
    try:
        met = dist.rendezvous("env://", timeout=timedelta(minutes=MINUTES))
        store, rank, world = next(met)
        store.set_timeout(dist.default_pg_timeout)  # loading takes different times
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    except (RuntimeError, ValueError) as error:
        address = ":".join(os.environ.get(f"MASTER_{key}", "?") for key in ("ADDR", "PORT"))
        raise ParallelError(
            f"the processes did not meet at {address} within {MINUTES:g} minutes; start all "
            f"{rank_and_world()[1]} with the address of the first and a free port there "
            f"({first_line(error)})"
        ) from None


def deal(
    members: int, loads: list[int], costs: tuple[int, int], band: int = 0
) -> tuple[tuple[int, ...], ...]:
    """The ranks of every member of a group, neighbours together, or one member's side by side.

    Where members are no multiple of the ranks, the rank that has most to run of this group has as
    little as possible, since all wait for it, and then the fullest ranks of all groups so far.
    loads: what every rank has of the groups before, to which this one's is added. costs: of a
    member's attention and FFN. band: how many attentions before its own a rank repeats.
    """
    world = len(loads)
    if world > members:
        share = world // members
        return tuple(tuple(range(m * share, (m + 1) * share)) for m in range(members))

    def counts(most: tuple[int, ...]) -> list[int]:
        return [members // world + (rank in most) for rank in range(world)]

    def added(most: tuple[int, ...]) -> list[int]:
        own = counts(most)
        repeated = [min(band, sum(own[:rank])) for rank in range(world)]
        return [(n + more) * costs[0] + n * costs[1] for n, more in zip(own, repeated, strict=True)]

    def judged(most: tuple[int, ...]) -> tuple[int, list[int]]:
        new = added(most)
        return max(new), sorted(map(int.__add__, loads, new), reverse=True)

    chosen = min(combinations(range(world), members % world), key=judged)
    loads[:] = map(int.__add__, loads, added(chosen))
    return tuple((rank,) for rank, count in enumerate(counts(chosen)) for _ in range(count))


class Link:
    """The connection between processes. delay: seconds that every exchange waits in addition, to
    simulate a slower one."""

    def __init__(self, delay: float = 0.0, group: Any = None, count: list[int] | None = None):
        self.delay, self.group, self._count = delay, group, [0] if count is None else count

    @property
    def exchanges(self) -> int:
        """How many there were so far."""
        return self._count[0]

    def among(self, group: Any) -> Link:
        """The connection within a group of processes; exchanges are counted together."""
        return Link(self.delay, group, self._count)

    def _start(self, x: Tensor) -> Tensor:
        self._count[0] += 1
        if self.delay:
            if x.is_cuda:
                torch.cuda.synchronize(x.device)  # or it would wait beside what it waits for
            until = time.perf_counter() + self.delay
            while time.perf_counter() < until:
                pass
        return x.contiguous()

    def sum(self, x: Tensor) -> Tensor:
        x = self._start(x)
        with together():
            dist.all_reduce(x, group=self.group)
        return x

    def send(self, x: Tensor, rank: int) -> Tensor:
        """What `rank` has here, on every rank."""
        x = self._start(x if dist.get_rank() == rank else torch.empty_like(x))
        with together():
            dist.broadcast(x, rank, group=self.group)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """All ranks' equally wide [.., X] side by side."""
        x = self._start(x)
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(self.group))]
        with together():
            dist.all_gather(parts, x, group=self.group)
        return torch.cat(parts, -1)


class Summed:
    """Mixed into an attention or an FFN of which every rank has a part."""

    link: Link

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)  # type: ignore[misc]
        if isinstance(out, tuple):
            return self.link.sum(out[0]), *out[1:]
        return self.link.sum(out)


class SplitHead(nn.Module):
    """An output head of which a rank computes its part of the vocabulary's logits. embedding: the
    module whose weight it reads where they are tied."""

    def __init__(self, head: nn.Linear, link: Link, embedding: nn.Module | None) -> None:
        super().__init__()
        rank, world = rank_and_world()
        self.words, self.link, self.tied = head.out_features, link, (embedding,)
        self.size = -(-self.words // world)
        first, last = (min(self.size * r, self.words) for r in (rank, rank + 1))
        self.span = first, last - first
        if embedding is None:
            self.weight = nn.Parameter(head.weight.new_empty(last - first, head.in_features))
        self.bias = None
        if head.bias is not None:
            self.bias = nn.Parameter(head.bias.new_empty(last - first))

    def forward(self, x: Tensor) -> Tensor:
        tied: Any = self.tied[0]
        weight = self.weight if tied is None else tied.weight.narrow(0, *self.span)
        part = nn.functional.linear(x, weight, self.bias)
        part = nn.functional.pad(part, (0, self.size - part.shape[-1]))
        return self.link.all_gather(part)[..., : self.words]


@dataclass(frozen=True)
class Local:
    """A decoder layer of a rank's model: which of the checkpoint's layers have its attention and
    its FFN. layer: the member's number in the original where it is dealt, None where the rank has
    its part of all members. share, part: the rank has the part-th of so many parts of it."""

    attention: int
    ffn: int
    layer: int | None = None
    attends: bool = True
    feeds: bool = True
    share: int = 1
    part: int = 0


@dataclass(eq=False)
class Dealt:
    """A group whose members are dealt to the ranks. senders: the rank that has each member's
    output in a prompt that runs in order. seen: of which members the cache tells the length of the
    text, so that there must be something in it. first: the first member's number in the cache."""

    members: list[Any]
    local: list[Local]
    group: Group
    senders: list[int]
    family: Family
    link: Link
    repeat: bool
    seen: list[bool]
    first: int
    arguments: list[dict[str, Any]] = field(default_factory=list)

    def attend(self, index: int, x: Tensor, arguments: dict[str, Any]) -> Tensor | None:
        """The attention branch of a member, None on ranks that do not compute it."""
        if self.local[index].attends:
            return self.member(index, arguments).attend(x)
        cache = cache_in(arguments)
        if self.seen[index] and cache is not None:
            nothing = x[:, None, :, :1]
            cache.update(nothing, nothing, self.first + index)
        return None

    def member(self, index: int, arguments: dict[str, Any]) -> GroupMember:
        layer, names = self.members[index], self.family.branches
        return GroupMember(layer, self.members, names, layer.forward, arguments, "own", "")

    def run(self, x: Tensor) -> Tensor:
        """The group's output from its input, both [B, L, D]."""
        group, arguments, count = self.group, self.arguments, len(self.members)
        self.arguments = []
        held: dict[int, Tensor] = {}
        for index in range(count):
            read = sum(held.values(), x) if group.is_in_order else x
            if (out := self.attend(index, read, arguments[index])) is not None:
                held[index] = out
        own = [index for index, local in enumerate(self.local) if local.feeds]
        first = self.local[own[0]].part == 0  # of those that share a member, the one that adds it
        adds = [held[index] for index in own if first]
        band = 0 if self.family.parallel else group.ffn_band
        y, inputs, outputs = x, dict[int, Tensor](), []
        if group.is_in_order:
            y = sum(held.values(), x)
        elif band is None:
            y = x + self.link.sum(sum(adds[1:], adds[0]))
        elif band and not self.repeat:
            every = x.new_zeros(count, *x.shape)
            for index, out in zip(own, adds, strict=False):
                every[index] = out
            every = self.link.sum(every)
            held, y = dict(enumerate(every)), x + every.sum(0)
        else:
            outputs = adds
        for index in own:
            if self.family.parallel or band is None:
                inputs[index] = x if self.family.parallel else y
            else:
                inputs[index] = sum((held[k] for k in range(max(0, index - band), index + 1)), x)
        outputs = [*outputs, *(self.member(i, {}).feed(inputs[i]) for i in own)]
        return y + self.link.sum(sum(outputs[1:], outputs[0]))


@dataclass(eq=False)
class InTurn:
    """Replaces a member's `forward`: all but the last pass x on, and the last runs the group. In
    order a member runs where its FFN is, and is sent to the others."""

    together: Dealt
    index: int

    def __call__(
        self, hidden_states: Tensor, *args: Any, in_order: bool = False, **kwargs: Any
    ) -> Tensor:
        together, index = self.together, self.index
        member = together.members[index]
        arguments = by_name(member, args, kwargs)
        if in_order:
            if together.local[index].feeds:
                hidden_states = type(member).forward(member, hidden_states, **arguments)
            else:
                together.attend(index, hidden_states, arguments)
            return together.link.send(hidden_states, together.senders[index])
        together.arguments.append(arguments)
        return together.run(hidden_states) if index + 1 == len(together.members) else hidden_states
