"""The playground: a page by gradio on which original and conversions answer the same prompt.

It is served on this machine only, and nothing on it comes from elsewhere.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import torch

from abreast.errors import AbreastError, install
from abreast.report.answers import (
    MOST_CHARACTERS,
    MOST_TOKENS,
    Answer,
    Models,
    Settings,
    answers,
    encode,
    parting,
    segments,
)
from abreast.report.guard import Guard
from abreast.report.panels import (
    about,
    agreement,
    complaint,
    front_picture,
    heading,
    panel,
    side,
    waiting,
)
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


class _Events:
    """What the page does when its reader moves the slider, picks a conversion or sends a prompt."""

    def __init__(self, models: Models) -> None:
        self.gr, self.models, self.run = check_gradio(), models, models.run
        self.has_template = bool(getattr(models.tokenizer, "chat_template", None))

    def depth_changed(self, depth: float) -> tuple[Any, str, str]:
        choices = self.run.at(depth)
        radio = self.gr.Radio(choices=_numbered(choices), value=0, visible=len(choices) > 1)
        return radio, about(self.run, choices[0]), front_picture(self.run, choices[0])

    def choice_changed(self, depth: float, index: int | None) -> tuple[str, str]:
        choice = self._chosen(depth, index)
        return about(self.run, choice), front_picture(self.run, choice)

    def prompt_sent(
        self,
        prompt: str,
        depth: float,
        index: int | None,
        new_tokens: float | None,
        temperature: float | None,
        top_p: float | None,
        seed: float | None,
        in_chat: bool,
    ) -> Iterator[tuple[Any, Any, Any, Any]]:
        choice, skip = self._chosen(depth, index), self.gr.skip
        try:
            if new_tokens is None or temperature is None or top_p is None or seed is None:
                raise AbreastError("a setting is empty; give every setting a number")
            try:
                settings = Settings(int(new_tokens), float(temperature), float(top_p), int(seed))
            except (TypeError, OverflowError):
                raise AbreastError("a setting is not a number; give every one a number") from None
            ids = encode(self.models, prompt, chat=in_chat and self.has_template)
            one, other = (waiting(*title) for title in _titles(choice))
            yield "Working …", "", one, other
            yield from _shown(self.models, choice, ids, settings)
        except AbreastError as error:
            yield complaint(str(error)), skip(), skip(), skip()
        except (MemoryError, torch.OutOfMemoryError):
            message = "out of memory; ask for fewer tokens, or start again with another --device"
            yield complaint(message), skip(), skip(), skip()

    def _chosen(self, depth: float, index: int | None) -> Choice:
        choices = self.run.at(depth if isinstance(depth, int | float) else self.run.first)
        return choices[index if isinstance(index, int) and 0 <= index < len(choices) else 0]


def build_page(models: Models) -> Any:
    """The page as gradio Blocks, not yet served."""
    events = _Events(models)
    gr = events.gr
    with gr.Blocks(title="abreast playground", analytics_enabled=False, fill_width=True) as blocks:
        gr.HTML(heading(models.run), elem_id="ab-heading")
        with gr.Row(elem_id="ab-body"):
            with gr.Column(scale=1, min_width=300, elem_id="ab-choice"):
                choice = _choice_of_plan(gr, models.run)
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
                    settings = _settings(gr, events.has_template)
                outputs = _outputs(gr)
        depth, way, facts, curve = choice
        private: dict[str, Any] = {"api_visibility": "private"}
        hidden: dict[str, Any] = {"show_progress": "hidden", **private}
        depth.change(
            events.depth_changed, depth, [way, facts, curve], trigger_mode="always_last", **hidden
        )
        way.input(events.choice_changed, [depth, way], [facts, curve], **hidden)
        runs = [
            event(
                events.prompt_sent,
                [prompt, depth, way, *settings],
                outputs,
                concurrency_limit=1,
                concurrency_id="models",
                show_progress="minimal",
                show_progress_on=outputs[0],
                **private,
            )
            for event in (go.click, prompt.submit)
        ]
        # In this order: what was on its way when the run ended must not come after it.
        ended = stop.click(None, cancels=runs, queue=False, **hidden)
        ended.then(lambda: _STOPPED, None, outputs[0], queue=False, **hidden)
    return blocks


def _choice_of_plan(gr: Any, run: Choices) -> tuple[Any, Any, Any, Any]:
    """The slider of depths, the conversions of one depth, and what is known of the one picked."""
    first = run.at(run.first)
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
        _numbered(first),
        value=0,
        label="Which one",
        visible=len(first) > 1,
        elem_id="ab-way",
    )
    facts = gr.HTML(about(run, first[0]), elem_id="ab-about")
    return depth, way, facts, gr.HTML(front_picture(run, first[0]))


def _settings(gr: Any, has_template: bool) -> list[Any]:
    """New tokens, temperature, top-p, seed and the switch for the chat template."""
    in_chat = gr.Checkbox(has_template, label="Use the model's chat template", visible=has_template)
    with gr.Row():
        return [
            gr.Number(64, label="New tokens, at most", minimum=1, maximum=MOST_TOKENS),
            gr.Number(0, label="Temperature (0: greedy)", minimum=0, maximum=5, step=0.1),
            gr.Number(1, label="Top-p", minimum=0, maximum=1, step=0.05),
            gr.Number(0, label="Seed", minimum=0, precision=0),
            in_chat,
        ]


def _outputs(gr: Any) -> list[Any]:
    """Status, verdict and the two answers."""
    with gr.Column(elem_id="ab-outcome"):
        outputs = [_live(gr, "ab-status"), gr.HTML("", elem_id="ab-verdict")]
    with gr.Row(elem_id="ab-answers"):
        outputs += [
            gr.HTML(waiting(name, _NOT_MADE), elem_id=f"ab-{name.lower()}")
            for name in (ORIGINAL, CONVERSION)
        ]
    gr.HTML(f'<p class="ab-note">{_FOOT}</p>')
    return outputs


def _numbered(choices: tuple[Choice, ...]) -> list[tuple[str, int]]:
    return [(_label(choice, choices), index) for index, choice in enumerate(choices)]


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
