"""The verbs that say what a change costs: eval, study."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from abreast.cli.options import (
    PLAN_HELP,
    device_option,
    json_option,
    parse_size,
    print_json,
    progress_bar,
    remote_option,
    revision_option,
    say,
    seed_option,
)
from abreast.cli.tables import print_corpora, print_table, print_tasks, quality_rows
from abreast.errors import AbreastError

if TYPE_CHECKING:
    from abreast.evaluate import Comparison, Perplexity


@click.command(name="eval")
@click.argument("model")
@click.option("--against", help="Compare with this model, usually the original.")
@click.option("--plan", help=f"Run MODEL grouped under this plan. {PLAN_HELP}")
@click.option(
    "--data",
    multiple=True,
    default=("stdlib",),
    show_default=True,
    help="Text file, folder, hub:DATASET[:SPLIT[:COLUMN]], stdlib (held out) or stdlib-train. "
    "Repeat it for several texts.",
)
@click.option("--max-tokens", default=100_000, show_default=True, help="Score at most this many.")
@click.option("--window", default=1024, show_default=True, help="Tokens the model sees at once.")
@click.option("--stride", default=512, show_default=True, help="Tokens between windows.")
@click.option("--per-window", is_flag=True, help="Put the sums of every window into the JSON.")
@click.option("--tasks", help="Instead of text, these lm-evaluation-harness tasks, by commas.")
@click.option(
    "--num-fewshot", type=int, help="With --tasks: examples per prompt. Default: its own."
)
@click.option("--limit", type=int, help="With --tasks: items of each. Default: all.")
@click.option("--include-path", multiple=True, help="With --tasks: folder of more task files.")
@click.option(
    "--add-bos/--no-add-bos",
    default=None,
    help="With --tasks: begin prompts with the beginning-of-text token. Default: the tokenizer's.",
)
@click.option("-o", "--out", help="With --tasks: keep every answer here, and go on from there.")
@click.option("--batch-size", default=1, show_default=True, help="Windows or prompts at once.")
@click.option("--dtype", default="auto", show_default=True, help="float32, bfloat16, float16.")
@revision_option
@remote_option
@device_option
@seed_option
@json_option
def evaluate(
    model: str,
    against: str | None,
    plan: str | None,
    data: tuple[str, ...],
    max_tokens: int,
    window: int,
    stride: int,
    per_window: bool,
    tasks: str | None,
    batch_size: int,
    dtype: str,
    revision: str | None,
    trust_remote_code: bool,
    device: str,
    seed: int,
    as_json: bool,
    **of_tasks: Any,
) -> None:
    """Perplexity of MODEL, or its accuracy on --tasks.

    With --against, also how far it strayed from that model: KL divergence and loss with standard
    errors and intervals, or the share of the accuracy that is kept and a test on the same items.
    """
    from abreast.data import load_tokens
    from abreast.evaluate import check_tokenizers, compare, perplexity
    from abreast.model import load

    options: dict[str, Any] = {
        "dtype": dtype,
        "device": device,
        "trust_remote_code": trust_remote_code,
    }
    if tasks is not None:
        options |= {"revision": revision, "batch_size": batch_size, "against": against}
        return _on_tasks(model, tasks, as_json, seed=seed, plan=plan, **of_tasks, **options)
    for name, value in of_tasks.items():
        if value not in (None, ()):
            raise AbreastError(
                f"--{name.replace('_', '-')} goes with --tasks; name some, or leave it"
            )
    loaded, tokenizer = load(model, plan=plan, revision=revision, **options)
    reference, reference_tokenizer = load(against, **options) if against else (None, None)
    tokenizer = tokenizer or reference_tokenizer
    if tokenizer is None:
        raise AbreastError(f"'{model}' has no tokenizer; copy the original's files into its folder")
    if reference_tokenizer is not None:
        check_tokenizers(tokenizer, reference_tokenizer)
    streams = [load_tokens(tokenizer, name, max_tokens=max_tokens, seed=seed) for name in data]
    sizes: dict[str, Any] = {"window": window, "stride": stride, "batch_size": batch_size}
    results: list[Comparison | Perplexity] = []
    for stream in streams:
        with progress_bar(f"evaluate on {stream.source}", as_json) as progress:
            sizes["progress"] = progress
            if reference is not None:
                results.append(compare(loaded, reference, stream, seed=seed, **sizes))
            else:
                results.append(perplexity(loaded, stream, **sizes))
    if as_json:
        found: list[dict[str, Any]] = [
            {
                "data": {
                    "source": stream.source,
                    "sha256": stream.sha256,
                    "documents": stream.num_documents,
                },
                "result": result.to_dict(windows=per_window),
            }
            for stream, result in zip(streams, results, strict=True)
        ]
        record = {"model": model, "against": against, "plan": plan, "dtype": dtype, "seed": seed}
        return print_json({**record, **(found[0] if len(found) == 1 else {"corpora": found})})
    if len(results) == 1:
        return print_table(quality_rows(results[0]))
    print_corpora(dict(zip(data, results, strict=True)))


def _on_tasks(
    model: str,
    tasks: str,
    as_json: bool,
    *,
    seed: int,
    num_fewshot: int | None,
    limit: int | None,
    include_path: tuple[str, ...],
    **options: Any,
) -> None:
    from abreast.evaluate import evaluate_tasks, find_tasks

    chosen: dict[str, Any] = {
        "include_path": include_path,
        "num_fewshot": num_fewshot,
        "limit": limit,
    }
    found = find_tasks(tasks.split(","), seed=seed, **chosen)
    with progress_bar("evaluate", as_json) as progress:
        result = evaluate_tasks(model, found, step=say, progress=progress, **options)
    if as_json:
        return print_json(result.to_dict())
    print_tasks(result)


@click.command()
@click.argument("model")
@click.option("-o", "--out", required=True, help="Folder of results; goes on with it.")
@click.option("--interventions", help="Some of them, by commas. Default: all.")
@click.option("--data", default="stdlib", show_default=True, help="As for eval.")
@click.option("--windows", default=16, show_default=True, help="Windows of text to score.")
@click.option("--window", default=256, show_default=True, help="Tokens in each.")
@click.option("--max-length", type=int, help="Longest stretch of layers. Default: all.")
@click.option("--permutations", default=3, show_default=True, help="Orders per shuffled stretch.")
@click.option("--batch-size", default=8, show_default=True, help="Windows at once.")
@click.option("--max-cache", default="1GB", show_default=True, help="States kept for reuse.")
@click.option("--devices", default="cpu", show_default=True, help="A worker each: cuda:0,cuda:1")
@click.option("--dtype", default="auto", show_default=True, help="float32, bfloat16, float16.")
@click.option("--no-plots", is_flag=True, help="Write no PNGs; needs no altair.")
@revision_option
@remote_option
@seed_option
@json_option
def study(
    model: str,
    out: str,
    interventions: str | None,
    data: str,
    windows: int,
    window: int,
    max_length: int | None,
    permutations: int,
    batch_size: int,
    max_cache: str,
    devices: str,
    dtype: str,
    no_plots: bool,
    revision: str | None,
    trust_remote_code: bool,
    seed: int,
    as_json: bool,
) -> None:
    """What MODEL loses when stretches of its layers are shuffled, pruned, merged or run abreast."""
    from abreast.model import INTERVENTIONS
    from abreast.report import check_drawing, draw_study
    from abreast.study import study as run

    if not no_plots:
        check_drawing()

    with progress_bar("study", as_json) as progress:
        result = run(
            model,
            out,
            data=data,
            interventions=interventions.split(",") if interventions else INTERVENTIONS,
            max_length=max_length,
            permutations=permutations,
            batch_size=batch_size,
            max_cache_bytes=parse_size(max_cache),
            num_windows=windows,
            window=window,
            seed=seed,
            dtype=dtype,
            devices=devices.split(","),
            revision=revision,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if not no_plots:
        draw_study(result.rows, result.num_layers, out)
    if as_json:
        return print_json(result.to_dict())
    print_table(
        {
            "results": out,
            "rows": str(len(result.rows)),
            "layer evaluations": f"{result.evaluations.spent}, "
            f"{result.evaluations.without_reuse} without reuse",
        }
    )
