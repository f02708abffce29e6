"""The verbs that read and write checkpoints: inspect, import, convert, verify, export, push."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from abreast.cli import console, tables
from abreast.errors import AbreastError

dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Check everything and report, but write nothing."
)
shard_option = click.option(
    "--max-shard-size", default="5GB", help="Largest weight file, e.g. 2GB."
)


@console.verb()
@click.argument("model", required=False)
@click.option("--known", is_flag=True, help="Check 40 well-known checkpoints instead.")
@click.option(
    "--hardware", help="Show how best to split it over this hardware, named as in estimate."
)
@console.revision_option
@console.json_option
def inspect(
    model: str | None, known: bool, hardware: str | None, revision: str | None, as_json: bool
) -> None:
    """Show a model's shape, and which layers can be grouped."""
    from abreast.convert import inspect_model
    from abreast.plan import Plan

    if known == (model is not None):
        raise AbreastError("inspect reads one MODEL, or --known")
    if model is None:
        return _print_known(as_json)
    on = _on_hardware(model, hardware, revision) if hardware is not None else {}
    facts = inspect_model(model, revision=revision)
    for warning in facts.warnings:
        console.say(f"warning: {warning}")
    if as_json:
        return console.print_json({**facts.to_dict(), **({"hardware": on} if on else {})})
    files = len(facts.shards)
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
        f"{console.bytes_text(facts.nbytes)} in {files} file{'s' * (files > 1)}",
    }
    if facts.plan is not None and facts.original_layers is not None:
        plan = Plan.parse(facts.plan, facts.original_layers)
        rows["converted"] = f"from {plan.num_layers} layers under plan {plan.label}"
    else:
        stretches = ", ".join(f"{first}..{last}" for first, last in facts.stretches)
        edges = " and ".join(map(str, facts.edges))
        within = f"consecutive layers within {stretches}; {edges} only with --force"
        rows["can be grouped"] = within if stretches else "no two layers"
        rows["cheapest to group"] = f"abreast plan {facts.source} -o RUN"
        if not facts.fusable:
            rows["conversion"] = f"none: {facts.unfoldable}"
        for first, second, reason in facts.refused[:8]:
            rows[f"refused {first}+{second}"] = reason
    rows |= {f"not for {engine}": reason for engine, reason in facts.refused_by.items()} | on
    console.print_table(rows)


def _on_hardware(model: str, hardware: str, revision: str | None) -> dict[str, str]:
    """How long a token would take there under a typical plan, and what memory."""
    from abreast.speed import Setting, hardware_of, read_config, typical_plan

    setting, config = Setting(hardware_of(hardware)), read_config(model, revision=revision)
    plan = typical_plan(config)
    words = tables.compared(config, plan, setting) or "one device: see estimate"
    return {f"on {hardware}": f"{plan.depth} stages, {words}"}


def _print_known(as_json: bool) -> None:
    """Which well-known checkpoints can be converted, and what a typical plan would bring."""
    from abreast.convert import known_models
    from abreast.speed import Setting, estimate, hardware_of, typical_plan

    records: list[dict[str, Any]] = []
    rows: list[tuple[str, ...]] = []
    refused: dict[str, str] = {}
    for model in known_models():
        record: dict[str, Any] = {"name": model.name, "hub": model.hub, "source": model.source}
        record |= {"model_type": model.config["model_type"], "reason": model.reason}
        if model.reason is None:
            plan = typical_plan(model.decoder)
            on = {name: Setting(hardware_of(name)) for name in ("H100", "8xH100")}
            brings = {name: estimate(model.decoder, plan, setting) for name, setting in on.items()}
            record["plan"] = plan.shorthand
            record["estimates"] = {name: entry.to_dict() for name, entry in brings.items()}
            pairs = f"{len(plan.groups)} {plan.groups[0].wiring} pairs"
            rows.append((model.name, pairs, *(entry.gain for entry in brings.values())))
            if reason := brings["8xH100"].refused:
                refused[model.name] = reason
        else:
            rows.append((model.name, "no", "", ""))
        records.append(record)
    if as_json:
        return console.print_json(records)
    unfit = {r["name"]: r["reason"] for r in records if r["reason"]}
    console.print_columns(
        ("checkpoint", "convertible", "H100", "8xH100"),
        rows,
        left={"checkpoint", "convertible"},
        title=f"{len(records) - len(unfit)} of {len(records)} can be converted; decoding at "
        "batch 1 under a typical plan, computed",
        borders=False,
        notes=[*tables.by_reason(unfit), *(f"8xH100: {n}" for n in tables.by_reason(refused))],
    )


@console.verb(name="import")
@click.argument("file", metavar="MODEL.gguf")
@click.option("-o", "--out", required=True, help="New folder for the checkpoint.")
@dry_run_option
@click.option(
    "--dtype",
    help="float32, bfloat16 or float16. Default: as stored, bfloat16 if quantised.",
)
@shard_option
@console.revision_option
@console.json_option
def import_gguf(
    file: str,
    out: str,
    dry_run: bool,
    dtype: str | None,
    max_shard_size: str,
    revision: str | None,
    as_json: bool,
) -> None:
    """Make a checkpoint from a GGUF file.

    MODEL.gguf is a file, or ORG/NAME:FILE.gguf on the Hugging Face Hub.
    """
    from abreast.engines.llamacpp import import_gguf as run

    size = console.parse_size(max_shard_size)
    options: dict[str, Any] = {"dtype": dtype, "revision": revision, "max_shard_bytes": size}
    record = run(file, out, **options, dry_run=dry_run)
    if record["quantized"]:
        console.say(
            f"the weights were quantised ({', '.join(record['kinds'])}) and are now numbers again, "
            "but not those before: what is measured from here on is relative to this file, not to "
            "the model that it was made from; start from that model's safetensors if you can"
        )
    if as_json:
        return console.print_json(record)
    click.echo(
        f"{out}: {record['family']} of {record['layers']} layers, {record['dtype']}, "
        f"{console.bytes_text(record['bytes'])}, {record['tokens']} tokens, "
        f"{'with a' if record['chat_template'] else 'no'} chat template"
        f"{' (dry run: nothing was written)' if dry_run else ''}"
    )


@console.verb()
@click.argument("model")
@console.plan_option
@click.option("-o", "--out", required=True, help="New folder for the converted checkpoint.")
@dry_run_option
@click.option("--dtype", help="Cast to float32, bfloat16 or float16. Default: no cast.")
@shard_option
@console.prefill_option
@click.option(
    "--format",
    "form",
    default="auto",
    help="auto, or deci, deci-ff, openelm or mlx, which other engines load without a plugin.",
)
@click.option("--quantize", help="fp8: float8 weights, a scale for each block of 128 x 128.")
@console.force_option
@console.revision_option
@console.json_option
def convert(
    model: str,
    plan: str,
    out: str,
    prefill: str,
    form: str,
    quantize: str | None,
    dry_run: bool,
    dtype: str | None,
    max_shard_size: str,
    force: bool,
    revision: str | None,
    as_json: bool,
) -> None:
    """Rewrite MODEL: each group's layers run side by side."""
    from abreast.checkpoint import check_free
    from abreast.convert import convert as run
    from abreast.convert import preview

    if not dry_run:
        check_free(Path(out))
    options: dict[str, Any] = {
        "revision": revision,
        "force": force,
        "dtype": dtype,
        "prefill": prefill,
        "form": form,
        "quantize": quantize,
        "max_shard_bytes": console.parse_size(max_shard_size),
    }
    planned = preview(model, plan, **options)
    for warning in planned.warnings:
        console.say(f"warning: {warning}")
    for engine, reason in planned.refused_by.items():
        console.say(f"not for {engine}: {reason}")
    if dry_run:
        if as_json:
            return console.print_json(planned.to_dict())
        stages = " ".join("+".join(map(str, stage)) for stage in planned.stages)
        written = console.bytes_text(planned.bytes_written)
        memory = console.bytes_text(planned.peak_memory)
        share = planned.format_bytes / (planned.bytes_written - planned.format_bytes)
        zeros = console.bytes_text(planned.format_bytes)
        added = {"format": f"{form}, zeros for it: {zeros} (+{share:.1%})"}
        return console.print_table(
            {
                "model": f"{planned.source} ({planned.family})",
                "stages": f"{planned.num_layers} layers -> {planned.depth}: {stages}",
                "architecture": f"{planned.architecture}, {planned.dtype}",
                "reads": console.bytes_text(planned.bytes_read),
                "writes": f"{written} in {len(planned.shards)} file(s)",
                **(added if form != "auto" else {}),
                "peak memory": f"about {memory} beyond Python and torch",
            }
        )
    with console.progress_bar("convert", as_json) as progress:
        manifest = run(model, plan, out, **options, progress=progress)
    if as_json:
        return console.print_json(manifest)
    layers, depth = manifest["num_layers"], manifest["depth"]
    click.echo(f"{out}: {layers} layers -> {depth} stages, {manifest['architecture']}")
    click.echo(f"check it: abreast verify {out} --against {model}")


@console.verb(name="convert-adapter")
@click.argument("adapter")
@click.argument("converted")
@click.option("-o", "--out", required=True, help="New folder for the converted adapter.")
@click.option("--base", help="The original. Default: the one that CONVERTED names.")
@dry_run_option
@console.revision_option
@console.json_option
def convert_adapter(
    adapter: str,
    converted: str,
    out: str,
    base: str | None,
    dry_run: bool,
    revision: str | None,
    as_json: bool,
) -> None:
    """Fold a LoRA adapter of the original for CONVERTED."""
    from abreast.convert import convert_adapter as run

    record = run(adapter, converted, out, base=base, revision=revision, dry_run=dry_run)
    for warning in record["warnings"]:
        console.say(f"warning: {warning}")
    if as_json:
        return console.print_json(record)
    click.echo(
        f"{out}: {record['modules']} matrices, rank up to {record['rank']}, {record['dtype']}, "
        f"{console.bytes_text(record['bytes'])}, for plan {record['plan']}"
        f"{' (dry run: nothing was written)' if dry_run else ''}"
    )


@console.verb()
@click.argument("out")
@click.option(
    "--against", help="The original that OUT was converted from. Default: only check the files."
)
@click.option("--tokens", default=256, help="Number of random tokens to compare on.")
@console.revision_option
@console.device_option
@console.seed_option
@console.json_option
def verify(
    out: str,
    against: str | None,
    tokens: int,
    revision: str | None,
    device: str,
    seed: int,
    as_json: bool,
) -> None:
    """Check that OUT computes what the grouped original does.

    Without --against, only check that OUT's files have the hashes recorded in abreast.json, and
    that no others would be read. The exit status is 0 if all is well, else 1.
    """
    if against is None:
        return _verify_files(out, as_json)
    if tokens < 2:
        raise AbreastError(f"--tokens {tokens} is too few to compare on; give at least 2")
    from abreast.convert import verify as run

    result = run(out, against, revision=revision, device=device, num_tokens=tokens, seed=seed)
    if as_json:
        console.print_json(result.to_dict())
    else:
        judged = f"(allowed {result.tolerance:.1e}, by the noise of float32)"
        console.print_table(
            {
                "plan": result.plan,
                "files": "damaged"
                if any(f.startswith("file ") for f in result.faults)
                else "as recorded",
                "tensors": f"{result.tensors} folded again and compared bit by bit",
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


def _verify_files(out: str, as_json: bool) -> None:
    from abreast.checkpoint import damaged, open_checkpoint, read_manifest, unrecorded

    folder = open_checkpoint(out).folder
    files = read_manifest(folder).files
    faults = [*damaged(folder, files), *unrecorded(folder, files)]
    if as_json:
        console.print_json({"ok": not faults, "faults": faults, "files": dict(files)})
    else:
        result = f"WRONG: {'; '.join(faults)}" if faults else "the files are as recorded"
        console.print_table({"files": f"{len(files)} hashed", "result": result})
    if faults:
        sys.exit(1)


@console.verb()
@click.argument("out")
@click.option("--gguf", "file", required=True, help="New GGUF file, for llama.cpp.")
@click.option("--quantize", "quantization", help="Quantise with llama.cpp, to Q4_K_M, Q8_0, ...")
@click.option(
    "--dtype", help="Dtype of the matrices: float32, bfloat16 or float16. Default: no cast."
)
@console.revision_option
@console.json_option
def export(
    out: str,
    file: str,
    quantization: str | None,
    dtype: str | None,
    revision: str | None,
    as_json: bool,
) -> None:
    """Export OUT, converted or not, to a GGUF file."""
    from abreast.engines.llamacpp import export as run
    from abreast.targets import LLAMACPP

    with console.progress_bar("export", as_json) as progress:
        record = run(
            out,
            file,
            quantization=quantization,
            dtype=dtype,
            revision=revision,
            progress=progress,
        )
    for warning in record["warnings"]:
        console.say(f"warning: {warning}")
    if as_json:
        return console.print_json(record)
    kind = quantization or "not quantised"
    click.echo(f"{file}: {record['layers']} layers, {kind}, {console.bytes_text(record['bytes'])}")
    click.echo(f"run it: {LLAMACPP.serve.format(file=file)}")
    click.echo(f"or: ollama create NAME -f {record['modelfile']}")


@console.verb()
@click.argument("out")
@click.argument("repo")
@click.option("--public/--private", help="Make the repository public, if it is new.")
@click.option(
    "--dry-run", is_flag=True, help="Check everything and list the files, but upload nothing."
)
@console.json_option
def push(out: str, repo: str, public: bool, dry_run: bool, as_json: bool) -> None:
    """Upload OUT, a conversion, to the Hub as REPO (ORG/NAME).

    Uploads the model card and the files whose hashes are recorded in OUT, nothing else.
    """
    from abreast.report import prepare_upload
    from abreast.report import push as run

    if not dry_run:
        address = run(out, repo, private=not public)
        return console.print_json({"url": address}) if as_json else click.echo(address)
    upload = prepare_upload(out, repo, private=not public)
    if as_json:
        return console.print_json(upload.to_dict())
    console.print_table({name: console.bytes_text(size) for name, size in upload.files.items()})
    for name in upload.left_out:
        console.say(f"left out: {name}")
    kind = "public" if public else "private"
    click.echo(
        f"{len(upload.files)} files, {console.bytes_text(upload.nbytes)}, to {repo} ({kind})"
    )
