"""Running changed models on windows of text: on disk, resumable, over several devices."""

from __future__ import annotations

import json
import math
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from abreast.checkpoint import open_checkpoint, resolve
from abreast.data import TokenStream
from abreast.errors import AbreastError
from abreast.model import (
    Pace,
    Program,
    check_device,
    check_norms,
    decoder_layers,
    fitting_dtype,
    load,
    minutes_text,
    name_of,
    pace_of,
    planned,
    run_programs,
    split,
)
from abreast.runs import (
    JOURNAL,
    Journal,
    check_least,
    check_run,
    check_window,
    identity_of,
    open_run,
    read_journal,
    recorded_dtype,
    token_stream,
    whole_windows,
    window_bytes,
    windows_at_once,
)
from abreast.study.settings import StudySettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[int, int], None]
Say = Callable[[str], None]
FORMAT = 2  # of the journal: 4~5 are merged layers in the first, and the wiring ff since


@dataclass(frozen=True)
class StudyRun:
    """A model, the windows that it and its changes are run on, and the folder of results.

    model: loaded from `folder`, None on the way to another process. tokens: int64 [num_windows,
    window], prefix included. size: windows at once. reference: whether every changed model is
    compared with the original, token by token.
    """

    out: Path
    folder: Path
    model: PreTrainedModel | None
    tokens: np.ndarray
    size: int
    reference: bool
    identity: dict[str, Any]
    settings: StudySettings

    @property
    def original(self) -> Program:
        return tuple(range(self.identity["num_layers"]))

    @property
    def prefix(self) -> int:
        """How many tokens at the beginning of every window are there before the text."""
        return len(self.identity.get("prefix", ()))

    @property
    def scored(self) -> int:
        """Scored tokens per window: those of the text, without a prefix all but the first."""
        return int(self.tokens.shape[1]) - max(self.prefix, 1)

    @property
    def batches(self) -> range:
        return range(math.ceil(len(self.tokens) / self.size))

    def journal(self) -> Journal:
        """What was run, by program and batch."""
        return read_journal(
            self.out, lambda batch: len(self.tokens[batch * self.size : (batch + 1) * self.size])
        )


@dataclass(frozen=True)
class _Share:
    """One worker's programs per batch of a run."""

    run: StudyRun
    work: tuple[tuple[int, tuple[Program, ...]], ...]
    journal: Path
    device: str
    threads: int


def check_settings(settings: StudySettings) -> None:
    """Raise AbreastError for sizes that make no sense and for devices that are not here."""
    check_least(
        {
            "the number of windows": (settings.num_windows, 1),
            "the window": (settings.window, 2),
            "the batch size": (settings.batch_size, 1),
        }
    )
    if not settings.devices:
        raise AbreastError("no device is named; give at least one, such as cpu or cuda:0")
    for name in settings.devices:
        if name != "auto":
            check_device(name)
    if "auto" in settings.devices and len(settings.devices) > 1:
        raise AbreastError("auto takes all devices for one worker; name it alone")


def start(
    kind: str,
    model: str | Path,
    out: str | Path,
    settings: StudySettings,
    *,
    reference: bool,
    stream: TokenStream | None = None,
    step: Say,
) -> StudyRun:
    """Load the model and its text, and open folder `out` for a run of this kind on them.

    stream: instead of the settings' data. step: see `token_stream`. Raises AbreastError for a
    folder with another run, or anything else, in it, settings that make no sense, and as `load` and
    `token_stream` do.
    """
    check_settings(settings)
    check_run(Path(out), kind)
    folder, _ = resolve(model, revision=settings.revision)
    fitting = fitting_dtype(
        open_checkpoint(folder),
        settings.dtype,
        settings.devices[0],
        recorded=recorded_dtype(Path(out), kind),
        step=step,
    )
    settings = replace(settings, dtype=fitting)
    loaded, tokenizer = _load(folder, settings, settings.devices[0])
    check_norms(loaded, settings.norms)
    config, window = loaded.config.get_text_config(), settings.window
    longest = getattr(config, "max_position_embeddings", None)
    check_window(window, longest)
    data = token_stream(
        settings.data if stream is None else stream,
        tokenizer,
        folder,
        max_tokens=settings.num_windows * window,
        window=window,
        seed=settings.seed,
        add_bos=settings.add_bos,
        role="judge",
        author=lambda: loaded,
        folder=Path(out),
        step=step,
    )
    vocabulary = loaded.get_input_embeddings().weight.shape[0]
    tokens = whole_windows(
        data, settings.num_windows, window, longest=longest, vocabulary=vocabulary
    )
    num_layers, logits = len(decoder_layers(loaded)), vocabulary if reference else 0
    cache = window_bytes(window, num_layers, config.hidden_size, loaded.dtype.itemsize, logits)
    at_once = windows_at_once(cache, settings.max_cache_bytes)
    size = min(len(tokens), settings.batch_size, at_once)
    identity = identity_of(
        folder,
        tokens,
        data.prefix,
        num_layers=num_layers,
        batch=size,
        seed=settings.seed,
        dtype=settings.dtype,
    )
    identity |= {"format": FORMAT, "norms": settings.norms}
    opened = open_run(Path(out), kind, identity)
    return StudyRun(opened, folder, loaded, tokens, size, reference, identity, settings)


def cost_text(
    passes: float, changed: int, settings: StudySettings, pace: Pace | None = None
) -> str:
    """What running so many changed models takes; in minutes as well where a window was timed.

    passes: full forward passes over all windows, of which there are num_windows in the settings.
    """
    text = (
        f"{changed} changed models, {passes:.1f} full forward passes over {settings.num_windows} "
        f"windows of {settings.window} tokens"
    )
    if pace is None:
        return text
    return f"{text}, {minutes_text(seconds_of(pace, passes, changed, settings))} here"


def seconds_of(pace: Pace, passes: float, changed: int, settings: StudySettings) -> float:
    """Of the work of `cost_text`, shared by the devices; workers on the CPU share its cores."""
    alone = pace.seconds(settings.num_windows, passes, changed + 1)
    return alone / len(set(settings.devices))


def run_all(
    run: StudyRun, programs: Iterable[Program], *, step: Say, progress: Progress | None
) -> tuple[dict[Program, np.ndarray], int]:
    """Sums of `run_programs` of every program, [num_windows, 1 or 4], and the layers run for them.

    Each evaluation is on disk before the next begins, and what is there is not run again. The
    original is always among them. step: told what is about to be computed. progress: called with
    (evaluations done, in all), one being a program on a batch. Raises AbreastError where the
    original's loss is not finite.
    """
    names = {program: name_of(program) for program in [run.original, *programs]}
    done = run.journal()
    todo = {(b, p) for b in run.batches for p in names if (names[p], b) not in done}
    parts = split({program for _, program in todo}, run.original, len(run.settings.devices))
    shares = _shares(run, parts, todo)
    if todo:
        layers = sum(planned(work) for share in shares for _, work in share.work)
        passes = layers / len(run.original) / len(run.batches)
        changed = {program for _, program in todo} - {run.original}
        pace = pace_of(run.model, run.settings.window, run.size) if run.model else None
        there = replace(run.settings, num_windows=len(run.tokens))  # a text may have fewer
        step(cost_text(passes, len(changed), there, pace))
    total = len(names) * len(run.batches)
    _run_shares(shares, progress, total - len(todo), total)
    done = run.journal()
    sums = {
        program: np.concatenate([np.asarray(done[name, b]["sums"]) for b in run.batches])
        for program, name in names.items()
    }
    if not np.isfinite(sums[run.original]).all():
        raise AbreastError(
            "the unmodified model gives a loss that is not finite; use --dtype bfloat16 or float32"
        )
    return sums, sum(done[name, b]["evaluated"] for name in names.values() for b in run.batches)


def _shares(
    run: StudyRun, parts: Sequence[set[Program]], todo: set[tuple[int, Program]]
) -> list[_Share]:
    devices = run.settings.devices
    cpus = max(1, sum(device.partition(":")[0] == "cpu" for device in devices))
    return [
        _Share(
            replace(run, model=None) if number else run,
            work=tuple((b, tuple(p for p in part if (b, p) in todo)) for b in run.batches),
            journal=run.out / JOURNAL.format(number),
            device=device,
            threads=max(1, torch.get_num_threads() // cpus),
        )
        for number, (device, part) in enumerate(zip(devices, parts, strict=True))
    ]


def _load(folder: Path, settings: StudySettings, device: str) -> tuple[PreTrainedModel, Any]:
    return load(
        folder,
        dtype=settings.dtype,
        device=device,
        trust_remote_code=settings.trust_remote_code,
    )


def _run_shares(
    shares: Sequence[_Share], progress: Progress | None, finished: int, total: int
) -> None:
    """Run the first share here, on the loaded model, the others in processes of their own."""
    before = sum(_lines(share.journal) for share in shares)
    reported = finished

    def report() -> None:
        nonlocal reported
        done = finished + sum(_lines(share.journal) for share in shares) - before
        if progress is not None and done > reported:
            reported = done
            progress(done, total)

    context = multiprocessing.get_context("spawn")
    busy = [share for share in shares[1:] if any(part for _, part in share.work)]
    workers = [context.Process(target=_work, args=(share,), daemon=True) for share in busy]
    try:
        for worker in workers:
            worker.start()
        _work(shares[0], report)
        for share, worker in zip(busy, workers, strict=True):
            while worker.is_alive():
                worker.join(1.0)
                report()
            if worker.exitcode:
                raise AbreastError(
                    f"the worker on {share.device} ended with status {worker.exitcode} "
                    "(its last words are above); run again to go on, perhaps with fewer devices"
                )
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.terminate()
                worker.join()


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _work(share: _Share, report: Callable[[], None] | None = None) -> None:
    run = share.run
    before = torch.get_num_threads()
    torch.set_num_threads(share.threads)
    try:
        model = run.model or _load(run.folder, run.settings, share.device)[0]
        with open(share.journal, "a", encoding="utf-8") as journal:
            for batch, programs in share.work:
                for line in _evaluate(run, model, batch, programs) if programs else ():
                    journal.write(json.dumps(line) + "\n")
                    journal.flush()
                    if report is not None:
                        report()
    finally:
        torch.set_num_threads(before)


def _evaluate(
    run: StudyRun, model: PreTrainedModel, batch: int, programs: Sequence[Program]
) -> Iterator[dict[str, Any]]:
    """Run programs on a batch; yield the journal's line of each."""
    ids = torch.from_numpy(run.tokens[batch * run.size :][: run.size])
    reference = run.original if run.reference else None
    prefix, norms, layers_run = run.prefix, run.settings.norms, 0
    for program, sums, evaluated in run_programs(
        model, ids, programs, prefix=prefix, reference=reference, norms=norms
    ):
        layers_run += evaluated
        if program in programs:  # the reference runs for the others as well
            name = name_of(program)
            yield {"program": name, "batch": batch, "evaluated": layers_run, "sums": sums.tolist()}
            layers_run = 0
