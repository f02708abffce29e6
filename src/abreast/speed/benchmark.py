"""How fast models run beside each other on one task, timed so that a difference means something.

Three tasks, those of the LP paper: `prefill` (the prompt at once), `decode` (single tokens at a
given context) and `generate` (the prompt and then N tokens). Models take turns, see `timing`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch

from abreast.errors import AbreastError
from abreast.model import inference, keeps_last
from abreast.speed.timing import Timing, claim, measure, timings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Task = Literal["prefill", "decode", "generate"]
Execution = Literal["eager", "compile"]


@dataclass(frozen=True)
class Footprint:
    """Memory of one candidate in one task, in bytes, on the process (rank) that measured it.

    weights: its parameters. kv_cache: keys and values after the task. device_peak: weights plus the
    most that a run added on the accelerator, None on a CPU. host_peak: the same for the host's
    memory, None where the system does not tell; memory that the warm process held already from
    earlier runs is not in it.
    """

    weights: int
    kv_cache: int
    device_peak: int | None
    host_peak: int | None


@dataclass(frozen=True)
class BenchResult:
    """Timings of one task, and under which conditions they hold.

    timings: per candidate, the original first. new_tokens is 0 for prefill. threads: CPU threads
    of torch. seconds: the raw times, arrays of shape [rounds]. ranks: processes that share the
    work.
    """

    task: str
    original: str
    batch_size: int
    context: int
    new_tokens: int
    rounds: int
    warmup: int
    seed: int
    device: str
    dtype: str
    threads: int
    timings: dict[str, Timing]
    seconds: dict[str, np.ndarray] = field(repr=False, compare=False)
    backend: str = "eager"
    ranks: int = 1
    memory: dict[str, Footprint] = field(default_factory=dict)

    def to_dict(self, *, seconds: bool = False) -> dict[str, Any]:
        """The result as JSON-ready values; `seconds` adds the raw times.

        Every timing also gets `ttft` (prefill) or `tpot` (decode), in seconds: the time to the
        first token, and the time per further token of one row.
        """
        found = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        found["timings"] = {name: self._metrics(timing) for name, timing in self.timings.items()}
        found["memory"] = {name: asdict(memory) for name, memory in self.memory.items()}
        if seconds:
            found["seconds"] = {name: array.tolist() for name, array in self.seconds.items()}
        else:
            del found["seconds"]
        return found

    def _metrics(self, timing: Timing) -> dict[str, float]:
        found = asdict(timing)
        if self.task == "prefill":
            found["ttft"] = timing.median
        elif self.task == "decode":
            found["tpot"] = timing.median / self.new_tokens
        return found


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
    options = keeps_last(model, 1)

    def prefill(prompt: torch.Tensor) -> tuple[torch.Tensor, Any]:
        output = model(input_ids=prompt, use_cache=True, **options)
        return output.logits[:, -1:].argmax(-1), output.past_key_values

    def step(token: torch.Tensor, cache: Any) -> torch.Tensor:
        output = model(input_ids=token, past_key_values=cache, use_cache=True)
        return output.logits[:, -1:].argmax(-1)

    return Steps(prefill, step)


def compiled(model: PreTrainedModel, length: int, task: Task) -> Steps:
    """The model through torch.compile with a static cache of `length` tokens.

    On CUDA the single-token step is replayed as a CUDA graph (mode "reduce-overhead"); prompts are
    compiled without graphs, and not at all for decode, which does not time them. Whatever is
    compiled is compiled for exactly these shapes.
    """
    from transformers import StaticCache

    options = keeps_last(model, 1)
    cache = StaticCache(config=model.config, max_cache_len=length)
    graphs = model.device.type == "cuda"

    def forward(token: torch.Tensor) -> torch.Tensor:
        output = model(input_ids=token, past_key_values=cache, use_cache=True, **options)
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


EXECUTIONS: dict[str, Callable[[PreTrainedModel, int, Task], Steps]] = {
    "eager": eager,
    "compile": compiled,
}


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
    """Time models against the first of them on one task, in interleaved rounds (see `measure`).

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

    execution: "eager" loops over `forward`, "compile" as `compiled`; neither is `generate` or a
    serving engine: they say how models compare in this framework on this machine. With several
    processes (ranks) every one of them calls this; barrier() lets them start together.

    Raises AbreastError for sizes that make no sense or exceed what a model can hold, and for models
    that differ in device, dtype or vocabulary. Running out of memory raises what torch raises.
    """
    if task not in get_args(Task):
        raise AbreastError(f"unknown task '{task}'; choose one of: {', '.join(get_args(Task))}")
    if execution not in EXECUTIONS:
        raise AbreastError(f"unknown execution '{execution}'; choose eager or compile")
    if min(batch_size, context) < 1 or (task != "prefill" and new_tokens < 1):
        raise AbreastError("batch size, context and new tokens must all be at least 1")
    if not models:
        raise AbreastError("there is nothing to time; name at least one model")
    generated = 0 if task == "prefill" else new_tokens
    for name, model in models.items():
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if limit and context + generated > limit:
            raise AbreastError(
                f"'{name}' holds {limit} tokens, fewer than the {context + generated} asked for; "
                "use a shorter context"
            )
    device = _shared({name: str(model.device) for name, model in models.items()}, "devices")
    dtype = _shared({name: str(model.dtype) for name, model in models.items()}, "dtypes")
    sizes = {name: model.get_input_embeddings().weight.shape[0] for name, model in models.items()}
    vocabulary = int(_shared({name: str(size) for name, size in sizes.items()}, "vocabularies"))
    prompt = np.random.default_rng(seed).integers(vocabulary, size=(batch_size, context))
    ids = torch.from_numpy(prompt).to(device)

    prepare: dict[str, Callable[[], None]] = {}
    candidates: dict[str, Callable[[], int]] = {}
    memory: dict[str, Footprint] = {}
    held: list[Any] = []

    def synchronize() -> None:
        if torch.device(device).type != "cpu":
            # Every device, because one model may be spread over several.
            for index in range(torch.accelerator.device_count()):
                torch.accelerator.synchronize(index)

    def waiting(start: Callable[[], None]) -> Callable[[], None]:
        def prepared() -> None:
            start()
            barrier()

        return prepared

    with inference(*models.values()):
        for name, model in models.items():
            steps = EXECUTIONS[execution](model, context + generated, task)
            start, candidates[name] = _RUNS[task](steps, ids, held, generated)
            prepare[name] = waiting(start)
        found = measure(
            candidates,
            rounds=rounds,
            warmup=warmup,
            prepare=prepare,
            synchronize=synchronize,
            clock=clock,
            progress=progress,
        )
        # Afterwards: by then everything is compiled, and what a first run alone needs is gone.
        for name, model in models.items():
            memory[name] = _footprint(model, prepare[name], candidates[name], held)
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
        timings=timings(found),
        seconds=found.seconds,
        backend=backend or execution,
        ranks=ranks,
        memory=memory,
    )


def verdict(result: BenchResult) -> str:
    """What the result allows one to say, in words: one line per candidate but the original.

    With several candidates each line begins with its name. A difference is claimed only where the
    95 % interval of the paired ratio excludes 1, and none at all from too few rounds.
    """
    others = {name: t for name, t in result.timings.items() if name != result.original}
    if not others:
        return "nothing to compare with"
    if len(others) == 1:
        return "".join(claim(timing, result.rounds) for timing in others.values())
    return "\n".join(f"{name}: {claim(timing, result.rounds)}" for name, timing in others.items())


def _shared(values: dict[str, str], what: str) -> str:
    """The one value that all models have."""
    if len(set(values.values())) > 1:
        listed = ", ".join(f"'{name}' {value}" for name, value in values.items())
        raise AbreastError(
            f"the models have different {what} ({listed}); timings compare only like with like"
        )
    return next(iter(values.values()))


# Each makes the untimed preparation and the timed run of one task. `held` carries the cache from
# one to the other, and keeps it, so that freeing it is not timed.
Run = tuple[Callable[[], None], Callable[[], int]]


def _prefill_run(steps: Steps, ids: torch.Tensor, held: list[Any], new_tokens: int) -> Run:
    def start() -> None:
        held.clear()
        steps.reset()

    def prefill() -> int:
        held.extend(steps.prefill(ids))
        return ids.numel()

    return start, prefill


def _decode_run(steps: Steps, ids: torch.Tensor, held: list[Any], new_tokens: int) -> Run:
    def start() -> None:
        held.clear()
        steps.reset()
        held.extend(steps.prefill(ids))

    def decode() -> int:
        token, cache = held
        for _ in range(new_tokens):
            token = steps.step(token, cache)
        return len(ids) * new_tokens

    return start, decode


def _generate_run(steps: Steps, ids: torch.Tensor, held: list[Any], new_tokens: int) -> Run:
    def start() -> None:
        held.clear()
        steps.reset()

    def generate() -> int:
        token, cache = steps.prefill(ids)
        held.extend((token, cache))
        for _ in range(new_tokens - 1):
            token = steps.step(token, cache)
        return len(ids) * new_tokens

    return start, generate


_RUNS: dict[str, Callable[[Steps, torch.Tensor, list[Any], int], Run]] = {
    "prefill": _prefill_run,
    "decode": _decode_run,
    "generate": _generate_run,
}


def _footprint(
    model: PreTrainedModel, start: Callable[[], None], run: Callable[[], int], held: list[Any]
) -> Footprint:
    """Memory that one more, untimed run takes."""
    held.clear()
    weights = sum(_nbytes(parameter) for parameter in model.parameters())
    on_cpu = model.device.type == "cpu"
    with _peaks(model.device) as peaks:
        start()
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
    )


def _nbytes(tensor: Any) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return int(local.nbytes)


@contextmanager
def _peaks(device: torch.device) -> Iterator[list[int | None]]:
    """By how many bytes [device, host] memory grew at most inside the block; None for not known."""
    found: list[int | None] = [None, None]
    before = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    resident = None
    with suppress(OSError):
        # Linux: 5 resets the high-water mark of this process's own resident memory.
        Path("/proc/self/clear_refs").write_text("5")
        resident = _status("VmRSS")
    yield found
    if device.type == "cuda":
        found[0] = torch.cuda.max_memory_allocated(device) - before
    if resident is not None:
        found[1] = max(0, _status("VmHWM") - resident)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {key}")
