"""The verbs that find a plan: measure, plan, optimize."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from abreast.cli import console, tables
from abreast.errors import AbreastError

if TYPE_CHECKING:
    from abreast.optimize import Checks
    from abreast.planner import (
        Budget,
        Calibration,
        CalibrationSettings,
        Planned,
        Profile,
        Search,
    )
    from abreast.rivals import Measured

out_option = click.option(
    "-o",
    "--out",
    required=True,
    type=console.RunFolder(),
    help="Run folder; a later call resumes from it.",
)
calibration_options = console.settings("calibration", "abreast.planner", "CalibrationSettings")
budget_options = console.settings("budget", "abreast.planner", "Budget")
search_options = console.settings("search", "abreast.planner", "Search")
# Defaults of other options. The names say what they are meant for, a 135M model on two cores:
# benchmarks/RESULTS.md, "Real models".
EFFORTS: dict[str, dict[str, Any]] = {
    "minutes": {"num_windows": 16, "per_group": 2, "max_tokens": 16_384, "rounds": 8},
    "hour": {},
    "night": {"num_windows": 128, "per_group": 8, "max_tokens": 200_000, "method": "both"},
}


def _take_effort(context: click.Context, option: click.Option, effort: str) -> None:
    context.default_map = EFFORTS[effort]


effort_option = click.option(
    "--effort",
    type=click.Choice([*EFFORTS]),
    default="minutes",
    is_eager=True,
    expose_value=False,
    callback=_take_effort,
    help="How much text and search. Explicit options take precedence. night also heals.",
)


@dataclass(frozen=True)
class Order:
    """What a search is to find, and where it goes."""

    model: str
    out: Path
    budget: Budget
    settings: CalibrationSettings
    search: Search
    as_json: bool


class Texts(NamedTuple):
    """Of each search the text that it sees and that which plans are judged on; and the questions
    that they are judged on, where a budget asks for them."""

    pairs: list[tuple[Calibration, Calibration]]
    questions: Calibration | None


@console.verb()
@click.argument("model")
@click.option("--dry-run", is_flag=True, help="Only print the time and memory it would take.")
@out_option
@console.chat_option
@calibration_options
@console.json_option
def measure(
    model: str, dry_run: bool, out: str, calibration: CalibrationSettings, as_json: bool
) -> None:
    """Measure what each group of layers costs alone.

    Also measures how much the layers depend on each other. Writes
    OUT/calibration/stats.safetensors. An interrupted run can be resumed.
    """
    from abreast.planner import calibrate, expect, expected_work
    from abreast.planner import measure as run

    if dry_run:
        from abreast.cli.forecast import searching

        return tables.print_expected(searching(model, calibration), as_json)
    opened = calibrate(model, Path(out) / "calibration", calibration, step=console.say)
    console.say(expected_work(opened, expect(opened.checkpoint, opened.settings)))
    with console.progress_bar("measure", as_json) as progress:
        stats = run(opened, progress=progress)
    if as_json:
        groups = {group.shorthand: cost.__dict__ for group, cost in stats.groups.items()}
        record = {"loss": stats.loss, "full_forwards": stats.full_forwards, "groups": groups}
        return console.print_json({**stats.identity, **record})
    rows = {
        "statistics": str(opened.folder / "stats.safetensors"),
        "took": f"{stats.full_forwards:.1f} full forward passes",
    }
    objective = opened.objective
    for group, cost in sorted(stats.groups.items(), key=lambda item: objective.value(item[1])):
        rows[group.shorthand] = (
            f"{objective.name} {objective.value(cost):.5f} ± {objective.stderr(cost):.5f}, "
            f"loss {cost.loss_increase:+.5f} ± {cost.loss_stderr:.5f}"
        )
    console.print_table(rows)


@console.verb()
@click.argument("model")
@budget_options
@search_options
@click.option("--baselines", is_flag=True, help="Compare with published ways to choose a plan.")
@click.option("--known", is_flag=True, help="Take this package's plan of --depth for MODEL.")
@click.option(
    "--repeat",
    type=click.IntRange(1),
    default=1,
    help="Searches, each on a text of its own, to see how far they differ.",
)
@click.option("--dry-run", is_flag=True, help="Only print the time and memory it would take.")
@out_option
@console.chat_option
@calibration_options
@console.json_option
def plan(
    model: str,
    out: str,
    budget: Budget,
    search: Search,
    baselines: bool,
    known: bool,
    repeat: int,
    dry_run: bool,
    calibration: CalibrationSettings,
    as_json: bool,
) -> None:
    """Find the best plan for MODEL within a budget.

    Writes OUT/plan.yaml, OUT/why.md and OUT/front.json. Reuses earlier measurements in OUT.
    """
    from abreast.checkpoint import write
    from abreast.planner import explain

    if known:
        return _take_known(model, Path(out), budget.depth, calibration.revision)
    order = Order(model, Path(out), budget, search.wired(calibration), search, as_json)
    if dry_run:
        from abreast.cli.forecast import searching

        expected = searching(
            model, order.settings, search, depth=budget.depth, baselines=baselines, repeat=repeat
        )
        return tables.print_expected(expected, as_json)
    texts = _open(order, repeat)
    planned, rivals = _find(order, texts, baselines)
    plan_file, reasons = Path(out) / "plan.yaml", Path(out) / "why.md"
    planned.front.stats.on_record(planned.plan).save(plan_file)
    write(reasons, explain(planned.plan, planned.front))
    searches = _repeated(order, texts, planned)
    if as_json:
        record = {"baselines": [row.to_dict() for row in rivals]} if baselines else {}
        record["searches"] = [run.to_dict() for run in searches]
        return console.print_json({**planned.to_dict(), **record})
    if rivals:
        tables.print_rivals(rivals, planned.front.objective)
    tables.print_plan(model, planned, search.machine)
    command = f"abreast convert {model} --plan {plan_file} -o OUT"
    console.print_table({"plan file": str(plan_file), "reasons": str(reasons), "next": command})
    tables.print_searches(searches)


@console.verb()
@click.argument("model")
@budget_options
@search_options
@effort_option
@click.option(
    "--baselines/--no-baselines", default=False, help="Compare with published ways to choose."
)
@click.option(
    "--heal", "method", type=click.Choice(["refit", "distill", "both"]), help="Heal the plan."
)
@click.option("--candidates", default=1, help="Number of top plans to heal.")
@click.option("--heal-steps", default=400, help="Training steps of healing.")
@click.option("--eval-data", default="auto", help="Text to evaluate on.")
@click.option("--max-tokens", default=100_000, help="Tokens to evaluate on.")
@click.option("--rounds", default=12, help="Interleaved timing rounds.")
@click.option("--new-tokens", default=64, help="Tokens to generate when timing.")
@click.option("--tasks", help="Evaluate on these tasks as well, as in eval.")
@click.option("--num-fewshot", type=int, help="With --tasks: examples per prompt.")
@click.option("--limit", type=int, help="With --tasks: items of each task.")
@click.option("--no-report", is_flag=True, help="Write no OUT/report (needs fewer packages).")
@click.option("--dry-run", is_flag=True, help="Only print how long it would take.")
@out_option
@console.chat_option
@calibration_options
@console.json_option
def optimize(
    model: str,
    out: str,
    budget: Budget,
    search: Search,
    baselines: bool,
    method: str | None,
    candidates: int,
    heal_steps: int,
    eval_data: str,
    max_tokens: int,
    rounds: int,
    new_tokens: int,
    tasks: str | None,
    num_fewshot: int | None,
    limit: int | None,
    no_report: bool,
    dry_run: bool,
    calibration: CalibrationSettings,
    as_json: bool,
) -> None:
    """Do it all: plan, heal, convert, verify, evaluate, time.

    Heals only with --heal, and ends with a report. Without a budget it makes the deepest cut that
    costs no more than quantising an 8B model to 3 bits. Every step leaves a file in OUT and is not
    repeated; another budget adds only what is new.
    """
    from abreast.cli.forecast import resumed
    from abreast.evaluate import find_tasks
    from abreast.heal import Recipe
    from abreast.optimize import Checks, Healing, evaluation_text
    from abreast.optimize import optimize as run
    from abreast.report import PAGE, check_extra
    from abreast.runs import record_environment

    if not no_report:
        check_extra()
    if candidates < 1 or (candidates > 1 and method is None):
        raise AbreastError("--candidates is how many plans to heal: at least 1, and with --heal")
    recipe = Recipe(steps=heal_steps)
    recipe.check()
    healing = None
    if method is not None:
        healing = Healing(method, calibration.data, recipe=recipe, candidates=candidates)
    order = Order(model, Path(out), budget, search.wired(calibration), search, as_json)
    loaded_tasks = None
    if tasks is not None:
        names, seed = tasks.split(","), calibration.seed
        loaded_tasks = find_tasks(names, num_fewshot=num_fewshot, limit=limit, seed=seed)
    checks = Checks(
        data=eval_data,
        max_tokens=max_tokens,
        window=calibration.window,
        rounds=rounds,
        new_tokens=new_tokens,
        tasks=loaded_tasks,
        add_bos=calibration.add_bos,
        dtype=calibration.dtype,
        device=calibration.device,
        revision=calibration.revision,
        trust_remote_code=calibration.trust_remote_code,
        seed=calibration.seed,
    )
    author = cache(partial(_load_and_forecast, order, checks, dry_run))
    if dry_run:
        author()
        return
    if (earlier := resumed(out)) is not None:
        console.say(earlier)
    writer = None if earlier else author
    if eval_data != "auto":  # a file is looked at before a model writes for minutes
        evaluation_text(model, out, checks, writer)
    texts = _open(order, author=writer)
    evaluation_text(model, out, checks, writer, step=console.say)
    if not earlier:
        author()  # where nothing had to be written
    command = ["abreast", *sys.argv[1:]]
    record_environment(order.out, calibration.device, command)
    planned, rivals = _find(order, texts, baselines, best=candidates, timed=True, rounds=rounds)
    with console.progress_bar("optimize", as_json) as progress:
        result = run(
            model,
            out,
            planned,
            healing=healing,
            checks=checks,
            command=command,
            report=not no_report,
            step=console.say,
            progress=progress,
        )
    if as_json:
        return console.print_json(result.to_dict())
    if rivals:
        tables.print_rivals(rivals, planned.front.objective)
    tables.print_plan(model, planned, search.machine)
    tables.print_optimized(result, None if no_report else Path(out) / "report" / PAGE)


def _load_and_forecast(order: Order, checks: Checks, dry_run: bool) -> Any:
    """The loaded original, once it has been said how long everything takes."""
    from abreast.cli.forecast import forecast
    from abreast.optimize import original_of

    original = original_of(order.model, checks)
    expected = forecast(
        original,
        order.model,
        order.out,
        order.settings,
        checks,
        depth=order.budget.depth,
        per_group=order.search.per_group,
        held_out_data=order.search.held_out_data,
    )
    if order.as_json and dry_run:
        console.print_json(asdict(expected))
    else:
        (click.echo if dry_run else console.say)(expected.words)
    return original


def _take_known(model: str, out: Path, depth: int | None, revision: str | None) -> None:
    """Write a plan that comes with the package, if there is one for just this model."""
    from abreast.checkpoint import open_checkpoint
    from abreast.plan import Plan

    plans = Plan.known(open_checkpoint(model, revision=revision).weights_sha256)
    if not plans:
        raise AbreastError(f"this package has no plan for '{model}'; search one without --known")
    if depth not in plans:
        depths = ", ".join(map(str, plans))
        raise AbreastError(f"this package has plans of {depths} stages for it; choose by --depth")
    out.mkdir(parents=True, exist_ok=True)
    plans[depth].save(out / "plan.yaml")
    console.print_table({"plan": plans[depth].label, "plan file": str(out / "plan.yaml")})


def _open(order: Order, repeat: int = 1, author: Callable[[], Any] | None = None) -> Texts:
    """The texts of all searches, one loaded model for all; what is wrong with them is said here."""
    from abreast.planner import check_depth, search_texts, task_questions
    from abreast.report import check_drawing

    search, budget = order.search, order.budget
    if search.plots:
        check_drawing()
    pairs: list[tuple[Calibration, Calibration]] = []
    for number in range(repeat):
        pairs.append(
            search_texts(
                order.model,
                order.out,
                order.settings,
                search.held_out_data,
                repeat=repeat,
                number=number,
                author=pairs[0][0].load if pairs else author,
                step=console.say,
            )
        )
        check_depth(pairs[0][0], budget.depth)
    questions = None
    if budget.keep_quality is not None:
        questions = task_questions(
            order.model, order.out, order.settings, search.questions, pairs[0][0].load
        )
    return Texts(pairs, questions)


def _find(
    order: Order,
    texts: Texts,
    compare_baselines: bool,
    *,
    best: int = 1,
    timed: bool = False,
    rounds: int = 12,
) -> tuple[Planned, tuple[Measured, ...]]:
    """Search, time where a speed is to be predicted, compare with rivals, draw."""
    from abreast.planner import with_profile
    from abreast.report import draw_front
    from abreast.rivals import compare_rivals

    budget, machine = order.budget, order.search.machine
    words = budget.text if machine is None else budget.text.replace("deepest cut", "fastest plan")
    console.say(f"budget: {words}")
    rows: tuple[Measured, ...] = ()
    calibration, held_out = texts.pairs[0]
    profile = _expected_profile(order, calibration)
    with console.progress_bar("plan", order.as_json) as progress:
        planned = _search(order, texts, profile, best, progress)
        if timed or compare_baselines:
            planned = with_profile(planned, calibration, order.out, rounds=rounds, step=console.say)
        if compare_baselines:
            front = planned.front
            rows = compare_rivals(
                front.best(),
                front.stats.geometry,
                calibration,
                held_out,
                order.out,
                profile=planned.profile,
                objective=front.objective,
                seed=order.settings.seed,
                step=console.say,
                progress=progress,
            )
    if order.search.plots:
        draw_front(planned, rows, order.out)
    return planned, rows


def _expected_profile(order: Order, calibration: Calibration) -> Profile | None:
    """Predicted for a machine that is named, measured for a budget of speed, else None."""
    from abreast.planner import estimated_profile, kind_of, profile_here

    search, groups = order.search, calibration.candidates
    if search.machine is not None:
        return estimated_profile(
            order.model,
            groups,
            search.machine,
            unpaired=search.unpaired,
            revision=order.settings.revision,
        )
    if order.budget.speedup is None:
        return None
    return profile_here(calibration, {*map(kind_of, groups)}, order.out, step=console.say)


def _search(
    order: Order,
    texts: Texts,
    profile: Profile | None,
    best: int,
    progress: Callable[[int, int], None] | None,
) -> Planned:
    """The plans within the budget, for each engine where none is named."""
    from abreast.planner import find_plan, keep_accuracy, per_engine

    budget = order.budget
    calibration, held_out = texts.pairs[0]
    planned = find_plan(
        calibration,
        order.out,
        budget,
        held_out=held_out,
        profile=profile,
        best=best,
        per_group=order.search.per_group,
        step=console.say,
        progress=progress,
    )
    if budget.keep_quality is not None and texts.questions is not None:
        planned = keep_accuracy(
            planned, texts.questions, budget.keep_quality, step=console.say, progress=progress
        )
    if not order.settings.engines:
        planned = per_engine(planned, calibration, held_out, step=console.say, progress=progress)
    return planned


def _repeated(order: Order, texts: Texts, planned: Planned) -> list[Planned]:
    """The first search and the others, on other texts, all judged on the same."""
    from abreast.planner import find_plan

    searches, timed = [planned], order.budget.speedup is not None
    for number, (calibration, held_out) in enumerate(texts.pairs[1:], start=2):
        console.say(f"search {number} of {len(texts.pairs)}, on another text")
        with console.progress_bar("plan", order.as_json) as progress:
            again = find_plan(
                calibration,
                calibration.folder.parent,
                order.budget,
                held_out=held_out,
                profile=planned.profile if timed else planned.front.profile,
                per_group=order.search.per_group,
                step=console.say,
                progress=progress,
            )
        searches.append(again)
    return searches
