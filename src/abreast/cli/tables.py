"""Results as text for a terminal; imports nothing heavy until it has a result to show."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from abreast.demo import Demo
    from abreast.evaluate import Comparison, Evaluation, Perplexity
    from abreast.plan import Plan
    from abreast.speed import Estimate, Report


def quality_rows(result: Comparison | Perplexity) -> dict[str, str]:
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
        "loss increase": f"{result.nll_difference:+.4f} ± {result.nll_difference_stderr:.4f} nats"
        f"{_interval(result.bootstrap['nll_difference'], '+.4f')}, "
        f"worse in {result.windows_worse:.0%} of the windows",
        "KL divergence": f"{result.kl:.4f} ± {result.kl_stderr:.4f} nats, "
        f"95th percentile {result.kl_p95:.4f}",
        "same top token": f"{result.top1_agreement:.1%} ± {result.top1_agreement_stderr:.1%}",
        "scored": f"{result.num_tokens} tokens, window {result.window}, stride {result.stride}",
    }


def _interval(ends: tuple[float, float], form: str) -> str:
    low, high = ends
    return f" [{low:{form}}, {high:{form}}]" if low <= high else ""  # NaN: one window alone


def print_corpora(results: Mapping[str, Comparison | Perplexity]) -> None:
    """One row per text."""
    from rich.console import Console
    from rich.table import Table

    from abreast.evaluate import Perplexity

    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("text", overflow="fold")
    alone = any(isinstance(result, Perplexity) for result in results.values())
    compared = ("original", "loss increase", "KL", "same top")
    for heading in ("perplexity", *(() if alone else compared)):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, result in results.items():
        text = f"{Path(name).name}\n{result.num_tokens} tokens"
        if isinstance(result, Perplexity):
            table.add_row(text, f"{result.perplexity:.3f} ± {result.perplexity_stderr:.3f}")
            continue
        interval = _interval(result.bootstrap["nll_difference"], "+.4f").strip()
        table.add_row(
            text,
            f"{result.model.perplexity:.3f}",
            f"{result.reference.perplexity:.3f}",
            f"{result.nll_difference:+.4f}\n{interval}",
            f"{result.kl:.4f}",
            f"{result.top1_agreement:.1%}",
        )
    console = Console(highlight=False)
    console.print(table)
    if not alone:
        console.print("brackets: 95 % bootstrap interval, windows drawn anew", soft_wrap=True)


def print_tasks(result: Evaluation) -> None:
    """One row per task and metric."""
    from rich.console import Console
    from rich.table import Table

    def score(value: float | None, stderr: float | None) -> str:
        if value is None:
            return ""
        # accuracies, and perplexities that may be of any size
        digits = ".3f" if max(value, stderr or 0.0) < 10 else ".4g"
        return f"{value:{digits}}" + ("" if stderr is None else f"±{stderr:{digits}}")

    alone = result.settings["against"] is None
    title = f"{result.settings['model']} {result.settings['plan'] or ''}"
    table = Table(title=title.strip(), box=None, padding=(0, 2, 0, 0))
    table.add_column("task", overflow="fold", min_width=16)
    headings = ("score", "items") if alone else ("original", "converted", "kept", "p", "only one")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, row in result.tasks.items():
        for metric, values in row.metrics.items():
            ours = score(values["converted"], values["converted_stderr"])
            if alone:
                table.add_row(f"{name}\n{metric}", ours, str(row.num_items))
                continue
            lost, won = values["only_original"], values["only_converted"]
            table.add_row(
                f"{name}\n{metric}",
                score(values["original"], values["original_stderr"]),
                ours,
                score(values["kept"], values["kept_stderr"]),
                "" if values["p_value"] is None else f"{values['p_value']:.2g}",
                "" if lost is None else f"{lost}:{won}",
            )
    console = Console(highlight=False)
    console.print(table)
    if result.kept_mean is not None:
        mean = score(result.kept_mean, result.kept_mean_stderr)
        console.print(f"accuracy kept, mean over tasks: {mean}", soft_wrap=True)
        console.print(
            "only one: items that only the original, only the converted model gets right; p is of "
            "the paired test on them",
            soft_wrap=True,
        )


def print_demo(result: Demo) -> None:
    from rich.console import Console
    from rich.table import Table

    from abreast.speed import verdict

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


def print_bench(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    from abreast.speed import conclusion

    job = report.job
    first = report.results[0]
    about = f"{first.backend}, {first.device}, {first.dtype}, {job.rounds} rounds"
    table = Table(title=f"{about}; ± is half the distance between the quartiles")
    for heading in ("task", "batch", "context", "model", "ms", "", "tokens/s", "against original"):
        table.add_column(heading, justify="left" if heading in ("task", "model", "") else "right")
    table.add_column("KV cache", justify="right")
    table.add_column("peak memory", justify="right")
    for result in report.results:
        for name, timing in result.timings.items():
            each = result.new_tokens if result.task == "decode" else 1
            memory = result.memory.get(name)
            peak = memory and (memory.device_peak or memory.host_peak)
            against = f"{timing.ratio:.2f}x [{timing.ratio_low:.2f}, {timing.ratio_high:.2f}]"
            table.add_row(
                result.task,
                str(result.batch_size),
                str(result.context),
                name,
                f"{1e3 * timing.median / each:.2f} ± {500 * timing.iqr / each:.2f}",
                {"prefill": "TTFT", "decode": "TPOT"}.get(result.task, "in all"),
                f"{timing.tokens_per_second:.1f}",
                "" if name == result.original else against,
                bytes_text(memory.kv_cache) if memory else "",
                bytes_text(peak) if peak else "",
                end_section=name == [*result.timings][-1],
            )
    console = Console(highlight=False)
    console.print(table)
    if first.memory:
        sizes = (f"{name} {bytes_text(m.weights)}" for name, m in first.memory.items())
        console.print(f"weights: {', '.join(sizes)}", soft_wrap=True)
    for failure in report.failures:
        console.print(f"{failure.case}: {failure.reason}", soft_wrap=True)
    console.print(conclusion(report.results), soft_wrap=True)


def print_estimates(plan: Plan, found: list[Estimate]) -> None:
    from rich.console import Console
    from rich.table import Table

    first = found[0]
    about = f"{plan.num_layers} -> {plan.depth} stages on {first.hardware}, {first.dtype}"
    table = Table(title=f"{about}: computed, not measured")
    for heading in ("runtime", "phase", "batch", "context", "original", "plan", "", "limit"):
        table.add_column(heading, justify="left" if heading in ("runtime", "phase") else "right")
    for entry in found:
        table.add_row(
            entry.runtime,
            entry.phase,
            str(entry.batch),
            str(entry.context),
            f"{1e3 * entry.original:.2f} ms",
            f"{1e3 * entry.converted:.2f} ms",
            f"{entry.speedup:.2f}x",
            entry.bound,
        )
    console = Console(highlight=False)
    console.print(table)
    before, after = first.all_reduces
    if max(first.ranks, first.baseline_ranks) > 1:
        console.print(
            f"{first.ranks} devices ({first.baseline_ranks} for the original), "
            f"{before} -> {after} collectives per forward pass"
        )
    largest = max(found, key=lambda entry: entry.weights + entry.kv_cache)
    console.print(
        f"per device: weights {bytes_text(largest.weights)}, KV cache up to "
        f"{bytes_text(largest.kv_cache)}{'' if largest.fits else ': more than it has'}",
        soft_wrap=True,
    )
    console.print(
        "graphs: a serving engine that replays CUDA graphs; eager: PyTorch operation by operation. "
        "limit: what the plan waits for, the program that starts kernels or the device.",
        soft_wrap=True,
    )


def print_table(rows: dict[str, str]) -> None:
    width = max(map(len, rows), default=0)
    for key, value in rows.items():
        click.echo(f"{key:<{width}}  {value}")


def bytes_text(count: int) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000  # type: ignore[assignment]
    return f"{count:.2f} GB"
