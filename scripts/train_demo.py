"""Train the demonstration model: on a GPU in minutes, on a CPU in hours.

In this order, with the package and its `dev` extra installed:

    python scripts/demo_corpus.py fetch --to run/packages
    python scripts/demo_corpus.py corpus --site run/packages --out run/corpus.jsonl.xz
    python scripts/demo_corpus.py tokenizer --corpus run/corpus.jsonl.xz --out run/tokenizer
    python scripts/train_demo.py --corpus run/corpus.jsonl.xz --tokenizer run/tokenizer \\
        --out run --seconds 1200
    python scripts/demo_card.py --model run/hf --corpus run/corpus.jsonl.xz --work run

run/hf is then what src/abreast/demo_model is to hold. The first three commands need no GPU. An
interrupted run goes on when its command is given again with --resume.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo_corpus import tokenise, windows
from demo_llama import SIZES, Attention, Llama, Model, attend, export
from torch import Tensor, nn

START = time.monotonic()


def probe(device: torch.device, m: Model, batch: int) -> bool:
    """Report the GPU's attention and return whether SDPA's own grouped-query is the faster."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    print(torch.cuda.get_device_name(device), "torch", torch.__version__, flush=True)
    rows = {}
    for native in (True, False):
        q, k, v = (
            torch.randn(
                batch,
                h,
                m.context,
                m.head_dim,
                device=device,
                dtype=torch.bfloat16,
                requires_grad=True,
            )
            for h in (m.heads, m.kv_heads, m.kv_heads)
        )
        try:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                attend(q, k, v, native)
            flash = True
        except RuntimeError:
            flash = False
        begin = 0.0
        for turn in range(8):
            if turn == 3:
                torch.cuda.synchronize()
                begin = time.monotonic()
            attend(q, k, v, native).sum().backward()
        torch.cuda.synchronize()
        rows[native] = time.monotonic() - begin
        print(f"attention native_gqa={native}: flash={flash}, {rows[native] / 5e-3:.2f} ms")
    return rows[True] <= rows[False]


class Data:
    """Batches as a pure function of the step, so that a resumed run sees what it would have."""

    def __init__(self, stream: np.ndarray, batch: int, length: int, device: torch.device) -> None:
        self.stream = torch.from_numpy(stream.astype(np.int16)).to(device)  # ids are below 2^15
        self.batch, self.length = batch, length
        self.count = (len(stream) - 1 - length) // length
        self.per_epoch = self.count // batch
        assert self.per_epoch, "the corpus is smaller than one batch"
        self.epoch = -1
        self.reach = torch.arange(length + 1, device=device)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        epoch, index = divmod(step, self.per_epoch)
        if epoch != self.epoch:  # new windows each epoch: another offset and another order
            rng = np.random.default_rng([17, epoch])
            order = rng.integers(self.length) + self.length * rng.permutation(self.count)
            self.starts = torch.from_numpy(order).to(self.stream.device)
            self.epoch = epoch
        starts = self.starts[index * self.batch : (index + 1) * self.batch]
        rows = self.stream[starts[:, None] + self.reach].long()
        return rows[:, :-1], rows[:, 1:]


def optimisers(model: Llama, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if n.startswith("layers") and p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups: list[dict[str, Any]] = [{"params": [model.embed_tokens.weight]}]
    groups.append({"params": norms, "weight_decay": 0.0})
    optimizers: list[torch.optim.Optimizer] = []
    if args.optimizer == "muon":
        optimizers.append(
            torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        )
    else:
        groups.append({"params": matrices})
    optimizers.append(
        torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    )
    return optimizers


def schedule(step: int, steps: int, warmup: int) -> float:
    """Neither warm-up nor plateau depends on `steps`, so it may be fixed after the first ones."""
    decay = 0.3 * steps
    return min(1.0, (step + 1) / warmup, (steps - step) / decay)


@torch.no_grad()
def held_out_loss(forward: Any, inputs: Tensor, targets: Tensor, batch: int) -> float:
    total = torch.zeros((), device=inputs.device)
    for i in range(0, len(inputs), batch):
        total += forward(inputs[i : i + batch], targets[i : i + batch])
    return (total / (targets >= 0).sum()).item()


def train(args: argparse.Namespace) -> None:
    out = args.out
    m = Model(**{name: getattr(args, name) for name in SIZES})
    args.window = args.window or m.context
    assert args.window <= m.context, "--window is longer than --context"
    device = torch.device(args.device)
    gpu = device.type == "cuda"
    out.mkdir(parents=True, exist_ok=True)
    stream, held = tokenise(args.corpus, args.tokenizer, out)
    print(
        f"{len(stream)} training and {len(held)} held-out tokens, {time.monotonic() - START:.0f} s",
        flush=True,
    )
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    model = Llama(m, torch.bfloat16 if gpu else torch.float32)
    export(model, args.tokenizer, out / "hf", check=True)  # fail now, not after the last step
    model.to(device)
    if gpu:
        native = probe(device, m, 32)
        for part in model.modules():
            if isinstance(part, Attention):
                part.native_gqa = native
    opts = optimisers(model, args)
    forward = torch.compile(model, dynamic=False) if gpu or args.compile else model
    data = Data(stream, args.batch, args.window, device)
    micro = args.micro_batch
    assert args.batch % micro == 0, "--batch is not a multiple of --micro-batch"
    per_step = args.batch * args.window

    x, y = windows(held, args.window, args.heldout_tokens // args.window)
    pad = -len(x) % micro  # whole batches, so that only one shape is compiled
    held_x = torch.from_numpy(np.pad(x, ((0, pad), (0, 0)))).to(device)
    held_y = torch.from_numpy(np.pad(y, ((0, pad), (0, 0)), constant_values=-100)).to(device)

    step, steps, before = 0, args.steps or 0, 0.0
    last = out / "checkpoint.pt"
    log = out / "training.log"
    if args.resume and last.exists():
        state = torch.load(last, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        for opt, saved in zip(opts, state["optimisers"], strict=True):
            opt.load_state_dict(saved)
        step, steps, before = state["step"], state["steps"], state["elapsed"]
        lines = [line for line in log.read_text().splitlines() if json.loads(line)["step"] <= step]
        log.write_text("".join(line + "\n" for line in lines))
    else:
        log.write_text("")

    def elapsed() -> float:
        return before + time.monotonic() - START

    def write(entry: dict[str, Any]) -> None:
        line = json.dumps(entry)
        print(line, flush=True)
        with log.open("a") as file:
            file.write(line + "\n")

    def save() -> None:
        state = {
            "model": model.state_dict(),
            "optimisers": [o.state_dict() for o in opts],
            "step": step,
            "steps": steps,
            "elapsed": elapsed(),
        }
        torch.save(state, out / "checkpoint.new")
        (out / "checkpoint.new").replace(last)
        export(model, args.tokenizer, out / "hf")

    def evaluate() -> float:
        return held_out_loss(forward, held_x, held_y, micro)

    evaluate()  # compiles the forward pass, so that the next is timed without
    begin = time.monotonic()
    heldout: float | None = evaluate()
    eval_seconds = time.monotonic() - begin
    if not step:
        write(
            {
                "step": 0,
                "tokens": 0,
                "loss": None,
                "heldout": heldout and round(heldout, 4),
                "lr": 0.0,
                "tokens_per_s": 0,
                "elapsed": round(elapsed(), 1),
            }
        )
    total = torch.zeros((), device=device)
    first = logged = step
    logged_at = saved_at = time.monotonic()
    timed_at, stopped = 0.0, False
    while not steps or step < steps:
        if step == first + 10 and not steps:
            torch.cuda.synchronize() if gpu else None
            timed_at = time.monotonic()
        if step == first + 40 and not steps:  # --seconds: fix the number of steps once
            torch.cuda.synchronize() if gpu else None
            seconds_per_step = (time.monotonic() - timed_at) / 30 + eval_seconds / args.eval_every
            begin = time.monotonic()
            save()
            seconds_per_step *= 1.01 + (time.monotonic() - begin) / args.save_every
            steps = step + max(1, int((args.seconds - 20 - elapsed()) / seconds_per_step))
            print(
                f"{seconds_per_step * 1e3:.1f} ms a step: --steps {steps} reproduces this run",
                flush=True,
            )
        rate = schedule(step, steps or 1 << 40, args.warmup)
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = args.lr * rate
        inputs, targets = data(step)
        for i in range(0, args.batch, micro):
            loss = forward(inputs[i : i + micro], targets[i : i + micro]) / per_step
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad()
        step += 1
        ends = step == steps
        if step % args.log_every == 0 or step % args.eval_every == 0 or ends:
            mean = (total / (step - logged)).item()
            speed = (step - logged) * per_step / (time.monotonic() - logged_at)
            heldout = evaluate() if step % args.eval_every == 0 or ends else None
            write(
                {
                    "step": step,
                    "tokens": step * per_step,
                    "loss": round(mean, 4),
                    "heldout": heldout and round(heldout, 4),
                    "lr": round(args.lr * rate, 6),
                    "tokens_per_s": round(speed),
                    "elapsed": round(elapsed(), 1),
                }
            )
            total.zero_()
            assert math.isfinite(mean), "the loss is not finite"
            logged, logged_at = step, time.monotonic()
            stopped = bool(args.stop_after) and time.monotonic() - START > args.stop_after
            if stopped or ends or time.monotonic() - saved_at > args.save_every:
                save()
                logged_at = saved_at = time.monotonic()
            if stopped and not ends:
                print(f"stopped after {step} of {steps} steps; go on with --resume", flush=True)
                return
    export(model, args.tokenizer, out / "hf", check=True)
    settings = {k: v for k, v in vars(args).items() if isinstance(v, int | float | str)}
    write(
        {
            "step": step,
            "final": True,
            "tokens": step * per_step,
            "heldout": heldout,
            "elapsed": round(elapsed(), 1),
            "corpus_tokens": len(stream),
            "heldout_tokens": len(held),
            "epochs": round(step / data.per_epoch, 2),
            "parameters": sum(p.numel() for p in model.parameters()),
            "model": asdict(m),
            "device": torch.cuda.get_device_name(device) if gpu else "CPU",
            "torch": torch.__version__,
            "settings": settings,
        }
    )
    shutil.copyfile(log, out / "hf" / "training.log")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for path in ("corpus", "tokenizer", "out"):
        parser.add_argument(f"--{path}", type=Path, required=True)
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--seconds", type=float, help="fit the run into this time")
    length.add_argument("--steps", type=int)
    shape = parser.add_argument_group("shape of the model")
    for size in SIZES:
        default = getattr(Model, size)
        flag = f"--{size.replace('_', '-')}"
        shape.add_argument(flag, type=int, default=default, help=f"default {default}")

    def option(flag: str, default: Any, note: str = "", **more: Any) -> None:
        note = f"{note}, default {default}".removeprefix(", ")
        parser.add_argument(flag, type=type(default), default=default, help=note, **more)

    parser.add_argument("--stop-after", type=float, help="seconds; stop early, to be resumed")
    parser.add_argument("--resume", action="store_true", help="go on where --out stopped")
    option("--device", "cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="compile on a CPU, too")
    option("--batch", 256, "windows in a step")
    option("--micro-batch", 64, "windows computed at once")
    parser.add_argument("--window", type=int, help="tokens in a window, default --context")
    option("--optimizer", "muon", choices=("muon", "adamw"))
    option("--lr", 2e-3)
    option("--warmup", 200, "steps")
    option("--seed", 0)
    option("--log-every", 50, "steps")
    option("--eval-every", 250, "steps")
    option("--save-every", 120.0, "seconds")
    option("--heldout-tokens", 300_000)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
