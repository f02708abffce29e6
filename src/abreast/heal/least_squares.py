"""Healing in closed form: re-solve matrices of grouped layers by ridge regression, untrained.

The plan's groups are walked from first to last. At each, two residual streams are known for some
calibration text: that of the original model, and the one that really arrives when the groups before
it run abreast, already refitted. Three questions about the group are linear, each in one set of its
matrices, and are answered in turn (`STEPS`):

- ``qkv``: from the input that a member's attention now gets, which matrices give the
  pre-activations that the original layer had at its own input? With U the new and U0 the original
  inputs, the answer for every matrix W that reads them is W A, where A = (U0'U + rI)(U'U + rI)^-1
  is the same hidden x hidden map for all of them: for r to infinity, W itself;
- ``gate_up``: the same for the FFN's;
- ``out``: which output matrices of all members together (o and down) make the group end at the
  original's residual stream at that depth? The target is that stream less the group's real input,
  so errors of earlier groups are corrected, not passed on.

Every answer is pulled towards the present weights by a ridge r, chosen on every third batch of the
calibration windows; "keep the weights as they are" is one of the choices. Only second moments of
activations are kept, so memory does not depend on the amount of text, except for the two residual
streams, which wait in host memory. The idea of a linear map fitted to a model's own activations is
that of ReplaceMe (arXiv 2505.02819), which removes layers instead.

``out`` counts errors relative to the size of each token's residual stream, for that is what the
norms behind it make of them. Besides, the first token of a window, at which attention rests when
there is nothing to attend to, has a stream that can be a thousand times as large as any other, and
its squared error would outweigh all the text's.

Where a norm follows a branch (Gemma 2 and 3, OLMo 2 and 3, EXAONE 4, GLM 4), the branch adds
g * W u / rms(W u), g being the norm's gain. With the root mean square as it is now, that is linear
in W as well, so ``out`` solves for diag(g) W on inputs divided by it, and then for a factor of g.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from abreast.errors import AbreastError
from abreast.families import complete, family_of, num_layers_of, sizes
from abreast.heal.recipe import FOLDS, check_enough
from abreast.heal.ridge import Moments, moments_pair, ridge_solution, solve
from abreast.model import (
    advance,
    branches_of,
    capture,
    decoder_layers,
    inference,
    mean_kl,
    predictions_of,
)
from abreast.plan import Group, Plan
from abreast.runs import check_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STEPS = ("qkv", "gate_up", "out")
CHECK_TOKENS = 4096
_TINY = 1e-30
Submodule = tuple[int, str]  # layer, name inside it
Inputs = dict[Submodule, torch.Tensor]


@dataclass(frozen=True)
class Fit:
    """One regression. layers and step say which matrices; ridge is None where they were kept.

    before, after: squared error of what they had to reproduce, as a fraction of its size, on the
    batches that the ridge was chosen on.
    """

    layers: tuple[int, ...]
    step: str
    ridge: float | None
    before: float
    after: float


@dataclass(frozen=True)
class Refit:
    """What `refit` did. kl_before, kl_after: mean KL(original || grouped) in nats on windows that
    no regression saw. kept: the model got its old weights back, because kl_after is not lower.
    """

    fits: tuple[Fit, ...]
    kl_before: float
    kl_after: float
    kept: bool
    num_tokens: int


class _Streams:
    """The residual streams of all calibration batches, in host memory, at one depth of the model.

    original: those of the original model; arriving: those under the plan, refitted so far.
    """

    def __init__(self, model: PreTrainedModel, ids: torch.Tensor, batch_size: int) -> None:
        self.model, self.layers = model, decoder_layers(model)
        self.arguments: dict[int, list[dict[str, Any]]] = {}  # of the layers, by size of the batch
        self.original = []
        # The ridge is chosen on whole batches.
        for batch in ids.tensor_split(max(FOLDS, math.ceil(len(ids) / batch_size))):
            entering, arguments = capture(model, self.layers, batch.to(model.device))
            self.arguments.setdefault(len(batch), arguments)
            self.original.append(entering.cpu())
        self.arriving = list(self.original)

    def submodule(self, layer: int, name: str) -> Any:
        return self.layers[layer].get_submodule(name)

    def run(
        self,
        stream: Sequence[torch.Tensor],
        steps: Sequence[int | Group],
        recorded: Sequence[Submodule] = (),
    ) -> Iterator[tuple[torch.Tensor, Inputs]]:
        """(output, inputs of the recorded submodules) of every batch after these steps."""
        for waiting in stream:
            x = waiting.to(self.model.device)
            inputs: Inputs = {}
            with ExitStack() as hooks:
                for layer, name in recorded:
                    hook = partial(_note_input, inputs, (layer, name))
                    module = self.submodule(layer, name)
                    hooks.enter_context(module.register_forward_pre_hook(hook))
                for step in steps:
                    x = advance(self.model, self.layers, self.arguments[len(x)], step, x)
            yield x, inputs


def _note_input(inputs: Inputs, key: Submodule, module: Any, arguments: tuple[Any, ...]) -> None:
    inputs[key] = arguments[0].to(module.weight.device)


def refit(
    model: PreTrainedModel,
    plan: Plan,
    tokens: np.ndarray,
    *,
    prefix: int = 0,
    steps: Sequence[str] = STEPS,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Refit:
    """Refit the grouped layers of `model` in place, for running under `plan`.

    model: the original, not grouped, on any device; it must be of a family that can be converted.
    tokens: calibration windows, ids of shape [windows, window]; prefix: how many of each are there
    before the text. steps: some of `STEPS`. progress: called with (stages done, stages).
    One window in ten, at least one, is kept from the regressions; if the KL divergence from the
    original is not lower there afterwards, the model gets its old weights back.

    Raises AbreastError for too little text, unknown steps, a plan for another model, an unknown
    family, too little memory on a CUDA device, and activations that are not finite; the model's
    weights are then as they were.
    """
    layers = decoder_layers(model)
    config = model.config.get_text_config(decoder=True).to_dict()
    family = family_of(config)
    _check_refit(model, plan, tokens, steps)
    if "out" in steps and model.device.type == "cuda":
        _check_memory(model, config, plan)
    ids = torch.from_numpy(np.ascontiguousarray(tokens))
    num_held_out = max(1, min(len(ids) // 10, CHECK_TOKENS // ids.shape[1]))
    held_out, ids = ids[:num_held_out], ids[num_held_out:]
    readers = [matrix.name for matrix in family.matrices if matrix.join == "rows"]
    matrices = {
        "qkv": [name for name in readers if not name.startswith("mlp.")],
        "gate_up": [name for name in readers if name.startswith("mlp.")],
        "out": [matrix.name for matrix in family.matrices if matrix.join == "columns"],
    }
    weights = [
        weight
        for group in plan.groups
        for member in group.layers
        for weight in layers[member].parameters()
    ]
    old = [weight.detach().to("cpu", copy=True) for weight in weights]
    with inference(model):
        reference = predictions_of(model, held_out, batch_size, prefix)
        kl_before = mean_kl(model, plan, reference)
        try:
            streams = _Streams(model, ids, batch_size)
            named = [(step, matrices[step]) for step in steps]
            fits = _walk(streams, plan, named, progress)
            kl_after = mean_kl(model, plan, reference)
        except BaseException:
            _restore(weights, old)
            raise
        won = kl_after < kl_before
        if not won:
            _restore(weights, old)
    return Refit(fits, kl_before, kl_after, kept=not won, num_tokens=int(ids[:, prefix:].numel()))


def memory_needed(
    config: Mapping[str, Any],
    *,
    largest_group: int = 2,
    bytes_per_weight: int = 2,
    batch_tokens: int = 16_384,
) -> dict[str, int]:
    """Bytes that `refit` needs on the model's device, by what they are for, from a config.json.

    largest_group: layers in the plan's largest group. batch_tokens: tokens run at once.
    moments: two sets, for the widest regression, ``out``, whose inputs are all members' heads and
    FFN neurons. solve: the ridged matrix and its Cholesky factor.
    activations: recorded inputs of one batch in float32, twice over, and the layer's own. Host
    memory, which grows with the text, is not included.
    """
    config = complete(config)
    family = family_of(config)
    size = sizes(config)
    layer = sum(
        sum(size[part] for part in matrix.rows) * size[matrix.columns] for matrix in family.matrices
    )
    weights = layer * num_layers_of(config) + 2 * size["V"] * size["D"]
    inputs = largest_group * (size["Q"] + size["F"])
    square, cross = 8 * inputs**2, 8 * inputs * size["D"]
    needs = {
        "weights": weights * bytes_per_weight,
        "moments": 2 * (square + cross),
        "solve": 2 * square + 3 * cross,
        "activations": 4 * batch_tokens * (2 * inputs + 8 * size["D"]),
    }
    return {**needs, "total": sum(needs.values())}


def _check_refit(
    model: PreTrainedModel, plan: Plan, tokens: np.ndarray, steps: Sequence[str]
) -> None:
    plan.check_layers(len(decoder_layers(model)))
    if not plan.groups:
        raise AbreastError("the plan has no groups, so there is nothing to heal; add some")
    if not steps or not set(steps) <= set(STEPS):
        raise AbreastError(f"refit steps {list(steps)}: choose some of {', '.join(STEPS)}")
    check_enough(tokens, "refit")
    check_tokens(tokens, model.get_input_embeddings().weight.shape[0])


def _check_memory(model: PreTrainedModel, config: Mapping[str, Any], plan: Plan) -> None:
    needs = memory_needed(config, largest_group=max(len(group.layers) for group in plan.groups))
    free, _ = torch.cuda.mem_get_info(model.device)
    more = needs["total"] - needs["weights"]
    if more > free:
        raise AbreastError(
            f"refit needs {more / 1e9:.0f} GB beside the model, {free / 1e9:.0f} GB are free on "
            f"{model.device}; use --refit-steps qkv,gate_up, smaller groups, or --device cpu"
        )


def _walk(
    streams: _Streams,
    plan: Plan,
    steps: Sequence[tuple[str, list[str]]],
    progress: Callable[[int, int], None] | None,
) -> tuple[Fit, ...]:
    """Refit group after group. steps: each with the names of the matrices it solves in a layer."""
    fits: list[Fit] = []
    for done, stage in enumerate(plan.stages):
        group = plan.group_of(stage)
        readers = [
            (member, names[0])
            for member in stage
            for step, names in steps
            if group is not None and step != "out"
        ]
        original_inputs: list[Inputs] = []
        for number, (x, inputs) in enumerate(streams.run(streams.original, stage, readers)):
            streams.original[number] = x.cpu()
            original_inputs.append({key: value.cpu() for key, value in inputs.items()})
        if group is not None:
            fits += _fit_group(streams, group, steps, original_inputs)
        arriving = streams.run(streams.arriving, stage if group is None else (group,))
        streams.arriving = [x.cpu() for x, _ in arriving]
        if progress is not None:
            progress(done + 1, plan.depth)
    return tuple(fits)


def _fit_group(
    streams: _Streams,
    group: Group,
    steps: Sequence[tuple[str, list[str]]],
    original_inputs: Sequence[Inputs],
) -> Iterator[Fit]:
    for step, names in steps:
        if step == "out":
            yield _fit_outputs(streams, group, names)
            continue
        # attentions in order read what those before them, refitted, leave
        in_turn = group.is_in_order and step == "qkv"
        for members in [(m,) for m in group.layers] if in_turn else [group.layers]:
            yield from _fit_inputs(streams, group, step, members, names, original_inputs)


def _fit_inputs(
    streams: _Streams,
    group: Group,
    step: str,
    members: Sequence[int],
    names: Sequence[str],
    original_inputs: Sequence[Inputs],
) -> Iterator[Fit]:
    """Let members' matrices reproduce, from what they now get, what they gave in the original."""
    weights = {(m, names[0]): streams.submodule(m, names[0]).weight for m in members}
    sums = {
        reader: moments_pair(weight.shape[1], weight.shape[1], weight.device)
        for reader, weight in weights.items()
    }
    for number, (_, inputs) in enumerate(streams.run(streams.arriving, (group,), [*sums])):
        for reader, part in sums.items():
            targets = original_inputs[number][reader].to(weights[reader].device)
            part[number % FOLDS > 0].add(inputs[reader], targets)
    for (member, _), part in sums.items():
        start = torch.eye(len(part[0].gram), dtype=torch.float64, device=part[0].gram.device)
        solution, ridge, before, after = solve(*part, start)
        for name in names if ridge is not None else ():
            weight = streams.submodule(member, name).weight
            weight.copy_(weight.double() @ solution)
        yield Fit((member,), step, ridge, before, after)


@dataclass(frozen=True)
class _Outputs:
    """The matrices with which a group's branches end, and the norms behind them, if any.

    keys: layer and name of each; gains: of the norms, [hidden], ones where there is none.
    """

    keys: list[Submodule]
    modules: list[Any]
    norms: list[nn.Sequential]
    gains: list[torch.Tensor]
    scale: float

    @classmethod
    def of(cls, streams: _Streams, layers: Sequence[int], names: Sequence[str]) -> _Outputs:
        branches = branches_of(streams.model)
        keys = [(layer, name) for layer in layers for name in names]
        modules = [streams.submodule(*key) for key in keys]
        norms = []
        for member, name in keys:
            in_mlp = name.startswith(f"{branches.mlp}.")
            after = branches.after_mlp if in_mlp else branches.after_attention
            norms.append(nn.Sequential(*(streams.submodule(member, norm) for norm in after)))
        # A norm gives back its gain, where all that it reads is 1.
        ones = [module.weight.new_ones(len(module.weight)) for module in modules]
        gains = [norm(one) for norm, one in zip(norms, ones, strict=True)]
        scale = getattr(streams.layers[layers[0]], branches.scale) if branches.scale else 1
        return cls(keys, modules, norms, gains, float(scale))

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for module in (*self.modules, *self.norms) for p in module.parameters()]

    def missing(self, streams: _Streams, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What the branches of a batch should add up to, and the size of each token's stream."""
        device = self.gains[0].device
        target = streams.original[number].to(device).float()
        missing = (target - streams.arriving[number].to(device).float()) / self.scale
        return missing, target.norm(dim=-1, keepdim=True).clamp(min=_TINY)


def _fit_outputs(streams: _Streams, group: Group, names: Sequence[str]) -> Fit:
    """Let a group's output matrices, all together, end at the original's residual stream."""
    outputs = _Outputs.of(streams, group.layers, names)
    device = outputs.gains[0].device
    pairs = list(zip(outputs.modules, outputs.gains, strict=True))
    start = torch.cat([(m.weight.double() * g[:, None]).to(device) for m, g in pairs], dim=1)
    sums = moments_pair(start.shape[1], start.shape[0], device)
    for number, (_, inputs) in enumerate(streams.run(streams.arriving, (group,), outputs.keys)):
        missing, size = outputs.missing(streams, number)
        rows = []
        for key, norm, (module, gain) in zip(outputs.keys, outputs.norms, pairs, strict=True):
            plain = module(inputs[key])
            scaled = plain.float() * gain.float()
            # 1 / rms(plain), 1 without a norm
            factor = (norm(plain).float() * scaled).sum(-1, keepdim=True)
            factor = factor / scaled.square().sum(-1, keepdim=True).clamp(min=_TINY)
            rows.append((inputs[key].float() * factor).to(device))
            if module.bias is not None:
                missing = missing - (factor * gain.float() * module.bias.float()).to(device)
        sums[number % FOLDS > 0].add(torch.cat(rows, dim=-1) / size, missing / size)
    error = sums[0].error(start) + sums[1].error(start)
    solution, ridge, before, after = solve(*sums, start)
    if ridge is None:
        return Fit(group.layers, "out", None, before, after)
    old = [parameter.detach().clone() for parameter in outputs.parameters]
    parts = solution.split([module.weight.shape[1] for module in outputs.modules], dim=1)
    for (module, gain), part in zip(pairs, parts, strict=True):
        # What a norm mutes cannot be solved for.
        heard = (gain.abs() > 1e-3 * gain.abs().max())[:, None]
        part = part.to(gain.device) / gain[:, None]
        module.weight.copy_(torch.where(heard, part.to(module.weight.dtype), module.weight))
    has_norms = any(True for norm in outputs.norms for _ in norm.parameters())
    if has_norms and _fit_gains(streams, group, outputs) >= error:
        _restore(outputs.parameters, old)
        return Fit(group.layers, "out", None, before, before)
    return Fit(group.layers, "out", ridge, before, after)


def _fit_gains(streams: _Streams, group: Group, outputs: _Outputs) -> float:
    """One factor for the gain of each norm behind the group's matrices; the squared error then.

    The norms undo whatever size the solution has, and what is small in it is small for a reason.
    """
    device, count = outputs.gains[0].device, len(outputs.norms)
    sums = Moments(count, 1, device)
    for number, (_, inputs) in enumerate(streams.run(streams.arriving, (group,), outputs.keys)):
        missing, size = outputs.missing(streams, number)
        branches = [
            norm(module(inputs[key])).to(device).float() / size
            for key, module, norm in zip(outputs.keys, outputs.modules, outputs.norms, strict=True)
        ]
        sums.add(torch.stack(branches, dim=-1), (missing / size)[..., None])
    start = torch.ones(1, count, dtype=torch.float64, device=device)
    factors = ridge_solution(sums, start, 1e-6 * float(sums.gram.diagonal().mean()))
    for norm, gain, factor in zip(outputs.norms, outputs.gains, factors[0].tolist(), strict=True):
        for weight in norm.parameters():  # Gemma's has 1 less than the gain
            weight.add_(((factor - 1) * gain).to(weight.dtype))
    return sums.error(factors)


def _restore(weights: Sequence[nn.Parameter], old: Sequence[torch.Tensor]) -> None:
    for weight, value in zip(weights, old, strict=True):
        weight.copy_(value)
