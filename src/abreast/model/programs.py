"""Changed models as programs: the steps they run, and running many of them without repetition.

A *program* is what a model with some of its layers shuffled, pruned, merged or put side by side
runs: steps, one after another. Programs are run in lexicographic order with the hidden states of
the current one at hand, so whatever steps two of them begin with is run once: the layers before a
changed stretch, the pairs that a longer stretch shares with a shorter one, and programs that are
the same altogether.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from abreast.errors import AbreastError
from abreast.model.grouping import by_name, decoder_layers, grouped
from abreast.model.scores import token_scores
from abreast.plan import WIRING_NAMES, Group, Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INTERVENTIONS = (
    "shuffle",
    "prune",
    "merge",
    "parallel",
    "2-parallel",
    "3-parallel",
    *WIRING_NAMES[1:],  # lp is parallel
)
LOGITS = 2**25  # logits at once: 128 MiB in float32


@dataclass(frozen=True)
class Merged:
    """A step: one layer whose weights are the mean of those of `layers`."""

    layers: tuple[int, ...]


Step = int | Group | Merged
Program = tuple[Step, ...]
Case = tuple[str, int, int]  # intervention, start, end


def cases(
    num_layers: int,
    interventions: Sequence[str] = INTERVENTIONS,
    *,
    max_length: int | None = None,
    permutations: int = 3,
    seed: int = 0,
) -> dict[Case, tuple[Program, ...]]:
    """The programs of every intervention on every stretch; more than one for shuffle only."""
    longest = max_length or num_layers
    return {
        (intervention, start, end): programs(
            intervention, start, end, num_layers, permutations=permutations, seed=seed
        )
        for intervention in interventions
        for start in range(num_layers)
        for end in range(start + 1, min(start + longest, num_layers))
    }


def programs(
    intervention: str,
    start: int,
    end: int,
    num_layers: int,
    *,
    permutations: int = 3,
    seed: int = 0,
) -> tuple[Program, ...]:
    """What a model of num_layers layers runs under an intervention on layers start..end.

    shuffle gives `permutations` different programs (orders of the stretch other than its own, by
    `seed`, start and end), or as many as there are; the others give one.
    """
    inside = tuple(range(start, end + 1))
    middles: list[Program]
    if intervention == "shuffle":
        middles = _orders(inside, permutations, seed)
    elif intervention == "prune":
        middles = [()]
    elif intervention == "merge":
        middles = [(Merged(inside),)]
    elif intervention in WIRING_NAMES:
        middles = [(Group.wired(inside, intervention),)]
    else:
        width = {"parallel": len(inside), "2-parallel": 2, "3-parallel": 3}[intervention]
        parts = [inside[at : at + width] for at in range(0, len(inside), width)]
        middles = [tuple(Group(layers=p) if len(p) > 1 else p[0] for p in parts)]
    before, after = range(start), range(end + 1, num_layers)
    return tuple((*before, *middle, *after) for middle in middles)


def planned(wanted: Iterable[Program]) -> int:
    """Layer evaluations that `run_programs` spends on these programs, per batch."""
    spent, path = 0, ()  # type: tuple[int, Program]
    for program in sorted(set(wanted), key=_order):
        spent += cost_of(program[shared_steps(path, program) :])
        path = program
    return spent


@torch.inference_mode()
def run_programs(
    model: PreTrainedModel,
    ids: torch.Tensor,
    wanted: Iterable[Program],
    *,
    reference: Program | None = None,
) -> Iterator[tuple[Program, np.ndarray, int]]:
    """Yield (program, sums, evaluated) of each program, in the order that shares most work.

    ids: token ids of shape [batch, window]. sums: `token_scores` of each window, summed over all
    its tokens but the first: float64 [batch, 1], the negative log-likelihood in nats. With a
    reference, a program that is then run first of all, [batch, 4] against it. evaluated: layers run
    for it. A layer keeps its own mask and positions wherever it runs; a merged one has those of its
    first layer. Held in memory: one state [batch, window, hidden] in the model's dtype per step of
    the current program and one more, one merged layer, and the reference's logits
    [batch, window, vocab]. Raises AbreastError for layers of unlike shape that cannot be merged,
    and as `apply`.
    """
    layers = decoder_layers(model)
    if any("forward" in vars(layer) for layer in layers):
        raise AbreastError("the model's layers run under a plan or hooks; remove them first")
    ids = ids.to(model.device)
    embedded, given = capture(model, layers, ids)
    first = [] if reference is None else [reference]
    path: Program = ()
    states = [embedded]
    logits: list[torch.Tensor | None] = []
    for program in [*first, *sorted(set(wanted) - set(first), key=_order)]:
        shared = shared_steps(path, program)
        del states[shared + 1 :]
        for step in program[shared:]:
            states.append(advance(model, layers, given, step, states[-1]))
        path = program
        if program == reference:
            logits = list(_logits(model, layers, states[-1], ids))
        sums = _score(model, layers, states[-1], ids, logits)
        yield program, sums, cost_of(program[shared:])


def split(wanted: set[Program], original: Program, shares: int) -> list[set[Program]]:
    """Programs per worker: those that leave the original at the same layer stay together."""
    by_start: dict[int, set[Program]] = {}
    for program in wanted:
        by_start.setdefault(shared_steps(program, original), set()).add(program)
    parts: list[set[Program]] = [set() for _ in range(shares)]
    loads = [0] * shares
    for _, together in sorted(by_start.items()):
        lightest = loads.index(min(loads))
        parts[lightest] |= together
        loads[lightest] += planned(together)
    return parts


def _orders(inside: tuple[int, ...], permutations: int, seed: int) -> list[Program]:
    generator = np.random.default_rng((seed, inside[0], inside[-1]))
    found: list[Program] = []
    while len(found) < min(permutations, math.factorial(len(inside)) - 1):
        order = tuple(generator.permutation(inside).tolist())
        if order != inside and order not in found:
            found.append(order)
    return found


def _order(program: Program) -> tuple[str, ...]:
    return tuple(name_of((step,)) for step in program)


def name_of(program: Program) -> str:
    """The journal's name of a program, as in "0 1 2+3 4~5"; "~" joins merged layers."""
    return " ".join(
        step.shorthand
        if isinstance(step, Group)
        else "~".join(map(str, step.layers if isinstance(step, Merged) else [step]))
        for step in program
    )


def cost_of(steps: Program) -> int:
    return sum(len(step.layers) if isinstance(step, Group) else 1 for step in steps)


def shared_steps(one: Program, other: Program) -> int:
    """How many steps two programs begin with alike."""
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


@torch.inference_mode()
def capture(
    model: PreTrainedModel, layers: nn.ModuleList, ids: torch.Tensor
) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """What enters the first layer, and what else the model hands to each; runs no layer."""
    given: list[dict[str, Any]] = [{} for _ in layers]
    entering: list[torch.Tensor] = []

    def forward_of(place: int) -> Callable[..., torch.Tensor]:
        def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            given[place] = by_name(layers[place], args, kwargs)
            entering.append(hidden_states)
            return hidden_states

        return forward

    with _replaced(layers, forward_of):
        model.base_model(input_ids=ids, use_cache=False)
    return entering[0], given


@contextmanager
def _replaced(
    layers: nn.ModuleList, forward_of: Callable[[int], Callable[..., torch.Tensor]]
) -> Iterator[None]:
    for place, layer in enumerate(layers):
        layer.forward = forward_of(place)  # type: ignore[assignment,unused-ignore]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@torch.inference_mode()
def advance(
    model: PreTrainedModel,
    layers: nn.ModuleList,
    given: list[dict[str, Any]],
    step: Step,
    x: torch.Tensor,
) -> torch.Tensor:
    """The hidden state after a step, for the one before it; both [batch, window, hidden]."""
    if isinstance(step, Merged):
        return _result(_mean_layer(layers, step.layers)(x, **given[step.layers[0]]))
    if isinstance(step, Group):
        with grouped(model, Plan(num_layers=len(layers), groups=(step,))):
            for layer in step.layers:  # all but the last hand x through
                x = layers[layer](x, **given[layer])
            return x
    return _result(layers[step](x, **given[step]))


def _result(returned: Any) -> torch.Tensor:
    return returned[0] if isinstance(returned, tuple) else returned


def _mean_layer(layers: nn.ModuleList, members: tuple[int, ...]) -> nn.Module:
    """A new layer whose every weight is the mean of the members', taken in float32."""
    weights = [dict(layers[member].named_parameters()) for member in members]
    shapes = [{name: weight.shape for name, weight in each.items()} for each in weights]
    for member, shape in zip(members, shapes, strict=True):
        if shape != shapes[0]:
            raise AbreastError(
                f"layers {members[0]} and {member} have weights of different shape and cannot be "
                "merged; leave merge out of --interventions"
            )
    merged = copy.deepcopy(layers[members[0]])
    for name, weight in merged.named_parameters():
        total = weight.float()
        for each in weights[1:]:
            total = total + each[name]
        weight.copy_(total / len(members))
    return merged


def _rows(model: PreTrainedModel, ids: torch.Tensor) -> int:
    """How many windows' logits are computed at once."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return max(1, LOGITS // (ids.shape[1] * vocabulary))


def _logits(
    model: PreTrainedModel, layers: nn.ModuleList, state: torch.Tensor, ids: torch.Tensor
) -> Iterator[torch.Tensor]:
    """Logits of all tokens but the first, a few windows at a time, of the last layer's output.

    The model runs with every layer replaced, so norm, head and whatever a family does around them
    (scaling, soft caps) are its own.
    """
    rows = _rows(model, ids)
    for part, wanted in zip(state.split(rows), ids.split(rows), strict=True):
        with _replaced(layers, lambda _, part=part: lambda *_args, **_kwargs: part):  # type: ignore[misc]
            yield model(input_ids=wanted, use_cache=False).logits[:, :-1]


def _score(
    model: PreTrainedModel,
    layers: nn.ModuleList,
    state: torch.Tensor,
    ids: torch.Tensor,
    reference: list[torch.Tensor | None],
) -> np.ndarray:
    """Sums per window as `run_programs` yields; reference: as `_logits` gave it, or nothing."""
    targets = ids[:, 1:].split(_rows(model, ids))
    others = reference or [None] * len(targets)
    found = zip(_logits(model, layers, state, ids), targets, others, strict=True)
    return np.concatenate([token_scores(*three).sum(1) for three in found])


@torch.inference_mode()
def geometry(
    model: PreTrainedModel, tokens: np.ndarray, batch_size: int, few: int
) -> dict[str, np.ndarray]:
    """How alike the layers' inputs are, and how much layers depend on each other.

    tokens: ids, int64 [windows, window]; the first `few` windows serve for the dependencies, which
    take most of the work. Returns similarity, angular, influence and dependency as `planner.Stats`
    has them, and layers, shape [1]: how many were run, windows times layers.
    """
    layers = decoder_layers(model)
    num_layers = len(layers)
    cosine = torch.zeros(num_layers + 1, num_layers + 1, dtype=torch.float64)
    angle = torch.zeros_like(cosine)
    apart = torch.zeros(num_layers, num_layers, dtype=torch.float64)
    run = 0
    for begin in range(0, len(tokens), batch_size):
        ids = torch.from_numpy(tokens[begin : begin + batch_size])
        entering, given = capture(model, layers, ids.to(model.device))
        states = [entering]
        for layer in range(num_layers):
            states.append(advance(model, layers, given, layer, states[-1]))
        run += num_layers * len(ids)
        unit = [torch.nn.functional.normalize(state.float(), dim=-1) for state in states]
        for place, here in enumerate(unit):
            for other in range(place, num_layers + 1):
                both = (here * unit[other]).sum(-1).clamp(-1, 1)
                cosine[place, other] += both.double().sum().cpu()
                angle[place, other] += both.double().arccos().sum().cpu() / math.pi
        if begin < few:
            rows = min(few - begin, len(ids))
            apart += _dependencies(model, ids[:rows], [state[:rows] for state in states])
            run += rows * num_layers * (num_layers - 1) // 2
    cosine, angle = (table / tokens.size for table in (cosine, angle))
    cosine, angle = (table + table.triu(1).T for table in (cosine, angle))
    found = {
        "similarity": cosine.numpy(),
        "angular": angle.numpy(),
        "influence": 1 - np.diagonal(cosine.numpy(), offset=1),
        "dependency": (apart / (few * tokens.shape[1])).numpy(),
        "layers": np.array([float(run)]),
    }
    return {name: np.ascontiguousarray(array) for name, array in found.items()}


def _dependencies(
    model: PreTrainedModel, ids: torch.Tensor, states: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Summed over tokens, cosine distance of layer j's contribution with and without layer i.

    states: the hidden states before each layer and after the last, [batch, window, hidden] each.
    """
    layers = decoder_layers(model)
    _, given = capture(model, layers, ids.to(model.device))
    found = torch.zeros(len(layers), len(layers), dtype=torch.float64)
    for left_out in range(len(layers)):
        state = states[left_out]
        for layer in range(left_out + 1, len(layers)):
            after = advance(model, layers, given, layer, state)
            with_it = (states[layer + 1] - states[layer]).float()
            alike = torch.nn.functional.cosine_similarity(with_it, (after - state).float(), dim=-1)
            found[left_out, layer] = (1 - alike).double().sum().cpu()
            state = after
    return found
