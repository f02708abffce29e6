"""Healing in closed form: re-solve matrices of grouped layers by ridge regression, untrained.

The plan's groups are walked from the first to the last. At each, two residual streams are known for
some calibration text: that of the original model, and the one that really arrives when the groups
before it run abreast, already refitted. Three questions about the group are linear, each in a set
of its matrices, and are asked one after another (`STEPS`):

- ``qkv``: from the input that a member's attention now gets, which matrices give the
  pre-activations that the original layer had at its own input? With U the new and U0 the original
  inputs, the answer for every matrix W that reads them is W A, where A = (U0'U + rI)(U'U + rI)^-1
  is the same hidden x hidden map for all of them: for r to infinity, W itself;
- ``gate_up``: the same for the FFN's;
- ``out``: which output matrices of all members together (o and down) make the group end at the
  original's residual stream at that depth? The target is that stream less the group's real input,
  so that errors of the groups before it are corrected, not passed on.

Every answer is pulled towards the weights that are there by a ridge r, which is chosen by
cross-validation over calibration windows, "keep the weights as they are" being one of the choices.
Only second moments of activations are kept, so memory does not depend on the amount of text, but
for the two residual streams, which wait in host memory. The idea of a linear map fitted to a
model's own activations is that of ReplaceMe (arXiv 2505.02819), which cuts layers instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from abreast.errors import AbreastError
from abreast.families import FAMILIES, Family, complete, family_of, num_layers_of, sizes
from abreast.model import advance, capture, decoder_layers, kl_under, logits_of
from abreast.plan import Group, Plan
from abreast.runs import check_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STEPS = ("qkv", "gate_up", "out")
# Multiples of the mean squared input, tried in this order until the error rises.
RIDGES = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4, 1e-5)
FOLDS = 3
MIN_TOKENS = 512
GUARD_TOKENS = 4096
Progress = Callable[[int, int], None]
Place = tuple[int, str]  # layer, submodule


@dataclass(frozen=True)
class Fit:
    """One regression. layers and step say which matrices; ridge is None where they were kept.

    before, after: held-out squared error of what they had to reproduce, as a fraction of its size.
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

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class _Moments:
    """Sums over tokens: U'U [n, n], U'T [n, m] and |T|^2 of inputs U and targets T, in float64."""

    def __init__(self, inputs: int, targets: int, device: torch.device) -> None:
        self.gram = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self.cross = torch.zeros(inputs, targets, dtype=torch.float64, device=device)
        self.size = 0.0

    def add(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        u, t = inputs.flatten(0, -2).float(), targets.flatten(0, -2).float()
        self.gram += u.T @ u
        self.cross += u.T @ t
        self.size += float(t.double().square().sum())

    def error(self, weight: torch.Tensor) -> float:
        """|T - U W'|^2 for W [m, n]."""
        explained = float((weight.T * self.cross).sum())
        return self.size - 2 * explained + float(((weight @ self.gram) * weight).sum())


def refit(
    model: PreTrainedModel,
    plan: Plan,
    tokens: np.ndarray,
    *,
    steps: Sequence[str] = STEPS,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Refit:
    """Refit the grouped layers of `model` in place, for running under `plan`.

    model: the original, not grouped, on any device; it must be of a family that can be converted.
    tokens: calibration windows, ids of shape [windows, window]. steps: some of `STEPS`; a family
    with norms after its branches (Gemma 2 and 3, OLMo 2 and 3, Exaone 4, GLM 4) has no linear
    ``out`` and goes without. progress: called with (stages done, stages).
    One window in ten, at least one, is kept from the regressions; if the KL divergence from the
    original is not lower there afterwards, the model gets its old weights back.

    Raises AbreastError for too little text, unknown steps, a plan for another model, an unknown
    family, and activations that are not finite; the model's weights are then as they were.
    """
    layers = decoder_layers(model)
    family = family_of(model.config.get_text_config(decoder=True).to_dict())
    _check(plan, len(layers), tokens, steps, model)
    ids = torch.from_numpy(np.ascontiguousarray(tokens))
    guard = max(1, min(len(ids) // 10, GUARD_TOKENS // ids.shape[1]))
    held, ids = ids[:guard], ids[guard:]
    matrices = _matrices(family)
    if family.member_norms:
        steps = tuple(step for step in steps if step != "out")
    changed = {
        (member, name): _at(layers[member], name).weight
        for group in plan.groups
        for member in group.layers
        for names in matrices.values()
        for name in names
    }
    old = {place: weight.detach().to("cpu", copy=True) for place, weight in changed.items()}
    with _evaluating(model), torch.no_grad():
        wanted = logits_of(model, held, batch_size)
        before = kl_under(model, plan, held, wanted)
        try:
            fits = _walk(model, layers, plan, ids, matrices, steps, batch_size, progress)
            after = kl_under(model, plan, held, wanted)
        except BaseException:
            _restore(changed, old)
            raise
        kept = not after < before
        if kept:
            _restore(changed, old)
    return Refit(
        fits=fits,
        kl_before=before,
        kl_after=after,
        kept=kept,
        num_tokens=int(ids.numel()),
    )


def memory_needed(
    config: Mapping[str, Any],
    *,
    largest_group: int = 2,
    bytes_per_weight: int = 2,
    batch_tokens: int = 16_384,
) -> dict[str, int]:
    """Bytes that `refit` needs on the model's device, by what they are for, from a config.json.

    largest_group: layers in the plan's largest group. batch_tokens: tokens run at once.
    moments: one set per fold and one of them all, for the widest regression, ``out``, whose inputs
    are all members' heads and FFN neurons. solve: the ridged matrix and its Cholesky factor.
    activations: recorded inputs of one batch in float32, twice over, and the layer's own. Host
    memory, which grows with the text, is not in it.
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
        "moments": (FOLDS + 1) * (square + cross),
        "solve": 2 * square + 3 * cross,
        "activations": 4 * batch_tokens * (2 * inputs + 8 * size["D"]),
    }
    return {**needs, "total": sum(needs.values())}


def _check(
    plan: Plan, num_layers: int, tokens: np.ndarray, steps: Sequence[str], model: PreTrainedModel
) -> None:
    plan.check_layers(num_layers)
    if not plan.groups:
        raise AbreastError("the plan has no groups, so there is nothing to heal; add some")
    unknown = [step for step in steps if step not in STEPS]
    if unknown or not steps:
        raise AbreastError(f"refit steps {list(steps)}: choose some of {', '.join(STEPS)}")
    if tokens.ndim != 2 or tokens.shape[0] < FOLDS + 1 or tokens.size < MIN_TOKENS:
        raise AbreastError(
            f"{tokens.size} tokens in {len(tokens)} windows are too little text for the "
            f"regression; give at least {MIN_TOKENS} tokens in {FOLDS + 1} windows"
        )
    check_tokens(tokens, model.get_input_embeddings().weight.shape[0])


def _matrices(family: Family) -> dict[str, list[str]]:
    """The matrices of one layer that each step solves."""
    rows = [m.name for m in family.matrices if m.join == "rows"]
    return {
        "qkv": [name for name in rows if not name.startswith("mlp.")],
        "gate_up": [name for name in rows if name.startswith("mlp.")],
        "out": [m.name for m in family.matrices if m.join == "columns"],
    }


def _walk(
    model: PreTrainedModel,
    layers: nn.ModuleList,
    plan: Plan,
    ids: torch.Tensor,
    matrices: Mapping[str, list[str]],
    steps: Sequence[str],
    batch_size: int,
    progress: Progress | None,
) -> tuple[Fit, ...]:
    """Refit group after group. The streams of all batches wait in host memory."""
    # At least as many batches as folds, for a fold is made of whole batches.
    batches = ids.tensor_split(max(FOLDS, math.ceil(len(ids) / batch_size)))
    given: dict[int, list[dict[str, Any]]] = {}
    original = []
    for batch in batches:
        entering, arguments = capture(model, layers, batch.to(model.device))
        given.setdefault(len(batch), arguments)
        original.append(entering.cpu())
    real = list(original)

    def run(
        stream: Sequence[torch.Tensor], stage: Sequence[int | Group], places: Sequence[Place]
    ) -> Iterator[tuple[int, torch.Tensor, dict[Place, torch.Tensor]]]:
        """(batch, output, inputs of places) of every batch of a stream after the given stages."""
        for number, waiting in enumerate(stream):
            x = waiting.to(model.device)
            with _recorded(layers, places) as inputs:
                for step in stage:
                    x = advance(model, layers, given[len(x)], step, x)
            yield number, x, inputs

    fits: list[Fit] = []
    for done, stage in enumerate(plan.stages):
        group = plan.group_of(stage)
        readers = [(k, matrices[step][0]) for k in stage for step in steps if step != "out"]
        # The original's inputs of every member, and its stream after the stage.
        known: list[dict[Place, torch.Tensor]] = []
        for number, x, inputs in run(original, stage, readers if group else ()):
            original[number] = x.cpu()
            known.append({place: value.cpu() for place, value in inputs.items()})
        for step in steps if group else ():
            assert group is not None
            if step == "out":
                fits.append(_fit_outputs(layers, group, matrices[step], run, real, original))
            else:
                for member in stage:
                    place = (member, matrices[step][0])
                    fits.append(
                        _fit_inputs(layers, group, step, place, matrices[step], run, real, known)
                    )
        real = [x.cpu() for _, x, _ in run(real, (group,) if group else stage, ())]
        if progress is not None:
            progress(done + 1, plan.depth)
    return tuple(fits)


def _fit_inputs(
    layers: nn.ModuleList,
    group: Group,
    step: str,
    place: Place,
    names: Sequence[str],
    run: Callable[..., Iterator[tuple[int, torch.Tensor, dict[Place, torch.Tensor]]]],
    real: Sequence[torch.Tensor],
    known: Sequence[dict[Place, torch.Tensor]],
) -> Fit:
    """Let a member's matrices reproduce, from what they now get, what they gave in the original."""
    weights = [_at(layers[place[0]], name).weight for name in names]
    width, device = weights[0].shape[1], weights[0].device
    folds = [_Moments(width, width, device) for _ in range(FOLDS)]
    for number, _, inputs in run(real, (group,), [place]):
        folds[number % FOLDS].add(inputs[place], known[number][place].to(device))
    start = torch.eye(width, dtype=torch.float64, device=device)
    found, ridge, before, after = _solve(folds, start)
    if ridge is not None:
        for weight in weights:
            weight.copy_(weight.double() @ found)
    return Fit((place[0],), step, ridge, before, after)


def _fit_outputs(
    layers: nn.ModuleList,
    group: Group,
    names: Sequence[str],
    run: Callable[..., Iterator[tuple[int, torch.Tensor, dict[Place, torch.Tensor]]]],
    real: Sequence[torch.Tensor],
    original: Sequence[torch.Tensor],
) -> Fit:
    """Let the group's output matrices, all together, end at the original's residual stream."""
    places = [(member, name) for member in group.layers for name in names]
    modules = [_at(layers[member], name) for member, name in places]
    weights = [module.weight for module in modules]
    start = torch.cat([weight.double() for weight in weights], dim=1)
    scale = _scale(layers[group.layers[0]])
    bias = sum(m.bias.float() for m in modules if m.bias is not None)
    folds = [_Moments(start.shape[1], start.shape[0], start.device) for _ in range(FOLDS)]
    for number, _, inputs in run(real, (group,), places):
        missing = original[number].to(start.device).float() - real[number].to(start.device).float()
        joined = torch.cat([inputs[place].float() for place in places], dim=-1)
        folds[number % FOLDS].add(joined, missing / scale - bias)
    found, ridge, before, after = _solve(folds, start)
    if ridge is not None:
        widths = [weight.shape[1] for weight in weights]
        for weight, part in zip(weights, found.split(widths, dim=1), strict=True):
            weight.copy_(part)
    return Fit(group.layers, "out", ridge, before, after)


def _solve(
    folds: Sequence[_Moments], start: torch.Tensor
) -> tuple[torch.Tensor, float | None, float, float]:
    """min over W of |T - U W'|^2 + r |W - start|^2: W, r (None: start kept), errors before, after.

    r is the one with the least error on each fold in turn, solved on the others. It multiplies the
    mean square of all inputs, whichever of them take part, so that it means the same to both.
    """
    total = _Moments(start.shape[1], start.shape[0], start.device)
    for fold in folds:
        total.gram += fold.gram
        total.cross += fold.cross
        total.size += fold.size
    if not math.isfinite(total.size) or not bool(total.gram.isfinite().all()):
        raise AbreastError(
            "activations are not finite (NaN or infinite); load the model in float32 or bfloat16, "
            "or check how its weights were made"
        )
    scale = float(total.gram.diagonal().mean())
    before = sum(fold.error(start) for fold in folds)
    best, ridge = before, None
    for candidate in RIDGES:
        if scale == 0:
            break
        error = 0.0
        for fold in folds:
            # The other folds' sums, made in place and undone: a copy would be as large again.
            total.gram -= fold.gram
            total.cross -= fold.cross
            error += fold.error(_ridge(total, start, candidate * scale))
            total.gram += fold.gram
            total.cross += fold.cross
        if error >= best:
            break
        best, ridge = error, candidate
    found = start if ridge is None else _ridge(total, start, ridge * scale)
    size = max(total.size, torch.finfo(torch.float64).tiny)
    return found, ridge, before / size, best / size


def _ridge(moments: _Moments, start: torch.Tensor, ridge: float) -> torch.Tensor:
    matrix = moments.gram.clone()
    matrix.diagonal().add_(ridge)
    factor = torch.linalg.cholesky(matrix)
    return torch.cholesky_solve(moments.cross + ridge * start.T, factor).T


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _recorded(
    layers: nn.ModuleList, places: Sequence[Place]
) -> Iterator[dict[Place, torch.Tensor]]:
    """What each place is called with, while the block runs."""
    found: dict[Place, torch.Tensor] = {}

    def recorder(place: Place) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def record(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            found[place] = arguments[0]

        return record

    hooks = [
        _at(layers[place[0]], place[1]).register_forward_pre_hook(recorder(place))
        for place in places
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _at(layer: nn.Module, name: str) -> Any:
    return layer.get_submodule(name)


def _scale(layer: nn.Module) -> float:
    """What a family multiplies its branches by before they join the residual stream."""
    model_type = getattr(getattr(layer, "self_attn", layer), "config", None)
    row = FAMILIES.get(getattr(model_type, "model_type", ""))
    return float(getattr(layer, row.branches.scale)) if row and row.branches.scale else 1.0


def _restore(changed: Mapping[Place, nn.Parameter], old: Mapping[Place, torch.Tensor]) -> None:
    with torch.no_grad():
        for place, weight in changed.items():
            weight.copy_(old[place])
