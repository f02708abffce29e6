"""What the verbs' command lines share: options, progress, and how results are printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from abreast.errors import AbreastError

Progress = Callable[[int, int], None]

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print the result as JSON on stdout."
)
revision_option = click.option("--revision", help="Branch, tag or commit of a Hugging Face model.")
force_option = click.option(
    "--force", is_flag=True, help="Allow groups with the first or last layer."
)
seed_option = click.option(
    "--seed", default=0, show_default=True, help="Seed of everything random."
)
device_option = click.option(
    "--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ..."
)
remote_option = click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Let code inside the checkpoint run. Off: it never does.",
)
PLAN_HELP = 'Groups such as "5+6 7+8" (lp), "7|8" (cqil), "7|8:1" (bypass 1), or a plan file.'


def print_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=2, default=str))


def say(message: str) -> None:
    click.echo(f"abreast: {message}", err=True)


def parse_size(text: str) -> int:
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = text[:-2].strip(), text[-2:].upper()
    try:
        size = float(number) * units[unit]
    except (KeyError, ValueError):
        raise AbreastError(f"size '{text}' cannot be read; write it like 500MB or 5GB") from None
    if not 10**3 <= size < float("inf"):
        raise AbreastError(f"size '{text}' is too small for a file; give at least 1KB")
    return int(size)


@contextmanager
def progress_bar(label: str, quiet: bool) -> Iterator[Progress | None]:
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield advance
