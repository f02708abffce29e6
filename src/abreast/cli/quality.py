"""The verbs about quality: eval, heal."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
from click.core import ParameterSource

from abreast.cli import console, tables
from abreast.errors import AbreastError

if TYPE_CHECKING:
    from abreast.data import TokenStream
    from abreast.evaluate import Comparison, Evaluation, Perplexity
    from abreast.heal import Recipe


@console.verb(name="eval")
@click.argument("model")
@click.option("--against", help="Compare with this model, usually the original.")
@click.option("--plan", help=f"Run MODEL grouped under this plan. {console.PLAN_HELP}")
@click.option(
    "--norms",
    type=click.Choice(["own", "split", "shared"]),
    default="own",
    help="With --plan: whose norms the members of a group use.",
)
@click.option(
    "--data",
    multiple=True,
    default=("auto",),
    help="Text file, folder, hub:DATASET[@CONFIG][:SPLIT[:COLUMN]], chat:FILE, stdlib (held out), "
    "stdlib-train or self (what the original writes). May be repeated. Default: see the "
    "documentation.",
)
@console.chat_option
@click.option("--max-tokens", default=100_000, help="Tokens to score.")
@click.option("--window", default=1024, help="Context length in tokens.")
@click.option("--stride", default=512, help="Tokens between windows.")
@click.option("--per-window", is_flag=True, help="Include the sums of every window in the JSON.")
@click.option(
    "--tasks", help="Evaluate on these lm-evaluation-harness tasks instead, comma-separated."
)
@click.option(
    "--num-fewshot", type=int, help="With --tasks: examples per prompt. Default: the task's own."
)
@click.option("--limit", type=int, help="With --tasks: items of each task. Default: all.")
@click.option("--include-path", multiple=True, help="With --tasks: folder with more task files.")
@console.bos_option
@click.option(
    "-o",
    "--out",
    type=console.RunFolder(),
    help="Keep answers to tasks and what the original writes here.",
)
@click.option("--batch-size", default=1, help="Windows or prompts per forward pass.")
@console.dtype_option
@console.revision_option
@console.remote_option
@console.device_option
@console.seed_option
@console.json_option
def evaluate(
    model: str,
    against: str | None,
    plan: str | None,
    norms: str,
    data: tuple[str, ...],
    max_tokens: int,
    window: int,
    stride: int,
    per_window: bool,
    add_bos: bool | None,
    tasks: str | None,
    out: str | None,
    batch_size: int,
    dtype: str,
    revision: str | None,
    trust_remote_code: bool,
    device: str,
    seed: int,
    as_json: bool,
    **task_options: Any,
) -> None:
    """Measure perplexity on text, or accuracy on --tasks.

    With --against, also compare MODEL with that model: KL divergence and loss increase with
    standard errors and intervals, or the share of accuracy kept and a paired test.
    """
    from abreast.data import OWN
    from abreast.evaluate import check_length, check_stride
    from abreast.runs import check_run, token_stream

    loading: dict[str, Any] = {
        "dtype": dtype,
        "device": device,
        "trust_remote_code": trust_remote_code,
        "norms": norms,
    }
    if plan is None and norms != "own":
        raise AbreastError(f"--norms {norms} goes with --plan; give one, or leave it out")
    # A folder has none: then it is the original that comes from the Hub.
    against_revision = revision if os.path.isdir(model) else None
    loading |= {"plan": plan, "revision": revision, "against_revision": against_revision}
    if tasks is not None:
        return _on_tasks(
            model,
            tasks,
            as_json,
            seed=seed,
            against=against,
            add_bos=add_bos,
            out=out,
            batch_size=batch_size,
            **task_options,
            **loading,
        )
    for name, value in task_options.items():
        if value not in (None, ()):
            option = name.replace("_", "-")
            raise AbreastError(f"--{option} goes with --tasks; name some, or leave it out")
    check_stride(window, stride)
    models = _load_models(model, against, **loading)
    if out is not None:
        check_run(Path(out), "comparison")

    # what can be wrong with files comes before minutes of writing
    streams: dict[str, TokenStream] = {}
    for name in sorted(data, key=lambda name: OWN in name):
        streams[name] = token_stream(
            name,
            models.tokenizer,
            models.author or model,
            max_tokens=max_tokens,
            window=window,
            seed=seed,
            add_bos=add_bos,
            role="judge",
            # no changed model is judged on what it writes itself
            author=(lambda: models.reference) if models.author else None,
            folder=Path(out) if out else None,
            step=console.say,
        )
        check_length(streams[name], min(window, max_tokens), models.loaded)
    for note in models.notes:
        console.say(note)
    sizes = {"window": window, "stride": stride, "batch_size": batch_size}
    results = {name: _on_text(models, streams[name], seed, as_json, sizes) for name in data}
    if as_json:
        record = {"model": model, "against": against, "plan": plan, "norms": norms}
        corpora = [_corpus_record(streams[name], results[name], per_window) for name in data]
        rest = corpora[0] if len(corpora) == 1 else {"corpora": corpora}
        return console.print_json({**record, "dtype": models.dtype, "seed": seed, **rest})
    if len(data) == 1:
        return console.print_table(_quality_rows(results[data[0]]))
    _print_corpora(results)


class _Models(NamedTuple):
    """What is judged and, if it is compared, with what. author: the folder of the latter."""

    loaded: Any
    reference: Any
    tokenizer: Any
    author: Path | None
    dtype: str
    notes: list[str]


def _load_models(
    model: str,
    against: str | None,
    *,
    plan: str | None,
    revision: str | None,
    against_revision: str | None,
    dtype: str,
    device: str,
    **loading: Any,
) -> _Models:
    from abreast.checkpoint import open_checkpoint, resolve
    from abreast.data import check_tokenizers
    from abreast.model import fitting_dtype, load

    notes = list[str]()
    checkpoint = open_checkpoint(model, revision=revision)
    dtype = fitting_dtype(checkpoint, dtype, device, step=notes.append)
    loading |= {"dtype": dtype, "device": device}
    loaded, tokenizer = load(model, plan=plan, revision=revision, **loading)
    if not against:
        return _Models(loaded, None, tokenizer, None, dtype, notes)
    reference, its_tokenizer = load(against, revision=against_revision, **loading)
    if tokenizer is not None and its_tokenizer is not None:
        check_tokenizers(tokenizer, its_tokenizer)
    author = resolve(against, revision=against_revision)[0]
    return _Models(loaded, reference, tokenizer or its_tokenizer, author, dtype, notes)


def _on_text(
    models: _Models, stream: TokenStream, seed: int, as_json: bool, sizes: dict[str, Any]
) -> Comparison | Perplexity:
    from abreast.evaluate import compare, perplexity

    with console.progress_bar(f"evaluate on {stream.source}", as_json) as progress:
        if models.reference is None:
            return perplexity(models.loaded, stream, **sizes, progress=progress)
        return compare(
            models.loaded, models.reference, stream, seed=seed, **sizes, progress=progress
        )


def _corpus_record(
    stream: TokenStream, result: Comparison | Perplexity, per_window: bool
) -> dict[str, Any]:
    about = {"documents": stream.num_documents, "prefix": list(stream.prefix)}
    return {"data": {**stream.about(), **about}, "result": result.to_dict(windows=per_window)}


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

    loaded = find_tasks(
        tasks.split(","),
        seed=seed,
        include_path=include_path,
        num_fewshot=num_fewshot,
        limit=limit,
    )
    with console.progress_bar("evaluate", as_json) as progress:
        result = evaluate_tasks(model, loaded, step=console.say, progress=progress, **options)
    if as_json:
        return console.print_json(result.to_dict())
    _print_tasks(result)


def _quality_rows(result: Comparison | Perplexity) -> dict[str, str]:
    from abreast.evaluate import Perplexity

    scored = f"{result.num_tokens} tokens, window {result.window}, stride {result.stride}"
    if isinstance(result, Perplexity):
        return {
            "perplexity": console.with_error(result, "perplexity", ".3f"),
            "loss": f"{console.with_error(result, 'nll', '.4f')} nats per token",
            "bits per byte": f"{result.bits_per_byte:.4f}",
            "scored": scored,
        }
    ours, theirs = result.model, result.reference
    return {
        "perplexity": console.with_error(ours, "perplexity", ".3f"),
        "of the original": console.with_error(theirs, "perplexity", ".3f"),
        "loss increase": f"{console.with_error(result, 'nll_difference', '+.4f')} nats"
        f"{_interval(result)}, worse in {result.windows_worse:.0%} of the windows",
        "KL divergence": f"{console.with_error(result, 'kl', '.4f')} nats, "
        f"95th percentile {result.kl_p95:.4f}",
        "same top token": console.with_error(result, "top1_agreement", ".1%"),
        "scored": scored,
    }


def _interval(result: Comparison) -> str:
    low, high = result.bootstrap["nll_difference"]
    return f" [{low:+.4f}, {high:+.4f}]" if low <= high else ""  # NaN: a single window


def _print_corpora(results: Mapping[str, Comparison | Perplexity]) -> None:
    """One row per text."""
    from abreast.evaluate import Perplexity

    rows: list[tuple[str, ...]] = []
    compared = False
    for name, result in results.items():
        text = f"{Path(name).name}\n{result.num_tokens} tokens"
        if isinstance(result, Perplexity):
            rows.append((text, console.with_error(result, "perplexity", ".3f")))
            continue
        compared = True
        rows.append(
            (
                text,
                f"{result.model.perplexity:.3f}",
                f"{result.reference.perplexity:.3f}",
                f"{result.nll_difference:+.4f}\n{_interval(result).strip()}",
                f"{result.kl:.4f}",
                f"{result.top1_agreement:.1%}",
            )
        )
    headings = ("text", "perplexity", "original", "loss increase", "KL", "same top")
    notes = ["brackets: 95 % bootstrap interval, windows resampled"] if compared else []
    console.print_columns(
        headings if compared else headings[:2], rows, left={"text"}, borders=False, notes=notes
    )


def _print_tasks(result: Evaluation) -> None:
    """One row per task and metric."""
    alone = result.settings["against"] is None
    title = f"{result.settings['model']} {result.settings['plan'] or ''}".strip()
    rows: list[tuple[str, ...]] = []
    for name, scores in result.tasks.items():
        for metric, values in scores.metrics.items():
            ours = _score(values["converted"], values["converted_stderr"])
            if alone:
                rows.append((f"{name}\n{metric}", ours, str(scores.num_items)))
                continue
            lost, won = values["only_original"], values["only_converted"]
            rows.append(
                (
                    f"{name}\n{metric}",
                    _score(values["original"], values["original_stderr"]),
                    ours,
                    _score(values["kept"], values["kept_stderr"]),
                    "" if values["p_value"] is None else f"{values['p_value']:.2g}",
                    "" if lost is None else f"{lost}:{won}",
                )
            )
    notes = []
    if result.kept_mean is not None:
        mean = _score(result.kept_mean, result.kept_mean_stderr)
        notes = [
            f"accuracy kept, mean over tasks: {mean}",
            "only one: items that only the original : only the converted model gets right; "
            "p: of the paired test on them",
        ]
    if result.above_chance_kept is not None and result.above_chance_interval is not None:
        low, high = result.above_chance_interval
        share = f"{result.above_chance_kept:.3f} [{low:.3f}, {high:.3f}]"
        notes.append(f"accuracy above chance kept, summed over multiple-choice tasks: {share}")
    headings = ("score", "items") if alone else ("original", "converted", "kept", "p", "only one")
    console.print_columns(
        ("task", *headings), rows, left={"task"}, title=title, borders=False, notes=notes
    )


def _score(value: float | None, stderr: float | None) -> str:
    if value is None:
        return ""
    # accuracies, and perplexities that may be of any size
    digits = ".3f" if max(value, stderr or 0.0) < 10 else ".4g"
    return f"{value:{digits}}" + ("" if stderr is None else f"±{stderr:{digits}}")


@console.verb()
@click.argument("model")
@console.plan_option
@click.option(
    "-o",
    "--out",
    required=True,
    type=console.RunFolder(".work"),
    help="New folder for the converted checkpoint.",
)
@click.option(
    "--method",
    type=click.Choice(["refit", "distill", "both"]),
    default="both",
    help="Closed form, training, or one after the other.",
)
@click.option("--data", default="auto", help="Text to heal on; as in eval.")
@console.chat_option
@console.bos_option
@click.option("--tokens", type=int, help="Tokens to heal on. Default: what the method needs.")
@click.option("--window", default=1024, help="Context length in tokens.")
@click.option("--refit-steps", default="qkv,gate_up,out", help="Refit these, in order.")
@click.option(
    "--recipe",
    "preset",
    type=click.Choice(["ours", "lp-paper", "cqil"]),
    default="ours",
    help="Preset that the training options below start from.",
)
@console.settings("recipe", "abreast.heal", "Recipe")
@click.option("--dtype", default="float32", help="Dtype of the weights in memory.")
@click.option("--out-dtype", help="Cast OUT to float32, bfloat16 or float16. Default: no cast.")
@console.prefill_option
@click.option(
    "--work",
    type=console.RunFolder(),
    help="Folder to resume from. Default: OUT.work, removed at the end.",
)
@click.option("--keep-weights", help="New folder for the healed weights, unconverted.")
@click.option("--no-plots", is_flag=True, help="Draw no charts (needs no altair).")
@console.force_option
@console.revision_option
@console.remote_option
@console.device_option
@console.seed_option
@click.option("--dry-run", is_flag=True, help="Only print the time and memory it would take.")
@console.json_option
@click.pass_context
def heal(
    context: click.Context,
    model: str,
    plan: str,
    out: str,
    method: str,
    data: str,
    add_bos: bool | None,
    tokens: int | None,
    window: int,
    refit_steps: str,
    preset: str,
    recipe: Recipe,
    dtype: str,
    out_dtype: str | None,
    prefill: str,
    work: str | None,
    keep_weights: str | None,
    no_plots: bool,
    force: bool,
    revision: str | None,
    trust_remote_code: bool,
    device: str,
    seed: int,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Convert MODEL, and win back lost quality."""
    from abreast.heal import RECIPES
    from abreast.heal import heal as run
    from abreast.report import check_drawing, draw_healing

    if not no_plots:
        check_drawing()
    implied = {
        name: value
        for name, value in RECIPES[preset].items()
        if context.get_parameter_source(name) is ParameterSource.DEFAULT
    }
    recipe = replace(recipe, **implied)
    if dry_run:
        from abreast.cli.forecast import healing

        rows = healing(
            model,
            plan,
            recipe.suited(device),
            method=method,
            window=window,
            revision=revision,
            force=force,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
        )
        return console.print_json(rows) if as_json else console.print_table(rows)
    with console.progress_bar("heal", as_json) as progress:
        healed = run(
            model,
            plan,
            out,
            method=method,
            data=data,
            add_bos=add_bos,
            tokens=tokens,
            window=window,
            recipe=recipe,
            refit_steps=refit_steps.split(","),
            seed=seed,
            device=device,
            dtype=dtype,
            work=work,
            keep=keep_weights,
            out_dtype=out_dtype,
            prefill=prefill,
            force=force,
            draw=None if no_plots else draw_healing,
            revision=revision,
            trust_remote_code=trust_remote_code,
            step=console.say,
            progress=progress,
        )
    if os.environ.get("RANK", "0") != "0":  # one of several processes speaks for all
        return
    for warning in healed.warnings:
        console.say(f"warning: {warning}")
    if as_json:
        return console.print_json(healed.to_dict())
    console.print_table(tables.healed_rows(healed))
