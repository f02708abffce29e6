"""The verbs that show the whole: demo, play."""

from __future__ import annotations

import click

from abreast.cli.options import (
    PLAN_HELP,
    device_option,
    json_option,
    print_json,
    remote_option,
    say,
    seed_option,
)
from abreast.cli.tables import print_demo


@click.command()
@click.option("--path", is_flag=True, help="Only print the folder of the bundled model.")
@click.option("--plan", help=f"Another plan than the bundled one. {PLAN_HELP}")
@click.option("-o", "--out", help="Keep the converted checkpoint in this new folder.")
@click.option("--max-tokens", default=100_000, show_default=True, help="Held-out tokens to score.")
@click.option("--rounds", default=12, show_default=True, help="Interleaved rounds of timing.")
@click.option("--dtype", default="float32", show_default=True, help="To evaluate and time in.")
@device_option
@seed_option
@json_option
def demo(
    path: bool,
    plan: str | None,
    out: str | None,
    max_tokens: int,
    rounds: int,
    dtype: str,
    device: str,
    seed: int,
    as_json: bool,
) -> None:
    """Do the whole job on the bundled model and print what it cost and what it won."""
    from abreast.demo import model_folder, run_demo

    if path:
        return click.echo(model_folder())
    result = run_demo(
        plan=plan,
        out=out,
        max_tokens=max_tokens,
        rounds=rounds,
        dtype=dtype,
        device=device,
        seed=seed,
        step=say,
    )
    if as_json:
        return print_json(result.to_dict())
    print_demo(result)


@click.command()
@click.argument("run")
@click.option("--against", help="Where the original is, if not where RUN says.")
@click.option("--port", type=click.IntRange(1, 65535), help="Default: a free one from 7860 on.")
@click.option("--no-browser", is_flag=True, help="Only print the address.")
@click.option("--dtype", default="auto", show_default=True, help="float32, bfloat16, float16.")
@device_option
@remote_option
def play(
    run: str,
    against: str | None,
    port: int | None,
    no_browser: bool,
    dtype: str,
    device: str,
    trust_remote_code: bool,
) -> None:
    """Ask the original and its conversions the same, side by side, on a page of this machine.

    RUN is a folder that `abreast plan` or `abreast optimize` left, or a converted checkpoint.
    """
    import threading
    import webbrowser

    from abreast.report import read_choices
    from abreast.report.playground import gradio, open_models, page, serve

    gradio()
    found = read_choices(run, against)
    say(f"load {found.model}")
    models = open_models(found, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    blocks = page(models)
    address = serve(blocks, port=port)
    say(f"the playground is at {address} (Ctrl-C ends it)")
    if not no_browser:
        webbrowser.open(address)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        say("the playground is closed")
    finally:
        blocks.close(verbose=False)
