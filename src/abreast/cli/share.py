"""The verbs that show a result to others: report, push."""

from __future__ import annotations

import click

from abreast.cli.options import json_option, print_json, say
from abreast.cli.tables import bytes_text, print_table


@click.command()
@click.argument("run")
@click.option("-o", "--out", help="Folder for the report. Default: RUN/report.")
@json_option
def report(run: str, out: str | None, as_json: bool) -> None:
    """Write one HTML page about RUN, a folder that optimize made, with pictures and numbers.

    Leaves OUT/report.html, OUT/results.json and PNGs, and a model card in the converted folder.
    """
    from abreast.report import numbers, read_run, write_card, write_report

    page = write_report(run, out)
    found = read_run(run)
    card = write_card(found.last) if found.last is not None else None
    if as_json:
        return print_json({"report": str(page), **numbers(found)})
    for part in found.missing():
        say(f"missing: {part.what}")
    if found.missing():
        say(f"go on with: {found.command}")
    rows = {"report": f"{page} ({bytes_text(page.stat().st_size)})"}
    print_table({**rows, **({"model card": str(card)} if card is not None else {})})


@click.command()
@click.argument("out")
@click.argument("repo")
@click.option("--private", is_flag=True, help="Make the repository private.")
@click.option("--dry-run", is_flag=True, help="Check everything, list the files, upload nothing.")
@json_option
def push(out: str, repo: str, private: bool, dry_run: bool, as_json: bool) -> None:
    """Upload OUT, a converted checkpoint, to the Hugging Face Hub as REPO (ORG/NAME).

    Only files whose hashes are recorded in OUT go, and the model card.
    """
    from abreast.report import prepare
    from abreast.report import push as run

    if not dry_run:
        address = run(out, repo, private=private)
        return print_json({"url": address}) if as_json else click.echo(address)
    found = prepare(out, repo, private=private)
    if as_json:
        return print_json(found.to_dict())
    print_table({name: bytes_text(size) for name, size in found.files.items()})
    for name in found.left_out:
        say(f"left out: {name}")
    kind = "private" if private else "public"
    click.echo(f"{len(found.files)} files, {bytes_text(found.nbytes)}, to {repo} ({kind})")
