"""What was measured of a model: statistics of its groups, costs of whole plans, and the choice.

Knows no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from abreast.checkpoint import own_file, replacing
from abreast.errors import AbreastError, first_line
from abreast.plan import Group, Plan
from abreast.planner.objective import KL, OF_TASKS, Cost, Objective
from abreast.runs import option

STATS_FILE = "stats.safetensors"
FRONT_FILE = "front.json"
GEOMETRY_ARRAYS = ("similarity", "angular", "influence", "dependency")
# What people accept when they quantise: mean KL of Q3_K_M for Llama 3 8B, by llama.cpp's own table
# (tools/perplexity/README.md), where Q4_K_M is at 0.03 and Q2_K at 0.4.
DEFAULT_KL = 0.1
DEFAULT_KL_IS = "quantising an 8B model to 3 bits costs"
MOST_KL = 3 * DEFAULT_KL  # how far a search goes whose plans are then judged on tasks
_METADATA_KEY = "abreast"
_COST_ARRAYS = ("kl", "kl_stderr", "loss_increase", "loss_stderr", "tokens")
_NOT_FINITE = "is not finite; measure again with --dtype float32, or check the model's weights"


@dataclass(frozen=True)
class Stats:
    """Statistics of one model on one calibration text; a file that is read without torch.

    identity: what they depend on (hashes of model and tokens, sizes, seed, dtype). source: the
    model as named by the user. loss: the original's, nats per token. groups: cost of every
    candidate group formed alone.

    similarity, angular: [L + 1, L + 1], over tokens the mean cosine similarity (CQIL, arXiv
    2404.06709, section 3.1) and mean angular distance, arccos / pi (arXiv 2403.17887, section 4.1),
    of the inputs of layers i and j; place L is the last layer's output. influence: [L], 1 - mean
    cosine of a layer's input and output (ShortGPT, arXiv 2403.03853, section 3.1). dependency:
    [L, L], entry (i, j) for i < j the mean cosine distance of layer j's contribution with and
    without layer i (FFN Fusion, arXiv 2503.18908, section 3); 0 elsewhere.
    full_forwards: cost of measuring, in forward passes of the whole model over the whole
    calibration text, counted in layers actually run. revision: of a model from the Hub.
    """

    identity: Mapping[str, Any]
    source: str
    num_layers: int
    loss: float
    groups: Mapping[Group, Cost]
    similarity: np.ndarray
    angular: np.ndarray
    influence: np.ndarray
    dependency: np.ndarray
    full_forwards: float
    revision: str | None = None

    @property
    def geometry(self) -> dict[str, np.ndarray]:
        """The arrays of the layers' inputs and outputs, by name."""
        return {name: getattr(self, name) for name in GEOMETRY_ARRAYS}

    def on_record(self, plan: Plan) -> Plan:
        """The plan with the model that was measured on record."""
        return plan.made_for(self.source, self.revision, self.identity.get("model"))

    def save(self, path: str | Path) -> None:
        """Write the file that `load` reads, as a whole or not at all."""
        names = [group.shorthand for group in self.groups]
        header = {
            "identity": dict(self.identity),
            "source": self.source,
            "revision": self.revision,
            "num_layers": self.num_layers,
            "loss": self.loss,
            "groups": names,
            "full_forwards": self.full_forwards,
        }
        costs = [asdict(cost) for cost in self.groups.values()]
        columns = {name: [cost[name] for cost in costs] for name in _COST_ARRAYS + OF_TASKS}
        arrays = {n: np.array(c, dtype=np.float64) for n, c in columns.items() if None not in c}
        arrays |= {name: np.ascontiguousarray(getattr(self, name)) for name in GEOMETRY_ARRAYS}
        with replacing(Path(path)) as staging:
            save_file(arrays, staging, metadata={_METADATA_KEY: json.dumps(header)})

    @classmethod
    def load(cls, path: str | Path) -> Stats:
        """Read a stats file. Raises AbreastError for one that is missing, damaged or not finite."""
        try:
            own_file(Path(path), most=None)
            with safe_open(path, framework="np") as file:
                header = json.loads((file.metadata() or {})[_METADATA_KEY])
                costs = (*_COST_ARRAYS, *(name for name in OF_TASKS if name in [*file.keys()]))
                arrays = {name: file.get_tensor(name) for name in (*costs, *GEOMETRY_ARRAYS)}
            num_layers = int(header["num_layers"])
            groups = [Plan.parse(name, num_layers).groups[0] for name in header["groups"]]
            arrays["tokens"] = arrays["tokens"].astype(int)
            columns = {name: arrays[name].tolist() for name in costs}
            stats = cls(
                identity=dict(header["identity"]),
                source=str(header["source"]),
                num_layers=num_layers,
                loss=float(header["loss"]),
                groups={
                    group: Cost(**{name: column[row] for name, column in columns.items()})
                    for row, group in enumerate(groups)
                },
                full_forwards=float(header["full_forwards"]),
                revision=header.get("revision"),
                **{name: arrays[name] for name in GEOMETRY_ARRAYS},
            )
        except FileNotFoundError:
            raise AbreastError(f"no statistics at '{path}'; run `abreast measure` first") from None
        except (
            SafetensorError,
            OSError,
            LookupError,
            ValueError,
            TypeError,
            AttributeError,
        ) as error:
            raise AbreastError(
                f"'{path}' is damaged ({first_line(error)}); delete it and measure again"
            ) from None
        stats.check()
        return stats

    def check(self) -> None:
        """Raise AbreastError unless every number is finite."""
        for name in GEOMETRY_ARRAYS:
            if not np.isfinite(getattr(self, name)).all():
                raise AbreastError(f"the statistics' {name} {_NOT_FINITE}")
        for group, cost in self.groups.items():
            if not np.isfinite([cost.kl, cost.loss_increase]).all():
                raise AbreastError(f"the cost of group {group.shorthand} {_NOT_FINITE}")


@dataclass(frozen=True)
class Profile:
    """Seconds of a forward pass: per stage, by kind, and for the rest; none below zero.

    single: one layer. groups: by kind, see `kind_of`. rest: embedding, head and whatever else does
    not depend on the plan. about: where the numbers come from.
    """

    about: str
    single: float
    groups: Mapping[str, float]
    rest: float

    def impossible(self) -> str | None:
        """A kind of stage that takes no time, as noise can make it; None where all take some."""
        stages = {"one layer": self.single, **self.groups}
        return next((kind for kind, seconds in stages.items() if not seconds > 0), None)

    def saves(self, group: Group) -> float:
        """By how many seconds forming a group makes a forward pass faster. Raises AbreastError for
        a kind not in it."""
        if (kind := kind_of(group)) not in self.groups:
            raise AbreastError(f"the latency profile has no group of kind '{kind}'; profile again")
        return len(group.layers) * self.single - self.groups[kind]

    def latency(self, plan: Plan) -> float:
        """Predicted seconds of one forward pass. Raises AbreastError for a kind not in it."""
        return self.rest + plan.num_layers * self.single - sum(map(self.saves, plan.groups))

    def speedup(self, plan: Plan) -> float:
        """Predicted latency of the original over that of the plan."""
        return self.latency(Plan(num_layers=plan.num_layers)) / self.latency(plan)


@dataclass(frozen=True)
class Budget:
    """Limit on what a plan costs, or the least that it must gain: one of them, or else DEFAULT_KL.

    depth: effective depth. max_kl: nats per token. max_ppl_increase: relative, 0.02 is 2 %.
    speedup: predicted, needs a profile. keep_quality: see `keep_accuracy`, which chooses among the
    plans with a KL of at most MOST_KL.
    """

    depth: int | None = option(None, "Budget: number of stages.")
    max_kl: float | None = option(
        None, f"Budget: largest KL divergence, nats per token. Without any budget: {DEFAULT_KL}."
    )
    max_ppl_increase: float | None = option(None, "Budget: 0.02 allows 2 % more perplexity.")
    speedup: float | None = option(None, "Budget: predicted speed-up of decoding.")
    keep_quality: float | None = option(
        None, "Budget: share of the accuracy above chance to keep on --score-tasks, such as 0.98."
    )

    def __post_init__(self) -> None:
        limits = [(name, value) for name, value in asdict(self).items() if value is not None]
        if len(limits) > 1:
            raise AbreastError(
                "give one budget only: --depth, --max-kl, --max-ppl-increase, --speedup or "
                "--keep-quality"
            )
        for name, value in limits:
            least = 1 if name == "speedup" else 0
            if not math.isfinite(value) or value <= least:
                raise AbreastError(
                    f"--{name.replace('_', '-')} {value:g} must be more than {least}"
                )
        if self.keep_quality is not None and self.keep_quality > 1:
            raise AbreastError(f"--keep-quality {self.keep_quality:g} is a share, of 1 at most")
        if not limits:
            object.__setattr__(self, "max_kl", DEFAULT_KL)

    @property
    def text(self) -> str:
        """The budget in words."""
        if self.depth is not None:
            return f"the plan of least loss with {self.depth} stages"
        if self.max_kl is not None:
            same = f", as much as {DEFAULT_KL_IS}" if self.max_kl == DEFAULT_KL else ""
            return f"the deepest cut with a KL of at most {self.max_kl:g} nats per token{same}"
        if self.max_ppl_increase is not None:
            return f"the deepest cut with at most {self.max_ppl_increase:.1%} more perplexity"
        if self.keep_quality is not None:
            return (
                f"the deepest cut that keeps {self.keep_quality:.1%} of the accuracy above chance"
            )
        return f"the plan of least loss that decodes {self.speedup:g}x as fast"

    def met(self, plan: Plan, cost: Cost, profile: Profile | None) -> bool:
        """Whether a plan of this cost is within the budget."""
        if self.depth is not None:
            return plan.depth == self.depth
        if self.max_kl is not None or self.keep_quality is not None:
            return cost.kl <= (self.max_kl or MOST_KL)
        if self.max_ppl_increase is not None:
            return cost.ppl_increase <= self.max_ppl_increase
        return _required(profile).speedup(plan) >= float(self.speedup or 0)

    def exhausted(self, plans: Mapping[Plan, Cost], profile: Profile | None) -> bool:
        """Whether the search can stop, given the plans of the depth just reached."""
        if self.depth is not None:
            return min(plan.depth for plan in plans) <= self.depth
        meets = [self.met(plan, cost, profile) for plan, cost in plans.items()]
        return any(meets) if self.speedup is not None else not any(meets)


@dataclass(frozen=True)
class Front:
    """Every plan that was measured as a whole, with its cost on the calibration text.

    full_forwards: cost of measuring each depth, in full forward passes over that text. objective:
    what the plans are ranked by. held_out: costs of the `efficient` plans on text that the search
    has not seen; empty where none was measured. profile: by whose times they were searched, None
    where by depth.
    """

    stats: Stats
    plans: Mapping[Plan, Cost]
    full_forwards: Mapping[int, float]
    objective: Objective = KL
    held_out: Mapping[Plan, Cost] = field(default_factory=dict)
    profile: Profile | None = None

    def among(self, groups: Iterable[Group]) -> Front:
        """The front with the plans that consist of these groups only."""
        known = set(groups)
        plans = {plan: cost for plan, cost in self.plans.items() if known.issuperset(plan.groups)}
        return replace(self, plans=plans)

    def judged(self, plan: Plan) -> Cost:
        """The cost of a plan on held-out text, where it was measured there."""
        return self.held_out.get(plan, self.plans[plan])

    def rank(self, plan: Plan) -> tuple[float, str]:
        """Sort key of a measured plan, the best first."""
        return self.objective.value(self.plans[plan]), plan.shorthand

    def best(self) -> dict[int, Plan]:
        """The best plan of each depth, deepest first; the original has no entry."""
        best: dict[int, Plan] = {}
        for plan in sorted(self.plans, key=self.rank):
            best.setdefault(plan.depth, plan)
        return dict(sorted(best.items(), reverse=True))

    def efficient(self) -> list[Plan]:
        """The best plan of each depth, or, searched by time, those that cost less than every faster
        one; the slowest first."""
        if (profile := self.profile) is None:
            return [*self.best().values()]
        best: list[Plan] = []
        for plan in sorted(self.plans, key=lambda plan: (profile.latency(plan), self.rank(plan))):
            if profile.speedup(plan) > 1 and not (best and self.rank(plan) >= self.rank(best[-1])):
                best.append(plan)
        return best[::-1]

    def choose(
        self, budget: Budget, profile: Profile | None = None, *, best: int = 1
    ) -> list[Plan]:
        """Plans within the budget, best first, at most `best`, all of one depth.

        With a depth or a speed-up, those best by the objective on the calibration text; with a
        limit on quality, which has to hold on held-out text where that was measured, the fastest
        (without a profile, those of least depth). Raises AbreastError for a budget that no measured
        plan meets, naming the nearest one that can be met.
        """
        meeting = [
            plan for plan, cost in self._limited(budget).items() if budget.met(plan, cost, profile)
        ]
        if not meeting:
            raise self._unmet(budget, profile)

        def latency(plan: Plan) -> float:
            return profile.latency(plan) if profile is not None else float(plan.depth)

        if budget.depth is None and budget.speedup is None:
            first = min(meeting, key=lambda plan: (latency(plan), self.rank(plan)))
        else:
            first = min(meeting, key=self.rank)
        others = [
            plan
            for plan in self.plans
            if plan.depth == first.depth and budget.met(plan, self.judged(plan), profile)
        ]
        return [first, *sorted({*others} - {first}, key=self.rank)][:best]

    def _limited(self, budget: Budget) -> Mapping[Plan, Cost]:
        """The plans that a budget chooses from, with the costs that it limits."""
        searched = budget.depth is not None or budget.speedup is not None
        return self.plans if searched else self.held_out or self.plans

    def _unmet(self, budget: Budget, profile: Profile | None) -> AbreastError:
        if not self.plans:
            return AbreastError("no plan has been measured; run `abreast plan` here first")
        if budget.depth is not None:
            return unreachable(budget.depth, self.stats.num_layers, self.best())
        if budget.max_kl is not None or budget.keep_quality is not None:
            least, most = (
                min(c.kl for c in self._limited(budget).values()),
                budget.max_kl or MOST_KL,
            )
            message = f"no plan has a KL of at most {most:g}; the least is {least:.2g}"
        elif budget.max_ppl_increase is not None:
            least = min(cost.ppl_increase for cost in self._limited(budget).values())
            message = (
                f"no plan raises the perplexity by at most {budget.max_ppl_increase:.2%}; "
                f"the least is {least:.2%}"
            )
        else:
            most = max(_required(profile).speedup(plan) for plan in self.plans)
            message = (
                f"no plan is predicted to be {budget.speedup:g}x faster; the most is {most:.2f}x"
            )
        return AbreastError(message)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the statistics as JSON-ready values."""
        return {
            "identity": dict(self.stats.identity),
            "full_forwards": dict(self.full_forwards),
            "plans": [{"plan": p.shorthand, **asdict(cost)} for p, cost in self.plans.items()],
            "held_out": [{"plan": p.shorthand, **asdict(c)} for p, c in self.held_out.items()],
        }


def unreachable(depth: int, num_layers: int, reachable: Iterable[int]) -> AbreastError:
    """The error for a depth that no plan has, naming the nearest of those that some plan has."""
    nearest = min(reachable, key=lambda other: (abs(other - depth), other))
    return AbreastError(
        f"depth {depth} cannot be reached from {num_layers} layers with these groups; "
        f"the nearest is {nearest} (larger groups: --max-group)"
    )


def kind_of(group: Group) -> str:
    """A group's kind in a profile, such as "lp 2" or "cqil:1 2"."""
    return f"{group.kind} {len(group.layers)}"


def reasons(plan: Plan, front: Front) -> list[dict[str, Any]]:
    """Why each group of a plan was chosen: its own cost, its inputs, and the best alternative.

    rank: among all candidates, by the objective alone. similarity: the least of its members'
    inputs. dependency: the largest within the group. without: the best measured plan of this depth
    that does without the group; extra_kl (or another objective's key): how much worse it is.
    """
    stats, objective = front.stats, front.objective
    alone = {group: objective.value(cost) for group, cost in stats.groups.items()}
    ranked = sorted(alone, key=lambda group: (alone[group], group.shorthand))
    rows = []
    for group in plan.groups:
        cost = stats.groups[group]
        first, *others = group.layers
        pairs = [(a, b) for a in group.layers for b in group.layers if a < b]
        rivals = [p for p in front.plans if p.depth == plan.depth and group not in p.groups]
        rival = min(rivals, key=front.rank, default=None)
        rows.append(
            {
                "group": group.shorthand,
                "kl": cost.kl,
                "kl_stderr": cost.kl_stderr,
                "loss_increase": cost.loss_increase,
                objective.key: alone[group],
                f"{objective.key}_stderr": objective.stderr(cost),
                "rank": ranked.index(group) + 1,
                "candidates": len(ranked),
                "similarity": min(float(stats.similarity[first, other]) for other in others),
                "dependency": max(float(stats.dependency[pair]) for pair in pairs),
                "without": rival.shorthand if rival else None,
                f"extra_{objective.key}": (
                    front.rank(rival)[0] - front.rank(plan)[0] if rival else None
                ),
            }
        )
    return rows


def explain(plan: Plan, front: Front) -> str:
    """One page of Markdown: cost of the plan, and `reasons` as a table."""
    cost, stats, objective = front.plans[plan], front.stats, front.objective
    judged, name, key = front.judged(plan), objective.name, objective.key
    total = sum(objective.value(stats.groups[group]) for group in plan.groups)
    text, searched = "calibration", ""
    if plan in front.held_out:
        text, searched = (
            "held-out",
            f"On the {cost.tokens:,} tokens that it was searched on it costs {name} "
            f"{objective.value(cost):.5f}, {objective.value(cost) - objective.value(judged):+.5f} "
            "against held-out text. ",
        )
    count = f"{sum(p.depth == plan.depth for p in front.plans)} plans of this depth"
    if front.profile is not None:
        count = f"{len(front.plans)} plans for its time ({front.profile.about})"
    lines = [
        f"# Why {plan.shorthand}",
        "",
        f"{stats.num_layers} layers in {plan.depth} stages. On {judged.tokens:,} tokens of "
        f"{text} text this plan costs {name} {objective.value(judged):.5f} ± "
        f"{objective.stderr(judged):.5f} {objective.unit}, loss "
        f"{judged.loss_increase:+.5f} ± {judged.loss_stderr:.5f}, perplexity "
        f"{judged.ppl_increase:+.2%}. {searched}Its groups alone cost {total:.5f} in sum. "
        f"It is the best of {count} that were measured as a whole.",
        "",
        f"| group | {name} alone | rank | inputs alike | depends | best plan without it "
        f"| {name} of that |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in reasons(plan, front):
        without = row["without"] or "none measured"
        extra = "" if row["without"] is None else f"{row[f'extra_{key}']:+.5f}"
        alone = f"{row[key]:.5f} ± {row[f'{key}_stderr']:.5f}"
        lines.append(
            f"| {row['group'].replace('|', '&#124;')} | {alone} "
            f"| {row['rank']} of {row['candidates']} | {row['similarity']:.3f} "
            f"| {row['dependency']:.3f} | {without.replace('|', '&#124;')} | {extra} |"
        )
    lines += [
        "",
        f"*{name} alone*: of the model with only this group formed. *rank*: among all candidate "
        "groups by that. *inputs alike*: least cosine similarity of its members' inputs. "
        "*depends*: how much a member's contribution turns when an earlier member is left out "
        f"(cosine distance). *best plan without it*: of the measured plans of the same depth, and "
        f"what its {name} is more.",
        "",
    ]
    return "\n".join(lines)


def _required(profile: Profile | None) -> Profile:
    if profile is None:
        raise AbreastError("a speed-up needs a latency profile; give --hardware")
    return profile
