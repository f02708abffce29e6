"""Scores on tasks, item by item, and what a conversion keeps of them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from abreast.checkpoint import finite
from abreast.errors import AbreastError
from abreast.evaluate.paired import mcnemar, sign_flips
from abreast.model import ratio_of_means

_COMPARED = ("kept", "kept_stderr", "p_value", "test", "only_original", "only_converted")


@dataclass(frozen=True)
class Answers:
    """What one model scored on one task, or on the tasks of one group.

    metrics: name -> {value, stderr, higher_is_better}; a name is the harness's, with the filter's
    after a comma if there is one. items: name -> one value per item, as the harness aggregates it.
    truncated: items whose beginning was cut off because the model cannot hold them.
    """

    version: str
    num_fewshot: int
    truncated: int
    metrics: dict[str, dict[str, Any]]
    items: dict[str, list[Any]]


@dataclass(frozen=True)
class Row:
    """One task: the converted (or grouped) model, and the original on the same items.

    metric: the first of the task's that is right or wrong item by item, else its first. kept:
    converted / original, the share of the accuracy that is kept (original / converted where lower
    is better), and its standard error over items by linearisation. p_value: that the two differ
    this much by chance; test: "mcnemar", exact, for right or wrong, from the items that only one
    model gets right, else "sign flips", a permutation test. What does not apply is None: with one
    model alone all but the converted values. metrics: the same of every metric of the task.
    """

    metric: str
    original: float | None
    original_stderr: float | None
    converted: float
    converted_stderr: float | None
    kept: float | None
    kept_stderr: float | None
    p_value: float | None
    test: str | None
    only_original: int | None
    only_converted: int | None
    num_items: int
    num_fewshot: int
    truncated: int
    metrics: dict[str, dict[str, float | None]]


@dataclass(frozen=True)
class Evaluation:
    """Rows by task. kept_mean: mean of `kept` over the tasks where higher is better."""

    tasks: dict[str, Row]
    kept_mean: float | None
    kept_mean_stderr: float | None
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(ours: Answers, theirs: Answers, metric: str, seed: int = 0) -> dict[str, Any]:
    """What `Row` has about two models' answers, for one metric; seed: of the permutation test."""
    found: dict[str, Any] = dict.fromkeys(_COMPARED)
    new, old = ours.metrics[metric], theirs.metrics[metric]
    higher = old["higher_is_better"]
    top, bottom = (new["value"], old["value"]) if higher else (old["value"], new["value"])
    found["kept"] = top / bottom if bottom else None
    a, b = _numbers(ours.items[metric]), _numbers(theirs.items[metric])
    if a is None or b is None:
        return found
    if higher and found["kept"] is not None and math.isclose(old["value"], b.mean(), rel_tol=1e-6):
        found["kept_stderr"] = finite(ratio_of_means(a, b)[1])
    if _binary(a) and _binary(b):
        lost, won = int(((b == 1) & (a == 0)).sum()), int(((a == 1) & (b == 0)).sum())
        found |= {"only_original": lost, "only_converted": won}
        found |= {"p_value": mcnemar(lost, won), "test": "mcnemar"}
    else:
        found |= {"p_value": sign_flips(a - b, seed=seed), "test": "sign flips"}
    return found


def together(parts: list[Answers]) -> Answers:
    """The items of several tasks as if they were one, for the metrics that are means over items."""
    if len(parts) == 1:
        return parts[0]
    metrics, items = {}, {}
    for name, about in parts[0].metrics.items():
        of_parts = [part.items.get(name) for part in parts]
        numbers = [None if each is None else _numbers(each) for each in of_parts]
        means = [
            n is not None and math.isclose(part.metrics[name]["value"], n.mean(), rel_tol=1e-6)
            for n, part in zip(numbers, parts, strict=True)
        ]
        if all(means):
            items[name] = [value for each in of_parts if each is not None for value in each]
            value = float(np.mean(items[name]))
            metrics[name] = {**about, "value": value, "stderr": stderr_of(value, items[name])}
    return Answers(
        version=", ".join(sorted({part.version for part in parts})),
        num_fewshot=max(part.num_fewshot for part in parts),
        truncated=sum(part.truncated for part in parts),
        metrics=metrics,
        items=items,
    )


def row_of(name: str, ours: Answers, theirs: Answers | None, seed: int) -> Row:
    def right_or_wrong(metric: str) -> bool:
        numbers = _numbers(ours.items[metric])
        return numbers is not None and _binary(numbers)

    if not ours.metrics:
        raise AbreastError(f"the tasks of group '{name}' share no metric; name them one by one")
    metrics: dict[str, dict[str, Any]] = {}
    for metric, score in ours.metrics.items():
        old = None if theirs is None else theirs.metrics[metric]
        metrics[metric] = {
            "original": None if old is None else old["value"],
            "original_stderr": None if old is None else old["stderr"],
            "converted": score["value"],
            "converted_stderr": score["stderr"],
            **(dict.fromkeys(_COMPARED) if theirs is None else compare(ours, theirs, metric, seed)),
        }
    chosen = next(filter(right_or_wrong, metrics), next(iter(metrics)))
    return Row(
        metric=chosen,
        **metrics[chosen],
        num_items=len(ours.items[chosen]),
        num_fewshot=ours.num_fewshot,
        truncated=ours.truncated,
        metrics=metrics,
    )


def kept_mean(rows: dict[str, Row]) -> tuple[float | None, float | None]:
    counted = [row for row in rows.values() if row.kept is not None and row.kept_stderr is not None]
    if not counted:
        return None, None
    mean = sum(row.kept or 0.0 for row in counted) / len(counted)
    return mean, math.sqrt(sum((row.kept_stderr or 0.0) ** 2 for row in counted)) / len(counted)


def _numbers(items: list[Any]) -> np.ndarray | None:
    """One number per item: the value itself, or the log-likelihood of [log-likelihood, weight]."""
    if items and all(isinstance(each, list) and len(each) == 2 for each in items):
        items = [each[0] for each in items]
    if not items or not all(isinstance(each, float) and math.isfinite(each) for each in items):
        return None
    return np.array(items)


def _binary(values: np.ndarray) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())


def stderr_of(value: float, items: list[Any]) -> float | None:
    """Standard error over items of what the harness aggregates by a mean or as perplexity."""
    numbers = _numbers(items)
    if numbers is None or len(numbers) < 2:
        return None
    paired = isinstance(items[0], list)
    weights = np.array([each[1] for each in items]) if paired else np.ones(len(items))
    mean, stderr = ratio_of_means(numbers, weights)
    for expected, slope in (
        (mean, 1.0),
        (math.exp(min(-mean, 700.0)), value),  # perplexity of log-likelihoods
        (-mean / math.log(2), 1 / math.log(2)),  # bits per byte
    ):
        if math.isclose(value, expected, rel_tol=1e-6):
            return finite(abs(slope) * stderr)
    return None
