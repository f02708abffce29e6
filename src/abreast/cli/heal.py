"""The verb that wins quality back: heal."""

from __future__ import annotations

import os

import click

from abreast.cli.options import (
    PLAN_HELP,
    device_option,
    force_option,
    json_option,
    print_json,
    progress_bar,
    remote_option,
    revision_option,
    say,
    seed_option,
)
from abreast.cli.tables import print_table


@click.command()
@click.argument("model")
@click.option("--plan", required=True, help=PLAN_HELP)
@click.option("-o", "--out", required=True, help="New folder for the converted checkpoint.")
@click.option(
    "--method",
    type=click.Choice(["refit", "distill", "both"]),
    default="both",
    show_default=True,
    help="Closed form, training, or one after the other.",
)
@click.option(
    "--data", default="stdlib-train", show_default=True, help="Text to heal on, as for eval."
)
@click.option("--tokens", type=int, help="Read at most so many. Default: what the method needs.")
@click.option("--window", default=1024, show_default=True, help="Tokens the model sees at once.")
@click.option("--refit-steps", default="qkv,gate_up,out", show_default=True, help="In this order.")
@click.option(
    "--train",
    type=click.Choice(["lora", "groups", "all"]),
    default="groups",
    show_default=True,
    help="Train adapters of the grouped layers, these layers, or the whole model.",
)
@click.option(
    "--objective",
    type=click.Choice(["kl", "lm"]),
    default="kl",
    show_default=True,
    help="Predict what the original predicts, or the text.",
)
@click.option("--steps", default=400, show_default=True, help="Of training.")
@click.option("--batch-size", default=8, show_default=True, help="Windows per step.")
@click.option("--micro-batch", default=8, show_default=True, help="Windows at once on a device.")
@click.option(
    "--optimizer",
    type=click.Choice(["adamw", "muon"]),
    default="adamw",
    show_default=True,
    help="Muon trains the layers' matrices, AdamW the rest.",
)
@click.option("--learning-rate", default=1e-4, show_default=True)
@click.option("--temperature", default=1.0, show_default=True, help="Of both distributions.")
@click.option(
    "--hidden-weight", default=20.0, show_default=True, help="Of the states after each stage."
)
@click.option(
    "--lm-weight", default=0.0, show_default=True, help="Of the text itself, beside the original."
)
@click.option("--lora-rank", default=32, show_default=True)
@click.option("--lora-targets", help="Matrices, by commas: q_proj,v_proj. Default: all.")
@click.option("--checkpointing", is_flag=True, help="Recompute activations; saves memory.")
@click.option(
    "--shard", is_flag=True, help="Spread weights and optimiser state over the processes (FSDP)."
)
@click.option("--no-bf16", is_flag=True, help="Train with float32 products.")
@click.option("--dtype", default="float32", show_default=True, help="Of the weights in memory.")
@click.option("--out-dtype", help="Cast OUT to float32, bfloat16 or float16. Default: keep.")
@click.option(
    "--prefill",
    type=click.Choice(["grouped", "sequential"]),
    default="grouped",
    show_default=True,
    help="As for convert.",
)
@click.option("--work", help="Folder of state to go on with. Default: OUT.work, removed after.")
@click.option("--keep-weights", help="New folder for the healed weights, unconverted.")
@click.option("--no-plots", is_flag=True, help="Write no PNG; needs no altair.")
@force_option
@revision_option
@remote_option
@device_option
@seed_option
@json_option
def heal(
    model: str,
    plan: str,
    out: str,
    method: str,
    data: str,
    tokens: int | None,
    window: int,
    refit_steps: str,
    train: str,
    objective: str,
    steps: int,
    batch_size: int,
    micro_batch: int,
    optimizer: str,
    learning_rate: float,
    temperature: float,
    hidden_weight: float,
    lm_weight: float,
    lora_rank: int,
    lora_targets: str | None,
    checkpointing: bool,
    shard: bool,
    no_bf16: bool,
    dtype: str,
    out_dtype: str | None,
    prefill: str,
    work: str | None,
    keep_weights: str | None,
    no_plots: bool,
    force: bool,
    revision: str | None,
    trust_remote_code: bool,
    device: str,
    seed: int,
    as_json: bool,
) -> None:
    """Convert MODEL, the original, under a plan and win back quality that this costs."""
    from abreast.heal import Recipe
    from abreast.heal import heal as run
    from abreast.report import check_drawing, draw_healing

    if not no_plots:
        check_drawing()

    recipe = Recipe(
        train=train,  # type: ignore[arg-type]
        objective=objective,  # type: ignore[arg-type]
        steps=steps,
        batch_size=batch_size,
        micro_batch=micro_batch,
        optimizer=optimizer,  # type: ignore[arg-type]
        learning_rate=learning_rate,
        temperature=temperature,
        hidden_weight=hidden_weight,
        lm_weight=lm_weight,
        lora_rank=lora_rank,
        lora_alpha=lora_rank,
        lora_targets=tuple(lora_targets.split(",")) if lora_targets else (),
        checkpointing=checkpointing,
        shard=shard,
        bf16=not no_bf16,
    )
    with progress_bar("heal", as_json) as progress:
        found = run(
            *(model, plan, out),
            method=method,
            data=data,
            tokens=tokens,
            window=window,
            recipe=recipe,
            refit_steps=refit_steps.split(","),
            seed=seed,
            device=device,
            dtype=dtype,
            work=work,
            keep=keep_weights,
            out_dtype=out_dtype,
            prefill=prefill,
            force=force,
            draw=None if no_plots else draw_healing,
            revision=revision,
            trust_remote_code=trust_remote_code,
            step=say,
            progress=progress,
        )
    if os.environ.get("RANK", "0") != "0":  # one of several processes speaks for all
        return
    for warning in found.warnings:
        say(f"warning: {warning}")
    if as_json:
        return print_json(found.to_dict())
    rows = {
        "converted": f"{out}, {found.depth} stages: {found.plan}",
        "KL before": f"{found.kl_before:.5f} nats per token from the original, "
        f"on {found.data['held_out_tokens']} tokens kept from healing",
        "KL after": f"{found.kl_after:.5f}",
    }
    if found.refit is not None:
        verdict = "won nothing, undone" if found.refit.kept else f"{len(found.refit.fits)} fits"
        rows["refit"] = f"{verdict}, on {found.refit.num_tokens} tokens"
    if found.distilled is not None:
        trained = found.distilled
        rows["training"] = (
            f"{trained.reason}; best after step {trained.best_step}, {trained.tokens} tokens"
        )
    print_table(rows)
