"""Accuracy on tasks, by the lm-evaluation-harness: original and conversion on the same items.

The harness (EleutherAI, https://github.com/EleutherAI/lm-evaluation-harness, pip name lm-eval)
knows the tasks: their data, prompts, metrics. It runs here, in this process, on the models that
`load` gives, one task after another, everything under the same settings. See docs/evaluation.md.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import importlib
import json
import logging
import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from abreast.checkpoint import open_checkpoint, resolve, sha256_of, write
from abreast.errors import AbreastError
from abreast.evaluate.accuracy import Answers, Evaluation, mean_kept, pool, score_task
from abreast.evaluate.statistics import metric_stderr
from abreast.families import num_layers_of
from abreast.model import inference, load
from abreast.plan import Plan
from abreast.runs import model_hash, open_run

OFFLINE = "offline"
FOLDER = Path(__file__).with_name("offline")
FEWSHOT_SEED = 1234  # the harness's own, so that examples are those of published numbers
Step = Callable[[str], None]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Tasks:
    """Tasks with their data and prompts, ready to be put to a model.

    loaded: the harness's task objects by name. rows: what to report, each one task or, for a group
    such as mmlu, several taken together. fingerprints: hash of each task's settings and of every
    prompt and answer in it. limit: items per task, None for all. seed: of the few-shot examples.
    """

    loaded: dict[str, Any]
    rows: dict[str, tuple[str, ...]]
    fingerprints: dict[str, str]
    limit: int | None
    seed: int


def local_data(file: str, examples: int = 0, config_source: str = "", **_: Any) -> Any:
    """Data of a task from a JSON Lines file next to its YAML file, for `custom_dataset` there.

    examples: that many rows, the first ones, are split "train", for few-shot examples; the others
    are split "test".
    """
    from datasets import Dataset, DatasetDict

    text = Path(config_source).with_name(file).read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    splits = {"train": rows[:examples], "test": rows[examples:]}
    return DatasetDict({name: Dataset.from_list(part) for name, part in splits.items() if part})


def find_tasks(
    names: Sequence[str],
    *,
    include_path: Sequence[str | Path] = (),
    num_fewshot: int | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Tasks:
    """Find tasks, get their data, make their prompts. No model is needed for it.

    names: tasks, groups, tags or patterns (mmlu_*) that the harness or a folder in include_path
    knows, "offline" for the suite of this package, or YAML files. num_fewshot: examples in each
    prompt; None leaves each task its own, and a task that says 0 in its file keeps that.

    Raises AbreastError where lm-eval is not installed, for unknown names (with the nearest ones),
    data that is neither in the cache nor to be had, and tasks that cannot be run.
    """
    manager_class = _harness("tasks").TaskManager
    names = [name.strip() for name in names if name.strip()]
    if (num_fewshot or 0) < 0 or (limit is not None and limit < 1):
        raise AbreastError("--num-fewshot must be at least 0, and --limit at least 1")
    for folder in include_path:
        if not Path(folder).is_dir():
            raise AbreastError(f"no folder '{folder}' with task files; check --include-path")
    for name in names:
        if _is_file_name(name) and not Path(name).is_file():
            raise AbreastError(f"no task file '{name}'; check the path")
    paths = [str(FOLDER), *map(str, include_path)]
    with _quiet():
        _seeded(seed)
        manager = manager_class(include_path=paths, include_defaults=False)
        # Reading the harness's 14,000 task files takes seconds; often none of them is needed.
        if not all(_is_local(name, manager) for name in names):
            manager = manager_class(include_path=paths)
        loaded: dict[str, Any] = {}
        rows: dict[str, tuple[str, ...]] = {}
        for name in (each for asked in names for each in _spelled_out(asked, manager)):
            found = _loaded(name, manager)
            group = next(iter(found.get("groups") or {}), None)
            parts = tuple(found["tasks"])
            rows |= {group: parts} if group else {part: (part,) for part in parts}
            loaded |= found["tasks"]
        fingerprints = {
            name: _prepare(name, task, num_fewshot, limit, FEWSHOT_SEED + seed)
            for name, task in loaded.items()
        }
    if not loaded:
        raise AbreastError(f"no task to run; name some, such as {OFFLINE}")
    return Tasks(loaded, rows, fingerprints, limit, seed)


def evaluate_tasks(
    model: str | Path,
    tasks: Tasks,
    *,
    against: str | Path | None = None,
    plan: Plan | str | None = None,
    out: str | Path | None = None,
    batch_size: int = 1,
    add_bos: bool | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    revision: str | None = None,
    against_revision: str | None = None,
    trust_remote_code: bool = False,
    step: Step = lambda message: None,
    progress: Progress | None = None,
) -> Evaluation:
    """Put tasks to a model and, one after the other, to the one it is to be compared with.

    model: original or converted; plan: run it grouped under this plan. against: usually the
    original. batch_size: prompts at once. add_bos: whether prompts begin with the tokenizer's
    beginning-of-text token; None leaves that to the tokenizer. Only one model is in memory at a
    time.

    out: folder that keeps every item's answer, OUT/NAME-KEY/TASK.jsonl, where KEY is a hash of
    everything that the answers depend on. What is there is not done again: an interrupted run goes
    on with the next task, and an original is evaluated once for all its conversions.

    Raises AbreastError as `load` does, and for models without a tokenizer and tasks whose answers
    are longer than the model can hold.
    """
    if batch_size < 1:
        raise AbreastError(f"batch size is {batch_size}; it needs at least 1")
    given: dict[str, Any] = {
        "batch_size": batch_size,
        "add_bos": add_bos,
        "dtype": dtype,
        "device": device,
    }
    settings: dict[str, Any] = {
        "limit": tasks.limit,
        "seed": tasks.seed,
        "fewshot_seed": FEWSHOT_SEED + tasks.seed,
        **given,
        "versions": _versions(),
    }
    if out is not None:
        open_run(Path(out), "comparison", {"format": 1})
    num_models = 1 if against is None else 2
    done = 0

    def answers(folder: Path, chosen: Plan | None) -> dict[str, Any]:
        nonlocal done
        found = {}
        kept = None if out is None else _folder(Path(out), folder, chosen, settings)
        ask = functools.cache(
            lambda: _model(folder, chosen, trust_remote_code=trust_remote_code, **given)
        )
        for name, task in tasks.loaded.items():
            text = tasks.fingerprints[name]
            saved = None if kept is None else _saved(kept, name, text)
            if saved is None:
                under = f" under {chosen.shorthand}" if chosen else ""
                step(f"{folder.resolve().name}{under}: {name}")
                saved, samples = _run(ask(), name, task, tasks, step)
                if kept is not None:
                    _save(kept, name, text, saved, samples)
            found[name] = saved
            done += 1
            if progress is not None:
                progress(done, num_models * len(tasks.loaded))
        return {row: pool([found[part] for part in parts]) for row, parts in tasks.rows.items()}

    folder, _ = resolve(model, revision=revision)
    grouping = _plan(folder, plan)
    theirs = None
    if against is not None:
        theirs = answers(resolve(against, revision=against_revision)[0], None)
    ours = answers(folder, grouping)
    rows = {
        name: score_task(name, ours[name], None if theirs is None else theirs[name], tasks.seed)
        for name in tasks.rows
    }
    mean, stderr = mean_kept(rows)
    about: dict[str, Any] = {
        "model": str(model),
        "plan": None if grouping is None else grouping.shorthand,
        "against": None if against is None else str(against),
        **settings,
        "tasks": {name: {"sha256": text} for name, text in tasks.fingerprints.items()},
    }
    for name, task in tasks.loaded.items():
        about["tasks"][name] |= {"version": str(task.VERSION), "num_fewshot": _shots(task)}
    result = Evaluation(rows, mean, stderr, about)
    if out is not None:
        write(Path(out) / "tasks.json", json.dumps(result.to_dict(), indent=1) + "\n")
    return result


def _harness(module: str) -> Any:
    try:
        return importlib.import_module(f"lm_eval.{module}")
    except ImportError as error:
        reason = "" if (error.name or "").startswith("lm_eval") else f" ({error})"
        raise AbreastError(
            f"tasks need the lm-evaluation-harness{reason}: pip install 'abreast[eval]'"
        ) from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Neither the harness's warnings, nor what tasks print, in between our own output."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _seeded(seed: int) -> None:
    """With seed 0 these are the harness's own."""
    random.seed(seed)
    np.random.seed(FEWSHOT_SEED + seed)
    torch.manual_seed(FEWSHOT_SEED + seed)


def _is_file_name(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _is_local(name: str, manager: Any) -> bool:
    """Whether a task of this suite or the user's, or a file, can do without the harness's own.

    Groups may be made of those.
    """
    if _is_file_name(name):
        text = Path(name).read_text(encoding="utf-8", errors="replace")
        return re.search("^(group|include):", text, re.MULTILINE) is None
    entry = manager.task_index.get(name)
    return entry is not None and entry.kind.name != "GROUP"


def _spelled_out(name: str, manager: Any) -> list[str]:
    if name in manager.task_index or _is_file_name(name):
        return [name]
    found = manager.match_tasks([name]) if set(name) & set("*?[") else []
    if found:
        return list(found)
    if Path(name).is_dir():
        raise AbreastError(f"'{name}' is a folder; use --include-path and name its tasks")
    near = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else f"try {OFFLINE}, or name a YAML file"
    raise AbreastError(f"no task '{name}'; {hint}")


def _loaded(name: str, manager: Any) -> Any:
    try:
        return manager.load([name])
    except Exception as error:  # task files can hold any mistake, in YAML, templates or Python
        if _is_network(error):
            raise AbreastError(
                f"the data of task '{name}' is not in the cache and cannot be fetched "
                f"({_reason(error)}); run once with the network, or use --tasks {OFFLINE}"
            ) from None
        raise AbreastError(f"task '{name}' cannot be used: {_reason(error)}") from None


def _is_network(error: Exception) -> bool:
    """Whether it means that the Hub, or a data set on it, is out of reach."""
    from datasets.exceptions import DatasetNotFoundError

    top = type(error).__module__.partition(".")[0]
    clients = {"huggingface_hub", "httpx", "httpx2", "requests"}
    return isinstance(error, ConnectionError | DatasetNotFoundError) or top in clients


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 300 else text[:300] + " ..."


def _prepare(name: str, task: Any, num_fewshot: int | None, limit: int | None, seed: int) -> str:
    """Make the task's prompts; return the hash of everything in it that a score depends on."""
    if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
        kind = (
            "runs code that models write" if getattr(task, "UNSAFE_CODE", False) else "has images"
        )
        raise AbreastError(f"task '{name}' {kind}; use lm_eval itself for it")
    # As simple_evaluate does it.
    if num_fewshot is not None and task.get_config("num_fewshot") != 0:
        task.set_config("num_fewshot", num_fewshot)
    elif task.get_config("num_fewshot") is None:
        task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(seed=seed)
    try:
        task.build_all_requests(limit=limit, rank=0, world_size=1)
        targets = [task.doc_to_target(doc) for _, doc in task.doc_iterator(limit=limit)]
        content = [task.dump_config(), [each.args for each in task.instances], targets]
    except Exception as error:  # templates and Python of the task run here
        raise AbreastError(f"task '{name}' cannot be used: {_reason(error)}") from None
    (content[0].get("metadata") or {}).pop("config_source", None)  # where it lies changes nothing
    text = re.sub(r" at 0x[0-9a-f]+", "", json.dumps(content, sort_keys=True, default=str))
    return hashlib.sha256(text.encode()).hexdigest()


def _shots(task: Any) -> int:
    return int(task.get_config("num_fewshot") or 0)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    from abreast.version import __version__

    names = ("lm_eval", "torch", "transformers")
    return {"abreast": __version__, **{name: version(name) for name in names}}


def _plan(folder: Path, plan: Plan | str | None) -> Plan | None:
    """The plan itself: a file's name says nothing about what is in it."""
    if not isinstance(plan, str):
        return plan
    config = open_checkpoint(folder).config
    return Plan.read(plan, num_layers_of(config.get("text_config", config)))


def _folder(out: Path, model: Path, plan: Plan | None, settings: dict[str, Any]) -> Path:
    """The folder of a model's answers, its name made of everything that they depend on."""
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    identity = {
        "model": model_hash(model),
        "tokenizer": {n: sha256_of(model / n) for n in names if (model / n).is_file()},
        "plan": None if plan is None else plan.shorthand,
        **settings,
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    return open_run(out / f"{model.resolve().name}-{key}", "answers", identity)


def _model(
    folder: Path, plan: Plan | None, *, batch_size: int, add_bos: bool | None, **options: Any
) -> Any:
    """The harness's own model class around ours."""
    model, tokenizer = load(folder, plan=plan, **options)
    if tokenizer is None:
        raise AbreastError(
            f"'{folder}' has no tokenizer; copy the original's files into its folder"
        )
    with _quiet():
        wrapped = _harness("models.huggingface").HFLM(
            pretrained=model, tokenizer=tokenizer, batch_size=batch_size, add_bos_token=add_bos
        )
    for name in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        setattr(wrapped, name, functools.partial(getattr(wrapped, name), disable_tqdm=True))
    return wrapped


def _run(
    model: Any, name: str, task: Any, tasks: Tasks, step: Step
) -> tuple[Answers, list[dict[str, Any]]]:
    """A model's answers to one task, and what the harness has to say about each item."""
    longest = (task.get_config("generation_kwargs") or {}).get("max_gen_toks", model.max_gen_toks)
    if task.OUTPUT_TYPE == "generate_until" and longest >= model.max_length:
        raise AbreastError(
            f"task '{name}' asks for answers of up to {longest} tokens, the model holds "
            f"{model.max_length} in all; leave the task out"
        )
    with _quiet(), inference(model.model):
        _seeded(tasks.seed)
        task.set_fewshot_seed(seed=FEWSHOT_SEED + tasks.seed)
        # What simple_evaluate calls after setting up the task, which `_prepare` did; it would also
        # run `pip list` each time.
        found = _harness("evaluator").evaluate(
            model,
            {"tasks": {name: task}, "groups": {}, "group_map": {}},
            limit=tasks.limit,
            bootstrap_iters=0,  # standard errors come from the items below
        )
        truncated = _truncated(model, task, longest)
    if truncated:
        step(f"{name}: {truncated} items are longer than {model.max_length} tokens and were cut")
    metrics, items = {}, {}
    for key, value in found["results"][name].items():
        metric, _, chosen = key.partition(",")
        if not chosen or metric.endswith("_stderr") or not isinstance(value, float | int):
            continue
        of_items = [
            s[metric] for s in found["samples"][name] if s["filter"] == chosen and metric in s
        ]
        label = metric if chosen == "none" else key
        items[label] = [_plain(each) for each in of_items]
        metrics[label] = {
            "value": float(value),
            "stderr": metric_stderr(float(value), items[label]),
            "higher_is_better": bool(found["higher_is_better"][name].get(metric, True)),
        }
    if not metrics:
        raise AbreastError(f"task '{name}' gives no number; leave it out")
    answers = Answers(str(task.VERSION), _shots(task), truncated, metrics, items)
    return answers, found["samples"][name]


def _truncated(model: Any, task: Any, longest: int) -> int:
    """How many items' prompts the model cannot hold; the harness cuts their beginning off."""
    if task.OUTPUT_TYPE == "loglikelihood_rolling":  # cut into windows instead
        return 0
    room = model.max_length - longest if task.OUTPUT_TYPE == "generate_until" else None
    cut = set()
    for each in task.instances:
        text = "".join(part for part in each.args if isinstance(part, str))
        if len(model.tok_encode(text)) > (model.max_length + 1 if room is None else room):
            cut.add(each.doc_id)
    return len(cut)


def _plain(value: Any) -> Any:
    """Numbers and pairs of numbers as Python's own; anything else as text."""
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    try:
        return float(value)
    except (TypeError, ValueError):
        return str(value)


def _save(
    folder: Path, name: str, fingerprint: str, answers: Answers, samples: list[dict[str, Any]]
) -> None:
    """One line per item, then the scores, which say that the lines are complete."""
    stem = _stem(name)
    lines = (json.dumps(each, default=str, ensure_ascii=False) + "\n" for each in samples)
    write(folder / f"{stem}.jsonl", "".join(lines))
    record = {"task": name, "sha256": fingerprint, "answers": asdict(answers)}
    write(folder / f"{stem}.json", json.dumps(record) + "\n")


def _stem(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name)


def _saved(folder: Path, name: str, fingerprint: str) -> Answers | None:
    path = folder / f"{_stem(name)}.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if (record["task"], record["sha256"]) != (name, fingerprint):
            return None
        return Answers(**record["answers"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
