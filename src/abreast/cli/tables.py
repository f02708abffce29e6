"""What the verbs that find, compare and heal plans print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abreast.cli import console

if TYPE_CHECKING:
    from abreast.heal import Healed
    from abreast.optimize import Optimized
    from abreast.plan import Plan
    from abreast.planner import Cost, Objective, Planned
    from abreast.rivals import Measured
    from abreast.speed import Hardware, Setting

ELSEWHERE = "L40S"  # what plans are predicted for beside this machine


def by_reason(reasons: Mapping[str, str]) -> list[str]:
    """A line per reason, after the names that have it."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return [f"{', '.join(same)}: {reason}" for reason, same in names.items()]


def print_rivals(rows: Sequence[Measured], objective: Objective) -> None:
    """A line per method and depth, and where layers abreast are the better buy."""
    from abreast.rivals import caption

    def percent(value: float | None) -> str:
        return "" if value is None else f"{value:.1%}"

    console.print_columns(
        ("depth", "method", "plan", objective.name, "loss", "same", "ms"),
        [
            (
                str(row.depth),
                row.method + (", refit" if row.refit else ""),
                row.plan,
                f"{objective.value(row.cost):.4f} ± {objective.stderr(row.cost):.4f}",
                f"{row.cost.loss_increase:+.4f}",
                percent(row.agreement),
                "" if row.seconds is None else f"{1000 * row.seconds:.2f}",
            )
            for row in sorted(rows, key=lambda row: (-row.depth, row.refit))
        ],
        left=("plan",),
        title="on held-out text (same: next tokens that stay; ms: decode, per token)",
        borders=False,
        notes=[caption(rows, objective)],
    )


def print_expected(record: Mapping[str, Any], as_json: bool) -> None:
    """What `forecast.searching` foretells."""
    from abreast.model import minutes_text

    if as_json:
        return console.print_json(record)
    least, minutes, searches = record["least_depth"], record["minutes"], record["searches"]
    repeated = f"{searches} searches, each " if searches > 1 else ""
    down = "" if least is None else f", down to {least} stages"
    rows = {
        "candidates": str(record["candidates"]),
        "takes": f"{repeated}about {record['likely']:.0f} full forward passes over the text, "
        f"at most {record['full_forwards']:.1f}{down}",
        "here": "unknown before the weights are here"
        if minutes is None
        else f"{minutes_text(60 * minutes)}, by a window that was timed now",
        "weights": console.bytes_text(record["weights"]),
        "kept states": console.bytes_text(record["activations"]),
    }
    rows |= {"baselines": record["baselines"]} if "baselines" in record else {}
    console.print_table(rows)


def print_searches(searches: Sequence[Planned]) -> None:
    """What each search chose, where there are several, and how far they differ."""
    if len(searches) < 2:
        return
    rows, objective = dict[str, str](), searches[0].front.objective
    for number, planned in enumerate(searches, start=1):
        rows[f"search {number}"] = (
            f"{planned.plan.label}: {objective.name} {objective.value(planned.expected):.5f} on "
            f"held-out text, {objective.value(planned.searched):.5f} where it was searched"
        )
    losses = [objective.value(planned.expected) for planned in searches]
    shared = set.intersection(*(set(planned.plan.groups) for planned in searches))
    rows["differ by"] = (
        f"{objective.name} {max(losses) - min(losses):.5f}; "
        f"{len(shared)} groups are in all of their plans"
    )
    console.print_table(rows)


def print_front(model: str, planned: Planned, machine: Hardware | None) -> None:
    """The best plan of every depth or time, what it costs and brings, here and elsewhere."""
    from abreast.planner import estimated_profile

    front, objective = planned.front, planned.front.objective
    plans = front.efficient()
    plans += [planned.plan] * (planned.plan not in plans)
    groups = [group for plan in plans for group in plan.groups]
    here = "here" if machine is None else machine.name
    profiles = {} if planned.profile is None else {here: planned.profile}
    if machine is None:
        revision = front.stats.revision
        profiles[ELSEWHERE] = estimated_profile(model, groups, ELSEWHERE, revision=revision)
    console.print_columns(
        ("", "stages", "plan", objective.name, "loss", *profiles),
        [
            (
                "->" if plan == planned.plan else "",
                str(plan.depth),
                plan.label,
                f"{objective.value(cost):.4f} ± {objective.stderr(cost):.4f}",
                f"{cost.loss_increase:+.4f}",
                *(f"{profile.speedup(plan):.2f}x" for profile in profiles.values()),
            )
            for plan in plans
            for cost in [front.judged(plan)]
        ],
        left=("plan",),
        title=f"the best plan of each {'time' if front.profile else 'depth'}, on held-out text; "
        "decode as predicted",
        borders=False,
    )


def print_engines(planned: Planned) -> None:
    """The best plan of each depth that each engine loads, a line per plan."""
    objective = planned.front.objective
    lines: dict[Plan, tuple[Cost, list[str]]] = {}
    for name, plans in planned.engines.items():
        for plan, cost in plans:
            lines.setdefault(plan, (cost, []))[1].append(name)
    if not planned.engines:
        return
    best = [*planned.front.best().values()]
    console.print_columns(
        ("stages", "plan", objective.name, "engines"),
        [
            (
                str(plan.depth),
                plan.shorthand,
                f"{objective.value(cost):.4f} ± {objective.stderr(cost):.4f}",
                ", ".join(names),
            )
            for plan, (cost, names) in sorted(
                lines.items(), key=lambda item: (-item[0].depth, item[0] not in best)
            )
        ],
        left=("plan", "engines"),
        title="the best plan of each depth that each engine loads, on held-out text",
        borders=False,
        notes=[f"not for {line}" for line in by_reason(planned.not_for)],
    )


def print_plan(model: str, planned: Planned, machine: Hardware | None) -> None:
    from abreast.speed import Setting, read_config

    cost, objective = planned.expected, planned.front.objective
    print_front(model, planned, machine)
    print_engines(planned)
    name, value, searched = objective.name, objective.value(cost), objective.value(planned.searched)
    rows = {
        "plan": planned.plan.label,
        "depth": f"{planned.plan.num_layers} -> {planned.plan.depth}",
        name: f"{value:.5f} ± {objective.stderr(cost):.5f} nats, on held-out text",
        "loss": f"{cost.loss_increase:+.5f} ± {cost.loss_stderr:.5f} nats, on held-out text",
        f"searched {name}": f"{searched:.5f} nats, {searched - value:+.5f} against held-out text",
        "search took": f"{sum(planned.front.full_forwards.values()):.1f} full forward passes",
    }
    if (tasks := planned.on_tasks) is not None:
        rows["accuracy kept"] = (
            f"{tasks.accuracy_kept:.1%} ± {tasks.kept_stderr:.1%} of that above chance"
        )
    if machine is not None and machine.count > 1:
        config = read_config(model, revision=planned.front.stats.revision)
        rows |= {f"on {machine.name}": compared(config, planned.plan, Setting(machine))}
    if planned.profile is not None:
        rows["predicted decode"] = f"{planned.profile.speedup(planned.plan):.2f}x"
    console.print_table(rows)


def compared(config: Mapping[str, Any], plan: Plan, setting: Setting) -> str:
    """How long a pass takes and what memory, sharded, replicated and on one device, and which of
    those that fit wins; empty for one device."""
    from abreast.speed import fastest_way, ways

    by_way = ways(config, plan, setting)
    words = [
        f"{way} {1e3 * entry.converted:.2f} ms and {console.bytes_text(entry.weights)} per device"
        for way, entry in by_way.items()
    ]
    first = fastest_way(by_way)
    return f"{setting.phase}: {', '.join(words)}; fastest: {first}" if first else ""


def print_optimized(result: Optimized, report: Path | None) -> None:
    """What healing won, and what the conversion costs and gains."""
    console.print_table(
        {
            f"healed {plan}": f"KL {kl['kl_before']:.5f} -> {kl['kl_after']:.5f}"
            for plan, kl in result.healed.items()
        }
    )
    quality, accuracy = result.quality, result.tasks
    rows = {
        "held-out loss": f"{quality['nll_difference']:+.4f} ± "
        f"{quality['nll_difference_stderr']:.4f} nats",
        "held-out KL": f"{quality['kl']:.4f} ± {quality['kl_stderr']:.4f} nats",
        "same top token": f"{quality['top1_agreement']:.1%}",
    }
    if accuracy is not None and accuracy["kept_mean"] is not None:
        mean = f"{accuracy['kept_mean']:.1%} ± {accuracy['kept_mean_stderr']:.1%}"
        rows["accuracy kept"] = f"{mean}, mean over {len(accuracy['tasks'])} tasks"
    rows |= {task: result.speed[task]["verdict"] for task in ("prefill", "decode")}
    rows["checkpoint"] = result.converted
    if report is not None:
        rows["report"] = str(report)
    console.print_table(rows)


def healed_rows(healed: Healed) -> dict[str, str]:
    """What healing won on each text, and how."""
    rows = {"converted": f"{healed.out}, {healed.depth} stages: {healed.plan}"}
    for on in healed.judged:
        part = "held-out part of the healing text" if on.known else "a kind not healed on"
        rows[f"{on.text} ({part})"] = (
            f"KL {console.with_error(on, 'kl_before', '.4f')} -> "
            f"{console.with_error(on, 'kl_after', '.4f')}, loss "
            f"{console.with_error(on, 'loss_before', '+.4f')} -> "
            f"{console.with_error(on, 'loss_after', '+.4f')} nats, {on.tokens} tokens"
        )
    if healed.refit is not None:
        verdict = "won nothing, undone" if healed.refit.kept else f"{len(healed.refit.fits)} fits"
        rows["refit"] = f"{verdict}, on {healed.refit.num_tokens} tokens"
    if (trained := healed.distilled) is not None:
        rows["training"] = (
            f"{trained.reason}; best after step {trained.best_step}, {trained.tokens} tokens in "
            f"{trained.seconds / 60:.1f} minutes"
        )
    return rows
