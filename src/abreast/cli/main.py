"""The `abreast` command. Verbs import what they need when they run, so --help needs no torch."""

from __future__ import annotations

import os
import signal
import sys
import time
from functools import partial
from typing import NoReturn

import click

from abreast.cli.checkpoint import (
    convert,
    convert_adapter,
    export,
    import_gguf,
    inspect,
    push,
    verify,
)
from abreast.cli.plan import measure, optimize, plan
from abreast.cli.quality import evaluate, heal
from abreast.cli.show import demo, env, play, report
from abreast.cli.speed import bench, estimate
from abreast.cli.study import study
from abreast.errors import AbreastError, first_line, is_fault
from abreast.version import __version__

_LIBRARIES = (
    *("accelerate", "datasets", "gguf", "huggingface_hub", "jinja2", "lm_eval", "peft"),
    *("safetensors", "tokenizers", "torch", "transformers"),
    "pyo3_runtime",  # a panic in the Rust of tokenizers or safetensors
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="abreast")
def cli() -> None:
    """Run consecutive layers of a language model side by side.

    MODEL is a folder with a Hugging Face checkpoint, or a Hugging Face id such as ORG/NAME.
    Try the bundled model: abreast inspect "$(abreast demo --path)"
    """


for command in (
    *(inspect, import_gguf, convert, convert_adapter, verify, export, push),
    *(evaluate, study, heal),
    *(measure, plan, optimize),
    *(bench, estimate),
    *(demo, report, play, env),
):
    cli.add_command(command)


def main() -> NoReturn:
    """Entry point: runs the command; a user's mistake is one line on stderr and status 2."""
    # Libraries that a verb imports later read these once; the user's own settings win.
    for name, value in (
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("TQDM_DISABLE", "1"),
    ):
        os.environ.setdefault(name, value)
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, signal.SIGTERM)  # Windows has no SIGHUP
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup and shells ignore some
            signal.signal(number, _interrupted)
    try:
        cli(prog_name="abreast", standalone_mode=False)
    except AbreastError as error:
        _leave(str(error))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("abreast: interrupted, nothing half-written is left", err=True)
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read our output is gone; keep Python from complaining again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except MemoryError:
        _leave("out of memory; use a smaller --batch-size, --window or model")
    except OSError as error:
        if error.filename is None:
            raise
        _leave(f"'{error.filename}': {error.strerror}")
    except BaseException as error:
        if not is_fault(error):
            raise
        if "can't start new thread" in str(error):
            _leave("out of memory; use a smaller --batch-size, --window or model")
        library = _library_of(error)
        if library is None or "ABREAST_TRACEBACK" in os.environ:
            raise
        _leave(
            f"{library} fails on this input: {first_line(error)} (ABREAST_TRACEBACK=1 tells where)"
        )
    sys.exit(0)


def _interrupted(number: int, frame: object, *, until: float = 0.0) -> None:
    """Let the blocks that remove staging folders run, for some seconds undisturbed by the same."""
    if time.monotonic() >= until:
        signal.signal(number, partial(_interrupted, until=time.monotonic() + 5.0))
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


def _library_of(error: BaseException) -> str | None:
    """The library in which an error arose, None for one of our own."""
    trace, names = error.__traceback__, [type(error).__module__]
    while trace is not None:
        names[1:] = [str(trace.tb_frame.f_globals.get("__name__"))]
        trace = trace.tb_next
    return next((root for name in names if (root := name.split(".")[0]) in _LIBRARIES), None)


def _leave(message: str) -> NoReturn:
    click.echo(f"abreast: {' '.join(message.split())}", err=True)
    sys.exit(2)
