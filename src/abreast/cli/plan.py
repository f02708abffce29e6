"""The verbs that find a plan: measure, plan, optimize."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from abreast.cli.options import (
    device_option,
    force_option,
    json_option,
    parse_size,
    print_json,
    progress_bar,
    remote_option,
    revision_option,
    say,
    seed_option,
)
from abreast.cli.tables import bytes_text, print_table
from abreast.errors import AbreastError

if TYPE_CHECKING:
    from abreast.planner import Calibration, Planned

_QUALITY = ("max_kl", "max_ppl_increase")
_PLACED = ("dtype", "device", "revision", "trust_remote_code")
_PASSED = ("window", "max_group", "force", "seed", "batch_size", *_PLACED)
_EXPECTED = (
    *("window", "max_group", "force", "dtype", "batch_size", "screen", "keep"),
    "revision",
)
_CALIBRATION = (
    click.option("-o", "--out", required=True, help="Folder of the run; goes on with it."),
    click.option("--data", default="stdlib-train", show_default=True, help="As for eval."),
    click.option("--windows", default=128, show_default=True, help="Windows of text."),
    click.option("--window", default=256, show_default=True, help="Tokens in each."),
    click.option("--max-group", default=2, show_default=True, help="Layers in a group, at most."),
    click.option(
        "--wirings", default="lp", show_default=True, help="Of lp, cqil, cqil-full; by commas."
    ),
    click.option("--screen", default=0.125, show_default=True, help="Share that all are tried on."),
    click.option("--keep", default=0.6, show_default=True, help="Share that goes on from there."),
    click.option("--batch-size", default=16, show_default=True, help="Windows at once."),
    click.option("--max-cache", default="1GB", show_default=True, help="States kept for reuse."),
    click.option("--dtype", default="auto", show_default=True, help="float32, bfloat16, float16."),
    force_option,
    revision_option,
    remote_option,
    device_option,
    seed_option,
    json_option,
)
_BUDGET = (
    click.option("--depth", type=int, help="Budget: this many stages."),
    click.option("--max-kl", type=float, help="Budget: at most this KL, nats per token."),
    click.option("--max-ppl-increase", type=float, help="Budget: 0.02 allows perplexity +2 %."),
    click.option("--speedup", type=float, help="Budget: decode this much faster, as predicted."),
    click.option("--hardware", help="Predict speed for this, as for estimate. Default: time here."),
    click.option("--per-group", default=4, show_default=True, help="Plans measured per group."),
    click.option(
        "--baseline-data", default="stdlib", show_default=True, help="Text to compare plans on."
    ),
    click.option("--no-plots", is_flag=True, help="Draw nothing; needs no altair."),
)
Command = Callable[..., Any]


def _with(options: tuple[Callable[[Command], Command], ...]) -> Callable[[Command], Command]:
    return lambda command: functools.reduce(lambda f, option: option(f), reversed(options), command)


@click.command()
@click.argument("model")
@click.option("--dry-run", is_flag=True, help="Only say what it would take.")
@_with(_CALIBRATION)
def measure(model: str, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Measure what each group of MODEL's layers costs alone, and how the layers depend.

    Leaves OUT/calibration/stats.safetensors. An interrupted run goes on where it was.
    """
    from abreast.planner import expect
    from abreast.planner import measure as run

    if dry_run:
        found = expect(
            model,
            num_windows=options["windows"],
            max_cache_bytes=parse_size(options["max_cache"]),
            wirings=options["wirings"].split(","),
            **{name: options[name] for name in _EXPECTED},
        )
        if as_json:
            return print_json(found.__dict__)
        return print_table(
            {
                "candidates": str(found.candidates),
                "takes": f"at most {found.full_forwards:.1f} full forward passes over the text",
                "weights": bytes_text(found.weights),
                "kept states": bytes_text(found.activations),
            }
        )
    calibration = _calibration(model, "calibration", **options)
    with progress_bar("measure", as_json) as progress:
        stats = run(calibration, screen=options["screen"], keep=options["keep"], progress=progress)
    if as_json:
        groups = {group.shorthand: cost.__dict__ for group, cost in stats.groups.items()}
        record = {"loss": stats.loss, "full_forwards": stats.full_forwards, "groups": groups}
        return print_json({**stats.identity, **record})
    ranked = sorted(stats.groups.items(), key=lambda item: item[1].kl)
    print_table(
        {
            "statistics": str(calibration.folder / "stats.safetensors"),
            "took": f"{stats.full_forwards:.1f} full forward passes",
            **{
                group.shorthand: f"KL {cost.kl:.5f} ± {cost.kl_stderr:.5f}, "
                f"loss {cost.loss_increase:+.5f} ± {cost.loss_stderr:.5f}"
                for group, cost in ranked
            },
        }
    )


@click.command()
@click.argument("model")
@_with(_BUDGET)
@click.option("--baselines", "compared", is_flag=True, help="Compare with published ways, too.")
@_with(_CALIBRATION)
def plan(model: str, as_json: bool, **options: Any) -> None:
    """Find the best plan for MODEL within a budget: depth, quality or speed.

    Leaves OUT/plan.yaml, OUT/why.md and OUT/front.json. What was measured before is used again.
    """
    from abreast.planner import explain

    found = _find(model, as_json, **options)
    out = Path(options["out"])
    found.plan.model_copy(update={"source": model}).save(out / "plan.yaml")
    (out / "why.md").write_text(explain(found.plan, found.front), encoding="utf-8")
    if as_json:
        return print_json(found.to_dict())
    _print_plan(found)
    print_table({"plan file": str(out / "plan.yaml"), "reasons": str(out / "why.md")})


@click.command()
@click.argument("model")
@_with(_BUDGET)
@click.option(
    "--no-baselines",
    "compared",
    is_flag=True,
    default=True,
    flag_value=False,
    help="Do not compare with the published ways to choose.",
)
@click.option("--heal", type=click.Choice(["refit", "distill", "both"]), help="Heal as well.")
@click.option("--candidates", default=1, show_default=True, help="Heal the best so many plans.")
@click.option("--heal-steps", default=400, show_default=True, help="Of training, for distill.")
@click.option("--eval-data", default="stdlib", show_default=True, help="Text to evaluate on.")
@click.option("--max-tokens", default=100_000, show_default=True, help="Of it, at most this many.")
@click.option("--rounds", default=12, show_default=True, help="Interleaved rounds of timing.")
@click.option("--tasks", help="Evaluate on these tasks as well, as for eval.")
@click.option("--num-fewshot", type=int, help="With --tasks: examples per prompt.")
@click.option("--limit", type=int, help="With --tasks: items of each.")
@click.option("--no-report", is_flag=True, help="Write no OUT/report; needs fewer packages.")
@_with(_CALIBRATION)
def optimize(
    model: str,
    heal: str | None,
    candidates: int,
    heal_steps: int,
    eval_data: str,
    max_tokens: int,
    rounds: int,
    tasks: str | None,
    num_fewshot: int | None,
    limit: int | None,
    no_report: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Do the whole job: measure, plan, heal if asked, convert, verify, evaluate, time and report.

    Every step leaves its file in OUT and is not done again; with another budget only what is new.
    """
    from abreast.evaluate import find_tasks
    from abreast.heal import Recipe
    from abreast.optimize import Healing
    from abreast.optimize import optimize as run
    from abreast.report import PAGE, check_extra

    if not no_report:
        check_extra()
    if candidates < 1 or (candidates > 1 and heal is None):
        raise AbreastError("--candidates is how many plans to heal: at least 1, and with --heal")
    recipe = Recipe(steps=heal_steps)
    recipe.check()
    healing = None
    if heal is not None:
        data = options["data"]
        healing = Healing(method=heal, data=data, recipe=recipe, candidates=candidates)
    asked = None
    if tasks is not None:
        asked = find_tasks(
            tasks.split(","), num_fewshot=num_fewshot, limit=limit, seed=options["seed"]
        )
    command = ["abreast", *sys.argv[1:]]
    found = _find(model, as_json, best=candidates, timed=True, command=command, **options)
    with progress_bar("optimize", as_json) as progress:
        result = run(
            model,
            options["out"],
            found,
            healing=healing,
            data=eval_data,
            max_tokens=max_tokens,
            rounds=rounds,
            tasks=asked,
            command=command,
            report=not no_report,
            step=say,
            progress=progress,
            **{name: options[name] for name in ("window", "seed", *_PLACED)},
        )
    if as_json:
        return print_json(result.to_dict())
    _print_plan(found)
    print_table(
        {
            f"healed {plan}": f"KL {kl['kl_before']:.5f} -> {kl['kl_after']:.5f}"
            for plan, kl in result.healed.items()
        }
    )
    quality, speed = result.quality, result.speed
    print_table(
        {
            "held-out loss": f"{quality['nll_difference']:+.4f} ± "
            f"{quality['nll_difference_stderr']:.4f} nats",
            "held-out KL": f"{quality['kl']:.4f} ± {quality['kl_stderr']:.4f} nats",
            "same top token": f"{quality['top1_agreement']:.1%}",
            **_kept(result.tasks),
            "prefill": speed["prefill"]["verdict"],
            "decode": speed["decode"]["verdict"],
            "checkpoint": result.converted,
            **({} if no_report else {"report": str(Path(options["out"]) / "report" / PAGE)}),
        }
    )


def _kept(tasks: dict[str, Any] | None) -> dict[str, str]:
    if tasks is None or tasks["kept_mean"] is None:
        return {}
    mean = f"{tasks['kept_mean']:.1%} ± {tasks['kept_mean_stderr']:.1%}"
    return {"accuracy kept": f"{mean}, mean over {len(tasks['tasks'])} tasks"}


def _find(
    model: str,
    as_json: bool,
    compared: bool,
    best: int = 1,
    timed: bool = False,
    command: Sequence[str] | None = None,
    **options: Any,
) -> Planned:
    from abreast.planner import (
        Budget,
        baselines,
        check_depth,
        estimated_profile,
        find_plan,
        profile_here,
    )
    from abreast.report import check_drawing, draw_front
    from abreast.runs import record_environment

    budget = Budget(**{name: options[name] for name in ("depth", *_QUALITY, "speedup")})
    plots = not options["no_plots"]
    if plots:
        check_drawing()
    calibration = _calibration(model, "calibration", **options)
    out = Path(options["out"])
    check_depth(calibration, budget.depth)
    if command is not None:
        record_environment(out, options["device"], command)
    groups, profile = calibration.candidates, None
    if options["hardware"] is not None:
        profile = estimated_profile(
            model, groups, options["hardware"], revision=options["revision"]
        )
    elif timed or budget.speedup is not None:
        placed = {name: options[name] for name in ("seed", *_PLACED)}
        profile = profile_here(model, groups, out, step=say, **placed)
    with progress_bar("plan", as_json) as progress:
        found = find_plan(
            calibration,
            out,
            budget,
            profile=profile,
            best=best,
            step=say,
            progress=progress,
            **{name: options[name] for name in ("per_group", "screen", "keep")},
        )
        series = None
        if compared:
            say("measure the published ways to choose, and the front, on held-out text")
            held_out = _calibration(
                model,
                "held-out",
                **{**options, "data": options["baseline_data"], "windows": 32},
            )
            series = baselines(found, held_out, out, seed=options["seed"], progress=progress)
    if plots:
        draw_front(found, series, out)
    return found


def _calibration(model: str, name: str, **options: Any) -> Calibration:
    from abreast.planner import calibrate

    return calibrate(
        model,
        Path(options["out"]) / name,
        data=options["data"],
        num_windows=options["windows"],
        max_cache_bytes=parse_size(options["max_cache"]),
        wirings=options["wirings"].split(","),
        **{name: options[name] for name in _PASSED},
    )


def _print_plan(found: Planned) -> None:
    cost = found.expected
    rows = {
        "plan": found.plan.shorthand,
        "depth": f"{found.plan.num_layers} -> {found.plan.depth}",
        "calibration KL": f"{cost.kl:.5f} ± {cost.kl_stderr:.5f} nats",
        "calibration loss": f"{cost.loss_increase:+.5f} ± {cost.loss_stderr:.5f} nats",
        "took so far": f"{sum(found.front.full_forwards.values()):.1f} full forward passes",
    }
    if found.profile is not None:
        rows["predicted decode"] = f"{found.profile.speedup(found.plan):.2f}x"
    print_table(rows)
