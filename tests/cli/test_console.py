"""What the verbs share: progress and notes."""

from types import SimpleNamespace

import click
from click.testing import CliRunner

from abreast.cli import console


def test_the_time_left_is_said_once_at_a_tenth_of_every_stage(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    progress = console.TimeLeft("measure")

    def run(first: int, seconds: float) -> list[str]:
        for done in range(first, 101):
            clock[0] += seconds
            progress(done, 100)
        return capsys.readouterr().err.splitlines()

    assert run(1, 6) == ["abreast: measure: about 9 minutes left"]
    assert run(1, 0.5) == []  # under a minute
    assert run(51, 12) == ["abreast: measure: about 9 minutes left"]  # a run that goes on


def test_where_stderr_is_no_terminal_the_time_left_is_said(capsys):
    with console.progress_bar("eval", quiet=False) as progress:
        assert isinstance(progress, console.TimeLeft)
    with console.progress_bar("eval", quiet=True) as progress:
        assert progress is None


def test_quiet_leaves_the_result_only():
    @console.verb()
    def note() -> None:
        console.say("about to begin")
        with console.progress_bar("note", quiet=False) as progress:
            click.echo(f"result {progress is None}")

    loud, quiet = (CliRunner().invoke(note, options) for options in ([], ["-q"]))
    assert (loud.stdout, loud.stderr) == ("result False\n", "abreast: about to begin\n")
    assert (quiet.stdout, quiet.stderr) == ("result True\n", "")


def test_a_number_without_an_error_is_shown_alone():
    result = SimpleNamespace(loss=0.5, loss_stderr=0.25, kl=0.5, kl_stderr=float("nan"))
    assert console.with_error(result, "loss", "+.2f") == "+0.50 ± 0.25"
    assert console.with_error(result, "kl", ".1%") == "50.0%"
