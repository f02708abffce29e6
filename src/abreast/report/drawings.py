"""The PNG files of `plan`, `study`, `heal` and `bench`: results in, a picture written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abreast.checkpoint import write
from abreast.errors import AbreastError, install
from abreast.report.charts import CONFIG, draw_interval, error_bar, png, value_axis
from abreast.rivals import Measured
from abreast.study import best_by_depth

if TYPE_CHECKING:
    from abreast.heal import Distilled, Refit
    from abreast.planner import Cost, Objective, Planned
    from abreast.speed import Report
    from abreast.study import StudyRow, SweepRow

# nats: the ends of every colour scale, so that any two maps can be compared
LOSS_RANGE = (1e-3, 10.0)
COLOURS = [f"var(--c{i})" for i in range(1, 6)]


def check_drawing(otherwise: str = "use --no-plots") -> None:
    """Raise AbreastError, naming the way without, where altair or vl-convert is missing."""
    if find_spec("altair") is None or find_spec("vl_convert") is None:
        raise AbreastError(f"drawing needs altair: {install('report')}, or {otherwise}")


def draw_front(planned: Planned, rows: Sequence[Measured], out: str | Path) -> None:
    """Draw pareto.png, quality against depth, and with a profile pareto-speed.png.

    rows: as `compare_rivals` returns them, or none to draw the front on the calibration text alone.
    """
    front, profile = planned.front, planned.profile
    text = "held-out" if rows or front.held_out else "calibration"
    title = f"{planned.plan.num_layers} layers, on {text} text"
    rows = [row for row in rows if not row.refit] or [
        Measured(
            method="planner",
            depth=plan.depth,
            plan=plan.shorthand,
            cost=front.judged(plan),
            speedup=profile.speedup(plan) if profile is not None else None,
        )
        for plan in front.efficient()
    ]
    for label, file, values in (
        ("effective depth", "pareto.png", [float(row.depth) for row in rows]),
        ("predicted speed-up of decoding", "pareto-speed.png", [row.speedup for row in rows]),
    ):
        lines: dict[str, dict[float, Cost]] = {}
        for row, x in zip(rows, values, strict=True):
            if x is not None:
                lines.setdefault(row.name, {}).setdefault(x, row.cost)
        if lines:
            draw_costs(lines, front.objective, label, title, Path(out) / file)


def draw_costs(
    series: Mapping[str, Mapping[float, Cost]],
    objective: Objective,
    xlabel: str,
    title: str,
    path: Path,
) -> None:
    """Draw the objective over depth or speed-up: a line per name, two standard errors each way."""
    points = [
        {
            **{"name": name, "x": x},
            **error_bar(objective.value(cost), objective.stderr(cost), logarithmic=True),
        }
        for name, line in series.items()
        for x, cost in sorted(line.items())
    ]
    _write(_lines(points, xlabel, f"{objective.label} ({objective.unit})"), title, path)


def draw_study(rows: Sequence[StudyRow], num_layers: int, out: str | Path) -> None:
    """Draw INTERVENTION.png, heat maps of the loss increase, and depth_curve.png.

    The curve has the best stretch at every effective depth; shuffle, which changes none, is left
    out.
    """
    best = best_by_depth(rows, lambda row: row.intervention)
    for name in best:
        cells = [(r.start, r.end, r.loss_increase) for r in rows if r.intervention == name]
        _draw_stretches(cells, num_layers, name, Path(out))
    points = [
        {"name": name, "x": depth, "value": max(row.loss_increase, LOSS_RANGE[0])}
        for name, by_depth in best.items()
        if name != "shuffle"
        for depth, row in by_depth.items()
    ]
    title = f"best stretch at each effective depth ({num_layers} layers unmodified)"
    ylabel = f"lowest loss increase (nats per token, at least {LOSS_RANGE[0]})"
    _write(_lines(points, "effective depth", ylabel), title, Path(out) / "depth_curve.png")


def draw_sweep(rows: Sequence[SweepRow], num_layers: int, out: str | Path) -> None:
    """Draw WIRING-SIZE.png, heat maps of the loss increase by first and last layer of the plan, and
    of the best first layer at every effective depth, a line per wiring and size, perplexity.png
    and, where they are known, task-NAME.png and perplexity-by-speed.png.
    """
    best = best_by_depth(rows, _kind)
    for kind in best:
        cells = [(r.first, r.last, r.loss_increase) for r in rows if _kind(r) == kind]
        _draw_stretches(cells, num_layers, kind, Path(out))
    title = f"best first layer at each effective depth ({num_layers} layers unmodified)"
    chosen = [(kind, row) for kind, by_depth in best.items() for row in by_depth.values()]
    points = [
        {"name": kind, "x": row.depth, "value": row.perplexity}
        for kind, row in chosen
        if math.isfinite(row.perplexity)
    ]
    _write(_lines(points, "effective depth", "perplexity"), title, Path(out) / "perplexity.png")
    for task in rows[0].tasks:
        points = [{"name": kind, "x": r.depth, "value": r.tasks[task]} for kind, r in chosen]
        chart = _lines(points, "effective depth", task, log=False)
        _write(chart, title, Path(out) / f"task-{task}.png")
    by_speed = [
        {"name": f"{kind}, {way}", "x": speedup, "value": row.perplexity}
        for way in ("predicted", "measured")
        for kind, row in chosen
        if math.isfinite(row.perplexity)
        and math.isfinite(speedup := getattr(row, f"{way}_speedup") or math.nan)
    ]
    if by_speed:
        chart = _lines(by_speed, "speed-up of decoding", "perplexity")
        _write(chart, title, Path(out) / "perplexity-by-speed.png")


def _kind(row: SweepRow) -> str:
    return f"{row.wiring}-{row.size}"


def draw_healing(refit: Refit | None, distilled: Distilled | None, path: Path) -> None:
    """Draw what each regression left of its error, and the training curves, where there are any."""
    import altair as alt

    parts = []
    if refit is not None:
        parts.append(_regressions(refit))
    if distilled is not None:
        curves = _training(distilled)
        best = alt.Chart(alt.Data(values=[{"x": distilled.best_step}])).mark_rule(
            color="var(--muted)", strokeDash=[4, 4]
        )
        title = "distil: loss (the dashed line marks the step whose weights were kept)"
        parts.append(alt.layer(best.encode(x="x:Q"), curves).properties(title=title))
    parts = [part.properties(width=560, height=300) for part in parts]
    _write(alt.vconcat(*parts).resolve_scale(color="independent", shape="independent"), "", path)


def draw_bench(report: Report, path: str | Path) -> None:
    """Draw speed relative to the original with 95 % intervals, a panel per task."""
    import altair as alt

    names = [contender.name for contender in report.job.contenders[1:]]
    tasks = list(dict.fromkeys(result.task for result in report.results))
    bars = [
        {
            "task": result.task,
            "case": f"{result.batch_size} x {result.context}",
            "name": name,
            "value": result.timings[name].ratio,
            "low": result.timings[name].ratio_low,
            "high": result.timings[name].ratio_high,
        }
        for result in report.results
        for name in names
    ]
    cases = alt.X("case:N").title("batch x context").sort(None).axis(labelAngle=-45)
    axis = alt.Y("value:Q").title("speed, original = 1")
    base = alt.Chart().encode(x=cases, xOffset=alt.XOffset("name:N").sort(names))
    one = alt.Chart().mark_rule(color="var(--fg)").encode(y=alt.datum(1))
    layers = alt.layer(
        base.mark_bar().encode(y=axis, color=_colour(names)),
        draw_interval(base, axis),
        one,
        data=alt.Data(values=bars),
    )
    width = max(160, 24 * len(bars) // len(tasks))
    panels = layers.properties(width=width, height=280).facet(
        column=alt.Column("task:N").title(None).sort(tasks)
    )
    _write(panels, "", Path(path))


def draw_losses(entries: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Draw the curves of a training. entries: name, x (step), value (loss in nats per token)."""
    _write(_lines(list(entries), "training step", "loss (nats per token)", log=False), "", path)


def _lines(points: Sequence[Mapping[str, Any]], xlabel: str, ylabel: str, log: bool = True) -> Any:
    """A line per name. points: name, x, value, and low and high for those with an error bar."""
    import altair as alt

    names = list(dict.fromkeys(point["name"] for point in points))
    whole = all(float(point["x"]).is_integer() for point in points)
    x = alt.X("x:Q").title(xlabel).scale(zero=False, nice=False, padding=12)
    y = value_axis(alt.Y, ylabel).scale(type="log" if log else "linear", zero=False)
    base = alt.Chart(alt.Data(values=list(points))).encode(
        x=x.axis(format="d", tickMinStep=1) if whole else x.axis(format=".2~f"),
        color=_colour(names),
    )
    layers = [
        base.mark_line(strokeWidth=1.8).encode(y=y),
        base.mark_point(filled=True, size=44, opacity=1).encode(
            y=y, shape=alt.Shape("name:N").scale(domain=names).title(None)
        ),
    ]
    if any("low" in point for point in points):
        layers.insert(0, draw_interval(base, y))
    return alt.layer(*layers).properties(height=380)


def _training(distilled: Distilled) -> Any:
    points = [
        {"name": name, "x": point.step, "value": value}
        for point in distilled.points
        for name, value in (("held out", point.held_out), ("training", point.loss))
        # while groups learn alone, their loss is no number of nats
        if math.isfinite(value) and value > 0 and (name == "held out" or point.phase == "model")
    ]
    return _lines(points, "step", "nats per token")


def _regressions(refit: Refit) -> Any:
    import altair as alt

    fits = [
        {"fit": f"{'+'.join(map(str, fit.layers))} {fit.step}", "name": name, "value": value}
        for fit in refit.fits
        for name, value in (("before", fit.before), ("after", fit.after))
        if value > 0
    ]
    axis = value_axis(alt.Y, "squared error, as a fraction", logarithmic=True)
    base = alt.Chart(alt.Data(values=fits)).encode(
        x=alt.X("fit:N").title("layers and step").sort(None).axis(labelLimit=200),
        y=axis,
    )
    return alt.layer(
        base.mark_line(color="var(--muted)").encode(detail="fit:N"),
        base.mark_point(filled=True, size=60, opacity=1).encode(color=_colour(["before", "after"])),
    ).properties(title="refit: held-out squared error of each regression")


def _draw_stretches(
    cells: Iterable[tuple[int, int, float]], num_layers: int, name: str, out: Path
) -> None:
    """Draw NAME.png from the first layer (downwards), last layer (to the right), loss increase.

    What lies outside LOSS_RANGE has the colour of its end. Up to 16 layers the numbers stand in the
    cells.
    """
    import altair as alt

    points = [
        {
            "first": first,
            "last": last,
            "value": min(max(increase, LOSS_RANGE[0]), LOSS_RANGE[1]),
            "text": _short(increase),
            "bright": increase > 0.3,
        }
        for first, last, increase in cells
        if math.isfinite(increase)
    ]
    layers = list(range(num_layers))
    shown = layers[:: math.ceil(num_layers / 16)]
    x = alt.X("last:O").title("last layer of the stretch").scale(domain=layers)
    y = alt.Y("first:O").title("first layer of the stretch").scale(domain=layers)
    colour = alt.Color("value:Q").title("loss increase (nats per token)")
    colour = colour.scale(type="log", domain=LOSS_RANGE, scheme="viridis")
    legend = alt.Legend(orient="right", gradientLength=380, titleOrient="right", format="~g")
    base = alt.Chart(alt.Data(values=points)).encode(
        x=x.axis(values=shown, labelAngle=0), y=y.axis(values=shown)
    )
    squares = base.mark_rect().encode(color=colour.legend(legend))
    chart = squares
    if num_layers <= 16:
        text = alt.condition(alt.datum.bright, alt.value("black"), alt.value("white"))
        numbers = base.mark_text(fontSize=9).encode(text="text:N", color=text)
        chart = alt.layer(squares, numbers)
    title = f"{name}: loss increase by stretch"
    _write(chart.properties(height=440), title, out / f"{name}.png", 440)


def _short(value: float) -> str:
    if value >= 1:
        return f"{value:.1f}"
    return f"{value:.2f}".replace("0.", ".") if abs(value) >= 0.005 else "0"


def _colour(names: Sequence[str]) -> Any:
    import altair as alt

    colour = alt.Color("name:N").title(None)
    if len(names) <= len(COLOURS):
        return colour.scale(domain=list(names), range=COLOURS[: len(names)])
    return colour.scale(domain=list(names), scheme="tableau10")


def _write(chart: Any, title: str, path: Path, width: int = 560) -> None:
    spec = {"width": width, **chart.to_dict(), "config": CONFIG, "padding": 12}
    if title:
        spec["title"] = title
    write(path, png(spec))
