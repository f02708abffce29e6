"""Results as text for a terminal; imports nothing heavy until it has a result to show."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from abreast.demo import Demo
    from abreast.evaluate import Comparison, Perplexity


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
        "loss increase": f"{result.nll_difference:+.4f} ± {result.nll_difference_stderr:.4f} nats",
        "KL divergence": f"{result.kl:.4f} ± {result.kl_stderr:.4f} nats, "
        f"95th percentile {result.kl_p95:.4f}",
        "same top token": f"{result.top1_agreement:.1%} ± {result.top1_agreement_stderr:.1%}",
        "scored": f"{result.num_tokens} tokens, window {result.window}, stride {result.stride}",
    }


def print_demo(result: Demo) -> None:
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
