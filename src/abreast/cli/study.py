"""The verb for researchers: study."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from abreast.cli import console, tables
from abreast.errors import AbreastError

if TYPE_CHECKING:
    from abreast.plan import Group, Plan
    from abreast.planner import Calibration, CalibrationSettings
    from abreast.rivals import Measured
    from abreast.study import Changes, Grid, StudySettings, Sweep


@console.verb()
@click.argument("model")
@click.option(
    "-o",
    "--out",
    required=True,
    type=console.RunFolder(),
    help="Folder of results; a later call resumes.",
)
@click.option("--dry-run", is_flag=True, help="Only print the time and memory it would take.")
@console.settings("changes", "abreast.study", "Changes")
@click.option("--sweep", is_flag=True, help="Measure every regular plan instead of every stretch.")
@console.settings("grid", "abreast.study", "Grid")
@click.option("--timed", is_flag=True, help="With --sweep: time each kind of group here as well.")
@click.option("--tasks", help="With --sweep: run these tasks under every plan, as in eval.")
@click.option("--num-fewshot", type=int, help="With --tasks: examples per prompt.")
@click.option("--limit", type=int, help="With --tasks: items of each task.")
@click.option(
    "--baselines", help="Also measure what published methods choose at these depths: 12,10."
)
@console.settings("settings", "abreast.study", "StudySettings")
@console.chat_option
@click.option("--no-plots", is_flag=True, help="Draw no charts (needs no altair).")
@console.json_option
def study(
    model: str,
    out: str,
    dry_run: bool,
    changes: Changes,
    sweep: bool,
    grid: Grid,
    timed: bool,
    baselines: str | None,
    settings: StudySettings,
    no_plots: bool,
    as_json: bool,
    **task_options: Any,
) -> None:
    """Measure what it costs to change MODEL's layers.

    Shuffles, prunes, merges and parallelises every stretch of layers.

    With --sweep, measures the loss, and the speed, under every regular plan instead: adjacent
    groups of one size and wiring.
    """
    from abreast.planner import KL
    from abreast.report import check_drawing, draw_study
    from abreast.runs import check_run
    from abreast.study import study as run

    extra = {name: value for name, value in task_options.items() if value is not None}
    _check_kind(sweep, changes, grid, [*extra, *(["timed"] if timed else [])])
    if sweep and baselines:
        raise AbreastError("--baselines goes without --sweep; leave one of them out")
    depths = _depths(model, baselines, settings.revision) if baselines else []
    if dry_run:
        return _print_expected(model, grid if sweep else changes, settings, depths, as_json)
    if not no_plots:
        check_drawing()
    if sweep:
        return _sweep(model, out, grid, settings, timed, extra, no_plots, as_json)
    texts = None
    if depths:  # what is wrong with folder and texts comes first
        check_run(Path(out), "study")
        texts = _texts(model, out, settings)
    with console.progress_bar("study", as_json) as progress:
        result = run(model, out, changes, settings, step=console.say, progress=progress)
    if not no_plots:
        draw_study(result.rows, result.num_layers, out)
    rivals = _rivals(texts, out, depths, as_json) if texts else ()
    if as_json:
        record = {"baselines": [row.to_dict() for row in rivals]} if depths else {}
        return console.print_json({**result.to_dict(), **record})
    if rivals:
        tables.print_rivals(rivals, KL)
    spent, without_reuse = result.evaluations.spent, result.evaluations.without_reuse
    console.print_table(
        {
            "results": out,
            "rows": str(len(result.rows)),
            "layer evaluations": f"{spent}, {without_reuse} without reuse",
        }
    )


def _print_expected(
    model: str, work: Changes | Grid, settings: StudySettings, depths: list[int], as_json: bool
) -> None:
    """What a study takes, and comparing published methods at these depths."""
    from abreast.checkpoint import open_checkpoint
    from abreast.cli.forecast import comparing, pace_with
    from abreast.families import num_layers_of
    from abreast.planner import candidates_of
    from abreast.study import study_cost

    study_cost(model, work, settings)  # what it refuses comes before the model is loaded
    pace = pace_with(model, settings, settings.devices[0])
    expected = study_cost(model, work, settings, pace)
    rivals = {}
    if depths:
        config = open_checkpoint(model, revision=settings.revision, weights=False).config
        calibration = _calibration(settings)
        groups = candidates_of(config, calibration, in_memory=True)
        methods, num_layers = _methods(), num_layers_of(config)
        rivals = {"baselines": comparing(groups, depths, methods, calibration, num_layers, pace)}
    if as_json:
        return console.print_json(expected.__dict__ | rivals)
    click.echo("\n".join([expected.text, *(f"rivals: {words}" for words in rivals.values())]))


def _texts(model: str, out: str, settings: StudySettings) -> tuple[Calibration, Calibration]:
    """The study's kind of text: that on which published methods choose, and another to judge on."""
    from abreast.planner import search_texts
    from abreast.runs import RIVALS_FOLDER

    folder = Path(out) / RIVALS_FOLDER
    return search_texts(model, folder, _calibration(settings), step=console.say)


def _calibration(settings: StudySettings) -> CalibrationSettings:
    """The settings with which published methods choose."""
    from abreast.plan import WIRING_NAMES
    from abreast.planner import MIN_CALIBRATION_WINDOWS, CalibrationSettings

    names = {field.name for field in fields(CalibrationSettings)}
    common = {name: value for name, value in vars(settings).items() if name in names}
    common |= {"device": settings.devices[0], "wirings": tuple(WIRING_NAMES)}
    common["num_windows"] = max(settings.num_windows, MIN_CALIBRATION_WINDOWS)
    return CalibrationSettings(**common)


def _methods() -> list[str]:
    """The published ones."""
    from abreast.rivals import METHODS

    return [method for method in METHODS if method != "planner"]


def _rivals(
    texts: tuple[Calibration, Calibration], out: str, depths: Sequence[int], as_json: bool
) -> tuple[Measured, ...]:
    """What published methods choose at these depths."""
    from abreast.model import geometry
    from abreast.rivals import compare_rivals
    from abreast.runs import RIVALS_FOLDER

    text = texts[0]
    with console.progress_bar("study", as_json) as progress:
        return compare_rivals(
            {},
            geometry(text.model, text.tokens, text.size, 1, text.prefix),
            *(*texts, Path(out) / RIVALS_FOLDER),
            depths=depths,
            methods=_methods(),
            step=console.say,
            progress=progress,
        )


def _depths(model: str, text: str, revision: str | None) -> list[int]:
    """Numbers of layers left of a model. Raises AbreastError for what is none."""
    from abreast.checkpoint import open_checkpoint
    from abreast.families import num_layers_of

    num_layers = num_layers_of(open_checkpoint(model, revision=revision, weights=False).config)
    depths = [int(part) if part.isdecimal() else 0 for part in text.split(",")]
    if not all(0 < depth < num_layers for depth in depths):
        raise AbreastError(
            f"--baselines {text}: give depths from 1 to {num_layers - 1}, with commas between them"
        )
    return depths


def _check_kind(sweep: bool, changes: Changes, grid: Grid, extra: list[str]) -> None:
    """Raise AbreastError for an option that goes with the other kind of study."""
    other: Any = changes if sweep else grid
    named = [entry.name for entry in fields(other) if getattr(other, entry.name) != entry.default]
    named += [] if sweep else extra
    if named:
        option, word = named[0].replace("_", "-"), "without" if sweep else "with"
        raise AbreastError(f"--{option} goes {word} --sweep; leave one of them out")


def _sweep(
    model: str,
    out: str,
    grid: Grid,
    settings: StudySettings,
    timed: bool,
    task_options: dict[str, Any],
    no_plots: bool,
    as_json: bool,
) -> None:
    from abreast.evaluate import find_tasks
    from abreast.planner import NoisyTiming, ProfileSettings, saved_profile
    from abreast.report import draw_sweep
    from abreast.study import sweep as run

    tasks = None
    if "tasks" in task_options:
        names = task_options.pop("tasks").split(",")
        tasks = find_tasks(names, seed=settings.seed, **task_options)
    elif task_options:
        raise AbreastError(f"--{min(task_options).replace('_', '-')} goes with --tasks; name some")

    def timer(
        folder: Path, groups: Sequence[Group], work: Path, dtype: str
    ) -> Callable[[Plan], float]:
        timing = ProfileSettings(dtype, settings.devices[0], seed=settings.seed)
        trust = settings.trust_remote_code
        try:
            profile = saved_profile(
                folder, groups, work, timing, trust_remote_code=trust, step=console.say
            )
        except NoisyTiming as error:
            console.say(f"no speed is measured: {error}")
            return lambda plan: math.nan
        return profile.latency

    with console.progress_bar("sweep", as_json) as progress:
        result = run(
            model,
            out,
            grid,
            settings,
            tasks=tasks,
            timer=timer if timed else None,
            step=console.say,
            progress=progress,
        )
    if not no_plots:
        draw_sweep(result.rows, result.num_layers, out)
    if as_json:
        return console.print_json(result.to_dict())
    _print_best(result)


def _print_best(result: Sweep) -> None:
    """A row per depth: the plan of lowest loss."""
    from abreast.study import best_by_depth

    (best,) = best_by_depth(result.rows, lambda row: "").values()
    console.print_columns(
        ("depth", "best plan", "loss increase", "perplexity", "KL", "same top"),
        [
            (
                str(depth),
                row.cqil or row.plan,
                f"{row.loss_increase:+.4f} ± {row.loss_stderr:.4f}",
                f"{row.perplexity:.3f}",
                f"{row.kl:.4f}",
                f"{row.same_top:.1%}",
            )
            for depth, row in sorted(best.items(), reverse=True)
        ],
        left={"best plan"},
        borders=False,
        notes=[f"{len(result.rows)} plans: {Path(result.folder) / 'sweep.csv'}"],
    )
