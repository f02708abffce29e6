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

if TYPE_CHECKING:
    from abreast.demo import Demo
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
        f"{_bytes(found.nbytes)} in {len(found.shards)} file{'s' * (len(found.shards) > 1)}",
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
    _print_table(rows)


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
        return _print_table(
            {
                "model": f"{planned.source} ({planned.family})",
                "stages": f"{planned.num_layers} layers -> {planned.depth}: {stages}",
                "architecture": f"{planned.architecture}, {planned.dtype}",
                "reads": _bytes(planned.bytes_read),
                "writes": f"{_bytes(planned.bytes_written)} in {len(planned.shards)} file(s)",
                "peak memory": f"about {_bytes(planned.peak_memory)} beyond Python and torch",
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
        _print_table(
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
    _print_table(_quality(result))


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
    _print_demo(result)


def _quality(result: Comparison | Perplexity) -> dict[str, str]:
    from abreast.evaluate import Perplexity

    if isinstance(result, Perplexity):
        return {
            "perplexity": f"{result.perplexity:.3f} ± {result.perplexity_stderr:.3f}",
            "loss": f"{result.nll:.4f} ± {result.nll_stderr:.4f} nats per token",
            "bits per byte": f"{result.bits_per_byte:.4f}",
            "scored": f"{result.num_tokens} tokens, window {result.window}, stride {result.stride}",
        }
    ours, theirs = result.model, result.reference
    return {
        "perplexity": f"{ours.perplexity:.3f} ± {ours.perplexity_stderr:.3f}",
        "of the original": f"{theirs.perplexity:.3f} ± {theirs.perplexity_stderr:.3f}",
        "loss increase": f"{result.nll_difference:+.4f} ± {result.nll_difference_stderr:.4f} nats",
        "KL divergence": f"{result.kl:.4f} ± {result.kl_stderr:.4f} nats, "
        f"95th percentile {result.kl_p95:.4f}",
        "same top token": f"{result.top1_agreement:.1%} ± {result.top1_agreement_stderr:.1%}",
        "scored": f"{result.num_tokens} tokens, window {result.window}, stride {result.stride}",
    }


def _print_demo(result: Demo) -> None:
    from rich.console import Console
    from rich.table import Table

    from abreast.bench import verdict

    quality = result.comparison
    decode, prefill = result.decode.timings, result.prefill.timings

    def error(value: float, stderr: float) -> str:
        return f"{value:.2f} ± {stderr:.2f}"

    table = Table(title=f"bundled model, plan {result.plan.shorthand}, {result.dtype}")
    for heading in ("", "original", "converted", "difference"):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_row("depth", str(result.plan.num_layers), str(result.plan.depth), "")
    table.add_row(
        "perplexity",
        error(quality.reference.perplexity, quality.reference.perplexity_stderr),
        error(quality.model.perplexity, quality.model.perplexity_stderr),
        f"{quality.nll_difference:+.4f} ± {quality.nll_difference_stderr:.4f} nats",
    )
    table.add_row("KL divergence", "", f"{quality.kl:.4f} ± {quality.kl_stderr:.4f}", "nats")
    table.add_row("same top token", "", f"{quality.top1_agreement:.1%}", "")
    for name, times in (("decode tokens/s", decode), ("prefill tokens/s", prefill)):
        after = times["converted"]
        table.add_row(
            name,
            f"{times['original'].tokens_per_second:.0f}",
            f"{after.tokens_per_second:.0f}",
            f"{after.ratio:.2f}x [{after.ratio_low:.2f}, {after.ratio_high:.2f}]",
        )
    console = Console(highlight=False)
    console.print(table)
    console.print(f"decode: {verdict(result.decode)}")
    console.print(f"prefill: {verdict(result.prefill)}")
    if result.out is not None:
        console.print(f"converted checkpoint: {result.out}", soft_wrap=True)


def _print_table(rows: dict[str, str]) -> None:
    width = max(map(len, rows))
    for key, value in rows.items():
        click.echo(f"{key:<{width}}  {value}")


def _print_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=2, default=str))


def _say(message: str) -> None:
    click.echo(f"abreast: {message}", err=True)


def _bytes(count: int) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000  # type: ignore[assignment]
    return f"{count:.2f} GB"


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
