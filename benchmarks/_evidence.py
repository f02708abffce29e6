"""docs/evidence.md, and README's first table, from the rows that benchmarks/real_models.py left.

A row is a JSON file in benchmarks/real_models, named MODEL-DEPTH-KIND. Knows no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from abreast.planner import KL, Cost
from abreast.rivals import LEFT_OUT, METHODS, Measured, at_equal_speed, caption

ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / "benchmarks" / "real_models"
PAGE, README, TEXTS = ROOT / "docs" / "evidence.md", ROOT / "README.md", ROWS / "TEXTS.md"
MARKED = re.compile("(?<=<!-- evidence-table -->\n).*(?=<!-- end of evidence-table -->)", re.DOTALL)
MODELS = {"smollm2": ("SmolLM2-135M-Instruct", 30), "gemma3": ("gemma-3-270m", 18)}
SHARES = (0.93, 0.83, 0.73, 0.67)
TRAINED = ("distilled", "distilled_wikitext")  # on two cores
DISTILLED = 0.83  # the share at which models are trained on two cores
HEALED = ("refit", "refit_wikitext", "distilled", "distilled_wikitext", "accelerated")
KINDS = ("rivals", *HEALED, "tasks", "answers", "long", "llamacpp", "text")
# kind, or model and kind -> the shares at which it is measured; everything else at all of them
FEWER: dict[str | tuple[str, str], tuple[float, ...]] = {
    "refit_wikitext": (DISTILLED,),
    "distilled": (DISTILLED,),
    "distilled_wikitext": (DISTILLED,),
    "accelerated": (DISTILLED, 0.67),
    ("gemma3", "distilled_wikitext"): (),
    ("gemma3", "accelerated"): (),
    ("gemma3", "answers"): (DISTILLED,),
    ("gemma3", "long"): (DISTILLED,),
}
TASKS = ("arc_easy", "arc_challenge", "openbookqa", "piqa", "winogrande", "hellaswag")
VARIANTS = {
    "original": "original",
    "plan": "plan",
    "refit": "+ refit",
    "refit_wikitext": "+ refit, on wikitext too",
    "distilled": "+ refit and distillation",
    "distilled_wikitext": "+ refit and distillation, on wikitext too",
    "accelerated": "+ refit and distillation on a GPU",
}
ENGINES = {
    "eager": "transformers",
    "compile": "torch.compile",
    "vllm": "vLLM",
    "llama.cpp": "llama.cpp",
}
MISSING = "not measured yet"
PROMPT = "The lighthouse at the end of the island was built in"
WORDS = 40  # of a text that the page shows
Row = dict[str, Any]


def depths(model: str) -> dict[int, float]:
    """The depths at which a model is measured -> share of the layers."""
    return {round(share * MODELS[model][1]): share for share in SHARES}


def every_row() -> dict[str, tuple[str, int, str]]:
    """Name -> model, depth, kind."""
    return {
        f"{model}-{depth}-{kind}": (model, depth, kind)
        for kind in KINDS
        for model in MODELS
        for depth, share in depths(model).items()
        if share in FEWER.get((model, kind), FEWER.get(kind, SHARES))
    }


def read_rows(folder: Path = ROWS) -> dict[str, Row]:
    return {file.stem: json.loads(file.read_text("utf-8")) for file in folder.glob("*.json")}


def with_error(pair: Sequence[float] | None, digits: int = 4, sign: str = "") -> str:
    """A number and its standard error."""
    return "" if pair is None else f"{pair[0]:{sign}.{digits}f}±{pair[1]:.{digits}f}"


def percent(pair: Sequence[float] | None) -> str:
    return "" if pair is None else with_error([100 * number for number in pair], 1)


def interval(triple: Sequence[float] | None, digits: int = 2) -> str:
    if triple is None:
        return ""
    return "{0:.{d}f} [{1:.{d}f}, {2:.{d}f}]".format(*triple, d=digits)


def groups(plan: str) -> str:
    return f"`{plan}`".replace("|", "\\|")


def table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; a line that is shorter than the headings is filled up."""
    filled = [[*line, *[""] * (len(headings) - len(line))] for line in lines]
    marks = ["---"] * len(headings)
    return "".join(f"|{'|'.join(line)}|\n" for line in (headings, marks, *filled))


def short(method: str) -> str:
    """The name in the literature that stands in brackets, or the whole."""
    name = METHODS.get(method, method)
    named = re.search(r"\((.+)\)", name)
    return named[1] if named else name


def choice(plan: str) -> str:
    """A plan in shorthand; of layers left out, runs of neighbours as first-last."""
    if not plan.startswith("without "):
        return groups(plan)
    runs: list[list[int]] = []
    for layer in map(int, plan.removeprefix("without ").split()):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    named = (f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"without {','.join(named)}"


def quality(rows: dict[str, Row], model: str) -> str:
    lines, texts = [], ""
    for depth in depths(model):
        row = rows.get(f"{model}-{depth}-rivals")
        if row and not lines:
            texts = (
                f"\nJudged on {row['tokens']:,} predictions. What other methods choose, and every "
                f"refit, rests on {row['chosen_on']:,} tokens.\n"
            )
            perplexity = f"{row['results']['original']['perplexity']:.2f}"
            lines.append([f"{MODELS[model][1]} original", perplexity])
        for entry in row["results"]["methods"] if row else []:
            lines.append(
                [
                    f"{depth} {short(entry['method'])}",
                    f"{entry['perplexity']:.2f}",
                    with_error(entry["loss"], sign="+"),
                    with_error(entry["kl"]),
                    percent(entry["agreement"]),
                    with_error(entry["refit_loss"], sign="+"),
                    with_error(entry["refit_kl"]),
                    percent(entry["refit_agreement"]),
                    choice(entry["plan"]),
                ]
            )
        for kind in HEALED:
            if healed := rows.get(f"{model}-{depth}-{kind}"):
                name = f"{depth} planner, {kind.replace('_', ', ')}"
                lines.append([name, *_healed(healed["results"][kind])])
    headings = ("left, method", "perplexity", "loss", "KL", "same, %")
    refitted = ("loss, refit", "KL, refit", "same, refit")
    return table((*headings, *refitted, "choice"), lines) + texts if lines else ""


def _healed(result: Row) -> list[str]:
    return [
        with_error(result["perplexity"], 2),
        with_error(result["loss"], sign="+"),
        with_error(result["kl"]),
        percent(result["agreement"]),
    ]


def by_variant(
    rows: dict[str, Row], model: str, kind: str, headings: Sequence[str], cells: Any
) -> str:
    """A line for the original, and for each variant at each depth; cells(result) fills it."""
    lines = []
    for depth in depths(model):
        row = rows.get(f"{model}-{depth}-{kind}")
        for variant, result in row["results"].items() if row else []:
            if variant != "original":
                lines.append([f"{depth} {VARIANTS[variant]}".removesuffix(" plan"), *cells(result)])
            elif not lines:
                lines.append([f"{MODELS[model][1]} original", *cells(result)])
    return table(("left", *headings), lines) if lines else ""


def missing(rows: dict[str, Row], *kinds: str) -> str:
    """One sentence that names the rows of these kinds which are still to be measured, or lack
    variants."""
    names = [name for name, (_, _, kind) in every_row().items() if kind in kinds]
    left = [f"`{name}`" for name in names if name not in rows]
    for name in names:
        if lacks := rows.get(name, {}).get("lacks"):
            left.append(f"`{name}` ({', '.join(VARIANTS[variant] for variant in lacks)})")
    return f"Of these {MISSING}: {', '.join(left)}.\n" if left else ""


def task_cells(result: Row) -> list[str]:
    share_kept = interval(result.get("above_chance"), 3)
    accuracy = (f"{100 * result['accuracy'][task]:.1f}" for task in TASKS)
    return [result["dtype"], share_kept, *accuracy]


def long_cells(result: Row) -> list[str]:
    kl = [with_error(pair, 3) for pair in result.get("kl", [])] or [""] * 8
    return [*kl, percent(result["repeated"]), with_error(result.get("own_kl"), 3)]


def rows_of(rows: dict[str, Row], model: str) -> list[Measured]:
    """What the rows "rivals" of a model hold, refits as rows of their own."""
    measured = []
    for name, row in rows.items():
        if name.startswith(f"{model}-") and name.endswith("-rivals"):
            for entry in row["results"]["methods"]:
                for prefix in ("", "refit_"):
                    if (kl := entry[f"{prefix}kl"]) is not None:
                        cost = Cost(*kl, *entry[f"{prefix}loss"], row["tokens"])
                        of = (entry["method"], row["depth"], entry["plan"], cost)
                        measured.append(Measured(*of, refit=bool(prefix)))
    return measured


def buy_rows(rows: Iterable[Measured], times: Row) -> list[Measured]:
    """Our plans and layers left out, with speeds as benchmarks/buy.py timed them in one engine.

    times: by depth. Any so many layers left take as long as those that were timed.
    """
    timed = []
    for row in rows:
        name = "ours" if row.method == "planner" else "cut" if row.method in LEFT_OUT else None
        entry = times.get(str(row.depth), {})
        if name is None or f"{name}_ms" not in entry:
            continue
        if name == "ours" and entry["plan"] != row.plan:  # another plan by now
            continue
        speed = {"seconds": entry[f"{name}_ms"] / 1000, "speedup": entry[f"{name}_ratio"][0]}
        timed.append(replace(row, **speed))
    return timed


def buy_text(rows: Sequence[Measured], record: Row) -> str:
    """A table per engine, and in words where layers abreast are the better buy."""
    parts = []
    for engine, times in record["engines"].items():
        timed = buy_rows(rows, times)
        plain = [row for row in timed if not row.refit]
        pairs = {str(pair.ours.depth): pair for pair in at_equal_speed(plain, KL)}
        reasons = [entry["refused"] for entry in times.values() if "refused" in entry]
        if not pairs:
            why = f"none of these plans: {reasons[0]}" if reasons else "other plans by now"
            parts.append(f"{ENGINES[engine]} runs {why}.\n")
            continue
        lines = []
        for depth, entry in sorted(times.items(), key=lambda item: -int(item[0])):
            if "refused" in entry:
                lines.append([depth, f"refused: {entry['refused']}".replace("|", "\\|")])
            elif pair := pairs.get(depth):
                lines.append([depth, *_bought(entry, pair, plain)])
        made = table(("left", *BOUGHT), lines)
        parts.append(f"{ENGINES[engine]}:\n\n{made}\n{caption(timed, KL)}\n")
    return "\n".join(parts)


BOUGHT = ("abreast, ms", "left out, ms", "KL", "KL, left out", "KL, left out, at our speed")


def _bought(entry: Row, pair: Any, rows: Sequence[Measured]) -> list[str]:
    cuts = [r for r in rows if r.depth == pair.ours.depth and r.method in LEFT_OUT]
    cut = min(cuts, key=lambda row: row.cost.kl)
    return [
        *(f"{entry[f'{n}_ms']:.2f}, {interval(entry[f'{n}_ratio'])}x" for n in ("ours", "cut")),
        f"{pair.ours.cost.kl:.4f}",
        f"{cut.cost.kl:.4f} {short(cut.method)}",
        f"{pair.value:.4f} {short(pair.rival)}" if pair.rival else "none as fast",
    ]


def buy(rows: dict[str, Row], model: str) -> str:
    record = rows.get(f"{model}-buy")
    return buy_text(rows_of(rows, model), record) if record else ""


def llamacpp_cells(result: Row) -> list[str]:
    if "kl" not in result:
        return [f"refused: {result['refused']}"]
    reason = (result.get("refused") or "").partition(";")[0]
    note = f"refused: {reason}; as lp: " if reason else ""
    kl = result["kl"]
    return [
        note + groups(result["plan"]),
        *(with_error(kl[name]) for name in ("quantised", "grouped", "both")),
        with_error(result["excess"], sign="+"),
        with_error(result["perplexity"]["quantised"], 2),
        with_error(result["perplexity"]["both"], 2),
        "{:.1f} → {:.1f}".format(*result["tokens_per_second"]),
    ]


def four_bits(rows: dict[str, Row], model: str) -> str:
    measured = [rows.get(f"{model}-{depth}-llamacpp") for depth in depths(model)]
    results = [row["results"]["plan"] for row in measured if row]
    reasons = {None if "kl" in result else result["refused"] for result in results}
    if len(reasons) == 1 and (reason := reasons.pop()):
        return f"llama.cpp runs none of these plans: {reason}.\n"
    headings = ("plan", "KL, Q4", "KL, grouped", "KL, both", "excess")
    more = ("perplexity, Q4", "perplexity, both", "tokens/s, Q4")
    return by_variant(rows, model, "llamacpp", (*headings, *more), llamacpp_cells)


def texts(rows: dict[str, Row], model: str) -> str:
    """Paragraphs of the page, at the share at which models are trained as well."""
    shown = [depth for depth, share in depths(model).items() if share == DISTILLED]
    return _written(rows, model, shown, WORDS)


def _written(
    rows: dict[str, Row], model: str, shown: Iterable[int], most: int | None = None
) -> str:
    """What every variant writes at these depths, the first words of it; the original once."""
    parts: dict[str, str] = {}
    for depth in shown:
        row = rows.get(f"{model}-{depth}-text")
        for variant, result in row["results"].items() if row else []:
            name = "original" if variant == "original" else f"{depth}, {VARIANTS[variant]}"
            words = result["text"].removeprefix(PROMPT).replace("```", "'''").split()
            parts[name] = " ".join(words[:most]) + (" ..." if words[:most] < words else "")
    return "\n".join(f"{name}:\n\n```text\n{text}\n```\n" for name, text in parts.items())


def all_texts(rows: dict[str, Row]) -> str:
    """benchmarks/real_models/TEXTS.md: whole texts, at every depth."""
    parts = ["# What they write\n", f'"{PROMPT}", continued greedily for 80 tokens.\n']
    for model, (name, _) in MODELS.items():
        parts += [f"## {name}\n", _written(rows, model, depths(model))]
    return "\n".join(parts)


# heading -> kinds of row, what is said of it, and the function that makes one model's part
SECTIONS: dict[str, tuple[tuple[str, ...], str, Any]] = {
    "Predictions": (
        ("rivals", *HEALED),
        "The second half of wikitext-2 (valid), windows of 256 tokens; the first half was "
        "searched, chosen and refitted on. Loss and KL in nats per token over the original; "
        "*same*: per cent of tokens with the same prediction. What the "
        "[rivals](planning.md#what-people-would-do-instead) do stands there. On the right, all "
        "with the same closed-form refit. *Planner, refit* and "
        "*distilled*: after `heal` on its default text without a network, with 60 minutes of "
        "training; *wikitext*: on its default text with one, for which the first half stands in "
        "for the training part (half of it; the rest is Python's source); "
        "*accelerated*: with a few minutes of training on a GPU, on other text (see the row).",
        quality,
    ),
    "Tasks": (
        ("tasks",),
        "400 items of each task in lm-eval; per cent right, and how much of the accuracy above "
        "chance is kept, summed over tasks, with the paired 95 % interval.",
        lambda rows, model: by_variant(rows, model, "tasks", ("dtype", "kept", *TASKS), task_cells),
    ),
    "Sums and copying": (
        ("answers",),
        "Loss per token of GSM8K's reference answers, given the question, and its paired increase; "
        "copied: prompts with six worked examples whose greedy answer is right, in per cent, "
        "prompts read abreast or in the original order (`--prefill sequential`).",
        lambda rows, model: by_variant(
            rows,
            model,
            "answers",
            ("GSM8K loss", "increase", "copied", "copied, exact prefill"),
            lambda r: [
                with_error(r["loss"], 3),
                with_error(r.get("increase"), sign="+"),
                percent(r["copied"]),
                percent(r.get("copied_sequential")),
            ],
        ),
    ),
    "Long text": (
        ("long",),
        "KL by position, each column 1,024 tokens, up to 8,192; then 512 freely sampled tokens "
        "after each of 8 prompts: per cent of 4-grams that were there before, and KL along the "
        "original's own text.",
        lambda rows, model: by_variant(
            rows,
            model,
            "long",
            (*(f"to {n}k" for n in range(1, 9)), "repeated", "KL, own text"),
            long_cells,
        ),
    ),
    "Four bits in llama.cpp": (
        ("llamacpp",),
        "Q4_K_M by llama.cpp's quantiser. KL to the original in float32: quantised alone, grouped "
        "alone, both; *excess* is what both lose beyond the sum. A plan that llama.cpp refuses is "
        "wired `lp`.",
        four_bits,
    ),
    "What they write": (
        ("text",),
        f'"{PROMPT}", continued greedily. [All depths](../benchmarks/real_models/TEXTS.md).',
        texts,
    ),
}


BUY = (
    "What [layers left out](planning.md#what-people-would-do-instead) lose where they decode as "
    "fast as our plans: batch 1, float32, milliseconds per token, paired ratio to the original "
    "with its 95 % interval. On two cores fewer layers show, not fewer exchanges. "
    "`python benchmarks/buy.py` times it."
)


def page(rows: dict[str, Row]) -> str:
    """docs/evidence.md."""
    made = sorted({row["date"] for row in rows.values()})
    parts = [
        "# Evidence from real models\n",
        "SmolLM2-135M-Instruct (30 layers) and gemma-3-270m (18 layers), imported from GGUF files "
        "(`make test-real` fetches them), at 93, 83, 73 and 67 % of their layers. The plans come "
        "with the package (`--plan smollm2-25`). ± is one standard error. Every number is in a "
        "row, a JSON file beside the script, with the hashes of model and text, and the machine. "
        "`python benchmarks/real_models.py MODEL-DEPTH-KIND` measures a row, without a row it "
        "lists what is missing, and `python benchmarks/real_models.py --page` writes this page. "
        + (f"Measured {made[0]} to {made[-1]}.\n" if made else "Nothing is measured yet.\n"),
    ]
    bought = [f"{name}:\n\n{text}" for m, (name, _) in MODELS.items() if (text := buy(rows, m))]
    if bought:
        parts += [f"## Quality at equal speed\n\n{BUY}\n", *bought]
    unmeasured, measured = [], {name.rpartition("-")[2] for name in rows}
    for heading, (kinds, about, section) in SECTIONS.items():
        if measured.isdisjoint(kinds):
            unmeasured.append(f"`{kinds[0]}` ({heading[0].lower()}{heading[1:]})")
            continue
        parts.append(f"## {heading}\n")
        parts.append(f"{' '.join((f'KIND `{kinds[0]}`.', about, missing(rows, *kinds))).strip()}\n")
        for model, (name, _) in MODELS.items():
            if made_of := section(rows, model):
                parts += [f"{name}:\n", made_of]
    if unmeasured:
        parts += ["## Other kinds of row\n", f"{', '.join(unmeasured)}: {MISSING}.\n"]
    return "\n".join(parts)


def readme_table(rows: dict[str, Row]) -> str:
    """One block per model, at the share at which it was trained as well."""
    lines = []
    for model, (name, layers) in MODELS.items():
        (depth,) = (d for d, share in depths(model).items() if share == DISTILLED)
        of = {
            kind: row["results"]
            for kind in ("rivals", *HEALED, "tasks")
            if (row := rows.get(f"{model}-{depth}-{kind}"))
        }
        if "rivals" in of:
            perplexity = f"{of['rivals']['original']['perplexity']:.2f}"
            lines.append([f"{name}, {layers} → {depth}", "original", perplexity])
            methods = of["rivals"]["methods"]
            best = next(entry for entry in methods if entry["method"] == "planner")
            lines.append(["", "our plan, as it is", *_numbers(best), _accuracy_kept(of, "plan")])
            others = [entry for entry in methods if entry["method"] != "planner"]
            if others:
                rival = min(others, key=lambda entry: entry["kl"][0])
                lines.append(["", f"the best rival, {METHODS[rival['method']]}", *_numbers(rival)])
        for kind in HEALED:
            if kind in of:
                healed = {**of[kind][kind], "perplexity": of[kind][kind]["perplexity"][0]}
                lines.append(["", VARIANTS[kind], *_numbers(healed), _accuracy_kept(of, kind)])
        if not of:
            lines.append([f"{name}, {layers} → {depth}", MISSING])
    headings = ("model, layers → stages", "", "perplexity", "loss, nats", "KL, nats")
    made = table((*headings, "same next token, %", "accuracy above chance kept"), lines)
    return f"\n{made}\n"


def _numbers(entry: Row) -> list[str]:
    return [
        f"{entry['perplexity']:.2f}",
        with_error(entry["loss"], 3, "+"),
        with_error(entry["kl"], 3),
        percent(entry["agreement"]),
    ]


def _accuracy_kept(of: dict[str, Any], variant: str) -> str:
    return interval(of.get("tasks", {}).get(variant, {}).get("above_chance"))


def write_pages(rows: dict[str, Row]) -> None:
    PAGE.write_text(page(rows), encoding="utf-8")
    TEXTS.write_text(all_texts(rows), encoding="utf-8")
    text = MARKED.sub(lambda _: readme_table(rows), README.read_text("utf-8"))
    README.write_text(text, encoding="utf-8")
