"""Options, progress and printing that the verbs share.

Options that fill a settings dataclass come from its fields: every field with a help text in its
metadata is an option (`runs.option`). Other metadata: `option`, its name where it is not the
field's (a flag that is on by default gets --no-NAME); `default`, as text, of a field without one;
`bytes`, for sizes like 5GB; `parse`, a function of the text; `options`, of a field that holds such
settings in turn.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import click
from click.core import ParameterSource

from abreast.checkpoint import held
from abreast.errors import AbreastError

Progress = Callable[[int, int], None]
WHOLE_RUN = 1e9  # seconds
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}

json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
revision_option = click.option("--revision", help="Branch, tag or commit of a Hugging Face model.")
force_option = click.option(
    "--force", is_flag=True, help="Allow groups with the first or last layer."
)
seed_option = click.option("--seed", default=0, help="Random seed.")
device_option = click.option(
    "--device",
    default="cpu",
    help="cpu, cuda, cuda:1, ..., or auto: all devices, then memory and disk.",
)
dtype_option = click.option(
    "--dtype", default="auto", help="float32, bfloat16 or float16; auto: fits model and device."
)
remote_option = click.option(
    "--trust-remote-code", is_flag=True, help="Allow code inside the checkpoint to run."
)
bos_option = click.option(
    "--add-bos/--no-add-bos",
    default=None,
    help="Start texts with the BOS token. Default: as the tokenizer does.",
)
chat_option = click.option(
    "--chat", help="JSONL of messages, rendered with the model's chat template; beside --data."
)
PLAN_HELP = (
    'Groups such as "5+6 7+8" (lp), "7|8" (cqil), "7|8:1" (bypass 1), "5~6" (ff), CQIL\'s names '
    '"P2 D1 S4 E8", a plan file, or a plan of this package such as smollm2-25.'
)
plan_option = click.option("--plan", required=True, help=PLAN_HELP)
prefill_option = click.option(
    "--prefill",
    type=click.Choice(["grouped", "sequential"]),
    default="grouped",
    help="sequential: run prompts in the original order, and only decode side by side.",
)


@dataclass(frozen=True)
class _Settings:
    """Stands for the options of one dataclass, which is imported when they are first needed."""

    argument: str
    module: str
    name: str

    @cached_property
    def type(self) -> Any:
        return getattr(import_module(self.module), self.name)

    @cached_property
    def options(self) -> list[click.Option]:
        types = get_type_hints(self.type)
        return [
            _option(entry.name, types[entry.name], entry.default, entry.metadata)
            for entry in fields(self.type)
            if "help" in entry.metadata
        ]

    @cached_property
    def parts(self) -> list[_Settings]:
        """Of the fields that are settings themselves."""
        types = get_type_hints(self.type)
        names = [entry.name for entry in fields(self.type) if "options" in entry.metadata]
        return [_Settings(n, types[n].__module__, types[n].__name__) for n in names]

    def every(self) -> list[click.Option]:
        """The options of its parts too."""
        return [*self.options, *(option for part in self.parts for option in part.every())]

    def take(self, values: dict[str, Any]) -> Any:
        """The settings, from parsed values of options, which are removed."""
        own = {str(option.name): values.pop(str(option.name)) for option in self.options}
        return self.type(**own, **{part.argument: part.take(values) for part in self.parts})


class RunFolder(click.types.StringParamType):
    """An option's folder, with a suffix, that the verb holds while it runs (`checkpoint.held`)."""

    def __init__(self, suffix: str = "") -> None:
        self.suffix = suffix


class SettingsCommand(click.Command):
    """A command that may have options from dataclasses, see `settings`."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        if not hasattr(self, "settings"):
            entries: list[Any] = self.params
            self.settings = [entry for entry in entries if isinstance(entry, _Settings)]
            self.params = [
                option
                for entry in entries
                for option in (entry.every() if isinstance(entry, _Settings) else [entry])
            ]
            self.params += [_noise("-q", "--quiet"), _noise("-v", "--verbose")]
        return super().get_params(ctx)

    def invoke(self, ctx: click.Context) -> Any:
        if (chat := ctx.params.pop("chat", None)) is not None:
            _add_chat(ctx, f"chat:{chat}")
        for entry in self.settings:
            ctx.params[entry.argument] = entry.take(ctx.params)
        first = {os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK")} == {"0"}
        if first and not ctx.params.get("dry_run"):
            for folder in self._run_folders(ctx.params):
                ctx.with_resource(held(folder))
        return super().invoke(ctx)

    def _run_folders(self, values: Mapping[str, Any]) -> Iterable[Path]:
        """Each once, though two options may name it: --work may be the one that --out implies."""
        named = [
            Path(f"{Path(value)}{option.type.suffix}")
            for option in self.params
            if isinstance(option.type, RunFolder) and (value := values.get(str(option.name)))
        ]
        return {os.path.abspath(folder): folder for folder in named}.values()


verb = partial(click.command, cls=SettingsCommand, context_settings={"show_default": True})


def settings(argument: str, module: str, name: str) -> Callable[[Any], Any]:
    """Give a verb the options of dataclass `name` in `module`, and an instance as `argument`."""

    def decorate(function: Any) -> Any:
        parameters = function.__dict__.setdefault("__click_params__", [])
        parameters.append(_Settings(argument, module, name))
        return function

    return decorate


def _noise(short: str, name: str) -> click.Option:
    """An option that every verb has, kept for `say` and `progress_bar`."""

    def keep(context: click.Context, option: click.Parameter, value: bool) -> None:
        context.meta[name] = value
        if value and name == "--verbose":  # libraries that are imported from here on
            os.environ.update(TRANSFORMERS_VERBOSITY="info", HF_HUB_VERBOSITY="info")

    text = "Print results only." if name == "--quiet" else "Print what libraries log as well."
    return click.Option(
        [short, name], is_flag=True, help=text, expose_value=False, callback=keep, is_eager=True
    )


def is_quiet() -> bool:
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get("--quiet"))


def _add_chat(ctx: click.Context, source: str) -> None:
    """Put conversations beside the text that --data names, or in the place of the default."""
    data = ctx.params["data"]
    if ctx.get_parameter_source("data") is ParameterSource.DEFAULT:
        ctx.params["data"] = source if isinstance(data, str) else (source,)
    else:
        ctx.params["data"] = f"{data},{source}" if isinstance(data, str) else (*data, source)


def _option(name: str, kind: Any, default: Any, metadata: Mapping[str, Any]) -> click.Option:
    default = metadata.get("default", default)
    flag = f"--{'no-' if default is True else ''}{name.replace('_', '-')}"
    declared = [name, *str(metadata.get("option", flag)).split()]
    if get_origin(kind) is UnionType:
        kind = next(part for part in get_args(kind) if part is not NoneType)
    options: dict[str, Any] = {"help": metadata["help"], "required": default is MISSING}
    parse = metadata.get("parse")
    if metadata.get("bytes"):
        parse, default = parse_size, _size_text(default)
    elif get_origin(kind) is tuple:
        parse = partial(_words, get_args(kind)[0], name.replace("_", "-"))
        default = ",".join(map(str, default)) or None
    if kind is bool:
        options |= {"is_flag": True, "default": default, "show_default": False}
        if default is not None:
            options["flag_value"] = not default
    elif default is not MISSING:
        options["default"] = default
    if parse is not None:
        options["callback"] = lambda context, option, text: parse(text)
    elif kind is not bool:
        options["type"] = click.Choice(get_args(kind)) if get_origin(kind) is Literal else kind
    return click.Option(declared, **options)


def _words(kind: Any, name: str, text: str | None) -> tuple[Any, ...]:
    words = [word.strip() for word in text.split(",")] if text else []
    if kind is int and not all(word.isascii() and word.isdigit() for word in words):
        raise AbreastError(f"--{name} '{text}' cannot be read; write whole numbers like 2,3,4")
    return tuple(map(kind, words))


def parse_size(text: str) -> int:
    number, unit = text[:-2].strip(), text[-2:].upper()
    try:
        size = float(number) * _UNITS[unit]
    except (KeyError, ValueError):
        raise AbreastError(f"size '{text}' cannot be read; write it like 500MB or 5GB") from None
    if not 10**3 <= size < float("inf"):
        raise AbreastError(f"size '{text}' is too small for a file; give at least 1KB")
    return int(size)


def _size_text(size: int) -> str:
    unit = next(name for name in ("GB", "MB", "KB") if size % _UNITS[name] == 0)
    return f"{size // _UNITS[unit]}{unit}"


def print_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=2, default=str))


def say(message: str) -> None:
    """A note on stderr, unless the user wants none."""
    if not is_quiet():
        click.echo(f"abreast: {message}", err=True)


def print_table(rows: Mapping[str, str]) -> None:
    width = max(map(len, rows), default=0)
    for key, value in rows.items():
        click.echo(f"{key:<{width}}  {value}")


def print_columns(
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    left: Collection[str],
    title: str | None = None,
    borders: bool = True,
    notes: Iterable[str] = (),
) -> None:
    """A table with the columns in `left` justified left, and notes below it.

    An empty row draws a line across. With borders nothing is cut off, however narrow the terminal;
    without, the columns in `left` are wrapped.
    """
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table

    style: dict[str, Any] = {} if borders else {"box": None, "padding": (0, 2, 0, 0)}
    table = Table(title=title, **style)
    for heading in headings:
        if heading in left:
            table.add_column(heading, overflow="fold", no_wrap=borders)
        else:
            table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        if row:
            table.add_row(*row)
        else:
            table.add_section()
    console = Console(highlight=False)
    if borders:
        unlimited = console.options.update(max_width=10_000)
        console.width = max(console.width, Measurement.get(console, unlimited, table).maximum)
    console.print(table)
    for note in notes:
        console.print(note, soft_wrap=True)


def with_error(result: Any, name: str, spec: str) -> str:
    """A number of a result and its standard error, which a single window does not have (NaN)."""
    value, error = (format(getattr(result, part), spec) for part in (name, f"{name}_stderr"))
    return value if "nan" in error else f"{value} ± {error.lstrip('+')}"


def bytes_text(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


@contextmanager
def progress_bar(label: str, quiet: bool) -> Iterator[Progress | None]:
    """A bar with the time left; where stderr is no terminal, a line that says it early on."""
    if quiet or is_quiet():
        yield None
    elif not sys.stderr.isatty():
        yield TimeLeft(label)
    else:
        from rich.console import Console
        from rich.progress import Progress as Bar

        # the speed since the start: batches may take longer than the default of 30 s
        with Bar(
            console=Console(stderr=True), transient=True, speed_estimate_period=WHOLE_RUN
        ) as bar:
            task = bar.add_task(label, total=None)
            before = 0

            def advance(done: int, total: int) -> None:
                nonlocal before
                if done < before:
                    bar.reset(task)
                before = done
                bar.update(task, completed=done, total=total)

            yield advance


class TimeLeft:
    """Progress that says once in every stage, at a tenth of it, how long the rest will take."""

    def __init__(self, label: str) -> None:
        self.label, self.done, self.said = label, 0, True

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if not self.done or done < self.done:  # a stage begins, perhaps where an earlier run ended
            self.first, self.begun, self.said = done, now, False
        self.done = done
        if self.said or (done - self.first) * 10 < total - self.first or done == self.first:
            return
        self.said = True
        if (left := (now - self.begun) / (done - self.first) * (total - done)) >= 60:
            say(f"{self.label}: about {left / 60:.0f} minutes left")
