"""The verbs about speed: bench measures it here, estimate computes it for other hardware."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import click

from abreast.cli.options import PLAN_HELP, json_option, print_json, remote_option, say, seed_option
from abreast.errors import AbreastError


@click.command()
@click.argument("original")
@click.argument("converted", nargs=-1)
@click.option("--plan", multiple=True, help=f"Also ORIGINAL grouped under it. {PLAN_HELP}")
@click.option(
    "--task",
    default="prefill,decode",
    show_default=True,
    help="prefill, decode (single tokens at the context), generate (prompt and new tokens).",
)
@click.option("--batch", default="1", show_default=True, help="Batch sizes, by commas.")
@click.option("--context", default="512", show_default=True, help="Prompt lengths, by commas.")
@click.option("--new-tokens", default=64, show_default=True, help="Tokens of generate.")
@click.option(
    "--steps", default=8, show_default=True, help="Single tokens timed at once in decode."
)
@click.option(
    "--backend",
    type=click.Choice(["eager", "compile", "tp", "vllm"]),
    default="eager",
    show_default=True,
    help="compile: static cache, CUDA graphs on a GPU; tp: tensor parallel under torchrun.",
)
@click.option("--ranks", type=int, help="Processes of tp (default 2) or devices of vllm (1).")
@click.option("--vllm", default="vllm", show_default=True, help="Command that starts vLLM.")
@click.option("--rounds", default=20, show_default=True, help="Rounds in which all take turns.")
@click.option("--warmup", default=2, show_default=True, help="Rounds before, not counted.")
@click.option("--dtype", default="auto", show_default=True, help="float32, bfloat16, float16.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option("--fallback-cpu", is_flag=True, help="Use the CPU where the device is missing.")
@click.option("-o", "--out", help="Also draw the result into this PNG.")
@remote_option
@seed_option
@click.option("--json", "as_json", is_flag=True, help="Print the result as one line of JSON.")
def bench(
    original: str,
    converted: tuple[str, ...],
    plan: tuple[str, ...],
    task: str,
    batch: str,
    context: str,
    new_tokens: int,
    steps: int,
    backend: str,
    ranks: int | None,
    vllm: str,
    rounds: int,
    warmup: int,
    dtype: str,
    device: str,
    fallback_cpu: bool,
    out: str | None,
    trust_remote_code: bool,
    seed: int,
    as_json: bool,
) -> None:
    """Time ORIGINAL and CONVERTED models in turns, and say what the conversion brings here."""
    from abreast.cli.tables import print_bench
    from abreast.report import check_drawing, draw_bench
    from abreast.speed import ORIGINAL, Case, Contender, Job, device_or_cpu, run

    tasks = _tasks(task)
    if out is not None and not Path(out).resolve().parent.is_dir():
        raise AbreastError(f"the folder of '{out}' does not exist; create it first")
    if out is not None:
        check_drawing("leave -o out")
    names = _names(converted)
    contenders = [
        Contender(ORIGINAL, original),
        *(Contender(name, model) for name, model in zip(names, converted, strict=True)),
        *(Contender(f"grouped {groups}", original, groups) for groups in plan),
    ]
    cases = [
        Case(kind, size, length, steps if kind == "decode" else new_tokens)  # type: ignore[arg-type]
        for kind in tasks
        for size in _numbers(batch, "--batch")
        for length in _numbers(context, "--context")
    ]
    job = Job(
        contenders=tuple(contenders),
        cases=tuple(cases),
        backend=backend,
        rounds=rounds,
        warmup=warmup,
        seed=seed,
        device=device if backend == "vllm" else device_or_cpu(device, fallback_cpu, say),
        dtype=dtype,
        ranks=_ranks(backend, ranks),
        vllm=tuple(shlex.split(vllm)),
        trust_remote_code=trust_remote_code,
    )
    leads = int(os.environ.get("RANK", "0")) == 0
    report = run(job, step=say if leads else lambda message: None)
    if not leads:
        return
    if out is not None:
        draw_bench(report, out)
    if as_json:
        return click.echo(json.dumps(report.to_dict()))
    print_bench(report)


@click.command()
@click.argument("model")
@click.option("--plan", required=True, help=PLAN_HELP)
@click.option("--hardware", required=True, help="Such as A100, 2xA100-NVLink, 8xH100-NVLink.")
@click.option("--batch", default="1", show_default=True, help="Batch sizes, by commas.")
@click.option("--context", default="1024", show_default=True, help="Contexts, by commas.")
@click.option("--ranks", type=int, help="Devices that share the work. Default: all.")
@click.option("--baseline-ranks", type=int, help="Devices of the original. Default: as many.")
@click.option(
    "--replicated",
    is_flag=True,
    help="As CQIL measures: the original on one device, single layers whole on every device.",
)
@click.option("--unfused", is_flag=True, help="Members one after another, as grouped in memory.")
@click.option(
    "--dtype", default="bfloat16", show_default=True, help="Of weights; also float8, int4."
)
@json_option
def estimate(
    model: str,
    plan: str,
    hardware: str,
    batch: str,
    context: str,
    ranks: int | None,
    baseline_ranks: int | None,
    replicated: bool,
    unfused: bool,
    dtype: str,
    as_json: bool,
) -> None:
    """Compute what a plan would bring on other hardware. MODEL: folder, config.json or ORG/NAME.

    Needs no weights. The numbers come from a model of the hardware, not from the hardware.
    """
    from abreast.cli.tables import print_estimates
    from abreast.families import num_layers_of
    from abreast.plan import Plan
    from abreast.speed import Setting, hardware_of, read_config
    from abreast.speed import estimate as compute

    config = read_config(model)
    parsed = Plan.read(plan, num_layers_of(config))
    target = hardware_of(hardware)
    found = [
        compute(
            config,
            parsed,
            Setting(
                target,
                batch=size,
                context=length,
                phase=phase,  # type: ignore[arg-type]
                runtime=runtime,  # type: ignore[arg-type]
                dtype=dtype,
                ranks=ranks,
                baseline_ranks=baseline_ranks,
                fused=not unfused,
                replicated=replicated,
            ),
        )
        for runtime in ("graphs", "eager")
        for phase in ("prefill", "decode")
        for size in _numbers(batch, "--batch")
        for length in _numbers(context, "--context")
    ]
    if as_json:
        rows = [entry.to_dict() for entry in found]
        return print_json({"model": model, "plan": parsed.shorthand, "estimates": rows})
    print_estimates(parsed, found)


def _ranks(backend: str, ranks: int | None) -> int:
    if ranks is not None and ranks < 1:
        raise AbreastError(f"--ranks {ranks} makes no sense; give at least 1")
    if backend == "tp":
        return int(os.environ.get("WORLD_SIZE", ranks or 2))
    return ranks or 1


def _tasks(text: str) -> list[str]:
    tasks = [word.strip() for word in text.split(",") if word.strip()]
    for word in tasks:
        if word not in ("prefill", "decode", "generate"):
            raise AbreastError(f"unknown task '{word}'; choose of prefill, decode, generate")
    return list(dict.fromkeys(tasks))


def _numbers(text: str, option: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and int(word) > 0 for word in words):
        raise AbreastError(f"{option} '{text}' cannot be read; write whole numbers like 1,8,64")
    return list(dict.fromkeys(int(word) for word in words))


def _names(models: tuple[str, ...]) -> list[str]:
    """Last parts of the paths, or the paths where those are not distinct."""
    names = [Path(model).name or model for model in models]
    distinct = len({*names, "original"}) == len(names) + 1
    return names if distinct else [f"{place}: {name}" for place, name in enumerate(models, 1)]
