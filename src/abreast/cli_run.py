"""The verbs that do a whole job: demo."""

from __future__ import annotations

import click

from abreast.options import (
    PLAN_HELP,
    device_option,
    json_option,
    print_json,
    say,
    seed_option,
)
from abreast.tables import print_demo


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
