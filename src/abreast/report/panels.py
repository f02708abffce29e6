"""What the playground shows, as HTML; what comes from outside is escaped here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from abreast.plan import Plan
from abreast.planner import KL
from abreast.report.answers import Answer, Segments
from abreast.report.records import Choice, Choices

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 340, 170, 44, 12, 12, 34
_LEAST_KL = 1e-6  # what a logarithmic axis can show


def heading(run: Choices) -> str:
    return (
        "<h1>abreast playground</h1>"
        f"<p><code>{escape(run.model)}</code>, {run.num_layers} layers, beside its conversions. "
        "Both answer the same prompt under the same settings.</p>"
    )


def about(run: Choices, choice: Choice) -> str:
    """What is known about a choice: plan, cost, speed, and how it runs."""
    plan, cost = choice.plan, choice.cost
    rows = [("Depth", f"{plan.num_layers} layers in {plan.depth} stages")]
    rows.append(("Plan", f"<code>{escape(plan.shorthand)}</code>" if plan.groups else "none"))
    if choice.healed is not None and "kl_after" in choice.healed:
        before, after = (choice.healed.get(key) for key in ("kl_before", "kl_after"))
        rows.append(("KL, healed", f"{_number(before)} → {_number(after)} nats/token"))
    if cost is not None:
        label = "Expected KL" if choice.healed is None else "KL before healing"
        rows.append((label, f"{cost.kl:.5f} ± {cost.kl_stderr:.5f} nats/token"))
        rows.append(("Perplexity", f"{cost.ppl_increase:+.2%} on {cost.tokens:,} tokens"))
    elif plan.groups:
        rows.append(("Expected KL", "not measured"))
    if choice.speedup is not None:
        rows.append(("Predicted decode", f"{choice.speedup:.2f}× the original's speed"))
    rows.append(("Runs as", escape(choice.way)))
    items = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in rows)
    return f'{plan_picture(plan)}<dl class="ab-facts">{items}</dl>{_note(run, choice)}'


def _number(value: object) -> str:
    return f"{value:.5f}" if isinstance(value, float) else "unknown"


def _note(run: Choices, choice: Choice) -> str:
    notes = []
    if choice.folder is None and choice.plan.groups:
        notes.append(
            "Grouped in memory, it shares the original's weights and answers as the conversion "
            "would, up to rounding, but not at its speed. "
            "<code>abreast optimize</code> leaves a conversion."
        )
    if choice.speedup is not None and run.speed:
        notes.append(f"The prediction rests on: {escape(run.speed)}.")
    return "".join(f'<p class="ab-note">{note}</p>' for note in notes)


def plan_picture(plan: Plan) -> str:
    """The stages in a row; the members of a group stand in one column."""
    stages = []
    for stage in plan.stages:
        group = plan.group_of(stage)
        kind = "" if group is None else f" ab-group ab-{group.wiring}"
        layers = "".join(f"<span>{layer}</span>" for layer in stage)
        stages.append(f'<div class="ab-stage{kind}">{layers}</div>')
    spoken = ", ".join(
        " beside ".join(map(str, stage)) if len(stage) > 1 else str(stage[0])
        for stage in plan.stages
    )
    return (
        f'<div class="ab-plan" role="img" aria-label="Layers in the order they run: {spoken}">'
        f"{''.join(stages)}</div>"
    )


def front_picture(run: Choices, chosen: Choice) -> str:
    """KL against depth on a logarithmic scale, the chosen plan ringed; empty with no costs."""
    known = {depth: [c.cost for c in run.at(depth) if c.cost] for depth in run.depths}
    best = {depth: min(costs, key=KL.value) for depth, costs in known.items() if costs}
    if not best:
        return ""
    kls = [max(cost.kl, _LEAST_KL) for cost in best.values()]
    low, high = math.floor(math.log10(min(kls))), math.ceil(math.log10(max(kls)))
    high = max(high, low + 1)
    deepest, least = run.num_layers, min(best)

    def x(depth: float) -> float:
        return _LEFT + (depth - least) / (deepest - least) * (_WIDTH - _LEFT - _RIGHT)

    def y(kl: float) -> float:
        share = (math.log10(max(kl, _LEAST_KL)) - low) / (high - low)
        return _HEIGHT - _BOTTOM - min(max(share, 0.0), 1.0) * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for power in range(low, high + 1):
        at = y(10.0**power)
        parts.append(f'<line class="ab-grid" x1="{_LEFT}" x2="{_WIDTH}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at + 4}" text-anchor="end">{10.0**power:g}</text>')
    every = max(1, math.ceil((deepest - least) / 8))
    for depth in range(deepest, least - 1, -every):
        parts.append(f'<text x="{x(depth)}" y="{_HEIGHT - 18}" text-anchor="middle">{depth}</text>')
    line = " ".join(f"{x(depth)},{y(cost.kl)}" for depth, cost in sorted(best.items()))
    parts.append(f'<polyline class="ab-line" points="{line}"/>')
    for depth, cost in best.items():
        if math.isfinite(cost.kl_stderr):
            ends = [y(cost.kl + 2 * sign * cost.kl_stderr) for sign in (-1, 1)]
            at = x(depth)
            parts.append(
                f'<line class="ab-line" x1="{at}" x2="{at}" y1="{ends[0]}" y2="{ends[1]}"/>'
            )
        parts.append(f'<circle class="ab-dot" cx="{x(depth)}" cy="{y(cost.kl)}" r="3"/>')
    kl = (chosen.healed or {}).get("kl_after", chosen.cost.kl if chosen.cost else None)
    if kl is not None or not chosen.plan.groups:
        at = y(kl) if kl is not None else _HEIGHT - _BOTTOM
        center = f'cx="{x(chosen.plan.depth)}" cy="{at}"'
        parts.append(f'<circle class="ab-dot" {center} r="3"/>')
        parts.append(f'<circle class="ab-ring" {center} r="7"/>')
    middle = (_LEFT + _WIDTH) / 2
    parts.append(
        f'<text x="{middle}" y="{_HEIGHT - 3}" text-anchor="middle">effective depth</text>'
    )
    spoken = "; ".join(f"{depth}: {cost.kl:.2g}" for depth, cost in sorted(best.items()))
    return (
        '<figure class="ab-front"><figcaption>KL from the original, nats per token</figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="KL by effective depth. {spoken}">{"".join(parts)}</svg></figure>'
    )


def panel(
    name: str, about: str, answer: Answer, parts: Segments, index: int | None, *, running: bool
) -> str:
    """A panel: who answers, how fast, and the text, marked from the first difference on.

    index: of the first differing token, if any.
    """
    speed = "" if math.isnan(answer.tokens_per_second) else f"{answer.tokens_per_second:,.1f}"
    figures = (
        f'<p class="ab-speed"><strong>{speed or "–"}</strong> tokens/s</p>'
        f'<p class="ab-small">{_count(len(answer.tokens))}</p>'
        f'<p class="ab-small">first after {answer.prefill * 1000:,.0f} ms</p>'
    )
    text = escape(parts.same)
    if index is not None and index < len(answer.tokens):
        text += (
            f'<mark class="ab-differs"><span class="ab-flag">differs</span>'
            f"<b>{escape(parts.first)}</b>{escape(parts.rest)}</mark>"
        )
    if answer.ended:
        text += '<span class="ab-end">end of text</span>'
    elif running:
        text += '<span class="ab-cursor" aria-hidden="true"></span>'
    return (
        f'<div class="ab-panel"><div class="ab-top"><div><h2>{escape(name)}</h2>'
        f'<p class="ab-small">{about}</p></div><div class="ab-figures">{figures}</div></div>'
        f'<div class="ab-text" tabindex="0" role="region" '
        f'aria-label="Answer of the {escape(name.lower())}">{text}</div></div>'
    )


def waiting(name: str, about: str) -> str:
    """A panel before its first answer."""
    return (
        f'<div class="ab-panel"><div class="ab-top"><div><h2>{escape(name)}</h2>'
        f'<p class="ab-small">{about}</p></div></div>'
        '<div class="ab-text ab-empty">The answer appears here.</div></div>'
    )


def side(choice: Choice) -> str:
    """One line about a choice for its panel."""
    plan = choice.plan
    if not plan.groups:
        return "the original again, so both must agree"
    return f"{plan.depth} of {plan.num_layers} stages, {escape(choice.way)}"


def agreement(
    answers: Sequence[Answer], index: int | None, tokens: tuple[str, str], *, running: bool
) -> str:
    """Where the two answers part. tokens: the first differing ones as text."""
    so_far = " so far" if running else ""
    if index is None:
        shared = min(len(answer.tokens) for answer in answers)
        return f"<p>Both answers agree in all {_count(shared)}{so_far}.</p>"
    one, other = (f"<code>{escape(repr(token))}</code>" for token in tokens)
    return (
        f"<p>The answers part at token {index + 1}: the original has {one}, the conversion "
        f"{other}. Before it, {'no token' if not index else _count(index)} agree"
        f"{'s' if index == 1 else ''}.</p>"
    )


def complaint(message: str) -> str:
    return f'<p class="ab-error">{escape(message)}</p>'


def _count(tokens: int) -> str:
    return f"{tokens:,} token" + ("" if tokens == 1 else "s")
