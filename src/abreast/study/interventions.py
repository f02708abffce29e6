"""The papers' interventions on any model: the loss when a stretch of layers is changed.

For every *stretch* start..end of at least two layers (zero-based, both ends included) and every
intervention of arXiv 2502.02790, section 3, the model is run with that stretch changed:

- ``shuffle``: its layers in random order, averaged over several seeded orders;
- ``prune``: without them;
- ``merge``: one layer in their place, whose every weight is the mean of theirs;
- ``parallel``: all of them as one ``lp`` group;
- ``2-parallel`` to ``6-parallel``: as ``lp`` groups of that size from `start` on; what is
  left over at the end is a smaller group, or a single layer as it was;
- ``cqil``, ``cqil-full``, ``ff``: as one group of another wiring, of CQIL's (arXiv 2404.06709,
  section 3.2) with bypass distance 0 or full causal visibility;
- ``2-parallel-cqil`` and its like: as consecutive groups of another wiring.

`abreast.model` defines what a changed model runs, and runs many without repeating what they have
in common; here is the study of all of them: on disk, resumable, over several devices.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from fnmatch import filter as matching
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from abreast.checkpoint import finite, write
from abreast.data import TokenStream
from abreast.errors import AbreastError
from abreast.model import INTERVENTIONS, Program, cases, cost_of, shared_steps
from abreast.plan import Group, Plan
from abreast.runs import check_least, to_csv
from abreast.study.running import Progress, Say, StudyRun, run_all, start
from abreast.study.settings import Changes, StudySettings

CSV, RECORD = "study.csv", "study.json"


class Row(Protocol):
    """What `best_by_depth` reads of a row."""

    @property
    def depth(self) -> int: ...

    @property
    def loss(self) -> float: ...


R = TypeVar("R", bound=Row)


@dataclass(frozen=True)
class StudyRow:
    """Loss under one intervention on layers start..end.

    depth: effective depth, the number of steps run one after another. cqil: what CQIL calls the
    plan, if it has a name there. loss: mean negative log-likelihood in nats per token.
    loss_increase: over the unmodified model. stderr: its standard error, paired over windows (std /
    sqrt(number of windows); NaN for one); for ``shuffle`` that of the average over the orders
    drawn, which leaves out what other orders would have given.
    """

    intervention: str
    start: int
    end: int
    depth: int
    cqil: str | None
    loss: float
    loss_increase: float
    stderr: float
    perplexity: float


@dataclass(frozen=True)
class Evaluations:
    """Layers run on one batch of windows each; a merged layer counts 1, a group of p layers p.

    spent: counted as they ran, with what was run before an interruption. without_reuse: had every
    row's model run from its first layer. prefix_only: had the unmodified layers before a stretch
    been reused, and nothing else.
    """

    spent: int
    without_reuse: int
    prefix_only: int


@dataclass(frozen=True)
class Study:
    """The result: rows in the order interventions, start, end.

    identity: what the numbers depend on (hashes of model and tokens, sizes, seed, dtype, norms).
    """

    rows: tuple[StudyRow, ...]
    loss: float
    num_layers: int
    num_tokens: int
    evaluations: Evaluations
    identity: dict[str, Any]
    folder: str

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON-ready values (NaN and infinity become None)."""
        record = asdict(self)
        return {**record, "rows": finite(record["rows"])}


def study(
    model: str | Path,
    out: str | Path,
    changes: Changes,
    settings: StudySettings,
    *,
    stream: TokenStream | None = None,
    step: Say = lambda message: None,
    progress: Progress | None = None,
) -> Study:
    """Run the interventions on every stretch; write study.csv and study.json to folder `out`.

    model: folder or Hugging Face id of any family that can run grouped. stream: instead of the
    settings' data. step, progress: see `run_all`.

    Each evaluation is on disk before the next begins. A later call with the same model, tokens,
    seed, window, dtype, norms and batch resumes from there, also with more interventions or
    lengths, and gives the very file that an uninterrupted one would have given; study.csv has the
    rows of the last call. Raises AbreastError for interventions that are unknown, and as `start`,
    `run_all` and `model.apply` do.
    """
    check_changes(changes)
    run = start("study", model, out, settings, reference=False, stream=stream, step=step)
    changed = changed_models(changes, len(run.original), settings.seed)
    programs = [program for several in changed.values() for program in several]
    sums, spent = run_all(run, programs, step=step, progress=progress)
    losses = {program: column[:, 0] / run.scored for program, column in sums.items()}
    original = losses[run.original]
    result = Study(
        rows=tuple(
            _row(case, programs, [losses[p] for p in programs], original, len(run.original))
            for case, programs in changed.items()
        ),
        loss=float(original.mean()),
        num_layers=len(run.original),
        num_tokens=len(run.tokens) * run.scored,
        evaluations=_evaluations(run, [run.original, *programs], spent),
        identity=run.identity,
        folder=str(run.out),
    )
    write(run.out / CSV, to_csv([asdict(row) for row in result.rows]))
    summary = {k: v for k, v in result.to_dict().items() if k not in ("rows", "folder")}
    write(run.out / RECORD, json.dumps(summary, indent=2) + "\n")
    return result


def check_changes(changes: Changes) -> None:
    """Raise AbreastError for unknown interventions and sizes that make no sense."""
    named = changes.interventions
    unknown = [name for name in named if not matching(INTERVENTIONS, name)]
    if unknown or not named:
        wrong = f"intervention '{unknown[0]}' is unknown" if unknown else "no intervention is named"
        raise AbreastError(f"{wrong}; choose from {', '.join(INTERVENTIONS)}")
    if len(set(named)) < len(named):
        raise AbreastError("an intervention is named twice; name each once")
    check_least(
        {
            "the longest stretch": (2 if changes.max_length is None else changes.max_length, 2),
            "the number of permutations": (changes.permutations, 1),
        }
    )


def changed_models(
    changes: Changes, num_layers: int, seed: int
) -> dict[tuple[str, int, int], tuple[Program, ...]]:
    """The programs of every (intervention, start, end)."""
    named = (match for name in changes.interventions for match in matching(INTERVENTIONS, name))
    return cases(
        num_layers,
        list(dict.fromkeys(named)),
        max_length=changes.max_length,
        permutations=changes.permutations,
        seed=seed,
    )


def wins(rows: Iterable[StudyRow], first: str, second: str) -> tuple[int, int, int]:
    """Number of stretches on which `first` loses less than, the same as, more than `second`.

    Rows of the same program are equal to the last bit, others practically never.
    """
    losses: dict[str, dict[tuple[int, int], float]] = {first: {}, second: {}}
    for row in rows:
        if row.intervention in losses:
            losses[row.intervention][row.start, row.end] = row.loss
    both = losses[first].keys() & losses[second].keys()
    pairs = [(losses[first][stretch], losses[second][stretch]) for stretch in both]
    fewer, more = sum(a < b for a, b in pairs), sum(a > b for a, b in pairs)
    return fewer, len(pairs) - fewer - more, more


def best_by_depth(rows: Iterable[R], name: Callable[[R], str]) -> dict[str, dict[int, R]]:
    """By name, the row of lowest loss at every effective depth."""
    best: dict[str, dict[int, R]] = {}
    for row in rows:
        by_depth = best.setdefault(name(row), {})
        if row.depth not in by_depth or row.loss < by_depth[row.depth].loss:
            by_depth[row.depth] = row
    return best


def perplexity_of(loss: float) -> float:
    """exp(loss), infinite where no float holds it."""
    return math.exp(loss) if loss < 709 else math.inf


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean over windows and its standard error, NaN for one window."""
    several = len(values) > 1
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if several else math.nan
    return float(values.mean()), error


def _row(
    case: tuple[str, int, int],
    programs: Sequence[Program],
    losses: Sequence[np.ndarray],
    original: np.ndarray,
    num_layers: int,
) -> StudyRow:
    """One row from the losses per window, shape [num_windows], of its programs and the original.

    case: intervention, start, end. losses: several for shuffle, which are averaged.
    """
    intervention, start, end = case
    groups = tuple(step for step in programs[0] if isinstance(step, Group))
    per_window = np.mean(losses, axis=0)
    increase, stderr = mean_and_error(per_window - original)
    loss = float(per_window.mean())
    return StudyRow(
        intervention,
        start,
        end,
        depth=len(programs[0]),
        cqil=Plan(num_layers=num_layers, groups=groups).cqil_name,
        loss=loss,
        loss_increase=increase,
        stderr=stderr,
        perplexity=perplexity_of(loss),
    )


def _evaluations(run: StudyRun, every: Sequence[Program], spent: int) -> Evaluations:
    original, batches = run.original, len(run.batches)
    after_prefix = sum(cost_of(program[shared_steps(program, original) :]) for program in every)
    return Evaluations(
        spent=spent,
        without_reuse=batches * sum(map(cost_of, every)),
        prefix_only=batches * (len(original) + after_prefix),
    )
