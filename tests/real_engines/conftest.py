"""Tests against real engines, each in a virtual environment of its own; see `make test-engines`.

vLLM takes half a minute to start, most of it imports. So this process imports it once and forks the
ranks of each run, which talk to each other as under torchrun.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from agreement import free_port

os.environ.update(
    {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in the rank's own process
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "OMP_NUM_THREADS": "1",
    }
)
SECONDS = 300
Work = Callable[..., Any]
InEngine = Callable[..., Any]


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A factory of float32 conversions, each made once, with any option of `convert`."""
    from abreast.convert import convert

    made: dict[str, Path] = {}

    def factory(source: Path, plan: str, **options: str) -> Path:
        key = f"{source} {plan} {options}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("converted") / "out"
            convert(source, plan, made[key], dtype="float32", **options)
        return made[key]

    return factory


@pytest.fixture
def run_apart(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Python code in an interpreter of its own."""

    def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )

    return run


@pytest.fixture(scope="session")
def in_engine() -> InEngine:
    """Run work(llm, **arguments) on every rank of a vLLM engine; return what rank 0 returns.

    in_engine(folder, work, tensor_parallel=1, arguments={}, pipeline=1, **options of vllm.LLM)
    """
    import torch

    torch.set_num_threads(1)  # a thread pool would not survive the fork
    import vllm  # noqa: F401

    def run(
        folder: Path | str,
        work: Work,
        tensor_parallel: int = 1,
        arguments: Any = None,
        pipeline: int = 1,
        **options: Any,
    ) -> Any:
        port, size = free_port(), tensor_parallel * pipeline
        options |= {"tensor_parallel_size": tensor_parallel, "pipeline_parallel_size": pipeline}
        context = multiprocessing.get_context("fork")
        ends = [context.Pipe(duplex=False) for _ in range(size)]
        ranks = [
            context.Process(
                target=_rank,
                args=(rank, size, port, str(folder), work, arguments or {}, options, end),
            )
            for rank, (_, end) in enumerate(ends)
        ]
        for process in ranks:
            process.start()
        try:
            answers = []
            for receive, _ in ends:
                assert receive.poll(SECONDS), "a rank gave no answer in time"
                answers.append(receive.recv())
                if answers[-1][1]:
                    break
        finally:
            for process in ranks:
                process.kill()
                process.join()
            for leftover in Path("/dev/shm").glob(f"*abreast-{port}-*"):
                leftover.unlink(missing_ok=True)
        for _, failure in answers:
            if failure:
                raise RuntimeError(failure)
        return answers[0][0]

    return run


def _hold_streams(worker: Any) -> None:
    """Make the buffers of a pipeline's later stages, which vLLM makes while it compiles only: on a
    CPU, without compilation, it stops at `assert self.intermediate_tensors is not None`."""
    from vllm.distributed import get_pp_group

    runner = worker.model_runner
    if not get_pp_group().is_first_rank and runner.intermediate_tensors is None:
        runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device="cpu"
        )


def _rank(
    rank: int,
    size: int,
    port: int,
    folder: str,
    work: Work,
    arguments: dict[str, Any],
    options: dict[str, Any],
    end: Any,
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if size > 1:
        # Ranks wait for each other in busy loops: two on one core would take turns, slowly.
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    try:
        from vllm import LLM
        from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

        def name(communicator: Any) -> str:
            ranks = "-".join(map(str, communicator.ranks))
            return f"abreast-{port}-{communicator.unique_name}-{ranks}"

        _CPUSHMDistributed.make_group_name = staticmethod(name)  # else the same for every run
        settings = {
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 256,
            "kv_cache_memory_bytes": 64 << 20,
            "gpu_memory_utilization": 0.1,
            "seed": 0,
            **({"distributed_executor_backend": "external_launcher"} if size > 1 else {}),
        }
        llm = LLM(folder, **{**settings, **options})
        llm.collective_rpc(_hold_streams)
        end.send((work(llm, **arguments), None))
    except BaseException:
        end.send((None, traceback.format_exc()))
    os._exit(0)
