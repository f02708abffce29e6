"""Accuracy on tasks of the lm-evaluation-harness: original and conversion on the same items.

The harness (EleutherAI, https://github.com/EleutherAI/lm-evaluation-harness, pip name lm-eval)
has the tasks: their data, prompts, metrics. It runs in this process, on models from `load`, one
task after another, all under the same settings. See docs/evaluation.md.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import importlib
import itertools
import json
import logging
import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from abreast.checkpoint import open_checkpoint, plan_for, resolve, sha256_of, write
from abreast.data import hub_or_cache
from abreast.errors import AbreastError, install
from abreast.evaluate import accuracy
from abreast.evaluate.accuracy import Answers, Evaluation
from abreast.evaluate.scoring import score_answers_only
from abreast.evaluate.statistics import metric_stderr
from abreast.model import device_of, fitting_dtype, inference, load
from abreast.plan import Norms, Plan
from abreast.runs import open_run, versions_of

OFFLINE = "offline"
FOLDER = Path(__file__).with_name("offline")
FEWSHOT_SEED = 1234  # the harness's own, so that examples are those of published numbers
Step = Callable[[str], None]


@dataclass(frozen=True)
class Tasks:
    """Tasks with their data and prompts, ready to run.

    loaded: the harness's task objects by name. rows: what to report, a task or, for a group such
    as mmlu, several pooled. fingerprints: hash of each task's settings, prompts and answers.
    limit: items per task, None for all. seed: of the few-shot examples.
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
    """Find tasks, get their data, make their prompts; needs no model.

    names: tasks, groups, tags or patterns (mmlu_*) of the harness or of a folder in include_path,
    "offline" for the suite of this package, or YAML files. num_fewshot: examples in each prompt;
    None for each task's own; a task whose file says 0 keeps that.

    Raises AbreastError where lm-eval is not installed, for unknown names (with the nearest ones),
    data that is neither in the cache nor available, and tasks that cannot be run.
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
    with contextlib.ExitStack() as stack:
        stack.enter_context(_quiet())
        _seeded(seed)
        manager = manager_class(include_path=paths, include_defaults=False)
        # Reading the harness's 14,000 task files takes seconds; often none of them is needed.
        if not all(_is_local(name, manager) for name in names):
            manager = manager_class(include_path=paths)
            stack.enter_context(hub_or_cache())
        loaded: dict[str, Any] = {}
        rows: dict[str, tuple[str, ...]] = {}
        for name in (match for pattern in names for match in _matches(pattern, manager)):
            entry = _loaded(name, manager)
            group = next(iter(entry.get("groups") or {}), None)
            parts = tuple(entry["tasks"])
            rows |= {group: parts} if group else {part: (part,) for part in parts}
            loaded |= entry["tasks"]
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
    norms: Norms = "own",
    step: Step = lambda message: None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Run tasks on a model and, after it, on the one to compare it with.

    model: original or converted; plan, norms: run it grouped, see `model.apply`. against: usually
    the original. batch_size: prompts at once. add_bos: whether prompts begin with the tokenizer's
    beginning-of-text token; None leaves that to the tokenizer. Only one model is in memory at a
    time.

    out: folder for every item's answer, OUT/NAME-KEY/TASK.jsonl, where KEY is a hash of everything
    that the answers depend on. Answers there are not computed again: an interrupted run resumes
    with the next task, and an original is evaluated once for all its conversions.

    Raises AbreastError as `load` does, and for models without a tokenizer and tasks whose answers
    are longer than the model can hold.
    """
    if batch_size < 1:
        raise AbreastError(f"batch size is {batch_size}; it needs at least 1")
    folder, _ = resolve(model, revision=revision)
    settings: dict[str, Any] = {
        "limit": tasks.limit,
        "seed": tasks.seed,
        "fewshot_seed": FEWSHOT_SEED + tasks.seed,
        "batch_size": batch_size,
        "add_bos": add_bos,
        "dtype": fitting_dtype(open_checkpoint(folder), dtype, device, step=step),
        "device": device,
        "versions": versions_of(("lm_eval", "torch", "transformers")),
    }
    if norms != "own":
        settings["norms"] = norms
    if out is not None:
        open_run(Path(out), "comparison", {"format": 1})
    subjects = [_Subject(folder, _plan(folder, plan), settings, trust_remote_code)]
    if against is not None:
        original, _ = resolve(against, revision=against_revision)
        subjects.insert(0, _Subject(original, None, settings, trust_remote_code))
    total, finished = len(subjects) * len(tasks.loaded), itertools.count(1)

    def advance() -> None:
        if progress is not None:
            progress(next(finished), total)

    *theirs, ours = [subject.answer(tasks, out, step, advance) for subject in subjects]
    before = theirs[0] if theirs else {}
    rows = {
        name: accuracy.score_task(name, ours[name], before.get(name), tasks.seed)
        for name in tasks.rows
    }
    mean, stderr = accuracy.mean_kept(rows)
    grouping = subjects[-1].plan
    about: dict[str, Any] = {
        "model": str(model),
        "plan": None if grouping is None else grouping.shorthand,
        "against": None if against is None else str(against),
        **settings,
        "tasks": {
            name: {
                "sha256": tasks.fingerprints[name],
                "version": str(task.VERSION),
                "num_fewshot": _shots(task),
            }
            for name, task in tasks.loaded.items()
        },
    }
    share = accuracy.above_chance_kept(rows, ours, before, _chance(tasks), tasks.seed)
    result = Evaluation(rows, mean, stderr, about, *share)
    if out is not None:
        write(Path(out) / "tasks.json", json.dumps(result.to_dict(), indent=1) + "\n")
    return result


@dataclass(frozen=True)
class _Subject:
    """A model to run tasks on, loaded only where an answer is missing."""

    folder: Path
    plan: Plan | None
    settings: dict[str, Any]
    trust_remote_code: bool

    def answer(
        self, tasks: Tasks, out: str | Path | None, step: Step, advance: Callable[[], None]
    ) -> dict[str, Answers]:
        """Answers by row, from disk where they are there; advance is called after each task."""
        saved_in = None if out is None else self._open_folder(Path(out))
        answers, model = {}, None
        for name, task in tasks.loaded.items():
            sha256 = tasks.fingerprints[name]
            saved = None if saved_in is None else accuracy.saved(saved_in, name, sha256)
            if saved is None:
                under = f" under {self.plan.shorthand}" if self.plan else ""
                step(f"{self.folder.resolve().name}{under}: {name}")
                model = model or self._load()
                saved, samples = _run_task(model, name, task, tasks, step)
                if saved_in is not None:
                    accuracy.save(saved_in, name, sha256, saved, samples)
            answers[name] = saved
            advance()
        return {
            row: accuracy.pool([answers[part] for part in parts])
            for row, parts in tasks.rows.items()
        }

    def _load(self) -> Any:
        """The harness's own model class around ours."""
        model, tokenizer = load(
            self.folder,
            plan=self.plan,
            dtype=self.settings["dtype"],
            device=self.settings["device"],
            trust_remote_code=self.trust_remote_code,
            norms=self.settings.get("norms", "own"),
        )
        if tokenizer is None:
            raise AbreastError(
                f"'{self.folder}' has no tokenizer; copy the original's files into its folder"
            )
        with _quiet():
            wrapped = _harness("models.huggingface").HFLM(
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=self.settings["batch_size"],
                add_bos_token=self.settings["add_bos"],
            )
        wrapped._device = device_of(model)  # also of a model that is spread over several
        for name in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
            setattr(wrapped, name, functools.partial(getattr(wrapped, name), disable_tqdm=True))
        score_answers_only(wrapped, self.settings["batch_size"])
        return wrapped

    def _open_folder(self, out: Path) -> Path:
        """The folder of the answers; its name is a hash of everything that they depend on."""
        files = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
        paths = {name: self.folder / name for name in files}
        identity = {
            "model": open_checkpoint(self.folder).sha256,
            "tokenizer": {n: sha256_of(path) for n, path in paths.items() if path.is_file()},
            "plan": None if self.plan is None else self.plan.shorthand,
            **self.settings,
        }
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
        return open_run(out / f"{self.folder.resolve().name}-{key}", "answers", identity)


def _harness(module: str) -> Any:
    try:
        return importlib.import_module(f"lm_eval.{module}")
    except ImportError as error:
        reason = "" if (error.name or "").startswith("lm_eval") else f" ({error})"
        raise AbreastError(
            f"tasks need the lm-evaluation-harness{reason}: {install('eval')}"
        ) from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness's warnings, and what tasks print, out of our own output."""
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
    """Whether a task needs none of the harness's own, as groups may."""
    if _is_file_name(name):
        text = Path(name).read_text(encoding="utf-8", errors="replace")
        return re.search("^(group|include):", text, re.MULTILINE) is None
    entry = manager.task_index.get(name)
    return entry is not None and entry.kind.name != "GROUP"


def _matches(name: str, manager: Any) -> list[str]:
    """Names of the tasks that a name or pattern stands for."""
    if name in manager.task_index or _is_file_name(name):
        return [name]
    if set(name) & set("*?[") and (matches := manager.match_tasks([name])):
        return list(matches)
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
    """Whether the Hub, or a data set on it, is out of reach."""
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
        runs_code = getattr(task, "UNSAFE_CODE", False)
        reason = "runs code that models write" if runs_code else "has images"
        raise AbreastError(f"task '{name}' {reason}; use lm_eval itself for it")
    # As simple_evaluate does it.
    if num_fewshot is not None and task.get_config("num_fewshot") != 0:
        task.set_config("num_fewshot", num_fewshot)
    elif task.get_config("num_fewshot") is None:
        task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(seed=seed)
    try:
        task.build_all_requests(limit=limit, rank=0, world_size=1)
        targets = [task.doc_to_target(doc) for _, doc in task.doc_iterator(limit=limit)]
        content = [task.dump_config(), [i.args for i in task.instances], targets]
    except Exception as error:  # templates and Python of the task run here
        raise AbreastError(f"task '{name}' cannot be used: {_reason(error)}") from None
    (content[0].get("metadata") or {}).pop("config_source", None)  # where it lies changes nothing
    text = re.sub(r" at 0x[0-9a-f]+", "", json.dumps(content, sort_keys=True, default=str))
    return hashlib.sha256(text.encode()).hexdigest()


def _shots(task: Any) -> int:
    return int(task.get_config("num_fewshot") or 0)


def _chance(tasks: Tasks) -> dict[str, np.ndarray]:
    """How often a guess is right, item by item, of the rows that are multiple choice throughout."""
    n, loaded = tasks.limit, tasks.loaded
    rows = {row: [loaded[part] for part in parts] for row, parts in tasks.rows.items()}
    return {
        row: np.array([1 / len(t.doc_to_choice(d)) for t in of for _, d in t.doc_iterator(limit=n)])
        for row, of in rows.items()
        if all(task.OUTPUT_TYPE == "multiple_choice" for task in of)
    }


def _plan(folder: Path, plan: Plan | str | None) -> Plan | None:
    """The plan itself: a file's name says nothing about what is in it."""
    return None if plan is None else plan_for(open_checkpoint(folder), plan)


def _run_task(
    model: Any, name: str, task: Any, tasks: Tasks, step: Step
) -> tuple[Answers, list[dict[str, Any]]]:
    """A model's answers to one task, and the harness's record of each item."""
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
        output = _harness("evaluator").evaluate(
            model,
            {"tasks": {name: task}, "groups": {}, "group_map": {}},
            limit=tasks.limit,
            bootstrap_iters=0,  # standard errors come from the items below
        )
        truncated = _truncated(model, task, longest)
    if truncated:
        step(f"{name}: {truncated} items are longer than {model.max_length} tokens and were cut")
    metrics, items = {}, {}
    for key, value in output["results"][name].items():
        metric, _, chosen = key.partition(",")
        if not chosen or metric.endswith("_stderr") or not isinstance(value, float | int):
            continue
        label = metric if chosen == "none" else key
        items[label] = [
            _plain(sample[metric])
            for sample in output["samples"][name]
            if sample["filter"] == chosen and metric in sample
        ]
        metrics[label] = {
            "value": float(value),
            "stderr": metric_stderr(float(value), items[label]),
            "higher_is_better": bool(output["higher_is_better"][name].get(metric, True)),
        }
    if not metrics:
        raise AbreastError(f"task '{name}' gives no number; leave it out")
    answers = Answers(str(task.VERSION), _shots(task), truncated, metrics, items)
    return answers, output["samples"][name]


def _truncated(model: Any, task: Any, longest: int) -> int:
    """Number of items whose prompts the model cannot hold; the harness cuts off their beginning."""
    if task.OUTPUT_TYPE == "loglikelihood_rolling":  # cut into windows instead
        return 0
    generates = task.OUTPUT_TYPE == "generate_until"
    room = model.max_length - longest if generates else model.max_length + 1
    truncated = set()
    for instance in task.instances:
        text = "".join(part for part in instance.args if isinstance(part, str))
        if len(model.tok_encode(text)) > room:
            truncated.add(instance.doc_id)
    return len(truncated)


def _plain(value: Any) -> Any:
    """Numbers and pairs of numbers as Python's own; anything else as text."""
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    try:
        return float(value)
    except (TypeError, ValueError):
        return str(value)
