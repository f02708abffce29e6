"""Options that come from the fields of a dataclass, and the instance that a verb gets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pytest
from click.testing import CliRunner

from abreast.cli import console
from abreast.cli.main import cli
from abreast.errors import AbreastError


@dataclass(frozen=True)
class Example:
    where: str = field(metadata={"help": "Required."})
    kind: Literal["a", "b"] = field(default="a", metadata={"help": "One of two."})
    count: int | None = field(default=None, metadata={"help": "A number.", "option": "-n"})
    rate: float = field(default=0.5, metadata={"help": "A fraction."})
    words: tuple[str, ...] = field(default=("x",), metadata={"help": "Comma-separated."})
    room: int = field(default=10**9, metadata={"help": "Memory.", "bytes": True})
    square: int = field(default=4, metadata={"help": "Squared.", "parse": lambda t: int(t) ** 2})
    fast: bool = field(default=True, metadata={"help": "Not fast."})
    loud: bool = field(default=False, metadata={"help": "Loud.", "option": "--shout"})
    hidden: int = 7


@console.verb()
@console.settings("example", __name__, "Example")
@console.seed_option
def show(example: Example, seed: int) -> None:
    print(example, seed)


def run(*arguments: str):
    return CliRunner().invoke(show, arguments)


def test_defaults_are_the_fields():
    assert run("--where", "w").stdout == f"{Example('w', square=16)} 0\n"


def test_values_reach_the_instance():
    arguments = ("--where", "w", "--kind", "b", "-n", "3", "--rate", "1", "--words", "p,q")
    arguments += ("--room", "2MB", "--square", "3", "--no-fast", "--shout", "--seed", "5")
    want = Example("w", "b", 3, 1.0, ("p", "q"), 2 * 10**6, 9, fast=False, loud=True)
    assert run(*arguments).stdout == f"{want} 5\n"


def test_help_shows_texts_choices_and_defaults():
    text = run("--help").stdout
    for part in ("[required]", "[a|b]", "[default: a]", "[default: x]", "[default: 1GB]", "Loud."):
        assert part in text
    assert "--hidden" not in text and text.count("default") == 6


def test_the_list_of_commands_says_each_whole():
    lines = CliRunner().invoke(cli, ["--help"], terminal_width=80).stdout.splitlines()
    listed = lines[lines.index("Commands:") + 1 :]
    assert len(listed) == len(cli.commands)
    assert [line for line in listed if not line.endswith((".", "?", ")"))] == []
    assert [line for line in listed if line.endswith("...")] == []


@pytest.mark.parametrize("arguments", [(), ("--where", "w", "--kind", "c"), ("--hidden", "1")])
def test_wrong_usage_is_refused(arguments):
    assert run(*arguments).exit_code == 2


def test_errors_in_a_value_are_the_users():
    assert isinstance(run("--where", "w", "--room", "2").exception, AbreastError)
