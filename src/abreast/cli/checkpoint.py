"""The verbs that read and write checkpoints: inspect, convert, verify, export."""

from __future__ import annotations

import sys
from typing import Any

import click

from abreast.cli.options import (
    PLAN_HELP,
    device_option,
    force_option,
    json_option,
    parse_size,
    print_json,
    progress_bar,
    revision_option,
    say,
    seed_option,
)
from abreast.cli.tables import bytes_text, print_table
from abreast.errors import AbreastError


@click.command()
@click.argument("model")
@revision_option
@json_option
def inspect(model: str, revision: str | None, as_json: bool) -> None:
    """Show family, shape, and which groups of layers are legal."""
    from abreast.convert import inspect_model

    found = inspect_model(model, revision=revision)
    if as_json:
        return print_json(found.to_dict())
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


@click.command()
@click.argument("model")
@click.option("--plan", required=True, help=PLAN_HELP)
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
@force_option
@revision_option
@json_option
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
        "max_shard_bytes": parse_size(max_shard_size),
    }
    planned = preview(model, plan, **options)
    for warning in planned.warnings:
        say(f"warning: {warning}")
    if dry_run:
        if as_json:
            return print_json(planned.to_dict())
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
    with progress_bar("convert", as_json) as progress:
        manifest = run(model, plan, out, **options, progress=progress)
    if as_json:
        return print_json(manifest)
    layers, depth = manifest["num_layers"], manifest["depth"]
    click.echo(f"{out}: {layers} layers -> {depth} stages, {manifest['architecture']}")
    click.echo(f"check it: abreast verify {out} --against {model}")


@click.command()
@click.argument("out")
@click.option("--against", required=True, help="The original that OUT was made from.")
@click.option("--tokens", default=256, show_default=True, help="Random tokens to compare on.")
@revision_option
@device_option
@seed_option
@json_option
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
    from abreast.convert import verify as run

    found = run(out, against, revision=revision, device=device, num_tokens=tokens, seed=seed)
    if as_json:
        print_json(found.to_dict())
    else:
        print_table(
            {
                "plan": found.plan,
                "files": "as recorded" if found.num_tokens else "damaged",
                "logits": f"differ by {found.uncached:.1e} of their range "
                + (
                    "(healed: not judged)"
                    if found.healed
                    else f"(allowed {found.tolerance:.0e} for {found.dtype})"
                ),
                "with KV cache": f"{found.cached:.1e}",
                "KL divergence": f"{found.kl:.1e} nats",
                "greedy tokens": f"{found.same_tokens} of {found.generated_tokens} the same",
                "result": "right" if found.ok else "WRONG: " + "; ".join(found.faults),
            }
        )
    if not found.ok:
        sys.exit(1)


@click.command()
@click.argument("out")
@click.option("--gguf", "file", required=True, help="New GGUF file, for llama.cpp.")
@click.option("--quantize", "quantization", help="Q4_K_M, Q8_0, ...: by llama.cpp's quantiser.")
@click.option("--dtype", help="Of the matrices: float32, bfloat16 or float16. Default: keep.")
@revision_option
@json_option
def export(
    out: str,
    file: str,
    quantization: str | None,
    dtype: str | None,
    revision: str | None,
    as_json: bool,
) -> None:
    """Write the checkpoint OUT, converted or not, for another engine."""
    from abreast.engines.llamacpp import export as run

    with progress_bar("export", as_json) as progress:
        found = run(
            out,
            file,
            quantization=quantization,
            dtype=dtype,
            revision=revision,
            progress=progress,
        )
    for warning in found["warnings"]:
        say(f"warning: {warning}")
    if as_json:
        return print_json(found)
    kind = quantization or "not quantised"
    click.echo(f"{file}: {found['layers']} layers, {kind}, {bytes_text(found['bytes'])}")
    click.echo(f"run it: llama-server -m {file} --flash-attn on")
