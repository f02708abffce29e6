"""The five back ends of a benchmark: several models, tasks, batch sizes and contexts.

A back end is a function from a job to results, one for every case as it is finished, so that a
later failure takes nothing back. `eager`, `cudagraphs` and `compile` run in this process, `tp` in
the processes of torchrun, `vllm` through vLLM's own benchmark command.
"""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import torch.distributed as dist

from abreast.checkpoint import open_checkpoint, plan_for, scratch
from abreast.engines.ranks import together
from abreast.engines.torch_tp import ParallelError, launched, load_parallel, open_for
from abreast.engines.vllm import VllmFailure, latency
from abreast.errors import AbreastError
from abreast.model import apply, fitting_dtype, load
from abreast.runs import hardware
from abreast.speed.benchmark import bench
from abreast.speed.timing import (
    BenchResult,
    Case,
    Contender,
    Failure,
    Job,
    Measurement,
    Report,
    timings,
)
from abreast.targets import Unpaired, recorded_plan

Step = Callable[[str], None]


def run(job: Job, *, step: Step = lambda message: None) -> Report:
    """Time every case of a job; a case that runs out of memory is a failure, not an error.

    step(message) announces progress. Raises AbreastError for a job that cannot run at all, and
    where not a single case could be timed.
    """
    if job.backend not in BACKENDS:
        raise AbreastError(f"unknown back end '{job.backend}'; choose one of {', '.join(BACKENDS)}")
    if not job.contenders or not job.cases:
        raise AbreastError("there is nothing to time; name a model and a task")
    if any(contender.plan for contender in job.contenders) and job.backend != "eager":
        raise AbreastError("only the eager back end runs a model grouped; leave --plan out")
    if job.backend == "tp":
        job = replace(job, contenders=tuple(_held(job)))
    elif job.link_delay or job.unpaired != ("shard",):
        raise AbreastError(
            "--link-delay and --unpaired belong to --backend tp; leave them out (vLLM on a "
            "simulated link: python benchmarks/vllm_decode.py --ranks 2 --waits 300)"
        )
    if job.backend != "vllm":
        original = open_checkpoint(job.contenders[0].model)
        job = replace(job, dtype=fitting_dtype(original, job.dtype, job.device, step=step))
    results: list[BenchResult] = []
    failures: list[Failure] = []
    for outcome in BACKENDS[job.backend](job):
        if isinstance(outcome, Failure):
            failures.append(outcome)
            step(f"{outcome.case}: {outcome.reason}")
        else:
            results.append(outcome)
            step(f"{outcome.name}: done")
    if not results:
        first = failures[0] if failures else Failure("nothing", "was timed")
        raise AbreastError(f"{first.case}: {first.reason}")
    return Report(job, tuple(results), tuple(failures), hardware(job.device))


def in_process(job: Job) -> Iterator[BenchResult | Failure]:
    """All models in this process."""
    yield from _time_cases(job, _load_models(job))


def tensor_parallel(job: Job) -> Iterator[BenchResult | Failure]:
    """Every model spread over the processes of torchrun.

    Started by torchrun, this process is one of them (several machines: torchrun on each); otherwise
    it starts torchrun on this machine with job.ranks processes.
    """
    if launched():
        yield from _as_rank(job)
        return
    with scratch("abreast-bench-") as folder:
        job_file, results = folder / "job.json", folder / "results"
        job_file.write_text(json.dumps(asdict(job)))
        results.touch()
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={job.ranks}"]
        environment = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // job.ranks))}
        done = subprocess.run(
            [
                sys.executable,
                *launcher,
                "-m",
                "abreast.speed.backends",
                str(job_file),
                str(results),
            ],
            env={**environment, **os.environ},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        lines = results.read_text().splitlines()
    yield from (_outcome(json.loads(line)) for line in lines)
    if done.returncode == 0:
        return
    if len(lines) == len(job.cases):
        raise AbreastError(f"torchrun failed: {_reason(done.stderr)}")
    case = job.cases[len(lines)]
    # Linux kills the greediest process when the host's memory is full.
    full = _is_out_of_memory(done.stderr) or "SIGKILL" in done.stderr
    yield Failure(case.name, _use_less(case) if full else _reason(done.stderr))


def _held(job: Job) -> Iterator[Contender]:
    """The contenders of tp, each as it is held. Raises AbreastError where processes cannot hold it.

    The original is sharded, or whole on one device where its heads do not divide; that is also
    timed where conversions are to be replicated.
    """
    for way in job.unpaired:
        if way not in get_args(Unpaired):
            raise AbreastError(f"--unpaired '{way}' is not one of {', '.join(get_args(Unpaired))}")
    if job.link_delay < 0:
        raise AbreastError(f"--link-delay {job.link_delay} makes no sense; give microseconds")
    original, *others = job.contenders
    ways: tuple[Unpaired, ...] = tuple(way for way in get_args(Unpaired) if way in job.unpaired)
    try:
        open_for(original.model, job.ranks)
        yield original
        if "replicate" in ways and recorded_plan(open_checkpoint(original.model).config) is None:
            yield replace(original, name="on one device", unpaired="replicate")
    except ParallelError:
        if "replicate" not in ways:
            raise
        open_for(original.model, job.ranks, "replicate")
        yield replace(original, unpaired="replicate")
    for contender in others:
        for way in ways:
            open_for(contender.model, job.ranks, way)  # refuses before torchrun starts
            name = contender.name if way == "shard" else f"{contender.name}, replicate"
            yield replace(contender, name=name, unpaired=way)


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
            yield Failure(
                case.name, _use_less(case) if _is_out_of_memory(str(error)) else str(error)
            )
            continue
        rows = case.context if case.task == "prefill" else case.new_tokens
        names = [contender.name for contender in job.contenders]
        arrays = {name: np.array(times) for name, times in seconds.items()}
        if noisy := [name for name in names if not (arrays[name] > 0).all()]:
            reason = f"noise hides what {case.new_tokens} tokens take '{noisy[0]}'; raise --steps"
            yield Failure(case.name, reason)
            continue
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


BACKENDS: dict[str, Callable[[Job], Iterator[BenchResult | Failure]]] = {
    "eager": in_process,
    "cudagraphs": in_process,
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


def _load_models(job: Job) -> dict[str, Any]:
    models: dict[str, Any] = {}
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
            apply(model, plan_for(open_checkpoint(contender.model), contender.plan))
        models[contender.name] = model
    return models


def _time_cases(
    job: Job, models: Mapping[str, Any], barrier: Callable[[], None] = lambda: None
) -> Iterator[BenchResult | Failure]:
    full: list[Case] = []
    for case in job.cases:
        if any(_is_larger(case, other) for other in full):
            yield Failure(
                case.name, f"left out, larger than what ran out of memory: {_use_less(case)}"
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
                execution="eager" if job.backend == "tp" else job.backend,  # type: ignore[arg-type]
                backend=_label(job),
                ranks=job.ranks if job.backend == "tp" else 1,
                barrier=barrier,
            )
        except AbreastError as error:  # such as a context that a model cannot hold
            if job.backend == "tp":
                raise
            yield Failure(case.name, str(error))
        except (RuntimeError, MemoryError) as error:
            # Alone, a rank cannot go on where the others do not; torchrun ends them all.
            if not _is_out_of_memory(f"{type(error).__name__}: {error}") or job.backend == "tp":
                raise
            full.append(case)
            yield Failure(case.name, _use_less(case))
        torch.compiler.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _label(job: Job) -> str:
    delay = f", simulated link of {job.link_delay} us" if job.link_delay else ""
    return f"{job.backend}{delay}"


def _is_larger(case: Case, other: Case) -> bool:
    return case.batch_size >= other.batch_size and case.context >= other.context


def _use_less(case: Case) -> str:
    knobs = [f"--context below {case.context}"]
    if case.batch_size > 1:
        knobs.insert(0, f"--batch below {case.batch_size}")
    return f"out of memory; use {' or '.join(knobs)}"


def _is_out_of_memory(message: str) -> bool:
    marks = ("out of memory", "OutOfMemoryError", "MemoryError", "can't allocate memory")
    return any(mark in message for mark in (*marks, "No available memory for the cache blocks"))


def _reason(stderr: str) -> str:
    """The error that ended torchrun; its own report comes after it."""
    lines = [line.split("]:")[-1].strip() for line in stderr.splitlines()]
    errors = [line for line in lines if "Error" in line.split(":")[0] and ":" in line]
    errors = [line for line in errors if "ChildFailedError" not in line]
    own = [line.partition(": ")[2] for line in errors if re.search("AbreastError|Parallel", line)]
    signals = [f"a process was ended by {name}" for name in re.findall(r"\bSIG[A-Z]+\b", stderr)]
    return (own or errors or signals or ["it did not say why"])[0]


def _outcome(row: dict[str, Any]) -> BenchResult | Failure:
    return Failure(**row) if "reason" in row else BenchResult.from_dict(row)


def _as_rank(job: Job) -> Iterator[BenchResult | Failure]:
    models = {
        contender.name: load_parallel(
            contender.model,
            dtype=job.dtype,
            device=job.device,
            unpaired=contender.unpaired,
            link_delay=job.link_delay * 1e-6,
        )
        for contender in job.contenders
    }
    yield from _time_cases(job, models, _wait)
    if dist.is_initialized():
        dist.destroy_process_group()


def _wait() -> None:
    """Until all ranks are here. Raises ParallelError where one ended."""
    if dist.is_initialized():
        with together():
            dist.barrier()


def _worker(job_file: str, results: str) -> None:
    """One process of torchrun: runs the job; rank 0 writes a line for every case that is done."""
    job = Job.from_dict(json.loads(Path(job_file).read_text()))
    for outcome in _as_rank(job):
        if os.environ["RANK"] == "0":
            row = (
                outcome.to_dict(seconds=True)
                if isinstance(outcome, BenchResult)
                else asdict(outcome)
            )
            with open(results, "a", encoding="utf-8") as lines:
                lines.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    _worker(*sys.argv[1:])
