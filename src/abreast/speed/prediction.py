"""How long a model and its plan would take on hardware that is not here, from config.json alone.

A roofline for every stage: matrices and the KV cache are read at a fraction of the memory
bandwidth, or multiplied at a fraction of the peak, whichever takes longer; every kernel costs the
device a gap and, unless a graph is replayed, the program a launch; every all-reduce costs latency
and volume. Program and device work side by side, so the slower of the two decides, except on a CPU,
where they are one. Constants and their sources: hardware.yaml. Two of them are calibrated to
published numbers (the gap between kernels, and the program's time per kernel in eager PyTorch);
docs/speed.md compares what follows with everything that the papers measured.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from abreast.errors import AbreastError
from abreast.families import family_of, head_dim_of, is_tied, num_layers_of, sizes
from abreast.plan import Plan, Wiring
from abreast.speed.hardware import Hardware, HardwareError, hardware_of, table

Phase = Literal["prefill", "decode"]
Runtime = Literal["eager", "graphs"]
Part = Literal["both", "attention", "ffn"]
BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "float8": 1.0, "int4": 0.5}


@dataclass(frozen=True)
class Shape:
    """What of a config.json matters here. Sizes in elements; attention and ffn: parameters of
    one layer; outside: those of the output head, which every token reads."""

    hidden: int
    queries: int
    keys: int
    attention: int
    ffn: int
    head: int
    embedding: int
    num_layers: int


@dataclass(frozen=True)
class Cost:
    """Seconds that the program (host) and the device need; costs add up."""

    host: float
    device: float
    synchronous: bool = False

    def __add__(self, other: Cost) -> Cost:
        host, device = self.host + other.host, self.device + other.device
        return Cost(host, device, self.synchronous or other.synchronous)

    def __mul__(self, times: int) -> Cost:
        return Cost(self.host * times, self.device * times, self.synchronous)

    @property
    def seconds(self) -> float:
        return self.host + self.device if self.synchronous else max(self.host, self.device)


@dataclass(frozen=True)
class Estimate:
    """Seconds per forward pass of the original and under the plan, per phase, and what they hold.

    bound: what decides: "program" or "device". all_reduces: per forward pass. weights, kv_cache:
    bytes per device. fits: whether they fit into its memory.
    """

    hardware: str
    phase: str
    runtime: str
    batch: int
    context: int
    dtype: str
    ranks: int
    baseline_ranks: int
    original: float
    converted: float
    speedup: float
    bound: str
    all_reduces: tuple[int, int]
    weights: int
    kv_cache: int
    fits: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def shape_of(config: Mapping[str, Any]) -> Shape:
    """Sizes from a config.json. Raises FamilyError for an unknown or a converted model."""
    family, size = family_of(config), sizes(config)
    attention = ffn = 0
    for matrix in family.matrices:
        elements = sum(size[part] for part in matrix.rows) * size[matrix.columns]
        if matrix.name.startswith("mlp."):
            ffn += elements
        else:
            attention += elements
    vocabulary = size["V"] * size["D"]
    return Shape(
        hidden=size["D"],
        queries=size["Q"],
        keys=size["K"],
        attention=attention,
        ffn=ffn,
        head=vocabulary,
        embedding=0 if is_tied(config) else vocabulary,
        num_layers=num_layers_of(config),
    )


def read_config(model: str | Path, *, revision: str | None = None) -> dict[str, Any]:
    """The config.json of a folder, of a Hugging Face id (nothing else is fetched), or that file.

    Raises AbreastError where there is none.
    """
    from abreast.checkpoint import read_json
    from abreast.errors import CheckpointError

    path = Path(model).expanduser()
    if path.is_dir() or path.suffix == ".json":
        return read_json(path / "config.json" if path.is_dir() else path)
    if str(model).count("/") != 1 or not all(str(model).split("/")):
        raise AbreastError(f"no model at '{model}'; give a folder, its config.json or ORG/NAME")
    from huggingface_hub import hf_hub_download

    try:
        return read_json(Path(hf_hub_download(str(model), "config.json", revision=revision)))
    except CheckpointError:
        raise
    except Exception as error:  # the client raises many kinds; all mean that it is not to be had
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AbreastError(f"no config.json of '{model}' here or on the Hub ({reason})") from None


def context_bytes(
    config: Mapping[str, Any], batch: int, context: int, dtype: str = "bfloat16"
) -> int:
    """Bytes of keys and values of all layers; grouping does not change them."""
    kv_heads = int(config.get("num_key_value_heads") or config["num_attention_heads"])
    per_token = 2 * kv_heads * head_dim_of(config) * num_layers_of(config)
    return int(per_token * batch * context * max(BYTES[dtype], 2.0))


@functools.lru_cache(maxsize=4096)
def _stage(
    shape: Shape,
    width: int,
    wiring: Wiring | None,
    hardware: Hardware,
    batch: int,
    context: int,
    phase: Phase,
    runtime: Runtime,
    dtype: str,
    ranks: int,
    fused: bool,
    replicated: bool,
    bypass: int,
    part: Part,
) -> Cost:
    """One stage of `width` layers; a single layer has width 1 and no wiring."""
    how, fractions = table()["runtimes"][runtime], table()["fractions"]
    tokens = batch * (context if phase == "prefill" else 1)
    split = 1 if replicated and width == 1 else ranks
    weight, value = BYTES[dtype], max(BYTES[dtype], 2.0)
    peak, gap = hardware.peak(dtype), table()["gap"]
    host = device = 0.0
    kernels = 0
    launched = 1 if fused else width
    for half, elements in (("attention", shape.attention), ("ffn", shape.ffn)):
        if part not in ("both", half):
            continue
        mine = elements * width / split
        read = mine * weight / (hardware.bandwidth * fractions["bandwidth"])
        multiplied = 2 * mine * tokens / (peak * fractions["flops"])
        device += max(read, multiplied)
        kernels += how["kernels"][half] * launched
    if part != "ffn":
        heads = width / split
        cache = 2 * shape.keys * batch * context * value * heads
        read = cache / (hardware.bandwidth * fractions["attention"])
        pairs = context * context / 2 if phase == "prefill" else context
        products = 4 * shape.queries * batch * pairs * heads
        device += max(read, products / (peak * fractions["attention_flops"]))
    for nbytes, members in _collectives(shape, width, wiring, ranks, split, tokens, bypass, part):
        device += hardware.all_reduce(nbytes, members)
        host += how["host_collective"]
    if hardware.synchronous:
        host += kernels * table()["synchronous_kernel"]
    else:
        host += kernels * how["host_kernel"]
        device += kernels * gap
    return Cost(host, device, hardware.synchronous)


def _collectives(
    shape: Shape,
    width: int,
    wiring: Wiring | None,
    ranks: int,
    split: int,
    tokens: int,
    bypass: int,
    part: Part,
) -> list[tuple[float, int]]:
    """(bytes, ranks) of every all-reduce of a stage; an exchange with neighbours counts as one."""
    nbytes = tokens * shape.hidden * 2.0
    if (split == 1 and width == 1) or ranks == 1:
        return []
    if part != "both":
        return [(nbytes, ranks)]
    if wiring != "cqil":
        return [(nbytes, ranks)] * 2
    if ranks % width:
        raise HardwareError(
            f"a cqil group of {width} layers runs on {width} devices or a multiple of that, "
            f"not on {ranks}"
        )
    found = [(nbytes, ranks)]
    if ranks > width:
        found.append((nbytes, ranks // width))
    if bypass:
        found.append((nbytes, 2))
    return found


def stage_cost(
    config: Mapping[str, Any],
    width: int,
    wiring: Wiring | None,
    hardware: Hardware | str,
    *,
    batch: int = 1,
    context: int = 1024,
    phase: Phase = "decode",
    runtime: Runtime = "graphs",
    dtype: str = "bfloat16",
    ranks: int | None = None,
    fused: bool = True,
    replicated: bool = False,
    bypass: int = 0,
    part: Part = "both",
) -> float:
    """Seconds of one stage: `width` layers in `wiring`, None for a single layer.

    batch: rows; context: tokens in the cache (decode) or of the prompt (prefill). ranks: devices
    that share the work, all by default. fused=False: members run one kernel after another, as
    grouped in memory. replicated: single layers run whole on every device, as in CQIL's own
    runtime. Pure, and remembered for equal arguments, so that a search may call it freely.
    Stages add up to a forward pass (plus what lies outside the layers) where program or device is
    the slower one throughout. Raises HardwareError and FamilyError.
    """
    hardware = hardware_of(hardware) if isinstance(hardware, str) else hardware
    _check(batch, context, dtype, phase, runtime)
    return _stage(
        shape_of(config),
        width,
        wiring,
        hardware,
        batch,
        context,
        phase,
        runtime,
        dtype,
        _ranks(hardware, ranks),
        fused,
        replicated,
        bypass,
        part,
    ).seconds


def _outside(
    shape: Shape,
    hardware: Hardware,
    batch: int,
    phase: Phase,
    runtime: Runtime,
    dtype: str,
    ranks: int,
) -> Cost:
    """Embedding, last norm, output head (of one position per row), choice of the token."""
    how, fractions = table()["runtimes"][runtime], table()["fractions"]
    kernels = how["kernels"]["outside"]
    elements = shape.head / ranks
    read = elements * BYTES[dtype] / (hardware.bandwidth * fractions["bandwidth"])
    device = max(read, 2 * elements * batch / (hardware.peak(dtype) * fractions["flops"]))
    host = 0.0
    if ranks > 1:
        device += 2 * hardware.all_reduce(batch * shape.hidden * 2.0, ranks)
        host += 2 * how["host_collective"]
    if hardware.synchronous:
        return Cost(host + kernels * table()["synchronous_kernel"], device, True)
    return Cost(host + kernels * how["host_kernel"], device + kernels * table()["gap"])


def forward_cost(
    config: Mapping[str, Any],
    plan: Plan | None,
    hardware: Hardware,
    *,
    batch: int = 1,
    context: int = 1024,
    phase: Phase = "decode",
    runtime: Runtime = "graphs",
    dtype: str = "bfloat16",
    ranks: int | None = None,
    fused: bool = True,
    replicated: bool = False,
) -> Cost:
    """A whole forward pass, of the original where plan is None. Arguments as for `stage_cost`."""
    shape = shape_of(config)
    _check(batch, context, dtype, phase, runtime)
    count = _ranks(hardware, ranks)
    if plan is not None:
        plan.check_layers(shape.num_layers)

    def stage(width: int, wiring: Wiring | None, bypass: int) -> Cost:
        return _stage(
            shape,
            width,
            wiring,
            hardware,
            batch,
            context,
            phase,
            runtime,
            dtype,
            count,
            fused,
            replicated,
            bypass,
            "both",
        )

    groups = plan.groups if plan is not None else ()
    singles = shape.num_layers - sum(len(group.layers) for group in groups)
    head_ranks = 1 if replicated else count
    total = _outside(shape, hardware, batch, phase, runtime, dtype, head_ranks)
    total = total + stage(1, None, 0) * singles
    for group in groups:
        total = total + stage(len(group.layers), group.wiring, group.bypass)
    return total


def stage_seconds(
    config: Mapping[str, Any], plan: Plan, hardware: Hardware | str, **options: Any
) -> tuple[float, ...]:
    """Seconds of every stage of a plan, in order, and last of what lies outside the layers.

    Options as for `forward_cost`. Their sum is the time of a forward pass where program or device
    is the slower one throughout, and more than it elsewhere.
    """
    hardware = hardware_of(hardware) if isinstance(hardware, str) else hardware
    found = []
    for stage in plan.stages:
        group = plan.group_of(stage)
        wiring, bypass = (group.wiring, group.bypass) if group else (None, 0)
        found.append(stage_cost(config, len(stage), wiring, hardware, bypass=bypass, **options))
    count = 1 if options.get("replicated") else _ranks(hardware, options.get("ranks"))
    outside = _outside(
        shape_of(config),
        hardware,
        options.get("batch", 1),
        options.get("phase", "decode"),
        options.get("runtime", "graphs"),
        options.get("dtype", "bfloat16"),
        count,
    )
    return (*found, outside.seconds)


def speedup(
    config: Mapping[str, Any],
    plan: Plan,
    hardware: Hardware | str,
    *,
    baseline_ranks: int | None = None,
    replicated: bool = False,
    **options: Any,
) -> float:
    """Seconds of the original / seconds under the plan. Options as for `forward_cost`.

    baseline_ranks: devices of the original, by default as many as the plan has; replicated: the
    original on one device and single layers whole on every device, which is what CQIL measures.
    """
    hardware = hardware_of(hardware) if isinstance(hardware, str) else hardware
    first = 1 if replicated else baseline_ranks or options.get("ranks")
    original = forward_cost(config, None, hardware, **{**options, "ranks": first, "fused": True})
    under = forward_cost(config, plan, hardware, replicated=replicated, **options)
    return original.seconds / under.seconds


def estimate(
    config: Mapping[str, Any],
    plan: Plan,
    hardware: Hardware | str,
    *,
    batch: int = 1,
    context: int = 1024,
    phase: Phase = "decode",
    runtime: Runtime = "graphs",
    dtype: str = "bfloat16",
    ranks: int | None = None,
    baseline_ranks: int | None = None,
    fused: bool = True,
    replicated: bool = False,
) -> Estimate:
    """Original against plan, with what decides and what has to be held. See `forward_cost`."""
    hardware = hardware_of(hardware) if isinstance(hardware, str) else hardware
    count = _ranks(hardware, ranks)
    first = 1 if replicated else _ranks(hardware, baseline_ranks or count)
    shared: dict[str, Any] = {
        "batch": batch,
        "context": context,
        "phase": phase,
        "runtime": runtime,
        "dtype": dtype,
    }
    original = forward_cost(config, None, hardware, ranks=first, **shared)
    under = forward_cost(
        config, plan, hardware, ranks=count, fused=fused, replicated=replicated, **shared
    )
    shape = shape_of(config)
    layers = (shape.attention + shape.ffn) * BYTES[dtype]
    singles = sum(len(stage) == 1 for stage in plan.stages)
    parts = (shape.num_layers - singles) / count + singles / (1 if replicated else count)
    head_ranks = 1 if replicated else count
    weights = layers * parts + (shape.head + shape.embedding) * BYTES[dtype] / head_ranks
    kv_cache = context_bytes(config, batch, context, dtype) * parts / shape.num_layers
    return Estimate(
        hardware=hardware.name,
        ranks=count,
        baseline_ranks=first,
        original=original.seconds,
        converted=under.seconds,
        speedup=original.seconds / under.seconds,
        bound="program" if under.host > under.device else "device",
        all_reduces=(
            0 if first == 1 else 2 * shape.num_layers + 2,
            _count_collectives(shape, plan, count, replicated),
        ),
        weights=int(weights),
        kv_cache=int(kv_cache),
        fits=weights + kv_cache < hardware.memory,
        **shared,
    )


def _count_collectives(shape: Shape, plan: Plan, ranks: int, replicated: bool) -> int:
    if ranks == 1:
        return 0
    found = 0 if replicated else 2
    for stage in plan.stages:
        group = plan.group_of(stage)
        wiring, bypass = (group.wiring, group.bypass) if group else (None, 0)
        split = 1 if replicated and group is None else ranks
        found += len(_collectives(shape, len(stage), wiring, ranks, split, 1, bypass, "both"))
    return found


def _ranks(hardware: Hardware, ranks: int | None) -> int:
    count = hardware.count if ranks is None else ranks
    if not 1 <= count <= hardware.count:
        devices = f"{hardware.count} device{'s' * (hardware.count > 1)}"
        raise HardwareError(f"'{hardware.name}' is {devices}; {count} cannot share the work")
    return count


def _check(batch: int, context: int, dtype: str, phase: str, runtime: str) -> None:
    if min(batch, context) < 1:
        raise AbreastError("batch size and context must both be at least 1")
    for value, known in ((dtype, BYTES), (phase, get_args(Phase)), (runtime, get_args(Runtime))):
        if value not in known:
            raise AbreastError(f"'{value}' is not one of {', '.join(known)}")
