"""The verbs about speed: bench measures it here, estimate computes it for other hardware."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from abreast.cli import console, tables
from abreast.errors import AbreastError

if TYPE_CHECKING:
    from abreast.plan import Plan
    from abreast.speed import Estimate, Job, Report, Setting

MACHINES = (
    *("Xeon", "H100", "8xH100-fused", "8xH100-one-shot", "8xH100-NCCL", "2xA100-NVLink"),
    *("2xL40S-PCIe", "2xRTX4090-PCIe-host", "4xRTX4090-PCIe-host", "2xRTX4090-10GbE"),
    *("2xRTX4090-2.5GbE", "2xRTX4090-1GbE", "4xRTX4090-1GbE", "2xM3Ultra-RDMA"),
    *("4xM3Ultra-RDMA", "2xM3Ultra-Thunderbolt", "4xM3Ultra-Thunderbolt"),
)
batch_option = click.option("--batch", default="1", help="Batch sizes, comma-separated.")


@console.verb()
@click.argument("original")
@click.argument("converted", nargs=-1)
@click.option(
    "--plan", multiple=True, help=f"Also time ORIGINAL grouped under it. {console.PLAN_HELP}"
)
@click.option(
    "--task",
    default="prefill,decode",
    help="prefill, decode (single tokens at the context), generate (prompt and new tokens).",
)
@batch_option
@click.option("--context", default="512", help="Prompt lengths, comma-separated.")
@click.option("--new-tokens", default=64, help="Tokens to generate.")
@click.option("--steps", default=8, help="Single tokens per timing in decode.")
@console.settings("job", "abreast.speed", "Job")
@click.option("--ranks", type=int, help="Processes of tp (default: 2) or devices of vllm (1).")
@click.option("--vllm", default="vllm", help="Command that starts vLLM.")
@click.option("--fallback-cpu", is_flag=True, help="Use the CPU if there is no such device.")
@click.option("-o", "--out", help="Also draw the result into this PNG file.")
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
    job: Job,
    ranks: int | None,
    vllm: str,
    fallback_cpu: bool,
    out: str | None,
    as_json: bool,
) -> None:
    """Time models in turn: does CONVERTED pay off?"""
    from abreast.report import check_drawing, draw_bench
    from abreast.speed import ORIGINAL, Case, Contender, device_or_cpu, run

    tasks = _tasks(task)
    if out is not None:
        if not Path(out).resolve().parent.is_dir():
            raise AbreastError(f"the folder of '{out}' does not exist; create it first")
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
    if job.backend != "vllm":
        job = replace(job, device=device_or_cpu(job.device, fallback_cpu, console.say))
    job = replace(
        job,
        contenders=tuple(contenders),
        cases=tuple(cases),
        ranks=_ranks(job.backend, ranks),
        vllm=tuple(shlex.split(vllm)),
    )
    leads = int(os.environ.get("RANK", "0")) == 0
    report = run(job, step=console.say if leads else lambda message: None)
    if not leads:
        return
    if out is not None:
        draw_bench(report, out)
    if as_json:
        return click.echo(json.dumps(report.to_dict()))
    _print_bench(report)


@console.verb()
@click.argument("model")
@click.option("--plan", help=f"{console.PLAN_HELP} Default: a typical one.")
@batch_option
@click.option("--context", default="1024", help="Context lengths, comma-separated.")
@console.settings("setting", "abreast.speed", "Setting")
@console.json_option
def estimate(
    model: str, plan: str | None, batch: str, context: str, setting: Setting, as_json: bool
) -> None:
    """Estimate the speed of a plan on other hardware. MODEL: folder, config.json or ORG/NAME.

    Without options: a table of many machines. Needs no weights. The numbers come from a model of
    the hardware, not from the hardware.
    """
    from abreast.plan import Plan
    from abreast.speed import Setting, fastest_way, read_config, shape_of, typical_plan, ways
    from abreast.speed import estimate as compute

    config = read_config(model)
    named = click.get_current_context().get_parameter_source("hardware")
    changed = batch != "1" or setting != Setting(setting.hardware)
    if plan is None and named is ParameterSource.DEFAULT and not changed:
        return _print_overview(config, _numbers(context, "--context")[0], as_json)
    num_layers = shape_of(config).num_layers
    parsed = Plan.read(plan, num_layers) if plan is not None else typical_plan(config)
    batches, contexts = _numbers(batch, "--batch"), _numbers(context, "--context")
    setting = replace(setting, batch=batches[0], context=contexts[0])
    estimates = [
        compute(
            config,
            parsed,
            replace(setting, runtime=runtime, phase=phase, batch=size, context=length),
        )
        for runtime in ("graphs", "eager")
        for phase in ("prefill", "decode")
        for size in batches
        for length in contexts
    ]
    if as_json:
        by_way = ways(config, parsed, setting)
        record = {
            "model": model,
            "plan": parsed.shorthand,
            "estimates": [entry.to_dict() for entry in estimates],
            "ways": {way: entry.to_dict() for way, entry in by_way.items()},
            "fastest": fastest_way(by_way),
        }
        return console.print_json(record)
    _print_estimates(parsed, estimates, tables.compared(config, parsed, setting))


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
            raise AbreastError(f"unknown task '{word}'; choose from prefill, decode, generate")
    return list(dict.fromkeys(tasks))


def _numbers(text: str, option: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and int(word) > 0 for word in words):
        raise AbreastError(f"{option} '{text}' cannot be read; write whole numbers like 1,8,64")
    return list(dict.fromkeys(int(word) for word in words))


def _names(models: tuple[str, ...]) -> list[str]:
    """The last parts of the paths, numbered where they are not distinct."""
    names = [Path(model).name or model for model in models]
    distinct = len({*names, "original"}) == len(names) + 1
    return names if distinct else [f"{number}: {name}" for number, name in enumerate(models, 1)]


def _print_bench(report: Report) -> None:
    first = report.results[0]
    notes = []
    if first.memory:
        sizes = (f"{name} {console.bytes_text(m.weights)}" for name, m in first.memory.items())
        notes.append(f"weights: {', '.join(sizes)}")
    notes += [f"{failure.case}: {failure.reason}" for failure in report.failures]
    console.print_columns(
        (
            *("task", "batch", "context", "model", "ms", "", "tokens/s", "against original"),
            *("KV cache", "peak memory", "exchanges"),
        ),
        _bench_rows(report),
        left={"task", "model", ""},
        title=f"{first.backend}, {first.device}, {first.dtype}, {report.job.rounds} rounds; "
        "±: half the interquartile range; ratio: median of paired rounds, 95 % interval",
        notes=[*notes, report.verdict],
    )


def _bench_rows(report: Report) -> Iterator[Sequence[str]]:
    for result in report.results:
        per_run = result.new_tokens if result.task == "decode" else 1
        for name, timing in result.timings.items():
            memory = result.memory.get(name)
            peak = memory and (memory.device_peak or memory.host_peak)
            ratio = f"{timing.ratio:.2f}x [{timing.ratio_low:.2f}, {timing.ratio_high:.2f}]"
            yield (
                result.task,
                str(result.batch_size),
                str(result.context),
                name,
                f"{1e3 * timing.median / per_run:.2f} ± {500 * timing.iqr / per_run:.2f}",
                {"prefill": "TTFT", "decode": "TPOT"}.get(result.task, "in all"),
                f"{timing.tokens_per_second:.1f}",
                "" if name == result.original else ratio,
                console.bytes_text(memory.kv_cache) if memory else "",
                console.bytes_text(peak) if peak else "",
                f"{memory.exchanges / per_run:g}" if memory and memory.exchanges else "",
            )
        yield ()


def _print_estimates(plan: Plan, estimates: list[Estimate], compared: str) -> None:
    first = estimates[0]
    rows = [
        (
            entry.runtime,
            entry.phase,
            str(entry.batch),
            str(entry.context),
            f"{1e3 * entry.original:.2f} ms",
            f"{1e3 * entry.converted:.2f} ms",
            f"{entry.speedup:.2f}x",
            entry.bound,
        )
        for entry in estimates
    ]
    notes = []
    before, after = first.all_reduces
    if max(first.ranks, first.baseline_ranks) > 1:
        notes.append(
            f"{first.ranks} devices ({first.baseline_ranks} for the original), "
            f"{before} -> {after} collectives per forward pass"
        )
    largest = max(estimates, key=lambda entry: entry.weights + entry.kv_cache)
    notes += [compared] * bool(compared)
    if first.refused is not None:
        notes.append(f"no engine splits this plan over {first.ranks} devices: {first.refused}")
    notes += [
        f"per device: weights {console.bytes_text(largest.weights)}, KV cache up to "
        f"{console.bytes_text(largest.kv_cache)}{'' if largest.fits else ': more than it has'}",
        "graphs: a serving engine that replays CUDA graphs; eager: PyTorch operation by operation. "
        "limit: what the plan waits for, the program that starts kernels or the device.",
    ]
    console.print_columns(
        ("runtime", "phase", "batch", "context", "original", "plan", "", "limit"),
        rows,
        left={"runtime", "phase"},
        title=f"{plan.num_layers} -> {plan.depth} stages on {first.hardware}, {first.dtype}: "
        f"computed, not measured{'; no engine splits it so, see below' * bool(first.refused)}",
        notes=notes,
    )


def _print_overview(config: Mapping[str, Any], context: int, as_json: bool) -> None:
    """What a typical plan would bring, machine by machine, and what to try first."""
    from abreast.speed import Setting, hardware_of, typical_plan
    from abreast.speed import estimate as compute

    plan = typical_plan(config)
    cases: dict[str, dict[str, Any]] = {
        "eager": {"runtime": "eager"},
        "decode": {},
        "batch 32": {"batch": 32},
        "int4": {"dtype": "int4"},
        "prefill": {"phase": "prefill"},
    }
    rows = {
        machine: {
            case: compute(config, plan, Setting(hardware_of(machine), context=context, **options))
            for case, options in cases.items()
        }
        for machine in MACHINES
    }
    if as_json:
        estimates = [entry.to_dict() for row in rows.values() for entry in row.values()]
        return console.print_json({"plan": plan.shorthand, "estimates": estimates})

    refused = [row["decode"].refused for row in rows.values() if row["decode"].refused]
    gain = rows["H100"]["decode"].original / rows["H100"]["int4"].original
    notes = [
        *(f"refused: {reason}" for reason in dict.fromkeys(refused)),
        *(["for another number of devices: --hardware 3xH100-NVLink, say"] if refused else []),
        f"Try first: 4-bit weights alone decode {gain:.1f}x as fast on an H100 at batch 1, and "
        "speculative decoding changes no answer. Layers abreast come on top of both.",
    ]
    notes.append(
        "Decoding at batch 1 in bfloat16, unless the column says otherwise. eager: PyTorch, "
        "operation by operation; the others: a serving engine with CUDA graphs, or as lean."
    )
    console.print_columns(
        ("machine", *cases),
        [(machine, *(entry.gain for entry in row.values())) for machine, row in rows.items()],
        left={"machine"},
        title=f"{plan.num_layers} -> {plan.depth} stages against the original, computed",
        borders=False,
        notes=notes,
    )
