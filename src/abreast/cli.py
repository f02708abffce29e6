"""The `abreast` command. Verbs are imported when they run, so that --help costs no torch."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import click

from abreast import __version__
from abreast.errors import AbreastError
from abreast.tables import bytes_text, print_demo, print_table, quality_rows

if TYPE_CHECKING:
    from abreast.evaluate import Comparison, Perplexity

Progress = Callable[[int, int], None]

_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
_revision = click.option("--revision", help="Branch, tag or commit of a Hugging Face model.")
_force = click.option("--force", is_flag=True, help="Allow groups with the first or last layer.")
_seed = click.option("--seed", default=0, show_default=True, help="Seed of everything random.")
_device = click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")
_remote = click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Let code inside the checkpoint run. Off: it never does.",
)
_plan_help = 'Groups such as "5+6 7+8" (lp), "7|8" (cqil), "7|8:1" (bypass 1), or a plan file.'


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="abreast")
def cli() -> None:
    """Run consecutive layers of a language model side by side.

    MODEL is a folder with a Hugging Face checkpoint, or a Hugging Face id such as ORG/NAME.
    Try it on the bundled model: abreast inspect "$(abreast demo --path)"
    """


@cli.command()
@click.argument("model")
@_revision
@_json
def inspect(model: str, revision: str | None, as_json: bool) -> None:
    """Show family, shape, and which groups of layers are legal."""
    from abreast.inspection import inspect_model

    found = inspect_model(model, revision=revision)
    if as_json:
        return _print_json(found.to_dict())
    rows = {
        "model": found.source,
        "family": f"{found.model_type} ({found.architecture})",
        "layers": str(found.num_layers),
        "hidden size": str(found.hidden_size),
        "attention": f"{found.num_attention_heads} heads of {found.head_dim}, "
        f"{found.num_key_value_heads} key-value heads",
        "FFN": str(found.intermediate_size),
        "vocabulary": f"{found.vocab_size}, {'tied' if found.tied else 'untied'} output head",
        "weights": f"{found.parameters / 1e6:.1f} M in {', '.join(found.dtypes)}, "
        f"{bytes_text(found.nbytes)} in {len(found.shards)} file{'s' * (len(found.shards) > 1)}",
    }
    if found.plan is not None:
        rows["converted"] = f"from {found.original_layers} layers under plan {found.plan}"
    else:
        stretches = ", ".join(f"{first}..{last}" for first, last in found.stretches)
        rows["legal groups"] = f"any consecutive layers within {stretches or 'no stretch'}"
        rows["with --force"] = " and ".join(f"groups with layer {edge}" for edge in found.edges)
        if not found.fusable:
            rows["fusion"] = "not for this family yet: its groups can only run grouped in memory"
        for first, second, reason in found.refused[:8]:
            rows[f"refused {first}+{second}"] = reason
    print_table(rows)


@cli.command()
@click.argument("model")
@click.option("--plan", required=True, help=_plan_help)
@click.option("-o", "--out", required=True, help="New folder for the converted checkpoint.")
@click.option("--dry-run", is_flag=True, help="Check everything, say what would be done, stop.")
@click.option("--dtype", help="Cast to float32, bfloat16 or float16. Default: keep.")
@click.option(
    "--max-shard-size", default="5GB", show_default=True, help="Largest file of weights, e.g. 2GB."
)
@click.option(
    "--prefill",
    type=click.Choice(["grouped", "sequential"]),
    default="grouped",
    show_default=True,
    help="sequential: run prompts in the original order, decode abreast.",
)
@_force
@_revision
@_json
def convert(
    model: str,
    plan: str,
    out: str,
    prefill: str,
    dry_run: bool,
    dtype: str | None,
    max_shard_size: str,
    force: bool,
    revision: str | None,
    as_json: bool,
) -> None:
    """Rewrite MODEL so that the layers of each group run abreast."""
    from abreast.convert import convert as run
    from abreast.convert import preview

    options: dict[str, Any] = {
        "revision": revision,
        "force": force,
        "dtype": dtype,
        "prefill": prefill,
        "max_shard_bytes": _parse_size(max_shard_size),
    }
    planned = preview(model, plan, **options)
    for warning in planned.warnings:
        _say(f"warning: {warning}")
    if dry_run:
        if as_json:
            return _print_json(planned.to_dict())
        stages = " ".join("+".join(map(str, stage)) for stage in planned.stages)
        return print_table(
            {
                "model": f"{planned.source} ({planned.family})",
                "stages": f"{planned.num_layers} layers -> {planned.depth}: {stages}",
                "architecture": f"{planned.architecture}, {planned.dtype}",
                "reads": bytes_text(planned.bytes_read),
                "writes": f"{bytes_text(planned.bytes_written)} in {len(planned.shards)} file(s)",
                "peak memory": f"about {bytes_text(planned.peak_memory)} beyond Python and torch",
            }
        )
    with _progress("convert", as_json) as progress:
        manifest = run(model, plan, out, **options, progress=progress)
    if as_json:
        return _print_json(manifest)
    layers, depth = manifest["num_layers"], manifest["depth"]
    click.echo(f"{out}: {layers} layers -> {depth} stages, {manifest['architecture']}")
    click.echo(f"check it: abreast verify {out} --against {model}")


@cli.command()
@click.argument("out")
@click.option("--against", required=True, help="The original that OUT was made from.")
@click.option("--tokens", default=256, show_default=True, help="Random tokens to compare on.")
@_revision
@_device
@_seed
@_json
def verify(
    out: str,
    against: str,
    tokens: int,
    revision: str | None,
    device: str,
    seed: int,
    as_json: bool,
) -> None:
    """Prove that OUT computes what MODEL computes under the same plan.

    Exit status 0 if it does, 1 if it does not.
    """
    if tokens < 2:
        raise AbreastError(f"--tokens {tokens} is too few to compare on; give at least 2")
    from abreast.verify import verify as run

    found = run(out, against, revision=revision, device=device, num_tokens=tokens, seed=seed)
    if as_json:
        _print_json(found.to_dict())
    else:
        print_table(
            {
                "plan": found.plan,
                "files": "as recorded" if found.num_tokens else "damaged",
                "logits": f"differ by {found.uncached:.1e} of their range "
                f"(allowed {found.tolerance:.0e} for {found.dtype})",
                "with KV cache": f"{found.cached:.1e}",
                "KL divergence": f"{found.kl:.1e} nats",
                "greedy tokens": f"{found.same_tokens} of {found.generated_tokens} the same",
                "result": "right" if found.ok else "WRONG: " + "; ".join(found.faults),
            }
        )
    if not found.ok:
        sys.exit(1)


@cli.command(name="eval")
@click.argument("model")
@click.option("--against", help="Compare with this model, usually the original.")
@click.option("--plan", help=f"Run MODEL grouped under this plan. {_plan_help}")
@click.option(
    "--data",
    default="stdlib",
    show_default=True,
    help="Text file, folder, hub:DATASET[:SPLIT[:COLUMN]], stdlib (held out) or stdlib-train.",
)
@click.option("--max-tokens", default=100_000, show_default=True, help="Score at most this many.")
@click.option("--window", default=1024, show_default=True, help="Tokens the model sees at once.")
@click.option("--stride", default=512, show_default=True, help="Tokens between windows.")
@click.option("--batch-size", default=1, show_default=True, help="Windows at once.")
@click.option("--dtype", default="auto", show_default=True, help="float32, bfloat16, float16.")
@_revision
@_remote
@_device
@_seed
@_json
def evaluate(
    model: str,
    against: str | None,
    plan: str | None,
    data: str,
    max_tokens: int,
    window: int,
    stride: int,
    batch_size: int,
    dtype: str,
    revision: str | None,
    trust_remote_code: bool,
    device: str,
    seed: int,
    as_json: bool,
) -> None:
    """Perplexity of MODEL; with --against also the KL divergence, both with standard errors."""
    from abreast.data import load_tokens
    from abreast.evaluate import check_tokenizers, compare, perplexity
    from abreast.load import load

    options: dict[str, Any] = {
        "dtype": dtype,
        "device": device,
        "trust_remote_code": trust_remote_code,
    }
    loaded, tokenizer = load(model, plan=plan, revision=revision, **options)
    reference, reference_tokenizer = load(against, **options) if against else (None, None)
    tokenizer = tokenizer or reference_tokenizer
    if tokenizer is None:
        raise AbreastError(f"'{model}' has no tokenizer; copy the original's files into its folder")
    if reference_tokenizer is not None:
        check_tokenizers(tokenizer, reference_tokenizer)
    stream = load_tokens(tokenizer, data, max_tokens=max_tokens, seed=seed)
    sizes: dict[str, Any] = {"window": window, "stride": stride, "batch_size": batch_size}
    result: Comparison | Perplexity
    with _progress("evaluate", as_json) as progress:
        if reference is not None:
            result = compare(loaded, reference, stream, progress=progress, **sizes)
        else:
            result = perplexity(loaded, stream, progress=progress, **sizes)
    if as_json:
        about = {
            "source": stream.source,
            "sha256": stream.sha256,
            "documents": stream.num_documents,
        }
        record = {"model": model, "against": against, "plan": plan, "dtype": dtype, "seed": seed}
        return _print_json({**record, "data": about, **{"result": result.to_dict()}})
    print_table(quality_rows(result))


@cli.command()
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
@click.option("--no-plots", is_flag=True, help="Write no PNGs; needs no matplotlib.")
@_revision
@_remote
@_seed
@_json
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
    from abreast.interventions import INTERVENTIONS
    from abreast.study import study as run

    with _progress("study", as_json) as progress:
        result = run(
            model,
            out,
            data=data,
            interventions=interventions.split(",") if interventions else INTERVENTIONS,
            max_length=max_length,
            permutations=permutations,
            batch_size=batch_size,
            max_cache_bytes=_parse_size(max_cache),
            num_windows=windows,
            window=window,
            seed=seed,
            dtype=dtype,
            devices=devices.split(","),
            plots=not no_plots,
            revision=revision,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if as_json:
        return _print_json(result.to_dict())
    print_table(
        {
            "results": out,
            "rows": str(len(result.rows)),
            "layer evaluations": f"{result.evaluations.spent}, "
            f"{result.evaluations.without_reuse} without reuse",
        }
    )


@cli.command()
@click.option("--path", is_flag=True, help="Only print the folder of the bundled model.")
@click.option("--plan", help=f"Another plan than the bundled one. {_plan_help}")
@click.option("-o", "--out", help="Keep the converted checkpoint in this new folder.")
@click.option("--max-tokens", default=100_000, show_default=True, help="Held-out tokens to score.")
@click.option("--rounds", default=12, show_default=True, help="Interleaved rounds of timing.")
@click.option("--dtype", default="float32", show_default=True, help="To evaluate and time in.")
@_device
@_seed
@_json
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
        step=_say,
    )
    if as_json:
        return _print_json(result.to_dict())
    print_demo(result)


def _print_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=2, default=str))


def _say(message: str) -> None:
    click.echo(f"abreast: {message}", err=True)


def _parse_size(text: str) -> int:
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
def _progress(label: str, quiet: bool) -> Iterator[Progress | None]:
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


def main() -> NoReturn:
    """Entry point: runs the command; a user's mistake is one line on stderr and status 2."""
    # Libraries that a verb imports later read these once; the user's own settings win.
    for name, value in (
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("TQDM_DISABLE", "1"),
    ):
        os.environ.setdefault(name, value)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that staging folders are removed
    try:
        cli(standalone_mode=False)
    except AbreastError as error:
        _leave(str(error))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("abreast: interrupted, nothing half-written is left", err=True)
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read our output has gone; keep Python from complaining again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except MemoryError:
        _leave("out of memory; use a smaller --batch-size, --window or model")
    except OSError as error:
        if error.filename is None:
            raise
        _leave(f"'{error.filename}': {error.strerror}")
    sys.exit(0)


def _leave(message: str) -> NoReturn:
    click.echo(f"abreast: {' '.join(message.split())}", err=True)
    sys.exit(2)
