"""Measured plans: what was found, which one a budget buys, why it was chosen; knows no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from abreast.errors import AbreastError
from abreast.figures import figure_class
from abreast.plan import Group, Plan
from abreast.planner.stats import Cost, Stats

FRONT_FILE = "front.json"


@dataclass(frozen=True)
class Profile:
    """Seconds that a forward pass spends per stage, by kind, and beside the stages.

    single: one layer. groups: by kind, see `kind_of`. rest: embedding, head and whatever else does
    not depend on the plan. about: where the numbers come from.
    """

    about: str
    single: float
    groups: Mapping[str, float]
    rest: float

    def latency(self, plan: Plan) -> float:
        """Predicted seconds of one forward pass. Raises AbreastError for a kind not in it."""
        found = self.rest
        for stage in plan.stages:
            group = plan.group_of(stage)
            kind = kind_of(group) if group is not None else None
            if kind is not None and kind not in self.groups:
                raise AbreastError(
                    f"the latency profile has no group of kind '{kind}'; profile again"
                )
            found += self.single if kind is None else self.groups[kind]
        return found

    def speedup(self, plan: Plan) -> float:
        """Predicted latency of the original over that of the plan."""
        return self.latency(Plan(num_layers=plan.num_layers)) / self.latency(plan)


@dataclass(frozen=True)
class Budget:
    """What a plan may cost or must win; exactly one is given.

    depth: effective depth. max_kl: nats per token. max_ppl_increase: relative, 0.02 is 2 %.
    speedup: predicted, needs a profile.
    """

    depth: int | None = None
    max_kl: float | None = None
    max_ppl_increase: float | None = None
    speedup: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in asdict(self).items() if value is not None}
        if len(given) != 1:
            raise AbreastError(
                "give exactly one budget: --depth, --max-kl, --max-ppl-increase or --speedup"
            )
        (name, value), least = *given.items(), 1 if self.speedup is not None else 0
        if not math.isfinite(value) or value <= least:
            raise AbreastError(f"--{name.replace('_', '-')} {value:g} must be more than {least}")

    def met(self, plan: Plan, cost: Cost, profile: Profile | None) -> bool:
        if self.depth is not None:
            return plan.depth == self.depth
        if self.max_kl is not None:
            return cost.kl <= self.max_kl
        if self.max_ppl_increase is not None:
            return cost.ppl_increase <= self.max_ppl_increase
        return _profile(profile).speedup(plan) >= float(self.speedup or 0)

    def exhausted(self, plans: Mapping[Plan, Cost], profile: Profile | None) -> bool:
        """Whether no plan deeper down is needed, given those of one depth."""
        if self.depth is not None:
            return min(plan.depth for plan in plans) <= self.depth
        meets = [self.met(plan, cost, profile) for plan, cost in plans.items()]
        return any(meets) if self.speedup is not None else not any(meets)


@dataclass(frozen=True)
class Front:
    """Every plan that was measured as a whole, with its cost on the calibration text.

    full_forwards: what measuring took at each depth, in full forward passes over that text.
    """

    stats: Stats
    plans: Mapping[Plan, Cost]
    full_forwards: Mapping[int, float]

    def best(self) -> dict[int, Plan]:
        """At each depth, the plan of lowest KL; the original has no entry."""
        found: dict[int, Plan] = {}
        for plan in sorted(self.plans, key=lambda p: (self.plans[p].kl, p.shorthand)):
            found.setdefault(plan.depth, plan)
        return dict(sorted(found.items(), reverse=True))

    def choose(
        self, budget: Budget, profile: Profile | None = None, *, best: int = 1
    ) -> list[Plan]:
        """The plans that the budget buys, best first, at most `best`, all of one depth.

        With a depth or a speed-up, those of lowest KL; with a limit of quality, the fastest (those
        of least depth without a profile). Raises AbreastError for a budget that no measured plan
        meets, naming the nearest that one does.
        """
        meeting = [plan for plan, cost in self.plans.items() if budget.met(plan, cost, profile)]
        if not meeting:
            raise AbreastError(self._nearest(budget, profile))

        def latency(plan: Plan) -> float:
            return profile.latency(plan) if profile is not None else float(plan.depth)

        def quality(plan: Plan) -> tuple[float, str]:
            return self.plans[plan].kl, plan.shorthand

        if budget.depth is None and budget.speedup is None:
            first = min(meeting, key=lambda plan: (latency(plan), *quality(plan)))
        else:
            first = min(meeting, key=quality)
        alike = sorted((plan for plan in meeting if plan.depth == first.depth), key=quality)
        return [first, *(plan for plan in alike if plan != first)][:best]

    def _nearest(self, budget: Budget, profile: Profile | None) -> str:
        if not self.plans:
            return "no plan has been measured; run `abreast plan` on this folder first"
        if budget.depth is not None:
            return unreachable(budget.depth, self.stats.num_layers, self.best())
        if budget.max_kl is not None:
            least = min(each.kl for each in self.plans.values())
            return f"no plan has a KL of at most {budget.max_kl:g}; the least is {least:.2g}"
        if budget.max_ppl_increase is not None:
            least = min(each.ppl_increase for each in self.plans.values())
            return (
                f"no plan raises the perplexity by at most {budget.max_ppl_increase:.2%}; "
                f"the least is {least:.2%}"
            )
        most = max(_profile(profile).speedup(plan) for plan in self.plans)
        return f"no plan is predicted to be {budget.speedup:g}x faster; the most is {most:.2f}x"

    def to_dict(self) -> dict[str, Any]:
        """All of it but the statistics as JSON-ready values."""
        return {
            "identity": dict(self.stats.identity),
            "full_forwards": dict(self.full_forwards),
            "plans": [{"plan": p.shorthand, **asdict(cost)} for p, cost in self.plans.items()],
        }


def unreachable(depth: int, num_layers: int, reachable: Iterable[int]) -> str:
    """What to say of a depth that no plan has; reachable: those that some plan has."""
    near = min(reachable, key=lambda each: (abs(each - depth), each))
    return (
        f"depth {depth} cannot be reached from {num_layers} layers with these groups; "
        f"the nearest is {near} (larger groups: --max-group)"
    )


def kind_of(group: Group) -> str:
    """A group's kind in a profile, such as "lp 2" or "cqil:1 2"."""
    return f"{group.kind} {len(group.layers)}"


def reasons(plan: Plan, front: Front) -> list[dict[str, Any]]:
    """Why each group of a plan: its own cost, how alike its inputs are, what else was tried.

    rank: its place among all candidates by KL alone. dependency: the largest within the group.
    without: of the measured plans of this depth that do without this group, the cheapest; extra_kl:
    how much more that one costs.
    """
    stats = front.stats
    ranked = sorted(stats.groups, key=lambda group: (stats.groups[group].kl, group.shorthand))
    found = []
    for group in plan.groups:
        first, *others = group.layers
        pairs = [(a, b) for a in group.layers for b in group.layers if a < b]
        instead = _instead(plan, group, front)
        found.append(
            {
                "group": group.shorthand,
                "kl": stats.groups[group].kl,
                "kl_stderr": stats.groups[group].kl_stderr,
                "loss_increase": stats.groups[group].loss_increase,
                "rank": ranked.index(group) + 1,
                "candidates": len(ranked),
                "similarity": min(float(stats.similarity[first, other]) for other in others),
                "dependency": max(float(stats.dependency[pair]) for pair in pairs),
                "without": instead.shorthand if instead is not None else None,
                "extra_kl": front.plans[instead].kl - front.plans[plan].kl if instead else None,
            }
        )
    return found


def explain(plan: Plan, front: Front) -> str:
    """One page of Markdown: what the plan costs, and `reasons` as a table."""
    cost, stats = front.plans[plan], front.stats
    tokens = f"{cost.tokens:,} tokens"
    lines = [
        f"# Why {plan.shorthand}",
        "",
        f"{stats.num_layers} layers in {plan.depth} stages. On {tokens} of calibration text this "
        f"plan costs KL {cost.kl:.5f} ± {cost.kl_stderr:.5f} nats per token, loss "
        f"{cost.loss_increase:+.5f} ± {cost.loss_stderr:.5f}, perplexity {cost.ppl_increase:+.2%}. "
        f"Its groups alone cost {sum(stats.groups[g].kl for g in plan.groups):.5f} in sum. "
        f"It is the best of {sum(p.depth == plan.depth for p in front.plans)} plans of this depth "
        "that were measured as a whole.",
        "",
        "| group | KL alone | rank | inputs alike | depends | best plan without it | KL of that |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in reasons(plan, front):
        without = row["without"] or "none measured"
        extra = "" if row["extra_kl"] is None else f"{row['extra_kl']:+.5f}"
        lines.append(
            f"| {row['group'].replace('|', '&#124;')} | {row['kl']:.5f} ± {row['kl_stderr']:.5f} "
            f"| {row['rank']} of {row['candidates']} | {row['similarity']:.3f} "
            f"| {row['dependency']:.3f} | {without.replace('|', '&#124;')} | {extra} |"
        )
    lines += [
        "",
        "*KL alone*: of the model with only this group formed. *rank*: among all candidate groups "
        "by that. *inputs alike*: least cosine similarity of its members' inputs. *depends*: how "
        "much a member's contribution turns when an earlier member is left out (cosine distance). "
        "*best plan without it*: of the measured plans of the same depth, and what its KL is more.",
        "",
    ]
    return "\n".join(lines)


def _instead(plan: Plan, group: Group, front: Front) -> Plan | None:
    others = [p for p in front.plans if p.depth == plan.depth and group not in p.groups]
    return min(others, key=lambda p: (front.plans[p].kl, p.shorthand), default=None)


def _profile(profile: Profile | None) -> Profile:
    if profile is None:
        raise AbreastError("a speed-up needs a latency profile; give --hardware")
    return profile


def draw(
    series: Mapping[str, Mapping[float, Cost]], xlabel: str, title: str, path: str | Path
) -> None:
    """Draw KL against depth or speed-up: a line with error bars per name, the first one thick.

    series: name -> x -> cost. Raises AbreastError without matplotlib.
    """
    figure = figure_class()(figsize=(6.8, 4.6), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for place, (name, line) in enumerate(series.items()):
        places: Sequence[float] = sorted(line)
        costs = [line[at] for at in places]
        axes.errorbar(
            places,
            [max(cost.kl, 1e-6) for cost in costs],
            yerr=[2 * cost.kl_stderr if math.isfinite(cost.kl_stderr) else 0 for cost in costs],
            marker="o",
            markersize=3 if place else 5,
            linewidth=1 if place else 2,
            linestyle="--" if place else "-",
            zorder=2 if place else 3,
            capsize=2,
            label=name,
        )
    axes.set(yscale="log", xlabel=xlabel, title=title)
    axes.set_ylabel("KL divergence from the original (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
