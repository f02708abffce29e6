"""Changed models as programs: the steps they run, and running many of them without repetition.

A *program* is the sequence of steps of a model with some of its layers shuffled, pruned, merged or
put side by side. Programs run in lexicographic order, and the hidden states of the current one are
kept, so steps at the beginning that two programs share run once: the layers before a changed
stretch, the pairs that a longer stretch shares with a shorter one, and equal programs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import nn

from abreast.errors import AbreastError
from abreast.model.branches import by_name, tensor_of
from abreast.model.forward import parameters
from abreast.model.grouping import branches_of, decoder_layers, device_of, grouped, returned
from abreast.model.scores import Reference, token_scores
from abreast.plan import WIRING_NAMES, Group, Norms, Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# By name: layers per group, None for the whole stretch, and wiring.
IN_GROUPS: dict[str, tuple[int | None, str]] = {
    "parallel" if wiring == "lp" else wiring: (None, wiring) for wiring in WIRING_NAMES
} | {
    f"{size}-parallel-{wiring}".removesuffix("-lp"): (size, wiring)
    for wiring in WIRING_NAMES
    for size in range(2, 7)
}
INTERVENTIONS = ("shuffle", "prune", "merge", *IN_GROUPS)
LOGITS = 2**25  # computed at once: 128 MiB in float32


@dataclass(frozen=True)
class Merged:
    """A step: one layer whose weights are the mean of those of `layers`."""

    layers: tuple[int, ...]


@dataclass(frozen=True)
class Mapped:
    """A step: a layer or group in which what some submodules return passes through linear maps.

    maps: (layer, name inside it) -> [hidden, hidden] for the submodule's output. label: tells such
    steps apart, who are equal whatever their maps.
    """

    step: int | Group
    label: str
    maps: Mapping[tuple[int, str], torch.Tensor] = field(default_factory=dict, compare=False)


Step = int | Group | Merged | Mapped
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
        (intervention, start, end): programs_under(
            intervention, start, end, num_layers, permutations=permutations, seed=seed
        )
        for intervention in interventions
        for start in range(num_layers)
        for end in range(start + 1, min(start + longest, num_layers))
    }


def programs_under(
    intervention: str,
    start: int,
    end: int,
    num_layers: int,
    *,
    permutations: int = 3,
    seed: int = 0,
) -> tuple[Program, ...]:
    """Programs of a model of num_layers layers under an intervention on layers start..end.

    shuffle gives `permutations` different ones (orders of the stretch other than its own, drawn by
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
    else:
        size, wiring = IN_GROUPS[intervention]
        width = size or len(inside)
        parts = [inside[at : at + width] for at in range(0, len(inside), width)]
        middles = [tuple(Group.wired(p, wiring) if len(p) > 1 else p[0] for p in parts)]
    before, after = range(start), range(end + 1, num_layers)
    return tuple((*before, *middle, *after) for middle in middles)


def program_of(plan: Plan) -> Program:
    """A plan's stages as steps."""
    return tuple(plan.group_of(stage) or stage[0] for stage in plan.stages)


def planned(programs: Iterable[Program]) -> int:
    """Layer evaluations that `run_programs` spends on these programs, per batch."""
    evaluated, previous = 0, ()  # type: tuple[int, Program]
    for program in sorted(set(programs), key=_order):
        evaluated += cost_of(program[shared_steps(previous, program) :])
        previous = program
    return evaluated


@torch.inference_mode()
def run_programs(
    model: PreTrainedModel,
    ids: torch.Tensor,
    programs: Iterable[Program],
    *,
    prefix: int = 0,
    reference: Program | None = None,
    norms: Norms = "own",
    scored: torch.Tensor | None = None,
    prompts: torch.Tensor | None = None,
) -> Iterator[tuple[Program, np.ndarray, int]]:
    """Yield (program, sums, evaluated) of each program, in the order that shares most work.

    ids: token ids of shape [batch, window]. prefix: how many of them, at the beginning of every
    window, are there before the text. sums: `token_scores` of each window, summed over all tokens
    of its text, without a prefix over all but the first: float64 [batch, 1], the negative
    log-likelihood in nats. With a reference, a program that then runs first, [batch, 4] against it.
    evaluated: layers run for it. A layer keeps its own mask and positions wherever it runs; a
    merged one has those of its first layer. Held in memory: one state [batch, window, hidden] in
    the model's dtype per step of the current program and one more, one merged layer, and the
    reference's log-probabilities [batch, window, vocab], float32. norms: of every group, see
    `apply`. Raises AbreastError for layers of different shape, which cannot be merged, and as
    `apply`.
    """
    layers = decoder_layers(model)
    if any("forward" in vars(layer) and not hasattr(layer, "_hf_hook") for layer in layers):
        raise AbreastError("the model's layers run under a plan or hooks; remove them first")
    ids = ids.to(device_of(model))
    embedded, arguments = capture(model, layers, ids)
    first = [] if reference is None else [reference]
    previous: Program = ()
    states = [embedded]
    scored_against: list[Reference] = []
    if prompts is not None:
        prompts = prompts.to(ids.device)[..., None]
    with _prompts_held(model, layers, prompts):
        for program in [*first, *sorted(set(programs) - set(first), key=_order)]:
            shared = shared_steps(previous, program)
            del states[shared + 1 :]
            for step in program[shared:]:
                states.append(advance(model, layers, arguments, step, states[-1], norms))
            previous, last = program, states[-1]
            if program == reference:
                parts = _logits(model, layers, last, ids, prefix)
                scored_against, theirs = [Reference.of(part) for part in parts], last
            if prompts is not None:
                last = torch.where(prompts, theirs, last)
            sums = _score(model, layers, last, ids, prefix, scored_against, scored)
            yield program, sums, cost_of(program[shared:])


@contextmanager
def _prompts_held(
    model: PreTrainedModel, layers: nn.ModuleList, prompts: torch.Tensor | None
) -> Iterator[None]:
    """Inside, every attention reads at `prompts`, [batch, window, 1], what it read the first time.

    So its keys and values there stay those of the program that runs first. None changes nothing.
    """
    held: dict[nn.Module, torch.Tensor] = {}

    def hold(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        name = parameters(type(module).forward)[1]  # families differ
        x = args[0] if args else kwargs[name]
        if module not in held:
            held[module] = x
            return None
        x = torch.where(cast(torch.Tensor, prompts).to(x.device), held[module], x)
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, name: x})

    with ExitStack() as hooks:
        if prompts is not None:
            attention = branches_of(model, by_parts=True).attention
            for layer in layers:
                module = getattr(layer, attention)
                hooks.enter_context(module.register_forward_pre_hook(hold, with_kwargs=True))
        yield


def split(programs: set[Program], original: Program, workers: int) -> list[set[Program]]:
    """Programs per worker: those that leave the original at the same layer stay together."""
    by_start: dict[int, set[Program]] = {}
    for program in programs:
        by_start.setdefault(shared_steps(program, original), set()).add(program)
    parts: list[set[Program]] = [set() for _ in range(workers)]
    loads = [0] * workers
    for _, together in sorted(by_start.items()):
        lightest = loads.index(min(loads))
        parts[lightest] |= together
        loads[lightest] += planned(together)
    return parts


def _orders(inside: tuple[int, ...], permutations: int, seed: int) -> list[Program]:
    generator = np.random.default_rng((seed, inside[0], inside[-1]))
    orders: list[Program] = []
    while len(orders) < min(permutations, math.factorial(len(inside)) - 1):
        order = tuple(generator.permutation(inside).tolist())
        if order != inside and order not in orders:
            orders.append(order)
    return orders


def _order(program: Program) -> tuple[str, ...]:
    return tuple(name_of((step,)) for step in program)


def name_of(program: Program) -> str:
    """The journal's name of a program, as in "0 1 2+3 4=5 6@label"; "=" joins merged layers."""
    return " ".join(
        f"{name_of((step.step,))}@{step.label}"
        if isinstance(step, Mapped)
        else step.shorthand
        if isinstance(step, Group)
        else "=".join(map(str, step.layers if isinstance(step, Merged) else [step]))
        for step in program
    )


def cost_of(steps: Program) -> int:
    """Layers that the steps evaluate."""
    plain = (step.step if isinstance(step, Mapped) else step for step in steps)
    return sum(len(step.layers) if isinstance(step, Group) else 1 for step in plain)


def shared_steps(one: Program, other: Program) -> int:
    """Number of steps at the beginning that two programs share."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


@torch.inference_mode()
def capture(
    model: PreTrainedModel, layers: nn.ModuleList, ids: torch.Tensor
) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """The input of the first layer, and the other arguments of every layer; runs no layer."""
    arguments: list[dict[str, Any]] = [{} for _ in layers]
    entering: list[torch.Tensor] = []

    def forward_of(index: int) -> Callable[..., Any]:
        def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            arguments[index] = by_name(layers[index], args, kwargs)
            entering.append(hidden_states)
            return returned(model, hidden_states)

        return forward

    with replaced(layers, forward_of):
        model.base_model(input_ids=ids, use_cache=False)
    return entering[0], arguments


@contextmanager
def replaced(
    layers: nn.ModuleList, forward_of: Callable[[int], Callable[..., Any]]
) -> Iterator[None]:
    """Inside, every layer has the `forward` of its index."""
    before = [vars(layer).get("forward") for layer in layers]  # accelerate's, where it spread them
    for index, layer in enumerate(layers):
        layer.forward = forward_of(index)  # type: ignore[assignment,unused-ignore]
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


@torch.inference_mode()
def advance(
    model: PreTrainedModel,
    layers: nn.ModuleList,
    arguments: list[dict[str, Any]],
    step: Step,
    x: torch.Tensor,
    norms: Norms = "own",
) -> torch.Tensor:
    """The hidden state after a step, from the one before it; both [batch, window, hidden].

    Wherever the step runs, both lie on one device.
    """
    device = x.device
    if isinstance(step, Mapped):
        with ExitStack() as hooks:
            for (layer, name), weight in step.maps.items():
                module = layers[layer].get_submodule(name)
                hooks.enter_context(module.register_forward_hook(partial(_map_output, weight)))
            return advance(model, layers, arguments, step.step, x)
    if isinstance(step, Merged):
        merged = _mean_layer(layers, step.layers)
        return tensor_of(merged(x, **arguments[step.layers[0]])).to(device)
    if isinstance(step, Group):
        with grouped(model, Plan(num_layers=len(layers), groups=(step,)), norms=norms):
            for layer in step.layers:  # all but the last pass x through
                x = tensor_of(layers[layer](x, **arguments[layer]))
            return x.to(device)
    return tensor_of(layers[step](x, **arguments[step])).to(device)


def _map_output(weight: torch.Tensor, module: nn.Module, args: Any, output: Any) -> Any:
    first = tensor_of(output)
    mapped = nn.functional.linear(first.float(), weight.to(first.device)).to(first.dtype)
    return (mapped, *output[1:]) if isinstance(output, tuple) else mapped


def _mean_layer(layers: nn.ModuleList, members: tuple[int, ...]) -> nn.Module:
    """A new layer, each weight the mean of the members' weights, taken in float32."""
    weights = [dict(layers[member].named_parameters()) for member in members]
    if any(weight.is_meta for own in weights for weight in own.values()):
        raise AbreastError(
            "layers whose weights wait in memory or on disk cannot be merged; leave merge out of "
            "--interventions, or name a device that holds the model"
        )
    shapes = [{name: weight.shape for name, weight in own.items()} for own in weights]
    for member, shape in zip(members, shapes, strict=True):
        if shape != shapes[0]:
            raise AbreastError(
                f"layers {members[0]} and {member} have weights of different shape and cannot be "
                "merged; leave merge out of --interventions"
            )
    merged = copy.deepcopy(layers[members[0]])
    for name, weight in merged.named_parameters():
        total = weight.float()
        for other in weights[1:]:
            total = total + other[name].to(total.device)
        weight.copy_(total / len(members))
    return merged


def _rows(model: PreTrainedModel, ids: torch.Tensor) -> int:
    """Number of windows whose logits are computed at once."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return max(1, LOGITS // (ids.shape[1] * vocabulary))


def _logits(
    model: PreTrainedModel,
    layers: nn.ModuleList,
    state: torch.Tensor,
    ids: torch.Tensor,
    prefix: int,
) -> Iterator[torch.Tensor]:
    """Logits of all scored tokens from the last layer's output, a few windows at a time.

    The model runs with every layer replaced, so norm, head and whatever a family does around them
    (scaling, soft caps) are its own.
    """
    rows = _rows(model, ids)
    for part, part_ids in zip(state.split(rows), ids.split(rows), strict=True):
        out = returned(model, part)
        with replaced(layers, lambda _, out=out: lambda *_args, **_kwargs: out):  # type: ignore[misc]
            yield model(input_ids=part_ids, use_cache=False).logits[:, max(prefix, 1) - 1 : -1]


def _score(
    model: PreTrainedModel,
    layers: nn.ModuleList,
    state: torch.Tensor,
    ids: torch.Tensor,
    prefix: int,
    reference: list[Reference],
    scored: torch.Tensor | None = None,
) -> np.ndarray:
    """Sums per window as `run_programs` yields; reference: of `_logits`, or empty."""
    targets = ids[:, max(prefix, 1) :].split(_rows(model, ids))
    others: Sequence[Reference | None] = reference or [None] * len(targets)
    parts = zip(_logits(model, layers, state, ids, prefix), targets, others, strict=True)
    scores = np.concatenate([token_scores(*part) for part in parts])
    if scored is not None:  # what is not scored may be no number
        scores = np.where(scored[:, max(prefix, 1) :, None].numpy(), scores, 0.0)
    return np.asarray(scores.sum(1))


@torch.inference_mode()
def geometry(
    model: PreTrainedModel, tokens: np.ndarray, batch_size: int, few: int, prefix: int = 0
) -> dict[str, np.ndarray]:
    """Similarity of the layers' inputs, and how much layers depend on each other.

    tokens: ids, int64 [windows, window]; the dependencies, which take most of the work, are of the
    first `few` windows only. prefix: positions at the beginning of every window that do not count;
    streams there can be a thousand times as large as elsewhere. Returns similarity, angular,
    influence and dependency as in `planner.Stats`, and layers, shape [1]: the layers run, windows
    times layers.
    """
    layers = decoder_layers(model)
    num_layers = len(layers)
    cosine = torch.zeros(num_layers + 1, num_layers + 1, dtype=torch.float64)
    angle = torch.zeros_like(cosine)
    apart = torch.zeros(num_layers, num_layers, dtype=torch.float64)
    evaluated = 0
    for begin in range(0, len(tokens), batch_size):
        ids = torch.from_numpy(tokens[begin : begin + batch_size])
        entering, arguments = capture(model, layers, ids.to(device_of(model)))
        states = [entering]
        for layer in range(num_layers):
            states.append(advance(model, layers, arguments, layer, states[-1]))
        evaluated += num_layers * len(ids)
        unit = [nn.functional.normalize(state[:, prefix:].float(), dim=-1) for state in states]
        for i, j in combinations_with_replacement(range(num_layers + 1), 2):
            cosines = (unit[i] * unit[j]).sum(-1).clamp(-1, 1).double()
            cosine[i, j] += cosines.sum().cpu()
            angle[i, j] += cosines.arccos().sum().cpu() / math.pi
        if begin < few:
            rows = min(few - begin, len(ids))
            apart += _dependencies(model, ids[:rows], [state[:rows] for state in states], prefix)
            evaluated += rows * num_layers * (num_layers - 1) // 2
    counted = tokens.shape[1] - prefix
    cosine, angle = (table / (len(tokens) * counted) for table in (cosine, angle))
    cosine, angle = (table + table.triu(1).T for table in (cosine, angle))
    arrays = {
        "similarity": cosine.numpy(),
        "angular": angle.numpy(),
        "influence": 1 - np.diagonal(cosine.numpy(), offset=1),
        "dependency": (apart / (few * counted)).numpy(),
        "layers": np.array([float(evaluated)]),
    }
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def _dependencies(
    model: PreTrainedModel, ids: torch.Tensor, states: Sequence[torch.Tensor], prefix: int
) -> torch.Tensor:
    """Cosine distance of layer j's contribution with and without layer i, summed over the text.

    Shape [layers, layers], the first index i. states: hidden states before each layer and after
    the last, [batch, window, hidden] each.
    """
    layers = decoder_layers(model)
    _, arguments = capture(model, layers, ids.to(device_of(model)))
    distances = torch.zeros(len(layers), len(layers), dtype=torch.float64)
    for left_out in range(len(layers)):
        state = states[left_out]
        for layer in range(left_out + 1, len(layers)):
            after = advance(model, layers, arguments, layer, state)
            contribution = (states[layer + 1] - states[layer]).float()
            cosine = nn.functional.cosine_similarity(contribution, (after - state).float(), dim=-1)
            distances[left_out, layer] = (1 - cosine[:, prefix:]).double().sum().cpu()
            state = after
    return distances
