"""The playground's page, by gradio: local, and nothing on it comes from elsewhere."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from abreast.errors import AbreastError
from abreast.report.choices import Choice
from abreast.report.playground.models import (
    Answer,
    Models,
    Settings,
    answers,
    encode,
    first_difference,
    segments,
)
from abreast.report.playground.view import (
    about,
    answer,
    complaint,
    front_picture,
    heading,
    side,
    verdict,
    waiting,
)

HOST = "127.0.0.1"
ORIGINAL, CONVERSION = "Original", "Conversion"
REFRESH = 0.08  # seconds between two looks at growing answers
_FOOT = (
    "The two models take turns, one token each; each one's clock runs during its own steps only. "
    "tokens/s leaves the prompt's pass out. One answer is no benchmark: "
    "<code>abreast bench</code> measures speed with its uncertainty."
)
_NOT_MADE = "waiting for a prompt"
_STOPPED = '<span class="ab-stopped">Stopped.</span>'


def gradio() -> Any:
    """The library, told to keep to itself. Raises AbreastError where it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    # It asks itself whether it is up; a proxy in the environment is no way to there.
    exempt = {*os.environ.get("no_proxy", os.environ.get("NO_PROXY", "")).split(","), HOST} - {""}
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(sorted(exempt))
    try:
        import gradio
    except ImportError:
        raise AbreastError("the playground needs gradio: pip install 'abreast[play]'") from None
    return gradio


def page(models: Models) -> Any:
    """The page as gradio Blocks, not yet served."""
    gr, run = gradio(), models.run
    chat = bool(getattr(models.tokenizer, "chat_template", None))
    first = run.at(run.first)

    def chosen(depth: float, place: int | None) -> Choice:
        there = run.at(depth)
        return there[place if place is not None and place < len(there) else 0]

    def moved(depth: float) -> tuple[Any, str, str]:
        there = run.at(depth)
        labels = [(_label(choice, there), place) for place, choice in enumerate(there)]
        radio = gr.Radio(choices=labels, value=0, visible=len(labels) > 1)
        return radio, about(run, there[0]), front_picture(run, there[0])

    def picked(depth: float, place: int | None) -> tuple[str, str]:
        choice = chosen(depth, place)
        return about(run, choice), front_picture(run, choice)

    def ask(
        prompt: str,
        depth: float,
        place: int | None,
        new_tokens: float | None,
        temperature: float | None,
        top_p: float | None,
        seed: float | None,
        in_chat: bool,
    ) -> Iterator[tuple[Any, Any, Any, Any]]:
        choice = chosen(depth, place)
        try:
            given = (new_tokens, temperature, top_p, seed)
            if any(value is None for value in given):
                raise AbreastError("a setting is empty; give every setting a number")
            settings = Settings(int(new_tokens), temperature, top_p, int(seed))  # type: ignore[arg-type]
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
                    *(low, high),
                    value=run.first,
                    step=1,
                    label="Effective depth",
                    info=f"{high} is the original; to the left, more layers run abreast",
                    elem_id="ab-depth",
                    visible=high > low,
                    buttons=[],
                )
                way = gr.Radio(
                    [(_label(choice, first), place) for place, choice in enumerate(first)],
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
                    elem_id="ab-prompt",
                )
                with gr.Row(elem_id="ab-buttons"):
                    go = gr.Button("Choices both", variant="primary", scale=3, elem_id="ab-run")
                    stop = gr.Button("Stop", scale=1, min_width=90, elem_id="ab-stop")
                with gr.Accordion("Settings", open=False):
                    in_chat = gr.Checkbox(chat, label="Use the model's chat template", visible=chat)
                    with gr.Row():
                        new_tokens = gr.Number(64, label="New tokens, at most", minimum=1)
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


def _label(choice: Choice, among: tuple[Choice, ...]) -> str:
    plans = {each.plan for each in among}
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

    def shown(found: tuple[Answer, Answer], running: bool) -> tuple[str, str, str, str]:
        place = first_difference(found[0].tokens, found[1].tokens)
        parted = ("", "")
        if place is not None:
            one, other = (decode([each.tokens[place]], raw=True) for each in found)
            parted = (one, other)
        panels = [
            answer(*title, each, segments(decode, each.tokens, place), place, running=running)
            for title, each in zip(titles, found, strict=True)
        ]
        clipped = models.limit is not None and len(ids) + settings.max_new_tokens > models.limit
        done = f"Done. The model holds {models.limit:,} tokens, so the answer was cut there."
        status = "Working …" if running else done if clipped else "Done."
        return status, verdict(found, place, parted, running=running), panels[0], panels[1]

    found = (Answer(), Answer())
    for found in answers(models, choice, ids, settings):
        if time.monotonic() - seen >= REFRESH:
            yield shown(found, True)
            seen = time.monotonic()
    yield shown(found, False)


def serve(blocks: Any, *, port: int | None = None) -> str:
    """Serve a page on this machine only, in the background; return its address.

    port: None takes the first that is free from 7860 on. Raises AbreastError for one in use.
    """
    gr = gradio()
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    # Another site's name that resolves to this machine must not reach the page.
    guard = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    try:
        _, address, _ = blocks.queue(default_concurrency_limit=4).launch(
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
            app_kwargs={"middleware": [guard]},
            theme=_theme(gr),
            css_paths=Path(__file__).with_name("play.css"),
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
