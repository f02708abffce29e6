"""The playground: a page by gradio on which original and conversions answer the same prompt.

It is served on this machine only, and nothing on it comes from elsewhere; what comes from outside
is escaped here.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files
from typing import Any

import torch

from abreast.errors import AbreastError, install
from abreast.plan import Plan
from abreast.planner import KL
from abreast.report.answers import (
    MOST_CHARACTERS,
    MOST_TOKENS,
    Answer,
    Models,
    Segments,
    Settings,
    answers,
    encode,
    parting,
    segments,
)
from abreast.report.guard import Guard
from abreast.report.records import Choice, Choices

HOST = "127.0.0.1"
ORIGINAL, CONVERSION = "Original", "Conversion"
REFRESH = 0.08  # seconds between two looks at growing answers
QUEUE = 32  # prompts that wait; more are refused
_FOOT = (
    "The two models take turns, one token each; each one's clock runs during its own steps only. "
    "tokens/s leaves the prompt's pass out. One answer is no benchmark: "
    "<code>abreast bench</code> measures speed with its uncertainty."
)
_NOT_MADE = "waiting for a prompt"
_STOPPED = '<span class="ab-stopped">Stopped.</span>'
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 340, 170, 44, 12, 12, 34
_LEAST_KL = 1e-6  # what a logarithmic axis can show


def check_gradio() -> Any:
    """The library, told to keep to itself. Raises AbreastError where it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    # It asks itself whether it is up; a proxy in the environment is no way to there.
    exempt = {*os.environ.get("no_proxy", os.environ.get("NO_PROXY", "")).split(","), HOST} - {""}
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(sorted(exempt))
    try:
        import gradio
    except ImportError:
        raise AbreastError(f"the playground needs gradio: {install('play')}") from None
    return gradio


def build_page(models: Models) -> Any:
    """The page as gradio Blocks, not yet served."""
    gr, run = check_gradio(), models.run
    chat = bool(getattr(models.tokenizer, "chat_template", None))
    first = run.at(run.first)

    def chosen(depth: float, index: int | None) -> Choice:
        choices = run.at(depth if isinstance(depth, int | float) else run.first)
        return choices[index if isinstance(index, int) and 0 <= index < len(choices) else 0]

    def moved(depth: float) -> tuple[Any, str, str]:
        choices = run.at(depth)
        labels = [(_label(choice, choices), index) for index, choice in enumerate(choices)]
        radio = gr.Radio(choices=labels, value=0, visible=len(labels) > 1)
        return radio, about(run, choices[0]), front_picture(run, choices[0])

    def picked(depth: float, index: int | None) -> tuple[str, str]:
        choice = chosen(depth, index)
        return about(run, choice), front_picture(run, choice)

    def ask(
        prompt: str,
        depth: float,
        index: int | None,
        new_tokens: float | None,
        temperature: float | None,
        top_p: float | None,
        seed: float | None,
        in_chat: bool,
    ) -> Iterator[tuple[Any, Any, Any, Any]]:
        choice = chosen(depth, index)
        try:
            if new_tokens is None or temperature is None or top_p is None or seed is None:
                raise AbreastError("a setting is empty; give every setting a number")
            try:
                settings = Settings(int(new_tokens), float(temperature), float(top_p), int(seed))
            except (TypeError, OverflowError):
                raise AbreastError("a setting is not a number; give every one a number") from None
            ids = encode(models, prompt, chat=in_chat and chat)
            one, other = (waiting(*title) for title in _titles(choice))
            yield "Working …", "", one, other
            yield from _shown(models, choice, ids, settings)
        except AbreastError as error:
            yield complaint(str(error)), gr.skip(), gr.skip(), gr.skip()
        except (MemoryError, torch.OutOfMemoryError):
            message = "out of memory; ask for fewer tokens, or start again with another --device"
            yield complaint(message), gr.skip(), gr.skip(), gr.skip()

    with gr.Blocks(title="abreast playground", analytics_enabled=False, fill_width=True) as blocks:
        gr.HTML(heading(run), elem_id="ab-heading")
        with gr.Row(elem_id="ab-body"):
            with gr.Column(scale=1, min_width=300, elem_id="ab-choice"):
                gr.HTML("<h2>Conversion</h2>")
                low, high = run.depths[0], run.depths[-1]
                depth = gr.Slider(
                    low,
                    high,
                    value=run.first,
                    step=1,
                    label="Effective depth",
                    info=f"{high} is the original; to the left, more layers run abreast",
                    elem_id="ab-depth",
                    visible=high > low,
                    buttons=[],
                )
                way = gr.Radio(
                    [(_label(choice, first), index) for index, choice in enumerate(first)],
                    value=0,
                    label="Which one",
                    visible=len(first) > 1,
                    elem_id="ab-way",
                )
                facts = gr.HTML(about(run, first[0]), elem_id="ab-about")
                curve = gr.HTML(front_picture(run, first[0]))
            with gr.Column(scale=3, min_width=300):
                prompt = gr.Textbox(
                    label="Prompt",
                    info="Both models go on from here. Shift and Enter run it.",
                    lines=3,
                    max_lines=8,
                    max_length=MOST_CHARACTERS,
                    elem_id="ab-prompt",
                )
                with gr.Row(elem_id="ab-buttons"):
                    go = gr.Button("Run both", variant="primary", scale=3, elem_id="ab-run")
                    stop = gr.Button("Stop", scale=1, min_width=90, elem_id="ab-stop")
                with gr.Accordion("Settings", open=False):
                    in_chat = gr.Checkbox(chat, label="Use the model's chat template", visible=chat)
                    with gr.Row():
                        new_tokens = gr.Number(
                            64, label="New tokens, at most", minimum=1, maximum=MOST_TOKENS
                        )
                        temperature = gr.Number(
                            0, label="Temperature (0: greedy)", minimum=0, maximum=5, step=0.1
                        )
                        top_p = gr.Number(1, label="Top-p", minimum=0, maximum=1, step=0.05)
                        seed = gr.Number(0, label="Seed", minimum=0, precision=0)
                with gr.Column(elem_id="ab-outcome"):
                    status = _live(gr, "ab-status")
                    outcome = gr.HTML("", elem_id="ab-verdict")
                with gr.Row(elem_id="ab-answers"):
                    boxes = [
                        gr.HTML(waiting(name, _NOT_MADE), elem_id=f"ab-{name.lower()}")
                        for name in (ORIGINAL, CONVERSION)
                    ]
                gr.HTML(f'<p class="ab-note">{_FOOT}</p>')
        private: dict[str, Any] = {"api_visibility": "private"}
        hidden: dict[str, Any] = {"show_progress": "hidden", **private}
        depth.change(moved, depth, [way, facts, curve], trigger_mode="always_last", **hidden)
        way.input(picked, [depth, way], [facts, curve], **hidden)
        inputs = [prompt, depth, way, new_tokens, temperature, top_p, seed, in_chat]
        outputs = [status, outcome, *boxes]
        runs = [
            event(
                ask,
                inputs,
                outputs,
                concurrency_limit=1,
                concurrency_id="models",
                show_progress="minimal",
                show_progress_on=status,
                **private,
            )
            for event in (go.click, prompt.submit)
        ]
        # In this order: what was on its way when the run ended must not come after it.
        ended = stop.click(None, cancels=runs, queue=False, **hidden)
        ended.then(lambda: _STOPPED, None, status, queue=False, **hidden)
    return blocks


def _live(gr: Any, name: str) -> Any:
    return gr.HTML("", html_template='<div role="status">${value}</div>', elem_id=name)


def _label(choice: Choice, choices: tuple[Choice, ...]) -> str:
    plans = {other.plan for other in choices}
    return choice.way if len(plans) == 1 else f"{choice.way}: {choice.plan.shorthand}"


def _titles(choice: Choice) -> tuple[tuple[str, str], tuple[str, str]]:
    layers = choice.plan.num_layers
    return (ORIGINAL, f"{layers} layers, one after another"), (CONVERSION, side(choice))


def _shown(
    models: Models, choice: Choice, ids: list[int], settings: Settings
) -> Iterator[tuple[str, str, str, str]]:
    """Status, verdict and both panels, a few times a second and once at the end."""
    tokenizer, titles, seen = models.tokenizer, _titles(choice), 0.0

    def decode(tokens: Any, raw: bool = False) -> str:
        return str(
            tokenizer.decode(
                tokens, skip_special_tokens=not raw, clean_up_tokenization_spaces=False
            )
        )

    def shown(pair: tuple[Answer, Answer], running: bool) -> tuple[str, str, str, str]:
        index = parting(pair[0].tokens, pair[1].tokens)
        first_tokens = ("", "")
        if index is not None:
            one, other = (decode([answer.tokens[index]], raw=True) for answer in pair)
            first_tokens = (one, other)
        panels = [
            panel(
                name, about, answer, segments(decode, answer.tokens, index), index, running=running
            )
            for (name, about), answer in zip(titles, pair, strict=True)
        ]
        clipped = models.limit is not None and len(ids) + settings.max_new_tokens > models.limit
        done = f"Done. The model holds {models.limit:,} tokens, so the answer was cut there."
        status = "Working …" if running else done if clipped else "Done."
        return status, agreement(pair, index, first_tokens, running=running), panels[0], panels[1]

    pair = (Answer(), Answer())
    for pair in answers(models, choice, ids, settings):
        if time.monotonic() - seen >= REFRESH:
            yield shown(pair, True)
            seen = time.monotonic()
    yield shown(pair, False)


def serve(blocks: Any, *, port: int | None = None) -> str:
    """Serve a page on this machine only, in the background; return its address.

    port: None takes the first that is free from 7860 on. Raises AbreastError for one in use.
    """
    gr = check_gradio()
    from starlette.middleware import Middleware

    try:
        _, address, _ = blocks.queue(default_concurrency_limit=4, max_size=QUEUE).launch(
            server_name=HOST,
            server_port=port,
            share=False,
            inbrowser=False,
            prevent_thread_lock=True,
            quiet=True,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            run_history=False,
            enable_monitoring=False,
            footer_links=[],
            max_file_size=1,
            app_kwargs={"middleware": [Middleware(Guard)]},
            theme=_theme(gr),
            css_paths=str(files("abreast.report").joinpath("templates", "play.css")),
        )
    except OSError:
        where = f"port {port}" if port is not None else "no port from 7860 on"
        raise AbreastError(f"{where} cannot be used; choose another with --port") from None
    return str(address)


def _theme(gr: Any) -> Any:
    return gr.themes.Default(
        primary_hue="indigo",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_text_color="white",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_label_text_color="*neutral_700",
        block_title_text_color="*neutral_800",
        input_placeholder_color="*neutral_600",
    )


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

    index: of the first differing token, None for none.
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
