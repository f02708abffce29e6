"""Linear maps that repair a program: for a run of layers left out, and for groups of ours alike.

A step *ends early* where layers behind it are left out. Its maps are fitted by least squares so
that the program's residual stream after it is the original's after those layers; a group's so that
it is the original's after the group. Every map multiplies what one branch (attention or FFN) adds
to the stream, and so could be folded into the branch's output matrix, but for families with norms
behind their branches. Solver and choice of the ridge are those of `heal`'s refit; the ridge pulls
towards the unchanged model.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from abreast.heal import FOLDS, moments_pair, solve
from abreast.model import (
    Mapped,
    Program,
    advance,
    branches_of,
    capture,
    decoder_layers,
    device_of,
    inference,
)
from abreast.plan import Group

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# refit: both branches of groups and of the last layer before a cut. map: ReplaceMe's (arXiv
# 2505.02819, section 3), of the FFN of the last layer before a cut only.
Repair = Literal["refit", "map"]


def marked(program: Program, num_layers: int, repair: Repair) -> Program:
    """The program with those steps marked that `fitted` gives maps; no other than itself if none.

    program: of layers and groups. Where the first layers are left out, no step is before the cut.
    """
    return tuple(
        Mapped(step, repair)
        if isinstance(step, int | Group)
        and ((isinstance(step, Group) and repair == "refit") or end > _layers(step)[-1] + 1)
        else step
        for step, end in zip(program, _ends(program, num_layers), strict=True)
    )


class Streams:
    """A model's residual streams at every depth, of some windows of text, in host memory.

    tokens: int64 [windows, window].
    """

    def __init__(self, model: PreTrainedModel, tokens: np.ndarray, batch_size: int) -> None:
        self.model, self.layers = model, decoder_layers(model)
        ids = torch.from_numpy(np.ascontiguousarray(tokens))
        # At least as many batches as folds, for a fold is made of whole batches.
        self.batches = ids.tensor_split(max(FOLDS, -(-len(ids) // batch_size)))
        self.original: list[list[torch.Tensor]] = []
        with inference(model):
            for batch in self.batches:
                x, arguments = self._enter(batch)
                states = [x.cpu()]
                for layer in range(len(self.layers)):
                    x = advance(model, self.layers, arguments, layer, x)
                    states.append(x.cpu())
                self.original.append(states)

    def _enter(self, batch: torch.Tensor) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        return capture(self.model, self.layers, batch.to(device_of(self.model)))

    def fitted(self, program: Program) -> Program:
        """The program with maps for its marked steps, each fitted with those before it in place."""
        with inference(self.model):
            return self._fitted(program)

    def _fitted(self, program: Program) -> Program:
        arguments = {len(batch): self._enter(batch)[1] for batch in self.batches}
        ends = _ends(tuple(_plain(step) for step in program), len(self.layers))
        arriving, changed = [states[0] for states in self.original], program[0] != 0
        done: list[Any] = []
        for step, end in zip(program, ends, strict=True):
            if not isinstance(step, Mapped):
                arriving = [
                    advance(self.model, self.layers, arguments[len(x)], step, x).cpu()
                    if changed
                    else self.original[number][end]
                    for number, x in enumerate(x.to(device_of(self.model)) for x in arriving)
                ]
                done.append(step)
                continue
            fitted, arriving = self._fit(step, end, arriving, arguments)
            done.append(fitted)
            changed = True
        return tuple(done)

    def _fit(
        self,
        step: Mapped,
        end: int,
        arriving: Sequence[torch.Tensor],
        arguments: dict[int, list[dict[str, Any]]],
    ) -> tuple[Mapped, list[torch.Tensor]]:
        """One step's maps, and the stream after it."""
        layers = _layers(step.step)
        branches, device = branches_of(self.model, by_parts=True), device_of(self.model)
        scale = float(getattr(self.layers[layers[0]], branches.scale)) if branches.scale else 1.0
        ends_of = (
            [branches.attention, *branches.after_attention][-1],
            [branches.mlp, *branches.after_mlp][-1],
        )
        repaired = ends_of if step.label == "refit" else ends_of[1:]
        names = [(layer, name) for name in repaired for layer in layers]
        waiting = []
        hidden = arriving[0].shape[-1]
        start = torch.eye(hidden, dtype=torch.float64, device=device).repeat(1, len(names))
        sums = moments_pair(len(names) * hidden, hidden, device)
        for number, states in enumerate(self.original):
            x = arriving[number].to(device)
            outputs: dict[tuple[int, str], torch.Tensor] = {}
            with ExitStack() as hooks:
                for key in names:
                    module = self.layers[key[0]].get_submodule(key[1])
                    hook = partial(_note_output, outputs, key)
                    hooks.enter_context(module.register_forward_hook(hook))
                x = advance(self.model, self.layers, arguments[len(x)], step.step, x)
            joined = torch.cat([outputs[key].to(device) for key in names], dim=-1)
            missing = (states[end].to(device).float() - x.float()) / scale
            targets = missing + sum(outputs[key].to(device) for key in names)
            relative = states[end].to(device).float().norm(dim=-1, keepdim=True).clamp(min=1e-30)
            sums[number % FOLDS > 0].add(joined / relative, targets / relative)
            waiting.append((x.cpu(), joined.cpu()))
        solution, *_ = solve(*sums, start)
        change = (scale * (solution - start)).float().cpu()
        after = [(x + torch.nn.functional.linear(u, change)).to(x.dtype) for x, u in waiting]
        maps = dict(zip(names, solution.float().split(hidden, dim=1), strict=True))
        return Mapped(step.step, step.label, maps), after


def _ends(program: Program, num_layers: int) -> list[int]:
    """After how many of the original's layers its stream is what follows each step."""
    return [*(_layers(step)[0] for step in program[1:]), num_layers]


def _plain(step: Any) -> Any:
    return step.step if isinstance(step, Mapped) else step


def _layers(step: Any) -> tuple[int, ...]:
    return step.layers if isinstance(step, Group) else (step,)


def _note_output(
    outputs: dict[tuple[int, str], torch.Tensor],
    key: tuple[int, str],
    module: Any,
    args: Any,
    output: Any,
) -> None:
    first = output[0] if isinstance(output, tuple) else output
    outputs[key] = first.float().clone()  # some layers go on in place
