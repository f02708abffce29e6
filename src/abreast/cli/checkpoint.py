"""The verbs that read and write checkpoints: inspect, convert, verify, export, push."""

from __future__ import annotations

import sys
from typing import Any

import click

from abreast.cli.options import (
    bytes_text,
    device_option,
    force_option,
    json_option,
    parse_size,
    plan_option,
    prefill_option,
    print_json,
    print_table,
    progress_bar,
    revision_option,
    say,
    seed_option,
    verb,
)
from abreast.errors import AbreastError


@verb()
@click.argument("model")
@revision_option
@json_option
def inspect(model: str, revision: str | None, as_json: bool) -> None:
    """Show a model's family, its shape, and which groups of layers are legal."""
    from abreast.convert import inspect_model

    facts = inspect_model(model, revision=revision)
    if as_json:
        return print_json(facts.to_dict())
    rows = {
        "model": facts.source,
        "family": f"{facts.model_type} ({facts.architecture})",
        "layers": str(facts.num_layers),
        "hidden size": str(facts.hidden_size),
        "attention": f"{facts.num_attention_heads} heads of {facts.head_dim}, "
        f"{facts.num_key_value_heads} key-value heads",
        "FFN": str(facts.intermediate_size),
        "vocabulary": f"{facts.vocab_size}, {'tied' if facts.tied else 'untied'} output head",
        "weights": f"{facts.parameters / 1e6:.1f} M in {', '.join(facts.dtypes)}, "
        f"{bytes_text(facts.nbytes)} in {len(facts.shards)} file{'s' * (len(facts.shards) > 1)}",
    }
    if facts.plan is not None:
        rows["converted"] = f"from {facts.original_layers} layers under plan {facts.plan}"
    else:
        stretches = ", ".join(f"{first}..{last}" for first, last in facts.stretches)
        rows["legal groups"] = f"any consecutive layers within {stretches or 'no stretch'}"
        rows["with --force"] = " and ".join(f"groups with layer {edge}" for edge in facts.edges)
        if not facts.fusable:
            rows["fusion"] = "not for this family yet: its groups can only run grouped in memory"
        for first, second, reason in facts.refused[:8]:
            rows[f"refused {first}+{second}"] = reason
    print_table(rows)


@verb()
@click.argument("model")
@plan_option
@click.option("-o", "--out", required=True, help="New folder for the converted checkpoint.")
@click.option("--dry-run", is_flag=True, help="Check everything and report, but write nothing.")
@click.option("--dtype", help="Cast to float32, bfloat16 or float16. Default: no cast.")
@click.option(
    "--max-shard-size", default="5GB", show_default=True, help="Largest weight file, e.g. 2GB."
)
@prefill_option
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
    """Rewrite MODEL so that the layers of each group run side by side."""
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


@verb()
@click.argument("out")
@click.option("--against", required=True, help="The original that OUT was converted from.")
@click.option(
    "--tokens", default=256, show_default=True, help="Number of random tokens to compare on."
)
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
    """Check that OUT computes the same as the original run under the same plan.

    Exit status 0 if it does, 1 if it does not.
    """
    if tokens < 2:
        raise AbreastError(f"--tokens {tokens} is too few to compare on; give at least 2")
    from abreast.convert import verify as run

    result = run(out, against, revision=revision, device=device, num_tokens=tokens, seed=seed)
    if as_json:
        print_json(result.to_dict())
    else:
        judged = f"(allowed {result.tolerance:.0e} for {result.dtype})"
        print_table(
            {
                "plan": result.plan,
                "files": "as recorded" if result.num_tokens else "damaged",
                "logits": f"differ by {result.uncached:.1e} of their range "
                f"{'(healed: not judged)' if result.healed else judged}",
                "with KV cache": f"{result.cached:.1e}",
                "KL divergence": f"{result.kl:.1e} nats",
                "greedy tokens": f"{result.same_tokens} of {result.generated_tokens} the same",
                "result": "right" if result.ok else "WRONG: " + "; ".join(result.faults),
            }
        )
    if not result.ok:
        sys.exit(1)


@verb()
@click.argument("out")
@click.option("--gguf", "file", required=True, help="New GGUF file, for llama.cpp.")
@click.option("--quantize", "quantization", help="Quantise with llama.cpp, to Q4_K_M, Q8_0, ...")
@click.option(
    "--dtype", help="Dtype of the matrices: float32, bfloat16 or float16. Default: no cast."
)
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
    """Export the checkpoint OUT, converted or not, for another engine."""
    from abreast.engines.llamacpp import export as run

    with progress_bar("export", as_json) as progress:
        record = run(
            out,
            file,
            quantization=quantization,
            dtype=dtype,
            revision=revision,
            progress=progress,
        )
    for warning in record["warnings"]:
        say(f"warning: {warning}")
    if as_json:
        return print_json(record)
    kind = quantization or "not quantised"
    click.echo(f"{file}: {record['layers']} layers, {kind}, {bytes_text(record['bytes'])}")
    click.echo(f"run it: llama-server -m {file} --flash-attn on")


@verb()
@click.argument("out")
@click.argument("repo")
@click.option("--private", is_flag=True, help="Make the repository private.")
@click.option(
    "--dry-run", is_flag=True, help="Check everything and list the files, but upload nothing."
)
@json_option
def push(out: str, repo: str, private: bool, dry_run: bool, as_json: bool) -> None:
    """Upload OUT, a converted checkpoint, to the Hugging Face Hub as REPO (ORG/NAME).

    Uploads the model card and the files whose hashes are recorded in OUT, nothing else.
    """
    from abreast.report import prepare
    from abreast.report import push as run

    if not dry_run:
        address = run(out, repo, private=private)
        return print_json({"url": address}) if as_json else click.echo(address)
    upload = prepare(out, repo, private=private)
    if as_json:
        return print_json(upload.to_dict())
    print_table({name: bytes_text(size) for name, size in upload.files.items()})
    for name in upload.left_out:
        say(f"left out: {name}")
    kind = "private" if private else "public"
    click.echo(f"{len(upload.files)} files, {bytes_text(upload.nbytes)}, to {repo} ({kind})")
