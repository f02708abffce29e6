"""One HTML page about a run, its pictures and its numbers, made from the run's files; no torch.

The page needs nothing but itself: the plotting library (Vega) lies in it, and its content security
policy allows no request at all and no script but the two whose hashes it names.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from datetime import datetime, timezone
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from abreast.checkpoint import finite, write
from abreast.errors import AbreastError, install
from abreast.planner import DEFAULT_KL, DEFAULT_KL_IS, KL
from abreast.report.card import serving
from abreast.report.charts import (
    DARK,
    LIGHT,
    LOSS,
    Chart,
    buy_chart,
    depth_chart,
    groups_chart,
    number,
    png,
    position_chart,
    speed_chart,
    tasks_chart,
)
from abreast.report.diagram import describe, draw_plan, draw_stage, stage_size
from abreast.report.metrics import METRICS, Metric
from abreast.report.records import Conversion, Run, read_run
from abreast.version import __version__

PAGE = "report.html"
MIN_ROUNDS = 6  # as in timing.py: fewer allow no 95 % interval, so no ratio is shown
_EXTRA = {"altair": "altair", "jinja2": "jinja2", "vl_convert": "vl-convert-python"}


def check_extra() -> None:
    """Raise AbreastError where a package that the report needs is not installed."""
    lacking = [package for module, package in _EXTRA.items() if find_spec(module) is None]
    if lacking:
        raise AbreastError(
            f"the report needs {', '.join(lacking)}: {install('report')}; "
            "optimize runs without it by --no-report"
        )


def write_report(run: str | Path, out: str | Path | None = None) -> Path:
    """Write report.html, results.json and a PNG per chart and of the plan; return the page's path.

    run: what `optimize` left, also half-finished: the page then says what is missing. out: folder,
    run/report unless given; a report there is replaced. Raises AbreastError for a folder that is no
    run, an `out` that holds something else, and without the ``report`` extra.
    """
    check_extra()
    record = read_run(run)
    target = Path(out) if out is not None else record.folder / "report"
    if target.exists() and not target.is_dir():
        raise AbreastError(f"'{target}' is a file; name a folder for the report")
    if target.is_dir() and any(target.iterdir()) and not (target / PAGE).is_file():
        raise AbreastError(f"'{target}' holds something else than a report; name a new folder")
    charts = _charts(record)
    pictures = {f"{chart.name}.png": png({**chart.spec, "width": 640}) for chart in charts}
    if record.last is not None:
        pictures["plan.png"] = _svg_png(draw_plan(record.last.plan, LIGHT))
    page = render(record, charts)
    target.mkdir(parents=True, exist_ok=True)
    for name, data in pictures.items():
        write(target / name, data)
    write(target / "results.json", json.dumps(numbers(record), indent=1) + "\n")
    write(target / PAGE, page)
    return target / PAGE


def render(run: Run, charts: list[Chart]) -> str:
    """The page."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from jinja2.utils import htmlsafe_json_dumps
    from markupsafe import Markup

    script = files("abreast.report").joinpath("templates", "report.js").read_text(encoding="utf-8")
    scripts = [Markup(text) for text in (_bundle(), script)] if charts else []
    jinja = Environment(
        loader=PackageLoader("abreast.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    last, (reason_columns, reasons) = run.last, _reasons(run)
    return jinja.get_template("report.html.j2").render(
        run=run,
        last=last,
        model=Path(run.model).name if run.model.startswith(("/", ".", "~")) else run.model,
        missing=run.missing(),
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
        charts={chart.name: chart for chart in charts},
        specs=htmlsafe_json_dumps({chart.name: chart.spec for chart in charts}),
        scripts=scripts,
        hashes=[_csp_hash(script) for script in scripts],
        light=LIGHT,
        dark=DARK,
        stages=_stages(last) if last is not None else [],
        reason_columns=reason_columns,
        reasons=reasons,
        verdict=verdict_of(last) if last is not None else "",
        tiles=_tiles(last) if last is not None else [],
        quality=[metric.row(last.quality) for metric in METRICS]
        if last is not None and last.quality
        else [],
        speed=speed_rows(last) if last is not None else [],
        tasks=task_rows(last) if last is not None else [],
        text_columns=_TEXT_COLUMNS,
        texts=text_rows(run),
        samples=_samples(last) if last is not None else [],
        other_columns=_OTHER_COLUMNS,
        others=[_summary(conversion) for conversion in run.others],
        serving=serving(str(last.target), last) if last is not None and last.manifest else None,
        number=number,
    )


def numbers(run: Run) -> dict[str, Any]:
    """All that the page shows, as JSON-ready values."""
    return finite(
        {
            "model": run.model,
            "command": run.command,
            "environment": run.environment,
            "missing": [part.what for part in run.missing()],
            "last": _numbers(run.last) if run.last is not None else None,
            "others": [_numbers(conversion) for conversion in run.others],
            "front": [row.to_dict() for row in run.front],
            "baselines": [row.to_dict() for row in run.baselines],
            "groups": group_rows(run),
            "texts": [dict(zip(_TEXT_COLUMNS, row, strict=True)) for row in text_rows(run)],
        }
    )


def verdict_of(conversion: Conversion) -> str:
    """What the conversion costs, what it brings, and whether to use it, in a sentence or two."""
    quality, decode = (
        conversion.quality,
        {r["phase"]: r for r in speed_rows(conversion)}.get("decode"),
    )
    if quality is None or decode is None or not decode["known"]:
        return "Not judged yet: it takes held-out text and at least six rounds of timing."
    cost = (
        f"It costs {quality['nll_difference']:+.3f} nats per token (KL {quality['kl']:.3f}), "
        f"{1 - quality['top1_agreement']:.0%} of next tokens change"
    )
    gain = f"decoding is {decode['ratio']:.2f}x as fast [{decode['low']:.2f}, {decode['high']:.2f}]"
    if decode["low"] <= 1:
        advice = "Do not use it on this machine: it is not shown to be faster here."
    elif quality["kl"] <= DEFAULT_KL:
        advice = f"Use it: this is no more than {DEFAULT_KL_IS}."
    else:
        advice = f"Heal it before you use it, or cut less: this is more than {DEFAULT_KL_IS}."
    return f"{cost}, and {gain} here. {advice}"


def speed_rows(conversion: Conversion) -> list[dict[str, Any]]:
    """Per phase that was timed: tokens per second of both, their ratio, the verdict."""
    rows = []
    for phase, row in conversion.phases.items():
        before, after = (row["timings"][name] for name in ("original", "converted"))
        rows.append(
            {
                "phase": phase,
                "before": before["tokens_per_second"],
                "after": after["tokens_per_second"],
                "ratio": after["ratio"],
                "low": after["ratio_low"],
                "high": after["ratio_high"],
                "verdict": row["verdict"],
                "known": row["rounds"] >= MIN_ROUNDS,
                "about": f"batch {row['batch_size']}, context {row['context']}, {row['dtype']}, "
                f"{row['device']}, {row['threads']} CPU threads, {row['rounds']} rounds",
            }
        )
    return rows


def task_rows(conversion: Conversion) -> list[dict[str, Any]]:
    """Per task its scores, standard errors, the share kept and the paired test's p value."""
    keys = [f"{model}{end}" for model in ("original", "converted") for end in ("", "_stderr")]
    keys += ["metric", "kept", "p_value", "num_items"]
    tasks = (conversion.tasks or {}).get("tasks", {})
    return [{"task": task, **{k: row.get(k) for k in keys}} for task, row in tasks.items()]


def text_rows(run: Run) -> list[tuple[str, ...]]:
    """What the texts were like, a line per source, see _TEXT_COLUMNS."""
    texts: dict[str, Any] = dict(run.texts)
    if run.last is not None:
        texts |= {
            "healing": (run.last.healed or {}).get("data"),
            "evaluation": (run.last.quality or {}).get("text"),
        }
    return [
        (
            use,
            part["source"],
            f"{part['tokens']:,}",
            f"{part['tokens'] / max(1, sum(p['tokens'] for p in text['parts'])):.0%}",
            f"{part['num_bytes'] / max(1, part['tokens']):.2f}",
            " / ".join(f"“{words}”" for words in part["beginnings"]),
        )
        for use, text in texts.items()
        if isinstance(text, Mapping)
        for part in text.get("parts", ())
    ]


def group_rows(run: Run) -> list[dict[str, Any]]:
    """Every candidate group with its cost alone, and whether the last plan has it."""
    if run.stats is None:
        return []
    chosen = set(run.last.plan.groups) if run.last is not None else set()
    return [
        {
            "group": group.shorthand,
            "first": group.layers[0],
            "kl": cost.kl,
            "kl_stderr": cost.kl_stderr,
            "chosen": group in chosen,
        }
        for group, cost in run.stats.groups.items()
    ]


def _charts(run: Run) -> list[Chart]:
    last, charts = run.last, []
    plain = [row for row in run.baselines if not row.refit]
    rows = plain or run.front
    chosen = last.plan.shorthand if last is not None else None
    if rows:
        charts += [depth_chart(rows, objective, chosen) for objective in (run.objective, LOSS)]
        about = f"transformers, {run.profile.about}" if run.profile else "estimated"
        charts += buy_chart(run.baselines, run.objective, about)
    if groups := group_rows(run):
        charts.append(groups_chart(groups))
    if last is not None:
        if places := (last.quality or {}).get("kl_by_position"):
            charts.append(position_chart(places))
        if tasks := task_rows(last):
            charts.append(tasks_chart(tasks))
        if speed := [row for row in speed_rows(last) if row["known"]]:
            charts.append(speed_chart(speed))
    return charts


def _stages(conversion: Conversion) -> list[dict[str, Any]]:
    from markupsafe import Markup

    plan = conversion.plan
    return [
        {
            "name": describe(stage, plan.group_of(stage)),
            "size": stage_size(stage, plan.group_of(stage)),
            "drawing": Markup(draw_stage(stage, plan.group_of(stage))),  # numbers and fixed words
        }
        for stage in plan.stages
    ]


def _tiles(conversion: Conversion) -> list[tuple[str, str, str]]:
    """(heading, number, small print) of what matters most."""
    plan, quality = conversion.plan, conversion.quality
    share = f"{plan.num_layers - plan.depth} of {plan.num_layers} steps fewer"
    tiles = [("effective depth", f"{plan.num_layers} → {plan.depth}", share)]
    if quality is not None:
        for metric in METRICS:
            if metric.tile is not None:
                value, _, error = _short(metric, quality).partition(" ± ")
                error = f"± {error} " if error else ""
                tiles.append((metric.tile, value, f"{error}{metric.small_print}"))
    for row in speed_rows(conversion):
        ratio = f"{'' if row['known'] else 'about '}{row['ratio']:.2f}x"
        tiles.append((f"{row['phase']} speed", ratio, row["verdict"]))
    return tiles


def _reasons(run: Run) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Why each group, headings and rows, where the last call's plan is the one that was planned."""
    planned = (run.results or {}).get("planned", {})
    same = run.last is not None and planned.get("plan") == run.last.plan.shorthand
    rows = planned.get("reasons", []) if same else []
    # the objective by which the plan was found names the columns: extra_kl, kl, kl_stderr
    keys = [name.removeprefix("extra_") for row in rows for name in row if name[:6] == "extra_"]
    key = keys[0] if keys else KL.key
    name = KL.name if key == KL.key else key
    headings = ("group", f"{name} alone", "rank", "inputs alike", "depends")
    return (*headings, "best plan without it", f"{name} of that"), [
        (
            row["group"],
            number(row[key], row[f"{key}_stderr"]),
            f"{row['rank']} of {row['candidates']}",
            f"{row['similarity']:.3f}",
            f"{row['dependency']:.3f}",
            row["without"] or "none measured",
            f"{row[f'extra_{key}']:+.5f}" if row[f"extra_{key}"] is not None else "",
        )
        for row in rows
    ]


def _samples(conversion: Conversion) -> list[dict[str, Any]]:
    samples = []
    for sample in (conversion.samples or {}).get("samples", []):
        first, shared = sample["first_difference"], sample["shared"]
        samples.append(
            {
                "prompt": sample["prompt"],
                "note": (
                    f"Both wrote the same {sample['new_tokens'][0]} tokens."
                    if first is None
                    else f"The first difference, marked, is at token {first + 1}."
                ),
                "texts": [
                    (model, sample[model][:shared], sample[model][shared:])
                    for model in ("original", "converted")
                ],
            }
        )
    return samples


_TEXT_COLUMNS = ("for", "source", "tokens", "share", "bytes per token", "begins")
_OTHER_COLUMNS = (
    *("depth", "plan", "healed"),
    *(f"{metric.tile},{metric.unit}".rstrip(",") for metric in METRICS if metric.tile),
    *("speed", "checkpoint"),
)


def _summary(conversion: Conversion) -> tuple[object, ...]:
    """A line of the table of the other plans, see _OTHER_COLUMNS."""
    quality, timed = conversion.quality, speed_rows(conversion)
    return (
        conversion.plan.depth,
        conversion.plan.label or "none",
        (conversion.healed or {}).get("method", ""),
        *(
            _short(metric, quality) if quality else "not measured"
            for metric in METRICS
            if metric.tile
        ),
        "; ".join(f"{r['phase']} {r['ratio']:.2f}x" for r in timed if r["known"]),
        str(conversion.target) if conversion.manifest else "not converted",
    )


def _short(metric: Metric, quality: Mapping[str, Any]) -> str:
    """The difference in a few digits, with its error."""
    value = metric.value(quality)
    if metric.spec.endswith("%") and value is not None:
        return format(value, metric.spec)
    return number(value, metric.stderr(quality))


def _numbers(conversion: Conversion) -> dict[str, Any]:
    plan = conversion.plan
    results = ("verify", "quality", "speed", "tasks", "samples")
    return {
        "plan": plan.shorthand,
        "num_layers": plan.num_layers,
        "depth": plan.depth,
        "converted": str(conversion.target) if conversion.manifest else None,
        "healed": conversion.healed,
        **{name: getattr(conversion, name) for name in results},
    }


@cache
def _bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script that an HTML page can hold."""
    import vl_convert

    text: str = vl_convert.javascript_bundle()  # type: ignore[call-arg]
    return text.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _csp_hash(script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _svg_png(svg: str) -> bytes:
    import vl_convert

    image: bytes = vl_convert.svg_to_png(svg, scale=2)
    return image
