"""Every regular plan of a model: its loss, accuracy and speed in one tidy table.

A *regular* plan has groups of one size and wiring, one after another from a first layer on, as in
the experiments of arXiv 2502.02790 (section 4) and arXiv 2404.06709 (section 4): (first layer,
number of groups, group size, wiring).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from abreast.checkpoint import finite, open_checkpoint, replacing, write
from abreast.data import TokenStream
from abreast.errors import AbreastError
from abreast.evaluate import evaluate_tasks
from abreast.families import num_layers_of
from abreast.model import Pace, planned, program_of
from abreast.plan import WIRING_NAMES, Group, Plan
from abreast.runs import check_least, to_csv
from abreast.speed import Setting, forward_cost, hardware_of
from abreast.study.interventions import (
    changed_models,
    check_changes,
    mean_and_error,
    perplexity_of,
)
from abreast.study.running import (
    Progress,
    Say,
    StudyRun,
    check_settings,
    cost_text,
    run_all,
    seconds_of,
    start,
)
from abreast.study.settings import Changes, Grid, StudySettings

if TYPE_CHECKING:
    from abreast.evaluate import Tasks

CSV, RECORD, PARQUET = "sweep.csv", "sweep.json", "sweep.parquet"
Seconds = Callable[[Plan], float]
Timer = Callable[[Path, Sequence[Group], Path, str], Seconds]


@dataclass(frozen=True)
class SweepRow:
    """One plan: `groups` groups of `size` layers, first..last (zero-based, both ends included).

    depth: effective depth. plan: its shorthand. cqil: CQIL's name for it, if it has one. loss: in
    nats per token, with its increase over the original; kl: KL(original || plan), nats per token;
    same_top: share of tokens whose most likely successor is the original's; their standard errors
    are over windows, paired, NaN for one. predicted_ms, measured_ms: of decoding one token,
    computed for the hardware and from a latency profile; speedup: the original's over it; None
    where not known. tasks: score by task, of the metric that `TaskScore` has.
    """

    wiring: str
    size: int
    groups: int
    first: int
    last: int
    depth: int
    plan: str
    cqil: str | None
    loss: float
    loss_increase: float
    loss_stderr: float
    perplexity: float
    kl: float
    kl_stderr: float
    same_top: float
    same_top_stderr: float
    predicted_ms: float | None
    predicted_speedup: float | None
    measured_ms: float | None
    measured_speedup: float | None
    tasks: dict[str, float]


@dataclass(frozen=True)
class Sweep:
    """The result: rows in the order wiring, size, groups, first.

    loss, tasks: the original's. identity: as in `Study`.
    """

    rows: tuple[SweepRow, ...]
    loss: float
    tasks: dict[str, float]
    num_layers: int
    num_tokens: int
    spent: int
    identity: dict[str, Any]
    folder: str

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON-ready values (NaN and infinity become None)."""
        record = asdict(self)
        return {**record, "rows": finite(_flat(self.rows))}


@dataclass(frozen=True)
class StudyCost:
    """What a study takes before it begins: changed models, and full forward passes over the text.

    text: in a sentence. seconds: where a window was timed.
    """

    changed: int
    full_forwards: float
    text: str
    seconds: float | None = None


def plans_of(grid: Grid, num_layers: int) -> list[tuple[str, int, Plan]]:
    """Every regular plan with its wiring and size. Raises AbreastError if the grid has none."""
    bounds = {"the most groups": grid.max_groups, "the least depth": grid.min_depth}
    check_least({label: (n, 1) for label, n in bounds.items() if n is not None})
    check_least({"the least size": (min(grid.sizes, default=0), 2)})
    unknown = [wiring for wiring in grid.wirings if wiring not in WIRING_NAMES]
    if unknown:
        raise AbreastError(
            f"wiring '{unknown[0]}' is unknown; choose from {', '.join(WIRING_NAMES)}"
        )
    plans = []
    for wiring in dict.fromkeys(grid.wirings):
        for size in dict.fromkeys(grid.sizes):
            most = min(num_layers // size, grid.max_groups or num_layers)
            for count in range(1, most + 1):
                if num_layers - count * (size - 1) < (grid.min_depth or 1):
                    break
                plans += [
                    (wiring, size, _regular(wiring, size, count, first, num_layers))
                    for first in range(num_layers - size * count + 1)
                ]
    if not plans:
        raise AbreastError(
            f"no plan of {num_layers} layers has such sizes, wirings and depth; widen the bounds"
        )
    return plans


def study_cost(
    model: str | Path, work: Changes | Grid, settings: StudySettings, pace: Pace | None = None
) -> StudyCost:
    """What `study` or `sweep` would take, from config and headers, reading no weights or text.

    pace: of the model, where it is known. Raises AbreastError for settings that make no sense, and
    as `open_checkpoint` does.
    """
    check_settings(settings)
    _, num_layers = _headers(model, settings)
    if isinstance(work, Grid):
        programs = {program_of(plan) for *_, plan in plans_of(work, num_layers)}
    else:
        check_changes(work)
        changed = changed_models(work, num_layers, settings.seed)
        programs = {program for several in changed.values() for program in several}
    original = tuple(range(num_layers))
    passes, count = planned({original, *programs}) / num_layers, len(programs)
    return StudyCost(
        changed=count,
        full_forwards=passes,
        text=cost_text(passes, count, settings, pace),
        seconds=None if pace is None else seconds_of(pace, passes, count, settings),
    )


def sweep(
    model: str | Path,
    out: str | Path,
    grid: Grid,
    settings: StudySettings,
    *,
    tasks: Tasks | None = None,
    timer: Timer | None = None,
    stream: TokenStream | None = None,
    step: Say = lambda message: None,
    progress: Progress | None = None,
) -> Sweep:
    """Run every plan of the grid; write sweep.csv (and sweep.parquet) and sweep.json to `out`.

    tasks: from `find_tasks`, run under every plan as well; their answers lie in OUT/tasks. timer:
    measures seconds of decoding a token under a plan, given the model's folder, all groups of the
    plans, OUT, and the dtype. stream: instead of the settings' data. step, progress: see `run_all`.

    Resumes as `study` does, also with a larger grid, and gives the same file. Raises AbreastError
    for a grid without plans, unknown hardware, parquet without a package that writes it, and as
    `start`, `run_all` and `model.apply` do, before anything is computed.
    """
    if grid.parquet:
        check_parquet()
    config, num_layers = _headers(model, settings)
    plans = plans_of(grid, num_layers)
    predicted = _predicted(config, grid.hardware) if grid.hardware is not None else None
    run = start("sweep", model, out, settings, reference=True, stream=stream, step=step)
    groups = dict.fromkeys(group for *_, plan in plans for group in plan.groups)
    measured = None
    if timer is not None:
        measured = timer(run.folder, [*groups], run.out, run.settings.dtype)
    programs = {plan: program_of(plan) for *_, plan in plans}
    sums, spent = run_all(run, programs.values(), step=step, progress=progress)
    scores = {plan: sums[program] / run.scored for plan, program in programs.items()}
    run = replace(run, model=None)  # tasks load it under each plan
    answered = _on_tasks(run, [*scores], tasks, step) if tasks is not None else {}
    original = Plan(num_layers=num_layers)
    rows = [
        SweepRow(
            **_about_plan(wiring, size, plan),
            **_scored(scores[plan]),
            **_timed("predicted", plan, predicted),
            **_timed("measured", plan, measured),
            tasks=answered.get(plan, {}),
        )
        for wiring, size, plan in plans
    ]
    result = Sweep(
        rows=tuple(rows),
        loss=float(sums[run.original][:, 0].mean() / run.scored),
        tasks=answered.get(original, {}),
        num_layers=num_layers,
        num_tokens=len(run.tokens) * run.scored,
        spent=spent,
        identity=run.identity,
        folder=str(run.out),
    )
    columns = _flat(rows)
    write(run.out / CSV, to_csv(columns))
    if grid.parquet:
        _write_parquet(columns, run.out / PARQUET)
    summary = {k: v for k, v in result.to_dict().items() if k not in ("rows", "folder")}
    write(run.out / RECORD, json.dumps(summary, indent=2) + "\n")
    return result


def _flat(rows: Iterable[SweepRow]) -> list[dict[str, Any]]:
    """The rows with a column per task, without the columns that no row has."""
    flat = []
    for row in rows:
        values = {entry.name: getattr(row, entry.name) for entry in fields(row)}
        tasks = values.pop("tasks")
        flat.append({**values, **{f"task_{name}": score for name, score in tasks.items()}})
    known = [name for name in flat[0] if any(row[name] is not None for row in flat)]
    return [{name: row[name] for name in known} for row in flat]


def check_parquet() -> None:
    """Raise AbreastError where no package is installed that writes parquet files."""
    if find_spec("pyarrow") is None and find_spec("polars") is None:
        raise AbreastError("--parquet needs pyarrow or polars: pip install pyarrow")


def _write_parquet(rows: Sequence[dict[str, Any]], path: Path) -> None:
    with replacing(path) as staging:
        if find_spec("pyarrow") is not None:
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), staging)
        else:
            import polars

            polars.DataFrame(rows, infer_schema_length=None).write_parquet(staging)


def _regular(wiring: str, size: int, count: int, first: int, num_layers: int) -> Plan:
    starts = range(first, first + count * size, size)
    groups = tuple(Group.wired(range(start, start + size), wiring) for start in starts)
    return Plan(num_layers=num_layers, groups=groups)


def _about_plan(wiring: str, size: int, plan: Plan) -> dict[str, Any]:
    return {
        "wiring": wiring,
        "size": size,
        "groups": len(plan.groups),
        "first": plan.groups[0].layers[0],
        "last": plan.groups[-1].layers[-1],
        "depth": plan.depth,
        "plan": plan.shorthand,
        "cqil": plan.cqil_name,
    }


def _scored(scores: np.ndarray) -> dict[str, Any]:
    """From means per window, [num_windows, 4]: nll, the original's nll, KL, agreement."""
    loss = float(scores[:, 0].mean())
    increase, loss_stderr = mean_and_error(scores[:, 0] - scores[:, 1])
    kl, kl_stderr = mean_and_error(scores[:, 2])
    same_top, same_top_stderr = mean_and_error(scores[:, 3])
    return {
        "loss": loss,
        "loss_increase": increase,
        "loss_stderr": loss_stderr,
        "perplexity": perplexity_of(loss),
        "kl": kl,
        "kl_stderr": kl_stderr,
        "same_top": same_top,
        "same_top_stderr": same_top_stderr,
    }


def _headers(model: str | Path, settings: StudySettings) -> tuple[dict[str, Any], int]:
    """config.json and the number of layers."""
    config = open_checkpoint(model, revision=settings.revision, weights=False).config
    return config, num_layers_of(config)


def _predicted(config: dict[str, Any], hardware: str) -> Seconds:
    """Seconds of decoding a token."""
    setting = Setting(hardware_of(hardware))

    def seconds(plan: Plan) -> float:
        return forward_cost(config, plan, setting).seconds

    seconds(Plan(num_layers=num_layers_of(config)))  # refuses a family that it cannot predict
    return seconds


def _timed(name: str, plan: Plan, seconds: Seconds | None) -> dict[str, Any]:
    if seconds is None:
        return {f"{name}_ms": None, f"{name}_speedup": None}
    taken = seconds(plan)
    original = seconds(Plan(num_layers=plan.num_layers))
    return {f"{name}_ms": 1e3 * taken, f"{name}_speedup": original / taken}


def _on_tasks(
    run: StudyRun, plans: Sequence[Plan], tasks: Tasks, step: Say
) -> dict[Plan, dict[str, float]]:
    """The score of every task under each plan, and of the original, whose plan has no groups."""
    settings = run.settings
    prompts = sum(len(task.instances) for task in tasks.loaded.values())
    step(f"tasks: {prompts} prompts under each of {len(plans)} plans, and of the original")
    answered = {}
    for plan in (Plan(num_layers=len(run.original)), *plans):
        scores = evaluate_tasks(
            run.folder,
            tasks,
            plan=plan,
            out=run.out / "tasks",
            add_bos=settings.add_bos,
            dtype=settings.dtype,
            device=settings.devices[0],
            trust_remote_code=settings.trust_remote_code,
            norms=settings.norms,
        )
        answered[plan] = {name: score.converted for name, score in scores.tasks.items()}
    return answered
