"""What the rows of benchmarks/real_models.py measure: one function per kind of row."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _evidence import DISTILLED, PROMPT, ROWS, TASKS, TRAINED, depths
from prefill import answered, few_shot

from abreast.checkpoint import open_checkpoint, read_manifest, write
from abreast.convert import convert
from abreast.data import CALIBRATION, TokenStream, load_tokens
from abreast.errors import AbreastError
from abreast.evaluate import Comparison, compare, evaluate_tasks, find_tasks, ratio_of_means
from abreast.families import family_of
from abreast.heal import Recipe, heal
from abreast.model import (
    cache_name,
    cache_of,
    device_of,
    grouped,
    inference,
    load,
    load_tokenizer,
    token_scores,
)
from abreast.plan import FOLDER as PLANS
from abreast.plan import Group, Plan
from abreast.targets import LLAMACPP, refusals

WIKITEXT, SUMS, WINDOW = "wikitext2-valid.txt", "gsm8k.jsonl", 256
NORMED = {"arc_challenge", "openbookqa", "piqa", "hellaswag"}  # judged by acc_norm, as is usual
Result = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How much is measured. heal: more arguments of `heal`."""

    tokens: int = 16_384
    items: int = 400
    problems: int = 200
    copies: int = 100
    long_windows: int = 4
    long_window: int = 8192
    stories: int = 8
    new_tokens: int = 512
    rounds: int = 20
    heal: tuple[tuple[str, Any], ...] = ()


# twice as fast compiled; share: benchmarks/LOG.md, 2026-11-28
FOR_AN_HOUR = Recipe(minutes=60, compile=True, group_share=0.1, evaluate_every=100)
LITTLE = (
    *(("data", "stdlib-train"), ("tokens", 6000), ("window", 64)),
    ("recipe", Recipe(steps=2, batch_size=2, micro_batch=2)),
)
SMALL = Sizes(1024, 20, 4, 4, 1, 512, 2, 24, 6, LITTLE)


@dataclass(frozen=True)
class Setting:
    """Where models, texts and unfinished work are. rows: where finished ones go.

    text, minutes: what a model is trained on with an accelerator, files of text or of token ids
    (.npy), and for how long. device: None for cuda in rows `accelerated`, the CPU in all others.
    dtype: of models in rows `tasks`, whose answers are counted; the other rows are measured in
    float32.
    """

    models: Path
    data: Path
    work: Path
    sizes: Sizes = Sizes()
    rows: Path = ROWS
    text: tuple[Path, ...] = ()
    minutes: float = 10
    device: str | None = None
    dtype: str = "bfloat16"

    def half(self, number: int) -> Path:
        """The first (0) or second (1) half of the text, cut at a line's end."""
        text = (self.data / WIKITEXT).read_text("utf-8")
        middle = text.rfind("\n", 0, len(text) // 2) + 1
        path = self.work / f"{('first', 'second')[number]}.txt"
        self.work.mkdir(parents=True, exist_ok=True)
        write(path, text[middle:] if number else text[:middle])
        return path


@dataclass(frozen=True)
class Subject:
    """A model as one row measures it. variant: a key of _evidence.VARIANTS."""

    setting: Setting
    model: str
    depth: int
    variant: str = "original"

    @property
    def original(self) -> Path:
        return self.setting.models / self.model

    @cached_property
    def plan(self) -> Plan:
        file = PLANS / f"{self.model}-{self.depth}.yaml"
        if not file.is_file():
            raise AbreastError(
                f"no plan {file.stem} in the package; run the row {file.stem}-rivals first, which "
                "finds one, or take one with --take"
            )
        return Plan.load(file)

    @property
    def folder(self) -> Path:
        """The checkpoint that is measured; it is healed first, where it must and is not yet."""
        if self.variant in ("original", "plan"):
            return self.original
        out = self.made(self.variant)
        if not out.is_dir():
            more: dict[str, Any] = {"method": "refit"}
            if self.variant in TRAINED:
                more = {"method": "both", "recipe": FOR_AN_HOUR, "tokens": 2**18}
            elif self.variant == "accelerated":
                more = self.with_accelerator()
            if self.variant.endswith("_wikitext"):
                more["data"] = f"{self.setting.half(0)},{CALIBRATION}"
            more |= {"device": self.device, **dict(self.setting.sizes.heal)}
            # what the model writes is the same at every depth
            texts = self.setting.work / f"{self.model}-written-{more['method']}"
            heal(self.original, self.plan, out, texts=texts, step=say, **more)
        return out

    @property
    def device(self) -> str:
        return self.setting.device or ("cuda" if self.variant == "accelerated" else "cpu")

    def with_accelerator(self) -> dict[str, Any]:
        """Arguments of `heal`."""
        recipe = Recipe(
            train="all",
            group_share=0.1,
            learning_rate=6e-4,
            minutes=self.setting.minutes,
            batch_size=48,
            micro_batch=48,
            evaluate_every=250,
            save_every=10**9,  # minutes, that a checkpoint of all weights would take a tenth of
            compile=True,
        )
        if not self.setting.text:
            raise AbreastError("training with an accelerator reads much text; name it with --text")
        tokenizer = load_tokenizer(self.original)
        streams = [
            TokenStream(np.load(file).astype(np.int64), file.stem, 1, 0)
            if file.suffix == ".npy"
            else load_tokens(tokenizer, str(file))
            for file in self.setting.text
        ]
        stream = TokenStream(
            np.concatenate([part.tokens for part in streams]),
            ",".join(part.source for part in streams),
            sum(part.num_documents for part in streams),
            sum(part.num_bytes for part in streams),
            streams[0].prefix,
        )
        return {
            "method": "both",
            "recipe": recipe,
            "data": stream,
            "tokens": len(stream),
            "window": 512,
        }

    def made(self, name: str) -> Path:
        """Where a checkpoint made under the plan lies; the name tells plans apart."""
        key = hashlib.sha256(self.groups.encode()).hexdigest()[:8]
        return self.setting.work / f"{self.model}-{self.depth}-{name}-{key}"

    @property
    def groups(self) -> str:
        return self.plan.shorthand

    def load(self) -> tuple[Any, Any]:
        return self.loaded(self.folder, self.plan if self.variant == "plan" else None)

    def loaded(self, folder: Path, plan: Plan | None = None) -> tuple[Any, Any]:
        return load(folder, plan=plan, dtype="float32", device=self.device)

    def text(self, tokens: int) -> TokenStream:
        """What models are judged on."""
        tokenizer = load_tokenizer(self.original)
        return load_tokens(tokenizer, str(self.setting.half(1)), max_tokens=tokens)


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def pair(values: Sequence[float]) -> list[float]:
    """Mean and standard error."""
    return list(ratio_of_means(np.array(values, float), np.ones(len(values))))


def judged(subject: Subject, _: Result | None) -> Result:
    """On the text that rivals are judged on."""
    (model, _), (original, _) = subject.load(), subject.loaded(subject.original)
    stream = subject.text(subject.setting.sizes.tokens)
    comparison = compare(model, original, stream, window=WINDOW, stride=WINDOW, batch_size=4)
    about = read_manifest(subject.folder).healed or {}
    return {
        **numbers(comparison),
        "reference_perplexity": comparison.reference.perplexity,
        "tokens": comparison.num_tokens,
        "healed": {key: about.get(key) for key in ("method", "kl_before", "kl_after")},
        **training(about),
    }


def training(about: Result) -> Result:
    """What a healed checkpoint's manifest says of its training; nothing of one that had none."""
    trained = about.get("distilled")
    if not trained:
        return {}
    keys = ("tokens", "seconds", "best_step", "reason")
    text = {key: about["data"][key] for key in ("sha256", "tokens")}
    text["source"] = ",".join(Path(name).name for name in about["data"]["source"].split(","))
    return {"trained": {key: trained[key] for key in keys}, "recipe": about["recipe"], "text": text}


def numbers(comparison: Comparison) -> Result:
    return {
        "perplexity": [comparison.model.perplexity, comparison.model.perplexity_stderr],
        "loss": [comparison.nll_difference, comparison.nll_difference_stderr],
        "kl": [comparison.kl, comparison.kl_stderr],
        "agreement": [comparison.top1_agreement, comparison.top1_agreement_stderr],
    }


def write_tasks(setting: Setting) -> Path:
    """Task files for lm-eval, and the user's items as these read them, in the work folder."""
    folder = setting.work / "tasks"
    folder.mkdir(parents=True, exist_ok=True)
    for name in TASKS:
        lines = (setting.data / f"{name}.jsonl").read_text("utf-8").splitlines()
        items = [json.loads(line) for line in lines[: setting.sizes.items]]
        text, target = "question", "answer"
        if name == "winogrande":  # which beginning makes the end likelier, as in lm-eval
            text, target = "answer", "ending"
            for item in items:
                start, _, end = item["question"].partition("_")
                item["choices"] = [start + choice for choice in item["choices"]]
                item["ending"] = end.strip()
        elif name not in ("hellaswag", "openbookqa"):
            text = "Question: {{question}}\nAnswer:"
        metric = "acc_norm" if name in NORMED else "acc"
        write(folder / f"{name}.jsonl", "".join(json.dumps(item) + "\n" for item in items))
        task = {
            "task": name,
            "dataset_kwargs": {"file": f"{name}.jsonl"},
            "test_split": "test",
            "num_fewshot": 0,
            "output_type": "multiple_choice",
            "doc_to_text": text,
            "doc_to_choice": "choices",
            "doc_to_target": target,
            "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}],
            "metadata": {"version": 1.0},
        }
        lines = ["custom_dataset: !function abreast.evaluate.local_data"]
        lines += [f"{key}: {json.dumps(value)}" for key, value in task.items()]
        write(folder / f"{name}.yaml", "\n".join(lines) + "\n")
    return folder


def tasks(subject: Subject, theirs: Result | None) -> Result:
    folder = write_tasks(subject.setting)
    loaded = find_tasks(TASKS, include_path=[folder])
    evaluation = evaluate_tasks(
        subject.folder,
        loaded,
        plan=subject.plan if subject.variant == "plan" else None,
        against=subject.original if theirs is not None else None,
        out=subject.setting.work / "answers",
        batch_size=32,
        dtype=subject.setting.dtype,
        device=subject.device,
        step=say,
    )
    accuracy = {name: score.converted for name, score in evaluation.tasks.items()}
    result: Result = {"accuracy": accuracy, "dtype": subject.setting.dtype}
    if evaluation.above_chance_kept is not None and evaluation.above_chance_interval is not None:
        result["above_chance"] = [evaluation.above_chance_kept, *evaluation.above_chance_interval]
    return result


def answers(subject: Subject, theirs: Result | None) -> Result:
    """Reference answers to sums, and copying; with the values per item, that others pair with."""
    sizes, (model, tokenizer) = subject.setting.sizes, subject.load()
    lines = (subject.setting.data / SUMS).read_text("utf-8").splitlines()[: sizes.problems]
    nll, counts = [], []
    with inference(model):
        for item in map(json.loads, lines):
            prompt = tokenizer(f"Question: {item['question']}\nAnswer:")["input_ids"]
            answer = tokenizer(f" {item['target']}", add_special_tokens=False)["input_ids"]
            ids = torch.tensor([prompt + answer], device=device_of(model))
            logits = model(ids[:, :-1], logits_to_keep=len(answer)).logits
            nll.append(float(token_scores(logits, ids[:, len(prompt) :]).sum()))
            counts.append(len(answer))
        copies = few_shot(count=sizes.copies)
        right = answered(model, tokenizer, copies)
    weights = np.array(counts, float)
    result: Result = {
        "loss": list(ratio_of_means(np.array(nll), weights)),
        "copied": pair(right),
        "items": {"nll": nll},
    }
    if theirs is not None:
        increase = np.array(nll) - np.array(theirs["items"]["nll"])
        result["increase"] = list(ratio_of_means(increase, weights))
    if subject.variant == "plan":
        model, _ = subject.loaded(subject.original)
        with grouped(model, subject.plan, prefill="sequential"), inference(model):
            result["copied_sequential"] = pair(answered(model, tokenizer, copies))
    return result


def kl_by_position(
    model: Any, original: Any, stream: TokenStream, window: int, columns: int = 8
) -> list[list[float]]:
    """KL and its error over windows, in so many columns of a window, through the KV cache.

    So only one column's logits are held at once, which counts with a large vocabulary.
    """
    size, own = window // columns, window - len(stream.prefix)
    rows: list[list[float]] = []
    with inference(model, original):
        for start in range(0, len(stream) - own, own):
            tokens = [*stream.prefix, *stream.tokens[start : start + own + 1]]
            ids = torch.tensor([tokens], device=device_of(model))
            caches, means = [None, None], []
            for position in range(0, window, size):
                part = ids[:, position : position + size]
                outputs = [
                    m(part, **{cache_name(m): cache}, use_cache=True)
                    for m, cache in zip((model, original), caches, strict=True)
                ]
                caches = [cache_of(output) for output in outputs]
                targets = ids[:, position + 1 : position + size + 1]
                scores = token_scores(outputs[0].logits, targets, outputs[1].logits)
                means.append(float(scores[..., 2].mean()))
            rows.append(means)
    return [pair(column) for column in zip(*rows, strict=True)]


def repeated(ids: Sequence[int]) -> float:
    """Share of the 4-grams that were there before."""
    grams = [tuple(ids[start : start + 4]) for start in range(len(ids) - 3)]
    return 1 - len(set(grams)) / len(grams)


def long(subject: Subject, theirs: Result | None) -> Result:
    sizes, (model, _) = subject.setting.sizes, subject.load()
    beginning, count = 48, sizes.stories
    stream = subject.text(max(sizes.long_windows * sizes.long_window + 1, count * beginning))
    prompts = stream.tokens[: count * beginning].reshape(count, beginning)
    prefix = np.array([stream.prefix] * count, dtype=np.int64).reshape(count, -1)
    ids = torch.from_numpy(np.concatenate([prefix, prompts], axis=1)).to(device_of(model))
    torch.manual_seed(0)
    with inference(model):
        text = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            min_new_tokens=sizes.new_tokens,
            max_new_tokens=sizes.new_tokens,
            pad_token_id=0,
        )
    written = text[:, ids.shape[1] :].tolist()
    result: Result = {"repeated": pair([repeated(row) for row in written])}
    if theirs is None:
        return {**result, "items": {"ids": text[:, len(stream.prefix) :].tolist()}}
    original, _ = subject.loaded(subject.original)
    own = np.array(theirs["items"]["ids"])
    texts = TokenStream(own.reshape(-1), "its own text", len(own), 0, stream.prefix)
    window = own.shape[1] + len(stream.prefix)
    comparison = compare(model, original, texts, window=window, stride=own.shape[1])
    kl = kl_by_position(model, original, stream, sizes.long_window)
    return {**result, "own_kl": [comparison.kl, comparison.kl_stderr], "kl": kl}


def text(subject: Subject, _: Result | None) -> Result:
    model, tokenizer = subject.load()
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]], device=device_of(model))
    with inference(model):
        options = {"do_sample": False, "max_new_tokens": 80, "pad_token_id": 0}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return {"text": tokenizer.decode(out[0], skip_special_tokens=True)}


def refused(subject: Subject, target: Any, plan: Plan) -> str | None:
    config = open_checkpoint(subject.original).config
    return next(refusals(target, config, family_of(config), plan), None)


def converted(subject: Subject, plan: Plan, name: str) -> Path:
    out = subject.made(name)
    if not out.is_dir():
        convert(subject.original, plan, out, dtype="float32")
    return out


def llamacpp(subject: Subject, _: Result | None) -> Result:
    """Four bits with and without groups; the groups wired lp where llama.cpp refuses the plan."""
    reason, plan = refused(subject, LLAMACPP, subject.plan), subject.plan
    if reason is not None:
        groups = tuple(Group(layers=group.layers) for group in plan.groups)
        plan = Plan(num_layers=plan.num_layers, groups=groups)
        if refused(subject, LLAMACPP, plan) is not None:
            return {"refused": reason}
    try:
        from quantization import excess, serve, with_llama_cpp
        from xllamacpp import Server  # noqa: F401
    except ImportError as error:
        raise AbreastError(
            f"{error}: run rows of llama.cpp with .venv-gguf/bin/python (`make test-gguf`)"
        ) from None
    original, tokenizer = load(subject.original, dtype="float32")
    stream = subject.text(subject.setting.sizes.tokens)
    plain = subject.setting.work / f"{subject.model}-original"  # GGUF files are written beside it
    if not plain.exists():
        plain.symlink_to(subject.original.resolve())
    results: dict[str, Comparison] = {}
    windows: dict[str, int] = {"window": WINDOW, "stride": WINDOW, "batch_size": 4}
    ours = converted(subject, plan, "lp")
    for name, folder in (("quantised", plain), ("grouped", ours), ("both", ours)):
        model, _ = load(folder, dtype="float32")
        if name != "grouped":
            with_llama_cpp("Q4_K_M")(model, folder)
        results[name] = compare(model, original, stream, **windows)
    ids = tokenizer(PROMPT)["input_ids"]
    servers = [serve(f.with_name(f"{f.name}-Q4_K_M.gguf")) for f in (plain, ours)]
    request = {"prompt": ids, "max_tokens": 64, "temperature": 0, "ignore_eos": True}
    rates = [
        [s.handle_completions(request)["timings"]["predicted_per_second"] for s in servers]
        for _ in range(subject.setting.sizes.rounds)
    ]
    return {
        "refused": reason,
        "plan": plan.shorthand,
        "kl": {name: [comparison.kl, comparison.kl_stderr] for name, comparison in results.items()},
        "perplexity": {
            name: numbers(comparison)["perplexity"] for name, comparison in results.items()
        },
        "excess": list(excess(results["both"], results["grouped"], results["quantised"])),
        "tokens_per_second": np.median(rates, axis=0).tolist(),
    }


@dataclass(frozen=True)
class Kind:
    """A kind of row. minutes: of one variant, of SmolLM2 on two cores; gemma takes about as long.

    original: it is measured as well, once for all depths; pairs: and others are paired with its
    items. variants: None for all that there are.
    """

    measure: Callable[[Subject, Result | None], Result]
    files: tuple[str, ...]
    minutes: float
    original: bool = False
    pairs: bool = False
    variants: tuple[str, ...] | None = None


KINDS = {
    "refit": Kind(judged, (WIKITEXT,), 12, variants=("refit",)),
    "refit_wikitext": Kind(judged, (WIKITEXT,), 6, variants=("refit_wikitext",)),
    "distilled": Kind(judged, (WIKITEXT,), 90, variants=("distilled",)),
    "distilled_wikitext": Kind(judged, (WIKITEXT,), 75, variants=("distilled_wikitext",)),
    "accelerated": Kind(judged, (WIKITEXT,), 15, variants=("accelerated",)),
    "tasks": Kind(tasks, tuple(f"{name}.jsonl" for name in TASKS), 7, original=True),
    "answers": Kind(answers, (SUMS,), 4, original=True, pairs=True),
    "long": Kind(long, (WIKITEXT,), 6, original=True, pairs=True),
    "llamacpp": Kind(llamacpp, (WIKITEXT,), 6, variants=("plan",)),
    "text": Kind(text, (), 0.3, original=True),
}


def variants_of(kind: str, model: str, depth: int) -> tuple[str, ...]:
    every = ("plan", "refit", *(("distilled",) if depths(model)[depth] == DISTILLED else ()))
    return KINDS[kind].variants or (*(("original",) if KINDS[kind].original else ()), *every)
