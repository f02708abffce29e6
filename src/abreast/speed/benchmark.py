"""How fast models run beside each other on one task, timed so that a difference means something.

Three tasks, those of the LP paper: `prefill` (the prompt at once), `decode` (single tokens at a
given context) and `generate` (the prompt and then N tokens). Models take turns, see `timing`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch

from abreast.errors import AbreastError
from abreast.model import cache_name, cache_of, device_of, inference, keeps
from abreast.speed.timing import BenchResult, Footprint, Task, time_in_turn, timings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Execution = Literal["eager", "cudagraphs", "compile"]


@dataclass(frozen=True)
class Steps:
    """One way to run one model. Tokens have shape [batch, 1], prompts [batch, context].

    prefill(prompt) -> (first token, cache); step(token, cache) -> next token, the cache grown by
    one. reset() is called, untimed, before a run.
    """

    prefill: Callable[[torch.Tensor], tuple[torch.Tensor, Any]]
    step: Callable[[torch.Tensor, Any], torch.Tensor]
    reset: Callable[[], None] = lambda: None


def eager(model: PreTrainedModel, length: int, task: Task) -> Steps:
    """The model as it is, with the cache that it makes itself (sliding where it slides)."""
    options, name = keeps(model, 1), cache_name(model)

    def prefill(prompt: torch.Tensor) -> tuple[torch.Tensor, Any]:
        output = model(input_ids=prompt, use_cache=True, **options)
        return output.logits[:, -1:].argmax(-1), cache_of(output)

    def step(token: torch.Tensor, cache: Any) -> torch.Tensor:
        output = model(input_ids=token, **{name: cache}, use_cache=True)
        return output.logits[:, -1:].argmax(-1)

    return Steps(prefill, step)


def compiled(model: PreTrainedModel, length: int, task: Task) -> Steps:
    """The model through torch.compile with a static cache of `length` tokens.

    On CUDA the single-token step is replayed as a CUDA graph (mode "reduce-overhead"); prompts are
    compiled without graphs, and not at all for decode, which does not time them. Whatever is
    compiled is compiled for exactly these shapes.
    """
    from transformers import StaticCache

    options, name = keeps(model, 1), cache_name(model)
    cache = StaticCache(config=model.config, max_cache_len=length)
    graphs = device_of(model).type == "cuda"

    def forward(token: torch.Tensor) -> torch.Tensor:
        output = model(input_ids=token, **{name: cache}, use_cache=True, **options)
        return output.logits[:, -1:].argmax(-1)

    many = forward if task == "decode" else torch.compile(forward, dynamic=False)
    one = torch.compile(forward, dynamic=False, mode="reduce-overhead" if graphs else "default")

    def prefill(prompt: torch.Tensor) -> tuple[torch.Tensor, Any]:
        if not all(layer.is_initialized for layer in cache.layers):
            # Compiled code must find the cache's memory in place, or it could not be replayed.
            forward(prompt)
            cache.reset()
        return many(prompt), cache

    def step(token: torch.Tensor, _: Any) -> torch.Tensor:
        if graphs:
            torch.compiler.cudagraph_mark_step_begin()
            return one(token).clone()  # a replay overwrites what the last one returned
        return one(token)

    return Steps(prefill, step, cache.reset)


def graphed(model: PreTrainedModel, length: int, task: Task) -> Steps:
    """The model's own kernels with a static cache of `length` tokens; the single-token step is
    recorded as a CUDA graph once and replayed. Prompts run as they are.

    Raises AbreastError for a model that is not on a CUDA device.
    """
    from transformers import StaticCache

    device = device_of(model)
    if device.type != "cuda":
        raise AbreastError(f"CUDA graphs need a CUDA device, and the model is on {device}")
    options, name = keeps(model, 1), cache_name(model)
    cache, graph = StaticCache(config=model.config, max_cache_len=length), torch.cuda.CUDAGraph()
    ids: list[torch.Tensor] = []  # what the graph reads, and what it writes

    def forward(token: torch.Tensor) -> torch.Tensor:
        output = model(input_ids=token, **{name: cache}, use_cache=True, **options)
        return output.logits[:, -1:].argmax(-1)

    def record(token: torch.Tensor) -> None:
        read, aside = token.clone(), torch.cuda.Stream(device)
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):  # what only a first run does must not be recorded
            forward(read)
        torch.cuda.current_stream(device).wait_stream(aside)
        with torch.cuda.graph(graph):
            ids.extend((read, forward(read)))
        cache.reset()

    def prefill(prompt: torch.Tensor) -> tuple[torch.Tensor, Any]:
        if not ids and task != "prefill":
            record(forward(prompt))
        return forward(prompt), cache

    def step(token: torch.Tensor, _: Any) -> torch.Tensor:
        ids[0].copy_(token)
        graph.replay()
        return ids[1].clone()  # the next replay overwrites it

    return Steps(prefill, step, cache.reset)


EXECUTIONS: dict[str, Callable[[PreTrainedModel, int, Task], Steps]] = {
    "eager": eager,
    "cudagraphs": graphed,
    "compile": compiled,
}


class _Candidate:
    """The untimed preparation and the timed run of one task on one model.

    held: shared by all candidates; carries the cache from one to the other, and keeps it, so that
    freeing it is not timed.
    """

    def __init__(
        self, steps: Steps, prompt: torch.Tensor, task: Task, new_tokens: int, held: list[Any]
    ) -> None:
        self.steps, self.prompt, self.held = steps, prompt, held
        self.task, self.new_tokens = task, new_tokens

    def prepare(self) -> None:
        self.held.clear()
        self.steps.reset()
        if self.task == "decode":
            self.held.extend(self.steps.prefill(self.prompt))

    def run(self) -> int:
        """Does the work and returns the number of tokens processed."""
        if self.task != "decode":
            self.held.extend(self.steps.prefill(self.prompt))
        if self.task == "prefill":
            return self.prompt.numel()
        token, cache = self.held
        for _ in range(self.new_tokens - (self.task == "generate")):
            token = self.steps.step(token, cache)
        return len(self.prompt) * self.new_tokens


def bench(
    models: Mapping[str, PreTrainedModel],
    *,
    task: Task,
    batch_size: int = 1,
    context: int = 512,
    new_tokens: int = 64,
    rounds: int = 20,
    warmup: int = 2,
    seed: int = 0,
    execution: Execution = "eager",
    backend: str | None = None,
    ranks: int = 1,
    barrier: Callable[[], None] = lambda: None,
    progress: Callable[[int, int], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> BenchResult:
    """Time models against the first of them on one task, in interleaved rounds.

    The prompts are batch_size rows of `context` random tokens, the same for all models and rounds.

    prefill: one forward pass over the prompts. Included: making (eager) and filling the KV cache,
    and the logits of the last position (of all positions for a model class that knows no
    `logits_to_keep`). Not included: tokenising, copying the prompts to the device, sampling,
    freeing the cache. tokens_per_second counts prompt tokens.

    decode: greedy generation of `new_tokens` per row after the prompt. Included: per token one
    forward pass over [batch_size, 1] with the KV cache growing, and argmax. Not included: the
    prefill, which is done anew before every run and already gives the first token fed in;
    tokenising; stopping at end of text (there is none). tokens_per_second counts generated tokens
    of all rows.

    generate: both, from the prompt to the last of `new_tokens` tokens; the first of them comes from
    the prefill. tokens_per_second counts generated tokens of all rows.

    execution: "eager" loops over `forward`, "cudagraphs" as `graphed`, "compile" as `compiled`;
    none is `generate` or a serving engine: they tell how models compare in this framework on this
    machine. With several processes (ranks) every one of them calls this; barrier() lets them start
    together.

    Raises AbreastError for sizes that make no sense or exceed what a model can hold, and for models
    that differ in device, dtype or vocabulary. Running out of memory raises what torch raises.
    """
    if task not in get_args(Task):
        raise AbreastError(f"unknown task '{task}'; choose one of: {', '.join(get_args(Task))}")
    if execution not in EXECUTIONS:
        raise AbreastError(
            f"unknown execution '{execution}'; choose one of: {', '.join(EXECUTIONS)}"
        )
    generated = 0 if task == "prefill" else new_tokens
    if min(batch_size, context) < 1 or (task != "prefill" and generated < 1):
        raise AbreastError("batch size, context and new tokens must all be at least 1")
    device, dtype, vocabulary = _common_ground(models, context + generated)
    prompt = np.random.default_rng(seed).integers(vocabulary, size=(batch_size, context))
    ids = torch.from_numpy(prompt).to(device)

    held: list[Any] = []
    with inference(*models.values()):
        candidates = {}
        for name, model in models.items():
            steps = EXECUTIONS[execution](model, context + generated, task)
            candidates[name] = _Candidate(steps, ids, task, generated, held)
        measurement = time_in_turn(
            {name: candidate.run for name, candidate in candidates.items()},
            rounds=rounds,
            warmup=warmup,
            prepare={name: partial(_in_turn, c.prepare, barrier) for name, c in candidates.items()},
            synchronize=partial(_synchronize, torch.device(device)),
            clock=clock,
            progress=progress,
        )
        # Afterwards: by then everything is compiled, and what only a first run needs is gone.
        memory = {
            name: _footprint(
                models[name], partial(_in_turn, candidate.prepare, barrier), candidate.run, held
            )
            for name, candidate in candidates.items()
        }
    return BenchResult(
        task=task,
        original=next(iter(models)),
        batch_size=batch_size,
        context=context,
        new_tokens=generated,
        rounds=rounds,
        warmup=warmup,
        seed=seed,
        device=device,
        dtype=dtype.removeprefix("torch."),
        threads=torch.get_num_threads(),
        timings=timings(measurement),
        seconds=measurement.seconds,
        backend=backend or execution,
        ranks=ranks,
        memory=memory,
    )


def _in_turn(first: Callable[[], None], then: Callable[[], None]) -> None:
    first()
    then()


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        # Every device, because one model may be spread over several.
        for index in range(torch.accelerator.device_count()):
            torch.accelerator.synchronize(index)


def _common_ground(models: Mapping[str, PreTrainedModel], length: int) -> tuple[str, str, int]:
    """Device, dtype and vocabulary size that all models share. Raises AbreastError."""
    if not models:
        raise AbreastError("there is nothing to time; name at least one model")
    for name, model in models.items():
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if limit and length > limit:
            raise AbreastError(
                f"'{name}' holds {limit} tokens, fewer than the {length} asked for; "
                "use a shorter context"
            )
    return (
        _shared({name: str(device_of(model)) for name, model in models.items()}, "devices"),
        _shared({name: str(model.dtype) for name, model in models.items()}, "dtypes"),
        _shared(
            {name: len(model.get_input_embeddings().weight) for name, model in models.items()},
            "vocabularies",
        ),
    )


def _shared(values: dict[str, Any], what: str) -> Any:
    """The one value that all models have."""
    if len(set(values.values())) > 1:
        listed = ", ".join(f"'{name}' {value}" for name, value in values.items())
        raise AbreastError(
            f"the models have different {what} ({listed}); timings compare only like with like"
        )
    return next(iter(values.values()))


def _footprint(
    model: PreTrainedModel, start: Callable[[], None], run: Callable[[], int], held: list[Any]
) -> Footprint:
    """Memory that one more, untimed run takes."""
    held.clear()
    weights = sum(_nbytes(parameter) for parameter in model.parameters())
    link = getattr(model, "link", None)
    on_cpu = device_of(model).type == "cpu"
    with _peaks(device_of(model)) as peaks:
        start()
        before = link.exchanges if link else 0
        run()
    device, host = peaks
    cache = sum(
        _nbytes(tensor)
        for layer in getattr(held[1], "layers", ())
        for tensor in (layer.keys, layer.values)
        if tensor is not None
    )
    held.clear()
    return Footprint(
        weights=weights,
        kv_cache=cache,
        device_peak=None if device is None else weights + device,
        host_peak=None if host is None else host + (weights if on_cpu else 0),
        exchanges=link.exchanges - before if link else None,
    )


def _nbytes(tensor: Any) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return int(local.nbytes)


@contextmanager
def _peaks(device: torch.device) -> Iterator[list[int | None]]:
    """The most that [device, host] memory grew inside the block, in bytes; None if unknown."""
    growth: list[int | None] = [None, None]
    before = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    resident = None
    with suppress(OSError):
        # Linux: 5 resets the high-water mark of this process's own resident memory.
        Path("/proc/self/clear_refs").write_text("5")
        resident = _status("VmRSS")
    yield growth
    if device.type == "cuda":
        growth[0] = torch.cuda.max_memory_allocated(device) - before
    if resident is not None:
        growth[1] = max(0, _status("VmHWM") - resident)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {key}")
