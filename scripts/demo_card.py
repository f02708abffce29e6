"""Measure the demonstration model and write its card: README.md and loss.png in its folder.

For the bundled one, from the repository's root (leave out --corpus for baselines counted on the
standard library only; scripts/train_demo.py tells how that file is made):

    python scripts/demo_card.py --model src/abreast/demo_model --reach 1024 \\
        --corpus run/corpus.jsonl.xz --work run
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from demo_corpus import VOCAB, tokenise, windows
from torch import Tensor

from abreast.data import CALIBRATION, HELD_OUT, load_tokens

# -------------------------------------------------------------------- the training log


def read_log(file: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The log's entries (step, loss, heldout) and its final one.

    Two formats are known: train_demo.py's JSON lines, and the plain text of the first bundled
    model ("100 5.418 lr 1.5e-03 4938 tok/s 164s", "held 4.09", "final held 2.65 16.75 M tok").
    """
    final: dict[str, Any] = {}
    lines = file.read_text().splitlines()
    if lines[0].startswith("{"):
        parsed = [json.loads(line) for line in lines]
        final = next((e for e in parsed if e.get("final")), final)
        return [e for e in parsed if not e.get("final")], final
    entries: list[dict[str, Any]] = []
    for line in lines:
        if match := re.match(r"(\d+) (\S+) lr \S+ \S+ tok/s (\d+)s$", line):
            step, loss, seconds = match.groups()
            entries.append({"step": int(step), "loss": float(loss), "elapsed": float(seconds)})
        elif match := re.match(r"held (\S+)$", line):
            entries[-1]["heldout"] = float(match[1])
        elif match := re.match(r"final held (\S+) (\S+) M tok$", line):
            final = {"heldout": float(match[1]), "tokens": float(match[2]) * 1e6}
    return entries, final


def loss_plot(entries: list[dict[str, Any]], file: Path) -> None:
    from abreast.report import draw_losses

    points = [
        {"name": label, "x": e["step"], "value": e[key]}
        for key, label in (("loss", "training"), ("heldout", "held-out"))
        for e in entries
        if e.get(key) and e["step"]
    ]
    draw_losses(points, file)


# ----------------------------------------------------------------------- measurements


def bigram_perplexity(stream: np.ndarray, inputs: np.ndarray, targets: np.ndarray) -> list[float]:
    """Perplexity of a unigram and of a bigram model counted on `stream`."""
    unigram = np.bincount(stream, minlength=VOCAB) + 1.0
    unigram /= unigram.sum()
    pairs = np.zeros(VOCAB * VOCAB, np.int64)
    for i in range(0, len(stream) - 1, 1 << 24):  # in pieces, for memory
        piece = stream[i : i + (1 << 24) + 1].astype(np.int64)
        pairs += np.bincount(piece[:-1] * VOCAB + piece[1:], minlength=VOCAB * VOCAB)
    context = pairs.reshape(VOCAB, VOCAB).sum(1)[inputs]
    count = pairs[inputs * VOCAB + targets]
    bigram = min(
        -np.log((count + alpha * unigram[targets]) / (context + alpha)).mean()
        for alpha in (1, 3, 10, 30, 100, 300, 1000, 3000)
    )
    return [math.exp(-np.log(unigram[targets]).mean()), math.exp(bigram)]


@dataclass
class Effect:
    """What a change to the layers does to the loss, over the same windows."""

    perplexity: float
    increase: float  # nats per token
    error: float  # its standard error, from the windows' own increases

    def __str__(self) -> str:
        return f"{self.perplexity:.2f} | {self.increase:+.4f} ± {self.error:.4f}"


class Meter:
    """Losses of a Llama in float32, whole and with its layers changed."""

    def __init__(self, folder: Path, device: str) -> None:
        from transformers import LlamaForCausalLM

        self.whole = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device)
        self.model, self.config = self.whole.model, self.whole.config
        self.layers = list(self.model.layers)
        self.device = device

    def parallel(self, h: Tensor, group: list[Any], rotary: Any) -> Tensor:
        """Layers run side by side: all attentions on `h`, then all FFNs on the shared sum."""
        parts = [
            layer.self_attn(
                layer.input_layernorm(h), position_embeddings=rotary, attention_mask=None
            )[0]
            for layer in group
        ]
        h = h + sum(parts)
        return h + sum(layer.mlp(layer.post_attention_layernorm(h)) for layer in group)

    def losses(self, h: Tensor, targets: Tensor) -> np.ndarray:
        logits = self.whole.lm_head(self.model.norm(h))
        flat = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return flat.view(targets.shape).double().cpu().numpy()

    def batches(self, x: np.ndarray, y: np.ndarray, size: int = 16) -> Any:
        for i in range(0, len(x), size):
            yield tuple(torch.from_numpy(t[i : i + size]).to(self.device) for t in (x, y))

    @torch.no_grad()
    def intact(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """transformers' own forward: loss of each target, shape [windows, positions]."""
        names = []
        for ids, targets in self.batches(x, y):
            logits = self.whole(ids, use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            names.append(loss.view(targets.shape).double().cpu().numpy())
        return np.concatenate(names)

    @torch.no_grad()
    def changed(self, x: np.ndarray, y: np.ndarray) -> tuple[list[Effect], list[Effect]]:
        """Each single layer left out, and each adjacent pair run as one `lp` group."""
        depth = len(self.layers)
        rows: dict[Any, list[np.ndarray]] = {}
        for ids, targets in self.batches(x, y):
            h = self.model.embed_tokens(ids)
            rotary = self.model.rotary_emb(h, torch.arange(ids.shape[1], device=h.device)[None])
            for i in range(depth):  # h is the input of layer i
                starts = {("drop", i): (h, i + 1)}
                if i + 1 < depth:
                    pair = self.parallel(h, self.layers[i : i + 2], rotary)
                    starts["pair", i] = (pair, i + 2)
                for key, (state, rest) in starts.items():
                    for layer in self.layers[rest:]:
                        state = self.parallel(state, [layer], rotary)
                    rows.setdefault(key, []).append(self.losses(state, targets).mean(1))
                h = self.parallel(h, [self.layers[i]], rotary)
            rows.setdefault("intact", []).append(self.losses(h, targets).mean(1))
            print(f"layers changed: {len(ids) * len(rows['intact'])} windows done", flush=True)
        means = {key: np.concatenate(parts) for key, parts in rows.items()}
        base = means["intact"]
        gap = abs(base - self.intact(x, y).mean(1)).max()
        assert gap < 1e-4, f"the hand-written forward is not transformers': {gap}"

        def effect(kind: str, i: int) -> Effect:
            more = means[kind, i] - base
            error = more.std(ddof=1) / math.sqrt(len(more)) if len(more) > 1 else math.nan
            return Effect(math.exp(means[kind, i].mean()), float(more.mean()), float(error))

        return (
            [effect("drop", i) for i in range(depth)],
            [effect("pair", i) for i in range(depth - 1)],
        )


# ------------------------------------------------------------------- parts of the card

STARTER = """\
## Status: a stand-in

This model is **half-trained**: it has seen 16.8 M tokens. It repeats itself when it generates, and
is of no use but as a small, real checkpoint for the demonstration and the tests of abreast. It is a
stand-in until a model trained on at least 1 billion tokens replaces it:
`scripts/train_demo.py` trains one in a single run on a GPU, and none was at hand when this was
bundled.

## Training

Trained on a CPU for 104 minutes on Python source text: the standard library and installed packages,
35 M tokens, of which it saw 16.8 M. Held out were the standard library's modules whose name
(relative to `Lib`, without `test/`) has an MD5 hash divisible by 20. Not recorded: which packages
these were, and whether some of them repeat text of held-out modules.

The log, [training.log](training.log), ends at a held-out loss of {loss:.3f} nats per token
(perplexity {perplexity:.1f}); which of the held-out tokens, in windows of what length, is not
recorded, so the numbers below need not agree with it. Of the files this model came with, only
`config.json` was changed: `max_position_embeddings` was 1024.
"""


def trained_text(entries: list[dict[str, Any]], final: dict[str, Any], corpus: Path | None) -> str:
    """Data and training of a model that train_demo.py made."""
    last = entries[-1]
    known = {"optimizer", "lr", "batch", "window", "warmup", "seed"}
    settings = final.get("settings", {}).items()
    flags = " ".join(f"--{k.replace('_', '-')} {v}" for k, v in settings if k in known)
    shape = final.get("model", {}).items()
    sizes = {"layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "context"}
    flags += "".join(f" --{k.replace('_', '-')} {v}" for k, v in shape if k in sizes)
    text = f"""\
## Training

{last["tokens"] / 1e6:.0f} million tokens seen ({final.get("epochs", "?")} passes) in
{last["step"]} steps, {last["elapsed"] / 60:.0f} minutes on {final.get("device", "?")} with PyTorch
{final.get("torch", "?")}. To repeat it:

    python scripts/train_demo.py --corpus run/corpus.jsonl.xz --tokenizer run/tokenizer \\
        --out run --steps {last["step"]} {flags}

The beginning of that script tells how the corpus and the tokenizer are made.
"""
    if corpus is None:
        return text
    manifest = read_manifest(corpus)
    packages = ", ".join(f"{n} {p['version']}" for n, p in manifest["packages"].items())
    licences = ", ".join(sorted({p["license"] for p in manifest["packages"].values()}))
    return f"""\
## Data

{manifest["documents"]} Python files ({manifest["characters"] / 1e6:.0f} million characters): the
standard library of Python {manifest["python"]} and {len(manifest["packages"])} packages under
permissive licences. Duplicates, generated and vendored files were left out. Held out, and never
trained on: {manifest["held_out_documents"]} of the standard library's modules, one in twenty,
chosen by a hash of their name (its `test` package apart); files that repeat their text were
dropped, too. The packages: {packages}.

Their licences, as they state them: {licences}.

{text}"""


def read_manifest(corpus: Path) -> dict[str, Any]:
    file = corpus.with_name(corpus.name.split(".")[0] + ".manifest.json")
    manifest: dict[str, Any] = json.loads(file.read_text())
    return manifest


def table(head: str, rows: list[str]) -> str:
    return "\n".join([f"| {head} |", "|---" * (head.count("|") + 1) + "|", *rows])


def card(args: argparse.Namespace) -> None:
    from transformers import AutoTokenizer

    entries, final = read_log(args.model / "training.log")
    loss_plot(entries, args.model / "loss.png")
    meter = Meter(args.model, args.device)
    m, depth = meter.config, len(meter.layers)
    window = m.max_position_embeddings
    reach = args.reach or window
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    held = load_tokens(tokenizer, HELD_OUT)

    x, y = windows(held.tokens, window, args.max_windows)
    whole = math.exp(meter.intact(x, y).mean())
    print(f"perplexity {whole:.4f} over {y.size} tokens", flush=True)
    lines = [f"| this model | - | {whole:.2f} |"]
    calibration = load_tokens(tokenizer, CALIBRATION)
    counted = [(f"the library's {calibration.num_documents} other modules", calibration.tokens)]
    if args.corpus:
        with tempfile.TemporaryDirectory() as folder:
            stream, _ = tokenise(args.corpus, args.model, args.work or Path(folder))
        documents = read_manifest(args.corpus)["documents"]
        counted.append((f"the {documents} files of `demo_corpus.py corpus`", stream))
    for source, stream in counted:
        unigram, bigram = bigram_perplexity(stream, x, y)
        where = f"{source}, {len(stream) / 1e6:.1f} M tokens"
        lines += [f"| bigram | {where} | {bigram:.1f} |", f"| unigram | {where} | {unigram:.0f} |"]
        print(f"{where}: bigram {bigram:.3f}, unigram {unigram:.2f}", flush=True)

    def spread(count: int, most: int) -> np.ndarray:
        return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int))

    long_x, long_y = windows(held.tokens, reach, args.max_windows)
    some = spread(len(long_x), max(1, args.some_tokens // reach))
    by_position = meter.intact(long_x[some], long_y[some]).mean(0).reshape(8, -1)
    positions = [math.exp(part.mean()) for part in by_position]
    print("by position:", [round(p, 2) for p in positions], flush=True)
    ranges = [
        f"| {i * reach // 8} to {(i + 1) * reach // 8 - 1} | {p:.1f} |"
        for i, p in enumerate(positions)
    ]

    few = spread(len(x), max(2, args.some_tokens // window))
    drops, pairs = meter.changed(x[few], y[few])
    changes = [f"| {i} | {drop} |" for i, drop in enumerate(drops)]
    grouped = [f"| {i}, {i + 1} | {pair} |" for i, pair in enumerate(pairs)]
    middle = range(1, depth - 1)
    unclear = [str(i) for i in middle if drops[i].increase < 2 * drops[i].error]
    verdict = (
        "Leaving out any one of the middle layers raises the perplexity."
        if not unclear
        else "Not raised by more than two standard errors for: " + ", ".join(unclear) + "."
    )

    if "settings" in final:
        origin = trained_text(entries, final, args.corpus)
    else:
        origin = STARTER.format(loss=final["heldout"], perplexity=math.exp(final["heldout"]))
    parameters = sum(p.numel() for p in meter.whole.parameters())
    extra = f" --reach {reach}" if args.reach else ""
    extra += " \\\n        --corpus run/corpus.jsonl.xz --work run" if args.corpus else ""
    limit = f"**Use at most {window} tokens at a time**: "
    limit += "what it predicts further on is much worse (see\nthe table by position)."
    limit = f"\n{limit}\n" if reach > window else ""
    (args.model / "README.md").write_text(f"""\
---
license: apache-2.0
language:
- code
library_name: transformers
pipeline_tag: text-generation
tags:
- llama
- python
- small
- layer-parallelism
---

# A small Python-source language model

Llama architecture, {parameters / 1e6:.1f} M parameters: {depth} layers, hidden size
{m.hidden_size}, {m.num_attention_heads} heads of {m.head_dim} dimensions, {m.num_key_value_heads} \
key-value heads, feed-forward size {m.intermediate_size},
{m.vocab_size}-token byte-level BPE, tied embeddings, stored in bfloat16.
What it writes need not run or be safe.
{limit}
{origin}
![Loss](loss.png)

## Measured

By transformers in float32, over the held-out modules of the standard library of Python
{platform.python_version()}: {y.size} tokens of {held.num_documents} modules, in non-overlapping \
windows of {window} tokens, so that a
token has between 1 and {window} tokens before it.

{table("model | counted on | perplexity", lines)}

The bigram is smoothed towards the unigram; its one constant was chosen on the held-out tokens
themselves, which favours it. The corpora contain no module that is held out by name.

By position in windows of {reach} tokens ({len(some) * reach} held-out tokens):

{table("position | perplexity", ranges)}

### One layer left out

On {len(few)} of the windows of {window} ({len(few) * window} tokens), the increase of the loss in \
nats per token ± its
standard error over the windows. {verdict}

{table("layer left out | perplexity | loss increase", changes)}

### Two layers side by side

Each adjacent pair run as one `lp` group, the others as they are, on the same windows: both
attentions read the shared input, both feed-forward blocks the shared sum.

{table("layers | perplexity | loss increase", grouped)}

## This card

It is written, and its numbers measured again, by

    python scripts/demo_card.py --model src/abreast/demo_model{extra}
""")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder, with its training.log")
    parser.add_argument("--corpus", type=Path, help="count the baselines on this, too")
    parser.add_argument("--work", type=Path, help="where the corpus' tokens are or are to be kept")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--reach", type=int, help="tokens: show positions beyond the context, too")
    parser.add_argument("--max-windows", type=int, default=1 << 30, help="held-out windows to use")
    parser.add_argument(
        "--some-tokens", type=int, default=16_384, help="of them for positions and changed layers"
    )
    card(parser.parse_args())


if __name__ == "__main__":
    main()
