"""Rows of docs/evidence.md: two real models at four depths, one command per row.

Without a row: all rows, what each lacks, and about how many minutes it takes on two cores.

    python benchmarks/real_models.py
    python benchmarks/real_models.py smollm2-25-tasks
    python benchmarks/real_models.py smollm2-25-accelerated --text prose.txt --minutes 10  # a GPU
    python benchmarks/real_models.py --take OUT    # rows and plans from benchmarks/rivals.py -o OUT
    python benchmarks/real_models.py --page        # docs/evidence.md and README's table

--models holds smollm2/ and gemma3/, as `make test-real` leaves them in .real-models; --data holds
wikitext2-valid.txt, gsm8k.jsonl ({"question", "target"}) and the tasks as JSON Lines ({"question",
"choices", "answer"}; winogrande with one "_" to fill). A row keeps the hashes of the model and of
these files; one that rests on others, or on another plan than the package has, is measured again.
An interrupted row goes on with what --work has, one that lacks variants with what it holds itself.
The plan of a depth is the package's; the row "rivals" searches where there is none, and --take puts
what it found there. Rows of llama.cpp run in the environment of `make test-gguf`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

from _evidence import MODELS, ROOT, ROWS, Row, depths, every_row, read_rows, with_error, write_pages
from _measures import (
    KINDS,
    PLANS,
    SMALL,
    WIKITEXT,
    WINDOW,
    Result,
    Setting,
    Subject,
    say,
    variants_of,
)

from abreast.checkpoint import open_checkpoint, sha256_of, write
from abreast.errors import AbreastError
from abreast.plan import Plan
from abreast.planner import CalibrationSettings, calibrate
from abreast.rivals import BASELINES_FILE
from abreast.runs import hardware, read_journal, versions_of


def measure_row(setting: Setting, name: str, only: Sequence[str] = ()) -> Row:
    """Measure what is missing of a row, keep it in the work folder and in `rows`.

    only: these variants, and the original. The row then says which others it lacks; a later call
    goes on with it, elsewhere too.
    """
    model, depth, kind = every_row()[name]
    subject, started = Subject(setting, model, depth), time.monotonic()
    rests_on = hashes(setting, subject.original, KINDS[kind].files)
    every = variants_of(kind, model, depth)
    here = hardware(replace(subject, variant=every[-1]).device)
    before = unfinished(setting, name, subject.groups, rests_on)
    results = {variant: result for variant, result in before.items() if variant not in only}
    for variant in every:
        # the others are compared with the original
        if variant in results or (only and variant not in (*only, "original")):
            continue
        of = replace(subject, variant=variant)
        basis = {**rests_on, "sizes": repr(setting.sizes), "dtype": setting.dtype}
        basis |= {} if variant == "original" else {"plan": subject.groups}
        stem = f"{model}-{kind}" if variant == "original" else name
        file = setting.work / "parts" / f"{stem}-{variant}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        saved = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        if saved.get("basis") != basis:
            say(f"{name}: {variant}")
            began = time.monotonic()
            result = KINDS[kind].measure(of, results.get("original"))
            saved = {"basis": basis, "result": result, "minutes": (time.monotonic() - began) / 60}
            saved["machine"] = hardware(of.device)
            write(file, json.dumps(saved))
        machine = {"machine": saved.get("machine", here)}
        results[variant] = {**saved["result"], "minutes": saved["minutes"], **machine}
    for result in results.values():
        if result["machine"] == here:
            del result["machine"]
    done = [variant for variant in every if variant in results]
    short = {v: {k: x for k, x in results[v].items() if k != "items"} for v in done}
    lacks = [variant for variant in every if variant not in results]
    more = {"lacks": lacks} if lacks else {}
    row = record(name, subject.groups, rests_on, short, machine=here, **more)
    state = f"lacks {', '.join(lacks)}" if lacks else "done"
    say(f"{name}: {state}, {(time.monotonic() - started) / 60:.1f} minutes")
    return save(setting, name, row)


def unfinished(
    setting: Setting, name: str, plan: str, rests_on: dict[str, str]
) -> dict[str, Result]:
    """What a row has that lacks some variants; none of a finished one, another plan or dtype.

    Not the original's part where others pair with its items, which are not in the row.
    """
    row = read_rows(setting.rows).get(name, {})
    if "lacks" not in row or (row["plan"], row["rests_on"]) != (plan, rests_on):
        return {}
    kind = KINDS[every_row()[name][2]]
    return {
        variant: {"machine": row["machine"], **result}
        for variant, result in row["results"].items()
        if (variant != "original" or not kind.pairs)
        and result.get("dtype", setting.dtype) == setting.dtype
    }


def record(name: str, plan: str, rests_on: dict[str, str], results: Any, **more: Any) -> Row:
    model, depth, _ = every_row()[name]
    return {
        "row": name,
        "model": MODELS[model][0],
        "layers": MODELS[model][1],
        "depth": depth,
        "plan": plan,
        "command": f"python benchmarks/real_models.py {name}",
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": hardware("cpu"),
        "versions": versions_of(("torch", "transformers", "lm_eval", "xllamacpp")),
        "rests_on": rests_on,
        **more,
        "results": results,
    }


def save(setting: Setting, name: str, row: Row) -> Row:
    """Numbers with six digits: more say nothing."""
    short = json.loads(json.dumps(row), parse_float=lambda text: float(f"{float(text):.6g}"))
    setting.rows.mkdir(parents=True, exist_ok=True)
    write(setting.rows / f"{name}.json", json.dumps(short, indent=1, ensure_ascii=False) + "\n")
    return short


def hashes(setting: Setting, model: Path, files: Sequence[str]) -> dict[str, str]:
    missing = [file for file in files if not (setting.data / file).is_file()]
    if missing or not model.is_dir():
        raise AbreastError(
            f"no {missing[0] if missing else model.name} here; name the folders with --models and "
            "--data, or in ABREAST_REAL_MODELS and ABREAST_EVAL_DATA"
        )
    return {"model": hash_of(model), **{file: hash_of(setting.data / file) for file in files}}


@cache
def hash_of(path: Path) -> str:
    """Of a checkpoint's weights, or of a file."""
    return open_checkpoint(path).weights_sha256 if path.is_dir() else sha256_of(path)


def rivals(setting: Setting, model: str) -> None:
    """Search, choose, refit and judge at all depths with benchmarks/rivals.py; take its rows."""
    out, first, second = setting.work / f"{model}-rivals", setting.half(0), setting.half(1)
    known = [Subject(setting, model, depth) for depth in depths(model)]
    plans = [PLANS / f"{model}-{subject.depth}.yaml" for subject in known]
    named = [part for s in known for part in ("--plan", s.groups)] if all_there(plans) else []
    texts = ["--data", str(first), "--judge-data", str(second)]
    windows = max(16, setting.sizes.tokens // WINDOW)
    sizes = ["--windows", str(windows // 2), "--judge-windows", str(windows)]
    script, folder = str(ROOT / "benchmarks" / "rivals.py"), str(setting.models / model)
    command = [sys.executable, script, folder, *texts, *sizes, "--methods", "all", *named]
    if subprocess.run([*command, "-o", str(out)]).returncode:
        raise AbreastError("benchmarks/rivals.py failed, see above; the same call goes on")
    take(setting, out)


def all_there(files: Sequence[Path]) -> bool:
    return all(file.is_file() for file in files)


def take(setting: Setting, out: Path) -> list[str]:
    """Rows and plans from the folder that benchmarks/rivals.py wrote; their names.

    Raises AbreastError unless it judged on the second half of the text, on the model in --models.
    """
    baselines = json.loads((out / BASELINES_FILE).read_text("utf-8"))
    basis, layers = baselines["rests_on"], baselines["rests_on"]["num_layers"]
    model = next((key for key, (_, count) in MODELS.items() if count == layers), None)
    if model is None:
        raise AbreastError(f"'{out}' is of a model of {layers} layers; none here has so many")
    folder = setting.models / model
    rests_on = hashes(setting, folder, (WIKITEXT,))
    with tempfile.TemporaryDirectory() as empty:
        settings = CalibrationSettings(
            data=str(setting.half(1)), num_windows=basis["num_windows"], window=basis["window"]
        )
        expected = calibrate(folder, empty, replace(settings, dtype=basis["dtype"])).identity
    for key in ("model", "tokens"):
        if basis[key] != expected[key]:
            raise AbreastError(f"'{out}' rests on another {key} than --models and --data hold")
    chosen = json.loads((out / "calibration" / "measure.json").read_text("utf-8"))["identity"]
    lines = read_journal(out / "rivals" / "held-out")
    program = next(name for name, _ in lines)
    nll = sum(sum(row[1] for row in line["sums"]) for (n, _), line in lines.items() if n == program)
    original = nll / baselines["plans"][0]["tokens"]
    names = []
    for depth in depths(model):
        entries = [entry for entry in baselines["plans"] if entry["depth"] == depth]
        ours = next((e for e in entries if (e["method"], e["refit"]) == ("planner", False)), None)
        if ours is None:
            continue
        again = {entry["method"]: entry for entry in entries if entry["refit"]}
        methods = [
            {
                "method": entry["method"],
                "plan": entry["plan"],
                "perplexity": math.exp(original + entry["loss_increase"]),
                **entry_numbers(entry),
                **{f"refit_{k}": v for k, v in entry_numbers(again.get(entry["method"])).items()},
            }
            for entry in sorted(entries, key=lambda e: (e["method"] != "planner", e["kl"]))
            if not entry["refit"]
        ]
        results = {"original": {"perplexity": math.exp(original)}, "methods": methods}
        more = {"tokens": ours["tokens"], "chosen_on": chosen["num_windows"] * chosen["window"]}
        more |= {"full_forwards": baselines["full_forwards"]}
        name = f"{model}-{depth}-rivals"
        save(setting, name, record(name, ours["plan"], rests_on, results, **more))
        if setting.rows == ROWS:  # else it only tries
            write_plan(model, depth, ours, basis, rests_on["model"])
        names.append(name)
    return names


def entry_numbers(entry: Row | None) -> Result:
    """Value and error of what is shown; None where it was not measured."""
    keys = {"loss": "loss_increase", "kl": "kl", "agreement": "agreement"}
    errors = {"loss": "loss_stderr", "kl": "kl_stderr", "agreement": "agreement_stderr"}
    return {k: None if entry is None else [entry[keys[k]], entry[errors[k]]] for k in keys}


def write_plan(model: str, depth: int, ours: Row, basis: Row, sha256: str) -> None:
    name, layers = MODELS[model]
    plan = Plan.parse(ours["plan"], layers, source=name, sha256=sha256)
    numbers = entry_numbers(ours)
    cells = with_error(numbers["loss"], sign="+"), with_error(numbers["kl"])
    loss, kl = (cell.replace("±", " ± ") for cell in cells)
    write(
        PLANS / f"{model}-{depth}.yaml",
        f"# {basis['num_windows'] * basis['window']:,} tokens of wikitext-2 (valid, second half): "
        f"loss {loss}, KL {kl} nats.\n# Searched on the first half. The hash is of the "
        f"weights that `abreast import` makes of the GGUF file.\n{plan.to_yaml()}",
    )


def show(setting: Setting) -> None:
    """Every row: done, made of something else, or missing, and how long it takes."""
    rows, total = read_rows(setting.rows), 0.0
    for name, (model, depth, kind) in every_row().items():
        row, file = rows.get(name), PLANS / f"{model}-{depth}.yaml"
        plan = Plan.load(file).shorthand if file.is_file() else None
        minutes = 25.0 if kind == "rivals" else 0.0
        if kind != "rivals":
            minutes = KINDS[kind].minutes * len(variants_of(kind, model, depth))
        state = "missing" if row is None else "unfinished" if "lacks" in row else "done"
        if row is not None and row["plan"] != plan:
            state = "of another plan"
        folder, files = setting.models / model, KINDS[kind].files if kind in KINDS else (WIKITEXT,)
        if row and folder.is_dir() and all_there([setting.data / file for file in files]):
            state = state if row["rests_on"] == hashes(setting, folder, files) else "of other data"
        total += 0 if state == "done" else minutes
        print(f"{name:24}  {state:16}  {'' if state == 'done' else f'{minutes:5.1f} min'}")
    print(f"\nAbout {total / 60:.1f} hours in all, on two cores.")


def main() -> None:
    formatter = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("row", nargs="*", help="rows to measure; none: list them")
    parser.add_argument("--models", default=os.environ.get("ABREAST_REAL_MODELS", ".real-models"))
    parser.add_argument("--data", default=os.environ.get("ABREAST_EVAL_DATA", "."))
    parser.add_argument("--work", default=".real-models/work", help="unfinished rows, checkpoints")
    parser.add_argument(
        "--text",
        type=Path,
        action="append",
        default=[],
        help="rows accelerated: text to train on, or token ids (.npy)",
    )
    parser.add_argument("--minutes", type=float, default=10, help="rows accelerated: of training")
    parser.add_argument("--device", help="where. Default: cuda in rows accelerated, else cpu")
    parser.add_argument("--dtype", default="bfloat16", help="rows tasks: of the models")
    parser.add_argument("--variants", help="only the original and these of a row: plan,refit")
    parser.add_argument("--take", metavar="OUT", help="what benchmarks/rivals.py left in OUT")
    parser.add_argument("--page", action="store_true", help="write docs/evidence.md and README")
    parser.add_argument("--small", action="store_true", help="try rows; they go to WORK/small")
    options = parser.parse_args()
    setting = Setting(
        Path(options.models),
        Path(options.data),
        Path(options.work),
        text=tuple(options.text),
        minutes=options.minutes,
        device=options.device,
        dtype=options.dtype,
    )
    if options.small:
        work = setting.work / "small"
        setting = replace(setting, work=work, rows=work, sizes=SMALL)
    try:
        run(setting, options)
    except AbreastError as error:
        sys.exit(f"real_models: {error}")


def run(setting: Setting, options: argparse.Namespace) -> None:
    if unknown := [name for name in options.row if name not in every_row()]:
        raise AbreastError(f"no row '{unknown[0]}'; without one, this lists them all")
    if options.take:
        print("\n".join(take(setting, Path(options.take))))
    for name in options.row:
        model, _, kind = every_row()[name]
        if kind == "rivals":
            rivals(setting, model)
        else:
            measure_row(setting, name, options.variants.split(",") if options.variants else ())
    if options.page:
        write_pages(read_rows(setting.rows))
    if not (options.row or options.take or options.page):
        show(setting)


if __name__ == "__main__":
    main()
