"""What a calibration run found out about a model: one file, read without torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from abreast.errors import AbreastError, first_line
from abreast.plan import Group, Plan

STATS_FILE = "stats.safetensors"
_KEY = "abreast"
_COSTS = ("kl", "kl_stderr", "loss_increase", "loss_stderr", "tokens")


@dataclass(frozen=True)
class Cost:
    """What running under a plan costs against the original model, in nats per token.

    kl: mean KL(original || model) of the next-token distributions. loss_increase: of the mean
    negative log-likelihood, paired. *_stderr: cluster-robust over windows. tokens: scored.
    """

    kl: float
    kl_stderr: float
    loss_increase: float
    loss_stderr: float
    tokens: int

    @property
    def ppl_increase(self) -> float:
        """Relative increase of the perplexity: 0.02 is 2 %."""
        return float(np.expm1(self.loss_increase))


@dataclass(frozen=True)
class Stats:
    """The statistics of one model on one calibration text.

    identity: what they depend on (hashes of model and tokens, sizes, seed, dtype). source: the
    model as it was asked for. loss: the original's, nats per token. groups: the cost of every
    candidate group formed alone.

    similarity, angular: [L + 1, L + 1], over tokens the mean cosine similarity (CQIL, arXiv
    2404.06709, section 3.1) and mean angular distance, arccos / pi (arXiv 2403.17887, section 4.1),
    of the inputs of layers i and j; place L is the last layer's output. influence: [L], 1 - mean
    cosine of a layer's input and output (ShortGPT, arXiv 2403.03853, section 3.1). dependency:
    [L, L], entry (i, j) for i < j the mean cosine distance of layer j's contribution with and
    without layer i (FFN Fusion, arXiv 2503.18908, section 3); 0 elsewhere.
    full_forwards: what measuring took, in forward passes of the whole model over the whole
    calibration text, counted in layers really run.
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

    def save(self, path: str | Path) -> None:
        """Write the file that `load` reads, as a whole or not at all."""
        names = [group.shorthand for group in self.groups]
        header = {
            "identity": dict(self.identity),
            "source": self.source,
            "num_layers": self.num_layers,
            "loss": self.loss,
            "groups": names,
            "full_forwards": self.full_forwards,
        }
        arrays = {
            name: np.array([getattr(cost, name) for cost in self.groups.values()], dtype=np.float64)
            for name in _COSTS
        }
        arrays |= {name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}
        path = Path(path)
        staging = path.with_name(f".{path.name}.new")
        save_file(arrays, staging, metadata={_KEY: json.dumps(header)})
        os.replace(staging, path)

    @classmethod
    def load(cls, path: str | Path) -> Stats:
        """Read a stats file. Raises AbreastError for one that is missing, damaged or not finite."""
        try:
            with safe_open(path, framework="np") as file:
                header = json.loads((file.metadata() or {})[_KEY])
                arrays = {name: file.get_tensor(name) for name in (*_COSTS, *_ARRAYS)}
            num_layers = int(header["num_layers"])
            found = [Plan.parse(name, num_layers).groups[0] for name in header["groups"]]
            columns = zip(*(arrays[name].tolist() for name in _COSTS), strict=True)
            costs = {
                group: Cost(kl, kl_stderr, loss, loss_stderr, int(tokens))
                for group, (kl, kl_stderr, loss, loss_stderr, tokens) in zip(
                    found, columns, strict=True
                )
            }
        except FileNotFoundError:
            raise AbreastError(f"no statistics at '{path}'; run `abreast measure` first") from None
        except (SafetensorError, OSError, LookupError, ValueError, TypeError) as error:
            raise AbreastError(
                f"'{path}' is damaged ({first_line(error)}); delete it and measure again"
            ) from None
        stats = cls(
            identity=header["identity"],
            source=header["source"],
            num_layers=num_layers,
            loss=header["loss"],
            groups=costs,
            full_forwards=header["full_forwards"],
            **{name: arrays[name] for name in _ARRAYS},
        )
        stats.check()
        return stats

    def check(self) -> None:
        """Raise AbreastError unless every number is finite."""
        for name in _ARRAYS:
            if not np.isfinite(getattr(self, name)).all():
                raise AbreastError(f"the statistics' {name} {_NOT_FINITE}")
        for group, cost in self.groups.items():
            if not np.isfinite([cost.kl, cost.loss_increase]).all():
                raise AbreastError(f"the cost of group {group.shorthand} {_NOT_FINITE}")


_ARRAYS = ("similarity", "angular", "influence", "dependency")
_NOT_FINITE = "is not finite; measure again with --dtype float32, or check the model's weights"
