"""The measures of quality, each described once, for the page, its tiles and tables, and the card.

A new measure that `evaluate.compare` returns is one more `Metric` here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Quality = Mapping[str, Any]  # of two models on the same text, as `Comparison.to_dict` gives it


@dataclass(frozen=True)
class Metric:
    """A measure of quality.

    key: of the difference between the two models, with its standard error under KEY_stderr and its
    interval under "bootstrap"; spec, unit: how it is written. per_model: key of what each model has
    for itself, and model_spec how that is written. relative: the difference is the relative change
    of those, and the interval that of their ratio. tile: heading among the numbers that matter
    most, with a line of small print. hub: name in the metadata for the Hub, which take each model's
    own number, or the difference where there is none.
    """

    key: str
    label: str
    spec: str
    unit: str = ""
    per_model: str | None = None
    model_spec: str = ""
    relative: bool = False
    interval_spec: str = ".4f"
    tile: str | None = None
    small_print: str = ""
    hub: str | None = None

    def value(self, quality: Quality) -> float | None:
        """The difference, None where it is not finite."""
        if not self.relative:
            return quality.get(self.key)
        ours, theirs = (quality[model][self.per_model] for model in ("model", "reference"))
        return ours / theirs - 1 if ours is not None and theirs is not None else None

    def stderr(self, quality: Quality) -> float | None:
        return quality.get(f"{self.key}_stderr")

    def row(self, quality: Quality) -> tuple[str, str, str, str]:
        """Label, original, converted and difference as text."""
        value, ratio = self.value(quality), " ratio" if self.relative else ""
        difference = ""
        if value is not None:
            error = _error(self.stderr(quality), self.spec.lstrip("+"))
            difference = f"{value:{self.spec}}{error}{self.unit}"
        if ends := (quality.get("bootstrap") or {}).get(self.key):
            low, high = (format(end, self.interval_spec) for end in ends)
            difference += f"{ratio} [{low}, {high}]"
        models = (self._of_model(quality[model]) for model in ("reference", "model"))
        original, converted = models
        return self.label, original, converted, difference

    def _of_model(self, numbers: Mapping[str, Any]) -> str:
        if self.per_model is None:
            return ""
        value = numbers.get(self.per_model)
        if value is None:
            return "not finite"
        error = _error(numbers.get(f"{self.per_model}_stderr"), self.model_spec)
        return f"{value:{self.model_spec}}{error}"


def _error(stderr: float | None, spec: str) -> str:
    return f" ± {stderr:{spec}}" if stderr is not None else ""


METRICS = (
    Metric(
        key="perplexity_ratio",
        label="perplexity",
        spec="+.2%",
        per_model="perplexity",
        model_spec=".2f",
        relative=True,
        interval_spec=".3f",
        tile="perplexity",
        small_print="against the original's",
        hub="perplexity",
    ),
    Metric(
        key="nll_difference",
        label="loss, nats per token",
        spec="+.4f",
        unit=" nats",
        per_model="nll",
        model_spec=".4f",
        tile="loss increase",
        small_print="nats per token",
    ),
    Metric(
        key="kl",
        label="KL divergence",
        spec=".4f",
        unit=" nats",
        tile="KL divergence",
        small_print="nats per token",
        hub="KL divergence from the original, nats",
    ),
    Metric(
        key="top1_agreement",
        label="same top token",
        spec=".1%",
        interval_spec=".3f",
        tile="same top token",
        small_print="of the predictions",
    ),
)
