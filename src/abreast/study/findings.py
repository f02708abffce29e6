"""What a study found: rows of losses, compared, written as CSV and drawn.

Knows no torch. The PNG files need matplotlib, which comes with the ``report`` extra.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from abreast.figures import figure_class

CURVE = "depth_curve.png"
LOSS_RANGE = (1e-3, 10.0)  # nats: the ends of every colour scale, so that any two maps can be compared


@dataclass(frozen=True)
class Row:
    """What one intervention on layers start..end costs.

    depth: effective depth, the number of steps run one after another. loss: mean negative
    log-likelihood in nats per token. loss_increase: over the unmodified model. stderr: its standard
    error, paired over windows (std / sqrt(number of windows); NaN for one); for ``shuffle`` that of
    the average over the orders drawn, which leaves out what other orders would have given.
    """

    intervention: str
    start: int
    end: int
    depth: int
    loss: float
    loss_increase: float
    stderr: float
    perplexity: float


def row_of(
    case: tuple[str, int, int], depth: int, losses: Sequence[np.ndarray], original: np.ndarray
) -> Row:
    """One row from the losses per window, shape [num_windows], of its models and the original.

    case: intervention, start, end. losses: several for shuffle, whose mean is taken.
    """
    per_window = np.mean(losses, axis=0)
    increase = per_window - original
    several = len(increase) > 1
    loss = float(per_window.mean())
    return Row(
        *case,
        depth=depth,
        loss=loss,
        loss_increase=float(increase.mean()),
        stderr=float(increase.std(ddof=1)) / math.sqrt(len(increase)) if several else math.nan,
        perplexity=math.exp(loss) if loss < 709 else math.inf,  # the last one a float holds
    )


def wins(rows: Iterable[Row], first: str, second: str) -> tuple[int, int, int]:
    """At how many stretches intervention `first` loses less than, the same as, more than `second`.

    Rows of the same program are equal to the last bit, others practically never.
    """
    loss = {(row.intervention, row.start, row.end): row.loss for row in rows}
    signs = [
        (own > other) - (own < other)
        for (name, *stretch), own in loss.items()
        if name == first and (other := loss.get((second, *stretch))) is not None  # type: ignore[arg-type]
    ]
    return signs.count(-1), signs.count(0), signs.count(1)


def best_by_depth(rows: Iterable[Row]) -> dict[str, dict[int, Row]]:
    """For each intervention, the row of lowest loss at every effective depth it reaches."""
    found: dict[str, dict[int, Row]] = {}
    for row in rows:
        at = found.setdefault(row.intervention, {})
        if row.depth not in at or row.loss < at[row.depth].loss:
            at[row.depth] = row
    return found


def draw(rows: Sequence[Row], num_layers: int, out: str | Path) -> None:
    """Draw INTERVENTION.png, heat maps of the loss increase over (start, end), and the curve.

    The curve has the best stretch at every effective depth; shuffle, which changes none, is left
    out. Raises AbreastError without matplotlib.
    """
    best = best_by_depth(rows)
    for intervention in best:
        grid = np.full((num_layers, num_layers), np.nan)
        for row in rows:
            if row.intervention == intervention:
                grid[row.start, row.end] = row.loss_increase
        _heat_map(grid, f"{intervention}: what it costs", Path(out) / f"{intervention}.png")
    series = {
        intervention: {depth: row.loss_increase for depth, row in at.items()}
        for intervention, at in best.items()
        if intervention != "shuffle"
    }
    title = f"best stretch at each effective depth ({num_layers} layers unmodified)"
    _depth_curve(series, title, Path(out) / CURVE)


def _heat_map(grid: np.ndarray, title: str, path: str | Path) -> None:
    """Draw loss increases over stretches of layers: first layer downwards, last one to the right.

    grid: shape [num_layers, num_layers], nats per token, NaN where there is nothing to show. What
    lies outside LOSS_RANGE has the colour of its end. Up to 16 layers the numbers stand in the cells.
    """
    from matplotlib.colors import LogNorm

    figure = figure_class()(figsize=(6.4, 5.4), dpi=110, layout="constrained")
    count = len(grid)
    axes = figure.add_subplot()
    norm = LogNorm(*LOSS_RANGE, clip=True)
    shown = np.ma.masked_invalid(np.maximum(grid, LOSS_RANGE[0]))
    image = axes.imshow(shown, norm=norm, cmap="viridis", origin="upper")
    ticks = range(0, count, -(-count // 16))
    axes.set(xlabel="last layer of the stretch", ylabel="first layer of the stretch")
    axes.set(xticks=ticks, yticks=ticks, title=title)
    if count <= 16:
        for (first, last), value in np.ndenumerate(grid):
            if np.isfinite(value):
                short = f"{value:.2f}".replace("0.", ".") if abs(value) >= 0.005 else "0"
                text = f"{value:.1f}" if value >= 1 else short
                colour = "black" if norm(max(value, LOSS_RANGE[0])) > 0.6 else "white"
                axes.text(last, first, text, ha="center", va="center", fontsize=6, color=colour)
    bar = figure.colorbar(image, ax=axes, extend="both", shrink=0.9)
    bar.set_label("loss increase (nats per token)")
    figure.savefig(path)


def _depth_curve(series: Mapping[str, Mapping[int, float]], title: str, path: str | Path) -> None:
    """Draw one line per name: effective depth -> loss increase in nats, at LOSS_RANGE's end if less."""
    figure = figure_class()(figsize=(6.4, 4.4), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for name, line in series.items():
        depths = sorted(line)
        heights = [max(line[depth], LOSS_RANGE[0]) for depth in depths]
        axes.plot(depths, heights, marker="o", markersize=3, label=name)
    axes.set(yscale="log", xlabel="effective depth", title=title)
    axes.set_ylabel(f"lowest loss increase (nats per token, at least {LOSS_RANGE[0]})")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
