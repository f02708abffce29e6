"""What each way to a depth costs, and which is the better buy at equal speed; knows no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from abreast.planner import OF_TASKS, Cost, Objective

BASELINES_FILE = "baselines.json"
METHODS = {
    "planner": "planner",
    "contiguous": "contiguous (LP)",
    "similarity": "similarity (CQIL)",
    "shortgpt": "least influence (ShortGPT)",
    "angular": "least angle",
    "sleb": "greedy (SLEB)",
    "replaceme": "linear map (ReplaceMe)",
    "random": "random",
}
ORIGINAL = "original"  # the rival of a plan that is no faster
LEFT_OUT = ("shortgpt", "angular", "sleb", "replaceme")  # they leave layers out


@dataclass(frozen=True)
class Measured:
    """A way to a depth, measured as a whole.

    method: who chose it, a key of METHODS. depth: stages or layers left. plan: its shorthand, or
    which layers are left out. refit: with its outputs refitted. agreement: share of next tokens
    that stay the same. seconds, speedup: predicted per decoded token, and against the original.
    None: not measured.
    """

    method: str
    depth: int
    plan: str
    cost: Cost
    refit: bool = False
    agreement: float | None = None
    agreement_stderr: float | None = None
    seconds: float | None = None
    speedup: float | None = None

    @property
    def name(self) -> str:
        """The method in words."""
        return METHODS.get(self.method, self.method) + (", refit" if self.refit else "")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, the cost's among them."""
        row = asdict(self)
        return {**row.pop("cost"), **row}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any], *, depth: int) -> Measured:
        """What `to_dict` made, or an earlier version. Raises LookupError, TypeError, ValueError."""

        def number(key: str) -> float:
            return math.nan if row.get(key) is None else float(row[key])

        def known(key: str) -> float | None:
            return None if row.get(key) is None else float(row[key])

        plan = str(row["plan"])
        if not re.fullmatch(r"(without)?[\d+|~:\s]*", plan):
            raise ValueError(plan)
        return cls(
            method=str(row.get("method", "planner")),
            depth=depth,
            plan=plan,
            cost=Cost(
                kl=float(row["kl"]),
                kl_stderr=number("kl_stderr"),
                loss_increase=float(row["loss_increase"]),
                loss_stderr=number("loss_stderr"),
                tokens=int(row["tokens"]),
                **{name: known(name) for name in OF_TASKS},
            ),
            refit=bool(row.get("refit", False)),
            agreement=known("agreement"),
            agreement_stderr=known("agreement_stderr"),
            seconds=known("seconds"),
            speedup=known("speedup"),
        )


@dataclass(frozen=True)
class AtSpeed:
    """One of our plans, and the best that layers left out reach at its speed.

    rival: the method, ORIGINAL where the plan is no faster, None where none that was measured is as
    fast. value, stderr: its objective.
    """

    ours: Measured
    rival: str | None
    value: float
    stderr: float
    verdict: str  # better, worse, even (within two standard errors), unmatched


def at_equal_speed(rows: Iterable[Measured], objective: Objective) -> list[AtSpeed]:
    """Each of the planner's rows whose speed is known beside the rivals at the same speed.

    A rival's cost at that speed lies on the line between its two nearest measured depths, or the
    original, which costs nothing. Refitted plans are compared with refitted rivals.
    """
    known = [row for row in rows if row.speedup is not None]
    compared = []
    for ours in (row for row in known if row.method == "planner"):
        lines = {ORIGINAL: [(1.0, 0.0, 0.0)]}
        for row in known:
            if row.method in LEFT_OUT and row.refit == ours.refit:
                lines.setdefault(row.method, [(1.0, 0.0, 0.0)]).append(_point(row, objective))
        time, value, stderr = _point(ours, objective)
        there = [(*at, name) for name, line in lines.items() if (at := _between(line, time))]
        if not there:
            compared.append(AtSpeed(ours, None, math.nan, math.nan, "unmatched"))
            continue
        theirs, error, name = min(there, key=lambda at: (*at[:2], at[2] != ORIGINAL))
        margin = 2 * math.hypot(stderr, error)
        verdict = "better" if theirs - value > margin else "even"
        verdict = "worse" if value - theirs > margin else verdict
        compared.append(AtSpeed(ours, name, theirs, error, verdict))
    return sorted(compared, key=lambda pair: -pair.ours.depth)


def _point(row: Measured, objective: Objective) -> tuple[float, float, float]:
    """Time per token over the original's, value, standard error."""
    stderr = objective.stderr(row.cost)
    known = stderr if math.isfinite(stderr) else 0.0
    return 1 / float(row.speedup or 1), objective.value(row.cost), known


def _between(line: Sequence[tuple[float, float, float]], time: float) -> tuple[float, float] | None:
    """Least value, with its error, that a line reaches in this time; None where all its points are
    slower. A point that is faster counts by itself, for noise may bend the line."""
    faster = [point for point in line if point[0] <= time]
    if not faster:
        return None
    reached = [point[1:] for point in faster]
    if slower := min((point for point in line if point[0] > time), default=None):
        near = max(faster)
        share = (time - near[0]) / (slower[0] - near[0])
        value = (1 - share) * near[1] + share * slower[1]
        reached.append((value, math.hypot((1 - share) * near[2], share * slower[2])))
    return min(reached)


def caption(rows: Sequence[Measured], objective: Objective) -> str:
    """Where layers abreast are the better buy at equal decode speed, and where not, in words."""
    sentences = []
    for refit, start in ((False, "At equal decode speed"), (True, "With both sides refitted")):
        pairs = at_equal_speed([row for row in rows if row.refit == refit], objective)
        of = {
            verdict: [pair for pair in pairs if pair.verdict == verdict]
            for verdict in ("better", "worse", "even", "unmatched")
        }
        if of["better"]:
            example = _example(of["better"], objective)
            sentences.append(
                f"{start}, layers abreast are the better buy at {_depths(of['better'])}: {example}."
            )
        elif pairs:
            sentences.append(f"{start}, layers abreast are nowhere the better buy.")
        for verdict, words in (
            ("worse", "Layers left out are the better buy at"),
            ("even", "Too close to tell at"),
        ):
            if some := of[verdict]:
                sentences.append(f"{words} {_depths(some)}: {_example(some, objective)}.")
        if of["unmatched"]:
            sentences.append(f"None that was measured is as fast as {_depths(of['unmatched'])}.")
    return " ".join(sentences) or "No decode speed is known, so nothing is compared at equal speed."


def _depths(pairs: Sequence[AtSpeed]) -> str:
    depths = ", ".join(str(pair.ours.depth) for pair in pairs)
    return f"depth{'s' if len(pairs) > 1 else ''} {depths}"


def _example(pairs: Sequence[AtSpeed], objective: Objective) -> str:
    """The deepest cut of the pairs in numbers."""
    pair = pairs[-1]
    ours = objective.value(pair.ours.cost)
    rival = "the original" if pair.rival == ORIGINAL else METHODS[str(pair.rival)]
    return (
        f"{objective.name} {ours:.3g} against {pair.value:.3g} of {rival} "
        f"at {pair.ours.speedup:.2f}x, depth {pair.ours.depth}"
    )
