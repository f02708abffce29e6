"""The papers' interventions on any model: the loss when a stretch of layers is changed.

For every *stretch* start..end of at least two layers (zero-based, both ends included) and every
intervention of arXiv 2502.02790, section 3, the model is run with that stretch changed:

- ``shuffle``: its layers in random order, averaged over several seeded orders;
- ``prune``: without them;
- ``merge``: one layer in their place, whose every weight is the mean of theirs;
- ``parallel``: all of them as one ``lp`` group;
- ``2-parallel``, ``3-parallel``: as consecutive ``lp`` pairs or triples from `start` on; what is
  left over at the end is a smaller group, or a single layer as it was;
- ``cqil``, ``cqil-full``: as one group wired as in CQIL (arXiv 2404.06709, section 3.2) with bypass
  distance 0, or with full causal visibility.

`abreast.model` defines what a changed model runs, and runs many without repeating what they have
in common; here is the study of all of them: on disk, resumable, over several devices.
"""

from __future__ import annotations

import json
import math
import multiprocessing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from abreast.checkpoint import finite, resolve, write
from abreast.data import AUTO, TokenStream
from abreast.errors import AbreastError
from abreast.model import (
    INTERVENTIONS,
    Program,
    cases,
    check_device,
    cost_of,
    decoder_layers,
    load,
    name_of,
    run_programs,
    shared_steps,
    split,
)
from abreast.runs import (
    JOURNAL,
    check_least,
    check_run,
    check_window,
    identity_of,
    open_run,
    read_journal,
    to_csv,
    token_stream,
    whole_windows,
    window_bytes,
    windows_at_once,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CSV, RECORD = "study.csv", "study.json"
FORMAT = 2  # of the journal: 4~5 are merged layers in the first, and the wiring ff since
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class StudyRow:
    """Loss under one intervention on layers start..end.

    depth: effective depth, the number of steps run one after another. loss: mean negative
    log-likelihood in nats per token. loss_increase: over the unmodified model. stderr: its standard
    error, paired over windows (std / sqrt(number of windows); NaN for one); for ``shuffle`` that of
    the average over the orders drawn, which leaves out what other orders would have given.
    """

    intervention: str
    start: int
    end: int
    depth: int
    loss: float
    loss_increase: float
    stderr: float
    perplexity: float


@dataclass(frozen=True)
class Evaluations:
    """Layers run on one batch of windows each; a merged layer counts 1, a group of p layers p.

    spent: counted as they ran, with what was run before an interruption. without_reuse: had every
    row's model run from its first layer. prefix_only: had the unmodified layers before a stretch
    been reused, and nothing else.
    """

    spent: int
    without_reuse: int
    prefix_only: int


@dataclass(frozen=True)
class Study:
    """The result: rows in the order interventions, start, end.

    identity: what the numbers depend on (hashes of model and tokens, sizes, seed, dtype).
    """

    rows: tuple[StudyRow, ...]
    loss: float
    num_layers: int
    num_tokens: int
    evaluations: Evaluations
    identity: dict[str, Any]
    folder: str

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON-ready values (NaN and infinity become None)."""
        record = asdict(self)
        return {**record, "rows": finite(record["rows"])}


@dataclass(frozen=True)
class _Share:
    """One worker's programs per batch, in `size` windows of tokens [num_windows, window].

    prefix: tokens before the text of every window.
    """

    folder: Path
    tokens: np.ndarray
    prefix: int
    size: int
    work: tuple[tuple[int, tuple[Program, ...]], ...]
    journal: Path
    dtype: str
    device: str
    trust_remote_code: bool
    threads: int

    def load(self) -> tuple[PreTrainedModel, Any]:
        return load(
            self.folder,
            dtype=self.dtype,
            device=self.device,
            trust_remote_code=self.trust_remote_code,
        )


def study(
    model: str | Path,
    out: str | Path,
    *,
    data: str | TokenStream = AUTO,
    add_bos: bool | None = None,
    interventions: Sequence[str] = INTERVENTIONS,
    max_length: int | None = None,
    num_windows: int = 16,
    window: int = 256,
    permutations: int = 3,
    seed: int = 0,
    dtype: str = "auto",
    devices: Sequence[str] = ("cpu",),
    batch_size: int = 8,
    max_cache_bytes: int = 2**30,
    revision: str | None = None,
    trust_remote_code: bool = False,
    step: Callable[[str], None] = lambda message: None,
    progress: Progress | None = None,
) -> Study:
    """Run the interventions on every stretch; write study.csv and study.json to folder `out`.

    model: folder or Hugging Face id of any family that can run grouped. data, step: see
    `token_stream`; add_bos: see `prefix_of`. It is cut into num_windows windows of
    `window` tokens, prefix and text, that do not overlap; the text is scored, without a prefix all
    but its first token. max_length: longest stretch, in layers.
    permutations: orders per stretch for shuffle (fewer where there are fewer). devices: one worker
    each; name "cpu" twice for two. batch_size: windows at once, fewer where the hidden states kept
    for reuse, (layers + 1) x batch x window x hidden values, would exceed max_cache_bytes per
    worker. progress: called with (evaluations done, in all), one being a program on a batch.

    Each evaluation is on disk before the next begins. A later call with the same model, tokens,
    seed, window, dtype and batch resumes from there, also with more interventions or lengths, and
    gives the very file that an uninterrupted one would have given; study.csv has the rows of the
    last call. Raises AbreastError for a folder with another study, or anything else, in it, sizes
    that make no sense, and as `load`, `load_tokens` and `apply` do.
    """
    _check_arguments(interventions, max_length, num_windows, window, permutations, batch_size)
    _check_devices(devices)
    check_run(Path(out), "study")
    folder, _ = resolve(model, revision=revision)
    loaded, tokenizer = load(
        folder, dtype=dtype, device=devices[0], trust_remote_code=trust_remote_code
    )
    config = loaded.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    check_window(window, longest)
    data = token_stream(
        data,
        tokenizer,
        folder,
        max_tokens=num_windows * window,
        window=window,
        seed=seed,
        add_bos=add_bos,
        role="judge",
        author=lambda: loaded,
        folder=Path(out),
        step=step,
    )
    tokens = whole_windows(
        data,
        num_windows,
        window,
        longest=longest,
        vocabulary=loaded.get_input_embeddings().weight.shape[0],
    )
    num_layers = len(decoder_layers(loaded))
    window_cache = window_bytes(window, num_layers, config.hidden_size, loaded.dtype.itemsize)
    size = min(len(tokens), batch_size, windows_at_once(window_cache, max_cache_bytes))
    identity = identity_of(
        folder, tokens, data.prefix, num_layers=num_layers, batch=size, seed=seed, dtype=dtype
    )
    identity["format"] = FORMAT
    changed = cases(
        num_layers, interventions, max_length=max_length, permutations=permutations, seed=seed
    )
    out = open_run(Path(out), "study", identity)
    original: Program = tuple(range(num_layers))
    every = [original, *(program for programs in changed.values() for program in programs)]
    batches = range(math.ceil(len(tokens) / size))
    names = {program: name_of(program) for program in every}
    done = read_journal(out)
    todo = {(b, p) for b in batches for p in names if (names[p], b) not in done}
    parts = split({program for _, program in todo}, original, len(devices))
    cpus = max(1, sum(device.partition(":")[0] == "cpu" for device in devices))
    shares = [
        _Share(
            folder,
            tokens,
            len(data.prefix),
            size,
            work=tuple((b, tuple(p for p in part if (b, p) in todo)) for b in batches),
            journal=out / JOURNAL.format(number),
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            threads=max(1, torch.get_num_threads() // cpus),
        )
        for number, (device, part) in enumerate(zip(devices, parts, strict=True))
    ]
    total = len(names) * len(batches)
    _run_shares(shares, loaded, progress, total - len(todo), total)
    done = read_journal(out)
    nll = {
        program: np.concatenate([done[name, b]["nll"] for b in batches])
        for program, name in names.items()
    }
    spent = sum(done[name, b]["evaluated"] for name in names.values() for b in batches)
    scored = window - max(1, len(data.prefix))
    result = _collect(changed, every, nll, scored, len(batches), spent, identity, out)
    write(out / CSV, to_csv(result.rows, StudyRow))
    summary = {k: v for k, v in result.to_dict().items() if k not in ("rows", "folder")}
    write(out / RECORD, json.dumps(summary, indent=2) + "\n")
    return result


def wins(rows: Iterable[StudyRow], first: str, second: str) -> tuple[int, int, int]:
    """Number of stretches on which `first` loses less than, the same as, more than `second`.

    Rows of the same program are equal to the last bit, others practically never.
    """
    losses: dict[str, dict[tuple[int, int], float]] = {first: {}, second: {}}
    for row in rows:
        if row.intervention in losses:
            losses[row.intervention][row.start, row.end] = row.loss
    both = losses[first].keys() & losses[second].keys()
    pairs = [(losses[first][stretch], losses[second][stretch]) for stretch in both]
    fewer, more = sum(a < b for a, b in pairs), sum(a > b for a, b in pairs)
    return fewer, len(pairs) - fewer - more, more


def best_by_depth(rows: Iterable[StudyRow]) -> dict[str, dict[int, StudyRow]]:
    """For each intervention, the row of lowest loss at every effective depth it reaches."""
    best: dict[str, dict[int, StudyRow]] = {}
    for row in rows:
        by_depth = best.setdefault(row.intervention, {})
        if row.depth not in by_depth or row.loss < by_depth[row.depth].loss:
            by_depth[row.depth] = row
    return best


def _collect(
    changed: Mapping[tuple[str, int, int], Sequence[Program]],
    every: Sequence[Program],
    nll: Mapping[Program, np.ndarray],
    scored: int,
    batches: int,
    spent: int,
    identity: dict[str, Any],
    out: Path,
) -> Study:
    """The result from nll, sums per window of `scored` tokens; every: all programs, original first.

    Raises AbreastError where the unmodified model's loss is not finite.
    """
    losses = {program: sums / scored for program, sums in nll.items()}
    original = every[0]
    if not np.isfinite(losses[original]).all():
        raise AbreastError(
            "the unmodified model gives a loss that is not finite; use --dtype bfloat16 or float32"
        )
    after_prefix = sum(cost_of(program[shared_steps(program, original) :]) for program in every)
    return Study(
        rows=tuple(
            _row(case, len(programs[0]), [losses[p] for p in programs], losses[original])
            for case, programs in changed.items()
        ),
        loss=float(losses[original].mean()),
        num_layers=len(original),
        num_tokens=len(losses[original]) * scored,
        evaluations=Evaluations(
            spent=spent,
            without_reuse=batches * sum(map(cost_of, every)),
            prefix_only=batches * (len(original) + after_prefix),
        ),
        identity=identity,
        folder=str(out),
    )


def _row(
    case: tuple[str, int, int], depth: int, losses: Sequence[np.ndarray], original: np.ndarray
) -> StudyRow:
    """One row from the losses per window, shape [num_windows], of its programs and the original.

    case: intervention, start, end. losses: several for shuffle, which are averaged.
    """
    intervention, start, end = case
    per_window = np.mean(losses, axis=0)
    increase = per_window - original
    several = len(increase) > 1
    loss = float(per_window.mean())
    return StudyRow(
        intervention,
        start,
        end,
        depth=depth,
        loss=loss,
        loss_increase=float(increase.mean()),
        stderr=float(increase.std(ddof=1)) / math.sqrt(len(increase)) if several else math.nan,
        perplexity=math.exp(loss) if loss < 709 else math.inf,  # the last one a float holds
    )


def _check_arguments(
    interventions: Sequence[str],
    max_length: int | None,
    num_windows: int,
    window: int,
    permutations: int,
    batch_size: int,
) -> None:
    unknown = [name for name in interventions if name not in INTERVENTIONS]
    if unknown or not interventions:
        wrong = f"intervention '{unknown[0]}' is unknown" if unknown else "no intervention is named"
        raise AbreastError(f"{wrong}; choose from {', '.join(INTERVENTIONS)}")
    if len(set(interventions)) < len(interventions):
        raise AbreastError("an intervention is named twice; name each once")
    check_least(
        {
            "the longest stretch": (2 if max_length is None else max_length, 2),
            "the number of windows": (num_windows, 1),
            "the window": (window, 2),
            "the number of permutations": (permutations, 1),
            "the batch size": (batch_size, 1),
        }
    )


def _check_devices(devices: Sequence[str]) -> None:
    if not devices:
        raise AbreastError("no device is named; give at least one, such as cpu or cuda:0")
    for name in devices:
        if name != "auto":
            check_device(name)
    if "auto" in devices and len(devices) > 1:
        raise AbreastError("auto takes all devices for one worker; name it alone")


def _run_shares(
    shares: Sequence[_Share],
    model: PreTrainedModel,
    progress: Progress | None,
    finished: int,
    total: int,
) -> None:
    """Run the first share here on the loaded model, the others in processes of their own."""
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
        _work(shares[0], model, report)
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


def _work(
    share: _Share,
    model: PreTrainedModel | None = None,
    report: Callable[[], None] | None = None,
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(share.threads)
    try:
        if model is None:
            model, _ = share.load()
        with open(share.journal, "a", encoding="utf-8") as journal:
            for batch, programs in share.work:
                ids = torch.from_numpy(share.tokens[batch * share.size :][: share.size])
                for program, sums, evaluated in run_programs(
                    model, ids, programs, prefix=share.prefix
                ):
                    line = {"program": name_of(program), "batch": batch, "evaluated": evaluated}
                    journal.write(json.dumps({**line, "nll": sums[:, 0].tolist()}) + "\n")
                    journal.flush()
                    if report is not None:
                        report()
    finally:
        torch.set_num_threads(before)
