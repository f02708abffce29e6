"""Bench jobs: several models, tasks, batch sizes and contexts, on one of four back ends.

A back end is a function from a job to results, one for every case as it is finished, so that
whatever happens later does not take back what is there. `eager` and `compile` run in this process,
`tp` in the processes of torchrun, `vllm` through vLLM's own benchmark command.
"""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from abreast.engines.torch_tp import launched, load_parallel
from abreast.engines.vllm import VllmFailure, latency
from abreast.errors import AbreastError
from abreast.model import apply, decoder_layers, load
from abreast.plan import Plan
from abreast.runs import hardware
from abreast.speed.benchmark import BenchResult, Footprint, Task, bench
from abreast.speed.timing import MIN_ROUNDS, Measurement, Timing, claim, timings

ORIGINAL = "original"


@dataclass(frozen=True)
class Contender:
    """One model to time. plan: run it grouped in memory under this plan, shorthand or file."""

    name: str
    model: str
    plan: str | None = None


@dataclass(frozen=True)
class Case:
    """One task at one batch size and context (tokens of the prompt). new_tokens: see `bench`."""

    task: Task
    batch_size: int
    context: int
    new_tokens: int

    @property
    def name(self) -> str:
        return f"{self.task} at batch {self.batch_size}, context {self.context}"


@dataclass(frozen=True)
class Job:
    """What to time. The first contender is the original. ranks: processes of the tp back end, and
    tensor parallel degree of vLLM. vllm: the words of its command, up to and without "bench"."""

    contenders: tuple[Contender, ...]
    cases: tuple[Case, ...]
    backend: str = "eager"
    rounds: int = 20
    warmup: int = 2
    seed: int = 0
    device: str = "cpu"
    dtype: str = "auto"
    ranks: int = 2
    vllm: tuple[str, ...] = ("vllm",)
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Failure:
    """A case that could not be timed, and what to do about it."""

    case: str
    reason: str


@dataclass(frozen=True)
class Report:
    """All that a job found."""

    job: Job
    results: tuple[BenchResult, ...]
    failures: tuple[Failure, ...]
    hardware: dict[str, Any] = field(default_factory=dict)

    def to_dict(self, *, seconds: bool = False) -> dict[str, Any]:
        return {
            "contenders": [asdict(contender) for contender in self.job.contenders],
            "hardware": self.hardware,
            "results": [result.to_dict(seconds=seconds) for result in self.results],
            "failures": [asdict(failure) for failure in self.failures],
            "verdict": conclusion(self.results).splitlines(),
        }


Backend = Callable[[Job], Iterator[BenchResult | Failure]]
Step = Callable[[str], None]


def run(job: Job, *, step: Step = lambda message: None) -> Report:
    """Time every case of a job; what does not fit into memory becomes a failure, not an error.

    step(message) announces what is done. Raises AbreastError for a job that cannot run at all, and
    where not a single case could be timed.
    """
    if job.backend not in BACKENDS:
        raise AbreastError(f"unknown back end '{job.backend}'; choose one of {', '.join(BACKENDS)}")
    if not job.contenders or not job.cases:
        raise AbreastError("there is nothing to time; name a model and a task")
    if any(contender.plan for contender in job.contenders) and job.backend != "eager":
        raise AbreastError("only the eager back end runs a model grouped; leave --plan out")
    results: list[BenchResult] = []
    failures: list[Failure] = []
    for found in BACKENDS[job.backend](job):
        if isinstance(found, Failure):
            failures.append(found)
            step(f"{found.case}: {found.reason}")
        else:
            results.append(found)
            step(f"{found.task}, batch {found.batch_size}, context {found.context}: done")
    if not results:
        first = failures[0] if failures else Failure("nothing", "was timed")
        raise AbreastError(f"{first.case}: {first.reason}")
    return Report(job, tuple(results), tuple(failures), hardware(job.device))


def in_process(job: Job) -> Iterator[BenchResult | Failure]:
    """Eager or compiled, all models in this process."""
    models = _models(job)
    yield from _cases(job, models)


def tensor_parallel(job: Job) -> Iterator[BenchResult | Failure]:
    """Every model spread over the processes of torchrun.

    Started by torchrun, this process is one of them (several machines: torchrun on each); otherwise
    it starts torchrun on this machine with job.ranks processes.
    """
    if launched():
        yield from _as_rank(job)
        return
    with tempfile.TemporaryDirectory(prefix="abreast-bench-") as folder:
        given, found = Path(folder) / "job.json", Path(folder) / "results"
        given.write_text(json.dumps(asdict(job)))
        found.touch()
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={job.ranks}"]
        environment = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // job.ranks))}
        done = subprocess.run(
            [sys.executable, *launcher, "-m", "abreast.speed.jobs", str(given), str(found)],
            env={**environment, **os.environ},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        lines = found.read_text().splitlines()
    yield from (_from_json(json.loads(line)) for line in lines)
    if done.returncode:
        reason = _told(done.stderr)
        if len(lines) < len(job.cases):
            case = job.cases[len(lines)]
            # Linux kills the greediest process when the host's memory is full.
            if _is_out_of_memory(done.stderr) or "SIGKILL" in done.stderr:
                reason = _lower(case)
            yield Failure(case.name, reason)
        else:
            raise AbreastError(f"torchrun failed: {reason}")


def vllm(job: Job) -> Iterator[BenchResult | Failure]:
    """vLLM's own latency benchmark, one process per model and round, the models taking turns.

    Times are medians over the repetitions within a process. decode is the difference between
    new_tokens + 1 and 1 tokens. Memory is not measured.
    """
    for case in job.cases:
        seconds: dict[str, list[float]] = {contender.name: [] for contender in job.contenders}
        try:
            for turn in range(job.rounds):
                order = job.contenders if turn % 2 == 0 else job.contenders[::-1]
                for contender in order:
                    seconds[contender.name].append(_vllm_seconds(job, contender, case))
        except VllmFailure as error:
            yield Failure(case.name, _lower(case) if _is_out_of_memory(str(error)) else str(error))
            continue
        rows = case.context if case.task == "prefill" else case.new_tokens
        names = [contender.name for contender in job.contenders]
        arrays = {name: np.array(times) for name, times in seconds.items()}
        measured = Measurement(arrays, dict.fromkeys(names, case.batch_size * rows))
        yield BenchResult(
            task=case.task,
            original=names[0],
            batch_size=case.batch_size,
            context=case.context,
            new_tokens=0 if case.task == "prefill" else case.new_tokens,
            rounds=job.rounds,
            warmup=1,
            seed=job.seed,
            device=job.device,
            dtype=job.dtype,
            threads=torch.get_num_threads(),
            timings=timings(measured),
            seconds=arrays,
            backend="vllm",
            ranks=job.ranks,
        )


def _vllm_seconds(job: Job, contender: Contender, case: Case) -> float:
    def run_once(output: int) -> float:
        return latency(
            job.vllm,
            contender.model,
            batch_size=case.batch_size,
            input_tokens=case.context,
            output_tokens=output,
            ranks=job.ranks,
            dtype=job.dtype,
            seed=job.seed,
            trust_remote_code=job.trust_remote_code,
        )

    if case.task == "prefill":
        return run_once(1)
    if case.task == "generate":
        return run_once(case.new_tokens)
    return run_once(case.new_tokens + 1) - run_once(1)


BACKENDS: dict[str, Backend] = {
    "eager": in_process,
    "compile": in_process,
    "tp": tensor_parallel,
    "vllm": vllm,
}


def device_or_cpu(device: str, fall_back: bool, step: Step = lambda message: None) -> str:
    """The device, or cpu where it is missing and the user allowed that. Raises AbreastError."""
    missing = device.startswith("cuda") and not torch.cuda.is_available()
    if not missing:
        return device
    if not fall_back:
        raise AbreastError("no CUDA device here; use --device cpu, or allow it by --fallback-cpu")
    step("no CUDA device here; timing on the CPU, as --fallback-cpu allows")
    return "cpu"


def conclusion(results: Sequence[BenchResult]) -> str:
    """The verdict in words: for every contender what became faster, by how much and in which task,
    what did not, and whether to use it here at all."""
    lines: list[str] = []
    names = list(dict.fromkeys(name for result in results for name in result.timings))
    for name in names[1:]:
        lines += _conclusion(name, [result for result in results if name in result.timings])
    return "\n".join(lines) or "nothing to compare with"


def _conclusion(name: str, results: Sequence[BenchResult]) -> list[str]:
    lines, faster, slower = [], [], []
    for result in results:
        timing = result.timings[name]
        place = f"{result.task}, batch {result.batch_size}, context {result.context}"
        lines.append(f"{name}: {place}: {claim(timing, result.rounds)}")
        if result.rounds >= MIN_ROUNDS:
            if timing.ratio_low > 1:
                faster.append((result.task, timing.ratio))
            elif timing.ratio_high < 1:
                slower.append((result.task, place))
    if all(result.rounds < MIN_ROUNDS for result in results):
        return [*lines, f"{name}: too few rounds for a verdict"]
    if not faster:
        what = "slower" if slower else "no faster"
        return [*lines, f"{name}: {what} in whatever was measured: do not use this here"]
    gains = []
    for task in dict.fromkeys(task for task, _ in faster):
        ratios = sorted(ratio for other, ratio in faster if other == task)
        low, high = f"{ratios[0]:.2f}", f"{ratios[-1]:.2f}"
        cases = sum(result.task == task for result in results)
        among = f" ({len(ratios)} of {cases} cases)" if cases > 1 else ""
        gains.append(f"{task} by {low}x" + (f" to {high}x" if high != low else "") + among)
    end = f"; slower, do not use it there: {'; '.join(place for _, place in slower)}"
    return [*lines, f"{name}: faster here in {', '.join(gains)}{end if slower else ''}"]


def _models(job: Job) -> dict[str, Any]:
    found: dict[str, Any] = {}
    loaded: dict[str, Any] = {}
    for contender in job.contenders:
        model = loaded.get(contender.model)
        if model is None:
            model, _ = load(
                contender.model,
                dtype=job.dtype,
                device=job.device,
                trust_remote_code=job.trust_remote_code,
            )
            loaded[contender.model] = model
        if contender.plan is not None:
            # A second set of modules over the same weights: grouping one leaves the other alone.
            shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
            model = copy.deepcopy(model, memo=shared)
            apply(model, Plan.read(contender.plan, len(decoder_layers(model))))
        found[contender.name] = model
    return found


def _cases(
    job: Job, models: Mapping[str, Any], barrier: Callable[[], None] = lambda: None
) -> Iterator[BenchResult | Failure]:
    full: list[Case] = []
    for case in job.cases:
        if any(_is_larger(case, other) for other in full):
            yield Failure(
                case.name, f"left out, larger than what ran out of memory: {_lower(case)}"
            )
            continue
        try:
            yield bench(
                models,
                task=case.task,
                batch_size=case.batch_size,
                context=case.context,
                new_tokens=case.new_tokens,
                rounds=job.rounds,
                warmup=job.warmup,
                seed=job.seed,
                execution="compile" if job.backend == "compile" else "eager",
                backend=job.backend,
                ranks=job.ranks if job.backend == "tp" else 1,
                barrier=barrier,
            )
        except (RuntimeError, MemoryError) as error:
            # Alone, a rank cannot go on where the others do not; torchrun ends them all.
            if not _is_out_of_memory(f"{type(error).__name__}: {error}") or job.backend == "tp":
                raise
            full.append(case)
            yield Failure(case.name, _lower(case))
        torch.compiler.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _is_larger(case: Case, other: Case) -> bool:
    return case.batch_size >= other.batch_size and case.context >= other.context


def _lower(case: Case) -> str:
    knobs = [f"--context below {case.context}"]
    if case.batch_size > 1:
        knobs.insert(0, f"--batch below {case.batch_size}")
    return f"out of memory; use {' or '.join(knobs)}"


def _is_out_of_memory(message: str) -> bool:
    marks = ("out of memory", "OutOfMemoryError", "MemoryError", "can't allocate memory")
    return any(mark in message for mark in (*marks, "No available memory for the cache blocks"))


def _told(stderr: str) -> str:
    """The last line that says what went wrong; torchrun's own report comes after it."""
    lines = [line.split("]:")[-1].strip() for line in stderr.splitlines()]
    errors = [line for line in lines if "Error" in line.split(":")[0] and ":" in line]
    errors = [line for line in errors if "ChildFailedError" not in line]
    own = [
        line.partition(": ")[2] for line in errors if "AbreastError" in line or "Parallel" in line
    ]
    ended = [f"a process was ended by {name}" for name in re.findall(r"\bSIG[A-Z]+\b", stderr)]
    return (own or errors or ended or ["it did not say why"])[0]


def _from_json(row: dict[str, Any]) -> BenchResult | Failure:
    if "reason" in row:
        return Failure(**row)
    known = Timing.__dataclass_fields__
    row["timings"] = {
        name: Timing(**{key: value for key, value in timing.items() if key in known})
        for name, timing in row["timings"].items()
    }
    row["seconds"] = {name: np.array(times) for name, times in row["seconds"].items()}
    row["memory"] = {name: Footprint(**memory) for name, memory in row["memory"].items()}
    return BenchResult(**row)


def _job_from_json(text: str) -> Job:
    row = json.loads(text)
    row["contenders"] = tuple(Contender(**contender) for contender in row["contenders"])
    row["cases"] = tuple(Case(**case) for case in row["cases"])
    row["vllm"] = tuple(row["vllm"])
    return Job(**row)


def _as_rank(job: Job) -> Iterator[BenchResult | Failure]:
    import torch.distributed as dist

    models = {
        contender.name: load_parallel(contender.model, dtype=job.dtype, device=job.device)
        for contender in job.contenders
    }
    yield from _cases(job, models, dist.barrier if dist.is_initialized() else lambda: None)
    if dist.is_initialized():
        dist.destroy_process_group()


def _worker(given: str, found: str) -> None:
    """One process of torchrun: runs the job; rank 0 writes a line for every case that is done."""
    rank = int(os.environ["RANK"])
    for result in _as_rank(_job_from_json(Path(given).read_text())):
        if rank == 0:
            row = asdict(result) if isinstance(result, Failure) else result.to_dict(seconds=True)
            with open(found, "a", encoding="utf-8") as lines:
                lines.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    _worker(*sys.argv[1:])
