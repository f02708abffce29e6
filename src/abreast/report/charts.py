"""The report's charts as Vega-Lite specifications, each with a description and a table of its data.

Colours are CSS variables, so that a page can theme them; `png` puts in real ones.
Knows no torch; needs altair, which comes with the ``report`` extra.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from abreast.planner import Objective
from abreast.rivals import Measured, caption

Row = Mapping[str, Any]

LIGHT = {
    **{"paper": "#ffffff", "fg": "#1b1f24", "muted": "#57606a", "grid": "#e3e6ea"},
    **{"wire": "#6e7781", "attn": "#cfe3fa", "ffn": "#fbe0c4"},
    **{"c1": "#0b5cad", "c2": "#b3430f", "c3": "#2c7a36", "c4": "#7a3fb0", "c5": "#6a737d"},
}
DARK = {
    **{"paper": "#15181c", "fg": "#e6e9ed", "muted": "#a3adb8", "grid": "#2d333a"},
    **{"wire": "#8b949e", "attn": "#1f4468", "ffn": "#5f3c17"},
    **{"c1": "#6cb6ff", "c2": "#ff9d66", "c3": "#7fd18b", "c4": "#cba6ff", "c5": "#9aa4af"},
}
LOSS = Objective(
    name="loss",
    label="loss increase over the original",
    unit="nats per token",
    value=lambda cost: cost.loss_increase,
    stderr=lambda cost: cost.loss_stderr,
)
LEAST = 1e-6  # what a logarithmic axis shows of costs that rounding made zero or negative
CONFIG = {
    "background": "var(--paper)",
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        **{"labelColor": "var(--muted)", "titleColor": "var(--fg)", "gridColor": "var(--grid)"},
        **{"domainColor": "var(--muted)", "tickColor": "var(--muted)"},
        **{"labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal"},
    },
    "legend": {
        **{"labelColor": "var(--fg)", "titleColor": "var(--fg)", "labelFontSize": 12},
        **{"orient": "top", "columns": 2, "title": None},
    },
}


@dataclass(frozen=True)
class Chart:
    """A chart and its text alternatives.

    spec: Vega-Lite. description: what it shows and, in a sentence, what is to be seen. columns:
    headings of the table; rows: its cells, as text.
    """

    name: str
    title: str
    description: str
    spec: Mapping[str, Any]
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def painted(spec: Mapping[str, Any]) -> str:
    """The specification as JSON text, with light colours for variables."""
    text = json.dumps(spec)
    for name, colour in LIGHT.items():
        text = text.replace(f"var(--{name})", colour)
    return text.replace("system-ui, sans-serif", "sans-serif")


def png(spec: Mapping[str, Any]) -> bytes:
    """The specification as a picture in light colours."""
    import vl_convert

    picture: bytes = vl_convert.vegalite_to_png(painted(spec), scale=2)
    return picture


def depth_chart(rows: Sequence[Measured], objective: Objective, chosen: str | None) -> Chart:
    """The best plan of each depth by an objective, a line per way to choose.

    The axis is logarithmic unless a plan is better than the original. chosen: the plan to mark.
    """
    import altair as alt

    label = objective.label
    points = _points(rows, objective, chosen)
    depth = alt.X("depth:Q").title("effective depth").scale(zero=False, padding=12)
    marked = "".join(
        f" The chosen plan, ringed, is at depth {point['depth']}: {point['exact']}."
        for point in points
        if point["chosen"]
    )
    methods = dict.fromkeys(point["method"] for point in points)
    return Chart(
        name=f"depth-{objective.key}",
        title=f"{label[0].upper()}{label[1:]} against depth",
        description=(
            f"Line chart of the {label}, by effective depth, one line per way to choose the plan: "
            f"{', '.join(methods)}. Bars are two standard errors each way.{marked}"
        ),
        spec=_curves(points, depth.axis(tickMinStep=1, format="d"), objective),
        columns=("chosen by", "depth", "plan", f"{label}, {objective.unit}"),
        rows=_table(points, "method", "depth", "plan", "exact"),
    )


def buy_chart(rows: Sequence[Measured], objective: Objective, about: str) -> list[Chart]:
    """The objective against predicted decode speed, without refits; none where no speed is known.

    Its description says where layers abreast are the better buy. about: engine and setting.
    """
    import altair as alt

    points = _points([r for r in rows if r.speedup is not None and not r.refit], objective, None)
    if not points:
        return []
    speedup = alt.X("speedup:Q").title("predicted speed of decoding, original = 1")
    chart = Chart(
        name=f"buy-{objective.key}",
        title=f"Quality against decode speed ({about})",
        description=caption(rows, objective),
        spec=_curves(points, speedup.scale(zero=False, padding=12), objective),
        columns=("chosen by", "depth", "plan", "speed", f"{objective.label}, {objective.unit}"),
        rows=_table(points, "method", "depth", "plan", "times", "exact"),
    )
    return [chart]


def _points(
    rows: Sequence[Measured], objective: Objective, chosen: str | None
) -> list[dict[str, Any]]:
    logarithmic = _is_logarithmic(objective, (objective.value(row.cost) for row in rows))
    return [
        {
            "method": row.name,
            "depth": row.depth,
            "plan": row.plan,
            "speedup": row.speedup,
            "times": f"{row.speedup:.2f}x" if row.speedup is not None else "unknown",
            **error_bar(value, stderr, logarithmic=logarithmic),
            "chosen": row.plan == chosen and row.method == "planner" and not row.refit,
        }
        for row in rows
        for value, stderr in [(objective.value(row.cost), objective.stderr(row.cost))]
    ]


def _is_logarithmic(objective: Objective, values: Iterable[float]) -> bool:
    """Whether its axis is logarithmic, so that one bad plan does not flatten all others.

    Divergences are never negative; a loss may be below the original's.
    """
    return objective.name.endswith("KL") or all(value > 0 for value in values)


def _curves(points: Sequence[Row], x: Any, objective: Objective) -> dict[str, Any]:
    """A line per method over x, its legend clickable, with a ring around the chosen plan."""
    import altair as alt

    methods = list(dict.fromkeys(point["method"] for point in points))
    selection = alt.selection_point(fields=["method"], bind="legend")
    base = alt.Chart(alt.Data(values=list(points))).encode(
        x=x,
        color=alt.Color("method:N").scale(
            domain=methods, range=[f"var(--c{1 + i % 5})" for i in range(len(methods))]
        ),
        opacity=alt.condition(selection, alt.value(1), alt.value(0.15)),
        tooltip=_tooltips(
            method="chosen by", depth="depth", exact=objective.label, times="speed", plan="plan"
        ),
    )
    shape = alt.Shape("method:N").scale(domain=methods)
    title = f"{objective.label} ({objective.unit})"
    axis = value_axis(
        alt.Y, title, logarithmic=_is_logarithmic(objective, (point["value"] for point in points))
    )
    layers = [
        # Vega-Lite makes a legend clickable for the first layer's parameters only
        draw_interval(base, axis).add_params(selection),
        base.mark_line(strokeWidth=1.8).encode(y=axis),
        base.mark_point(filled=True, size=64).encode(y=axis, shape=shape),
    ]
    if chosen := [point for point in points if point["chosen"]]:  # it warns of empty layers
        ringed = alt.Chart(alt.Data(values=chosen))
        ring = ringed.mark_point(size=240, strokeWidth=2, color="var(--fg)")
        layers.append(ring.encode(x=x, y=axis))
    return _spec(alt.layer(*layers), 300)


def groups_chart(rows: Sequence[Row]) -> Chart:
    """The cost of every candidate group alone, by its first layer.

    rows: group, first (layer), kl, kl_stderr, chosen.
    """
    import altair as alt

    number_at: Counter[int] = Counter()  # groups that begin at the same layer stand side by side
    points = []
    for row in rows:
        points.append(
            {
                "group": row["group"],
                "first": row["first"] + 0.15 * number_at[row["first"]],
                **error_bar(row["kl"], row["kl_stderr"], logarithmic=True),
                "use": "in the plan" if row["chosen"] else "not in the plan",
            }
        )
        number_at[row["first"]] += 1
    uses = ["in the plan", "not in the plan"]
    first = alt.X("first:Q").title("first layer of the group").scale(zero=False, padding=12)
    axis = value_axis(alt.Y, "KL alone (nats per token)", logarithmic=True)
    base = alt.Chart(alt.Data(values=points)).encode(
        x=first.axis(tickMinStep=1, format="d"),
        color=alt.Color("use:N").scale(domain=uses, range=["var(--c2)", "var(--c5)"]),
        tooltip=_tooltips(group="group", exact="KL alone", use="chosen"),
    )
    shape = alt.Shape("use:N").scale(domain=uses, range=["diamond", "circle"])
    layers = alt.layer(
        draw_interval(base, axis),
        base.mark_point(filled=True, size=80, opacity=1).encode(y=axis, shape=shape),
    )
    least = min(points, key=lambda point: point["value"])
    most = max(points, key=lambda point: point["value"])
    return Chart(
        name="groups-kl",
        title="Cost of each group alone",
        description=(
            f"Point chart of the KL divergence with only one group formed, for {len(rows)} groups "
            f"by their first layer. The cheapest is {least['group']} ({least['exact']}), the most "
            f"expensive {most['group']} ({most['exact']})."
        ),
        spec=_spec(layers, 260),
        columns=("group", "KL alone, nats", "chosen"),
        rows=_table(points, "group", "exact", "use"),
    )


def position_chart(rows: Sequence[Row]) -> Chart:
    """KL by the position in the window. rows: start, end (exclusive), kl, stderr."""
    import altair as alt

    points = [
        {
            "middle": (row["start"] + row["end"]) / 2,
            "span": f"{row['start']} to {row['end'] - 1}",
            **error_bar(row["kl"], row["stderr"]),
        }
        for row in rows
    ]
    axis = value_axis(alt.Y, "KL divergence (nats per token)")
    base = alt.Chart(alt.Data(values=points)).encode(
        x=alt.X("middle:Q").title("position in the window (tokens)").scale(padding=8),
        color=alt.value("var(--c1)"),
        tooltip=_tooltips(span="positions", exact="KL"),
    )
    layers = alt.layer(
        draw_interval(base, axis),
        base.mark_line().encode(y=axis),
        base.mark_point(filled=True, size=52, opacity=1).encode(y=axis),
    )
    first, last = points[0], points[-1]
    return Chart(
        name="position-kl",
        title="KL divergence by position",
        description=(
            "Line chart of the KL divergence by the position of the token in its window, from "
            f"{first['exact']} at {first['span']} to {last['exact']} at {last['span']}."
        ),
        spec=_spec(layers, 240),
        columns=("positions", "KL, nats"),
        rows=_table(points, "span", "exact"),
    )


def tasks_chart(rows: Sequence[Row]) -> Chart:
    """Accuracy per task. rows: task, metric, original, original_stderr, converted, ..._stderr."""
    import altair as alt

    models = ["original", "converted"]
    points = [
        {"task": row["task"], "model": model, **error_bar(row[model], row[f"{model}_stderr"])}
        for row in rows
        for model in models
    ]
    axis = value_axis(alt.X, "score")
    base = alt.Chart(alt.Data(values=points)).encode(
        y=alt.Y("task:N").title(None).axis(ticks=False, domain=False, labelLimit=110),
        yOffset=alt.YOffset("model:N").scale(domain=models),
        color=alt.Color("model:N").scale(domain=models, range=["var(--c5)", "var(--c1)"]),
        tooltip=_tooltips(task="task", model="model", exact="score"),
    )
    layers = alt.layer(
        draw_interval(base, axis), base.mark_point(filled=True, size=70, opacity=1).encode(x=axis)
    )
    scores = (f"{row['task']} {row['original']:.3f} and {row['converted']:.3f}" for row in rows)
    return Chart(
        name="tasks",
        title="Task scores",
        description=(
            "Point chart of the score per task, original and converted, with two standard errors "
            f"each way. {'; '.join(scores)}."
        ),
        spec=_spec(layers, 44 * len(rows) + 10),
        columns=("task", "model", "score"),
        rows=_table(points, "task", "model", "exact"),
    )


def speed_chart(rows: Sequence[Row]) -> Chart:
    """The ratio of speeds per phase. rows: phase, ratio, low, high, verdict."""
    import altair as alt

    points = [
        {
            **row,
            "value": row["ratio"],
            "exact": f"{row['ratio']:.3f}x",
            "interval": f"{row['low']:.3f} to {row['high']:.3f}",
        }
        for row in rows
    ]
    axis = value_axis(alt.X, "speed against the original (1 = the same)")
    base = alt.Chart(alt.Data(values=points)).encode(
        y=alt.Y("phase:N").title(None).axis(ticks=False, domain=False),
        color=alt.value("var(--c1)"),
        tooltip=_tooltips(phase="phase", verdict="verdict"),
    )
    same = alt.Chart(alt.Data(values=[{"value": 1}])).mark_rule(strokeDash=[4, 4])
    layers = alt.layer(
        same.encode(x="value:Q", color=alt.value("var(--muted)")),
        draw_interval(base, axis),
        base.mark_point(filled=True, size=90, opacity=1).encode(
            x=axis.scale(zero=False, padding=16)
        ),
    )
    verdicts = "; ".join(f"{row['phase']}: {row['verdict']}" for row in rows)
    return Chart(
        name="speed",
        title="Speed against the original",
        description=(
            "Point chart of the converted model's speed over the original's, with 95 % intervals "
            f"of the paired ratio. {verdicts}."
        ),
        spec=_spec(layers, 46 * len(rows)),
        columns=("phase", "ratio", "95 % interval", "verdict"),
        rows=_table(points, "phase", "exact", "interval", "verdict"),
    )


def number(value: float | None, stderr: float | None = None) -> str:
    """A number with its standard error, to as many digits as the error allows."""
    if value is None:
        return "unknown"
    if not stderr or not math.isfinite(stderr):
        return f"{value:.3g}"
    digits = max(0, 1 - int(f"{stderr:e}".partition("e")[2]))
    return f"{value:.{digits}f} ± {stderr:.{digits}f}"


def error_bar(value: float, stderr: float | None, *, logarithmic: bool = False) -> dict[str, Any]:
    """A value, exactly as text, and its error bar, two standard errors each way.

    On a logarithmic axis a bar that would reach zero ends at a tenth of the value.
    """
    exact = number(value, stderr)
    value = max(value, LEAST) if logarithmic else value
    reach = 2 * stderr if stderr is not None and math.isfinite(stderr) else 0.0
    low = max(value - reach, value / 10) if logarithmic else value - reach
    return {"value": value, "low": low, "high": value + reach, "exact": exact}


def value_axis(channel: Any, title: str, *, logarithmic: bool = False) -> Any:
    """The channel alt.X or alt.Y for the field "value"."""
    axis = channel("value:Q").title(title).axis(format="~g", tickCount=6)
    return axis.scale(type="log") if logarithmic else axis


def draw_interval(base: Any, axis: Any) -> Any:
    """Rules from the field "low" to "high" along an axis."""
    low = axis.copy()
    low.shorthand = "low:Q"
    end = "y2" if type(axis).__name__ == "Y" else "x2"
    return base.mark_rule(strokeWidth=1.5).encode(low, **{end: "high:Q"})


def _tooltips(**titles: str) -> list[Any]:
    import altair as alt

    return [alt.Tooltip(f"{field}:N", title=title) for field, title in titles.items()]


def _table(points: Sequence[Row], *fields: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(str(point[field]) for field in fields) for point in points)


def _spec(chart: Any, height: int) -> dict[str, Any]:
    spec: dict[str, Any] = chart.properties(width="container", height=height).to_dict()
    # Wide charts would push a phone's page sideways; `fit` counts axes and legend in.
    spec["autosize"] = {"type": "fit-x", "contains": "padding", "resize": True}
    return {**spec, "config": CONFIG}
