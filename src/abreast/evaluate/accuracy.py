"""Scores on tasks, item by item, and the share of them that a conversion keeps."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from abreast.checkpoint import read_text, write
from abreast.errors import AbreastError
from abreast.evaluate.statistics import (
    RESAMPLES,
    Interval,
    all_binary,
    interval,
    item_values,
    mcnemar,
    metric_stderr,
    ratio_of_means,
    resampled,
    sign_flips,
)

_PAIRED = ("kept", "kept_stderr", "p_value", "test", "only_original", "only_converted")


@dataclass(frozen=True)
class Answers:
    """One model's scores on a task, or on the tasks of a group.

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
class TaskScore:
    """One task: the converted (or grouped) model, and the original on the same items.

    metric: the first of the task's that is right or wrong item by item, else its first. kept:
    converted / original, the share of the accuracy that is kept (original / converted where lower
    is better), and its standard error over items by linearisation. p_value: of a difference this
    large by chance; test: "mcnemar", exact, for right or wrong, from the items that only one model
    gets right, else "sign flips", a permutation test. What does not apply is None: for a single
    model, all but the converted values. metrics: the same for every metric of the task.
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
    """Scores by task. kept_mean: mean of `kept` over the tasks where higher is better.

    above_chance_kept, above_chance_interval: see the function, over the multiple-choice tasks.
    """

    tasks: dict[str, TaskScore]
    kept_mean: float | None
    kept_mean_stderr: float | None
    settings: dict[str, Any]
    above_chance_kept: float | None = None
    above_chance_interval: Interval | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def paired_scores(
    converted: Answers, original: Answers, metric: str, seed: int = 0
) -> dict[str, Any]:
    """The fields of `TaskScore` that compare two models on one metric.

    seed: of the permutation test.
    """
    paired: dict[str, Any] = dict.fromkeys(_PAIRED)
    new, old = converted.metrics[metric], original.metrics[metric]
    higher = old["higher_is_better"]
    top, bottom = (new["value"], old["value"]) if higher else (old["value"], new["value"])
    paired["kept"] = top / bottom if bottom else None
    a, b = item_values(converted.items[metric]), item_values(original.items[metric])
    if a is None or b is None:
        return paired
    if higher and paired["kept"] is not None and math.isclose(old["value"], b.mean(), rel_tol=1e-6):
        stderr = ratio_of_means(a, b)[1]
        paired["kept_stderr"] = stderr if math.isfinite(stderr) else None
    if all_binary(a) and all_binary(b):
        lost, won = int(((b == 1) & (a == 0)).sum()), int(((a == 1) & (b == 0)).sum())
        paired |= {"only_original": lost, "only_converted": won}
        paired |= {"p_value": mcnemar(lost, won), "test": "mcnemar"}
    else:
        paired |= {"p_value": sign_flips(a - b, seed=seed), "test": "sign flips"}
    return paired


def pool(parts: list[Answers]) -> Answers:
    """The items of several tasks as if of one, for the metrics that are means over items."""
    if len(parts) == 1:
        return parts[0]
    metrics, items = {}, {}
    for name, metric in parts[0].metrics.items():
        if all(_is_mean_of_items(part, name) for part in parts):
            items[name] = [value for part in parts for value in part.items[name]]
            value = float(np.mean(items[name]))
            metrics[name] = {**metric, "value": value, "stderr": metric_stderr(value, items[name])}
    return Answers(
        version=", ".join(sorted({part.version for part in parts})),
        num_fewshot=max(part.num_fewshot for part in parts),
        truncated=sum(part.truncated for part in parts),
        metrics=metrics,
        items=items,
    )


def score_task(name: str, converted: Answers, original: Answers | None, seed: int) -> TaskScore:
    """The score of one task. Raises AbreastError for a group whose tasks share no metric."""
    if not converted.metrics:
        raise AbreastError(f"the tasks of group '{name}' share no metric; name them one by one")
    metrics: dict[str, dict[str, Any]] = {}
    for metric, score in converted.metrics.items():
        old = {"value": None, "stderr": None} if original is None else original.metrics[metric]
        metrics[metric] = {
            "original": old["value"],
            "original_stderr": old["stderr"],
            "converted": score["value"],
            "converted_stderr": score["stderr"],
            **(
                dict.fromkeys(_PAIRED)
                if original is None
                else paired_scores(converted, original, metric, seed)
            ),
        }
    values = {metric: item_values(converted.items[metric]) for metric in metrics}
    binary = (metric for metric, of in values.items() if of is not None and all_binary(of))
    chosen = next(binary, next(iter(metrics)))
    return TaskScore(
        metric=chosen,
        **metrics[chosen],
        num_items=len(converted.items[chosen]),
        num_fewshot=converted.num_fewshot,
        truncated=converted.truncated,
        metrics=metrics,
    )


def mean_kept(scores: dict[str, TaskScore]) -> tuple[float | None, float | None]:
    """Mean of `kept` over the tasks that have it with an error, and its standard error."""
    pairs = [
        (score.kept, score.kept_stderr)
        for score in scores.values()
        if score.kept is not None and score.kept_stderr is not None
    ]
    if not pairs:
        return None, None
    mean = sum(kept for kept, _ in pairs) / len(pairs)
    return mean, math.sqrt(sum(stderr**2 for _, stderr in pairs)) / len(pairs)


def above_chance_kept(
    scores: Mapping[str, TaskScore],
    converted: Mapping[str, Answers],
    original: Mapping[str, Answers],
    chance: Mapping[str, np.ndarray],
    seed: int = 0,
) -> tuple[float | None, Interval | None]:
    """Share of the accuracy above chance that is kept, summed over tasks, and its 95 % interval.

    All by task, original empty where there is none. chance: how often a guess is right,
    [num_items], of the tasks that count. A task's metric is that of its score; one that is not
    right or wrong item by item does not count. The interval is a percentile bootstrap that draws
    items anew within every task, the same ones of both models (B. Efron and R. Tibshirani, An
    Introduction to the Bootstrap, 1993, section 8.3).
    None where the original is no better than chance.
    """
    rng = np.random.default_rng(seed)
    sums, drawn = np.zeros(2), np.zeros((RESAMPLES, 2))
    for task in (task for task in chance if task in original):
        metric = scores[task].metric
        ours, theirs = (item_values(of[task].items[metric]) for of in (converted, original))
        if ours is None or theirs is None or not (all_binary(ours) and all_binary(theirs)):
            continue
        above = np.stack([ours - chance[task], theirs - chance[task]], axis=1)
        sums += above.mean(0)
        drawn += resampled(above, rng) / len(above)
    if sums[1] <= 0:
        return None, None
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(sums[0] / sums[1]), interval(drawn[:, 0] / drawn[:, 1])


def save(
    folder: Path, name: str, fingerprint: str, answers: Answers, samples: list[dict[str, Any]]
) -> None:
    """One line per item, then the scores, which say that the lines are complete."""
    stem = _stem(name)
    lines = (json.dumps(item, default=str, ensure_ascii=False) + "\n" for item in samples)
    write(folder / f"{stem}.jsonl", "".join(lines))
    record = {"task": name, "sha256": fingerprint, "answers": asdict(answers)}
    write(folder / f"{stem}.json", json.dumps(record) + "\n")


def _stem(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name)


def saved(folder: Path, name: str, fingerprint: str) -> Answers | None:
    path = folder / f"{_stem(name)}.json"
    try:
        record = json.loads(read_text(path))
        if (record["task"], record["sha256"]) != (name, fingerprint):
            return None
        return Answers(**record["answers"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _is_mean_of_items(answers: Answers, metric: str) -> bool:
    numbers = item_values(answers.items.get(metric, []))
    return numbers is not None and math.isclose(
        answers.metrics[metric]["value"], numbers.mean(), rel_tol=1e-6
    )
