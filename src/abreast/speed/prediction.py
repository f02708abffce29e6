"""How long a model and its plan would take on hardware that is not here, from config.json alone.

A roofline for every stage: matrices and the KV cache are read at a fraction of the memory
bandwidth, or multiplied at a fraction of the peak, whichever takes longer; every kernel costs the
device a gap and, unless a graph is replayed, the program a launch; every all-reduce costs latency
and volume; between two graphs the device waits. Program and device work side by side, so the slower
of the two decides, except on a CPU, where they are one. Constants and their sources: hardware.yaml.
Two of them are calibrated to published numbers (the gap between kernels, and the program's time per
kernel in eager PyTorch); docs/speed.md compares the estimates with all that the papers measured.

Everything here is pure and needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from abreast.errors import AbreastError
from abreast.families import family_of, num_layers_of
from abreast.plan import Group, Plan
from abreast.runs import option
from abreast.speed.hardware import Hardware, HardwareError, hardware_of, table
from abreast.speed.shape import Shape, shape_of
from abreast.targets import TORCH_TP, VLLM, Unpaired, refusals

Phase = Literal["prefill", "decode"]
Runtime = Literal["graphs", "cudagraphs", "eager"]
Part = Literal["both", "attention", "ffn"]
BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "float8": 1.0, "int4": 0.5}


@dataclass(frozen=True)
class Setting:
    """How a model is served. Fields with a help text are options of `abreast estimate`.

    batch: rows. context: tokens in the KV cache (decode) or of the prompt (prefill). runtime:
    "graphs" for a serving engine that replays CUDA graphs, "eager" for PyTorch operation by
    operation, "cudagraphs" for the same operations replayed. Raises AbreastError for unknown
    values, HardwareError for too many ranks.
    """

    hardware: Hardware = field(
        metadata={
            "help": "For example H100 or 8xA100-PCIe.",
            "parse": hardware_of,
            "default": "H100",
        }
    )
    batch: int = 1
    context: int = 1024
    phase: Phase = "decode"
    runtime: Runtime = "graphs"
    ranks: int | None = option(None, "Devices that share the work. Default: all of them.")
    baseline_ranks: int | None = option(None, "Devices for the original. Default: the same number.")
    unpaired: Unpaired = option(
        "shard",
        "replicate: single layers are whole on every device, as in CQIL's "
        "measurements, and the original runs on one.",
    )
    fused: bool = option(
        True, "Run a group's members one after another, as when grouped in memory.", "--unfused"
    )
    dtype: str = option("bfloat16", "Dtype of the weights; also float8 and int4.")

    def __post_init__(self) -> None:
        if min(self.batch, self.context) < 1:
            raise AbreastError("batch size and context must both be at least 1")
        for value, known in (
            (self.dtype, tuple(BYTES)),
            (self.phase, get_args(Phase)),
            (self.runtime, get_args(Runtime)),
            (self.unpaired, get_args(Unpaired)),
        ):
            if value not in known:
                raise AbreastError(f"'{value}' is not one of {', '.join(known)}")
        if not 1 <= self.devices <= self.hardware.count:
            count = self.hardware.count
            raise HardwareError(
                f"'{self.hardware.name}' is {count} device{'s' * (count > 1)}; "
                f"{self.devices} cannot share the work"
            )

    @property
    def devices(self) -> int:
        return self.hardware.count if self.ranks is None else self.ranks

    @property
    def tokens(self) -> int:
        """Tokens of one forward pass."""
        return self.batch * (self.context if self.phase == "prefill" else 1)

    @property
    def cache_bytes(self) -> float:
        """Bytes of one element of the KV cache."""
        return max(BYTES[self.dtype], 2.0)

    @property
    def baseline(self) -> Setting:
        """The setting of the original that a plan is compared with."""
        ranks = 1 if self.unpaired == "replicate" else self.baseline_ranks or self.ranks
        return replace(self, ranks=ranks, baseline_ranks=None, fused=True, unpaired="shard")

    def held(self, group: Group | None) -> tuple[float, float]:
        """How many layers' attentions and FFNs of a stage the fullest device has."""
        if group is None:
            part = 1.0 if self.unpaired == "replicate" else 1 / self.devices
            return part, part
        width = len(group.layers)
        if self.unpaired == "shard" or self.devices > width:
            return width / self.devices, width / self.devices
        members = math.ceil(width / self.devices)
        return width if group.is_in_order else members, members

    def deals(self, group: Group) -> bool:
        """Whether devices get whole members of a group that FFNs exchange nothing within."""
        width, devices = len(group.layers), self.devices
        whole = self.unpaired == "replicate" or not (width % devices and devices % width)
        return whole and not group.shares_ffn_input

    def repeated(self, group: Group | None) -> float | None:
        """How many layers' attentions the last of the fullest devices would repeat, those with
        a member more being the first; None where there is nothing to exchange instead."""
        if group is None or self.devices == 1 or not (group.ffn_band and self.deals(group)):
            return None
        width = len(group.layers)
        share = max(1, self.devices // width)
        full = width % self.devices or min(width, self.devices)
        return min(group.ffn_band, (full - 1) * math.ceil(width / self.devices)) / share


@dataclass(frozen=True)
class ForwardCost:
    """Seconds that the program (host) and the device need; costs add up."""

    host: float
    device: float
    synchronous: bool = False

    def __add__(self, other: ForwardCost) -> ForwardCost:
        host, device = self.host + other.host, self.device + other.device
        return ForwardCost(host, device, self.synchronous or other.synchronous)

    def __mul__(self, times: int) -> ForwardCost:
        return ForwardCost(self.host * times, self.device * times, self.synchronous)

    @property
    def seconds(self) -> float:
        return self.host + self.device if self.synchronous else max(self.host, self.device)


@dataclass(frozen=True)
class Estimate:
    """Seconds per forward pass of the original and under the plan, and memory.

    bound: what limits the speed under the plan, "program" or "device". all_reduces: per forward
    pass, of the original and under the plan. weights, kv_cache: bytes per device. fits: whether
    they fit into its memory. refused: why no engine splits the plan over that many devices, None
    where one does.
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
    refused: str | None

    @property
    def gain(self) -> str:
        """What the plan brings, in a word."""
        if self.refused is not None:
            return "refused"
        return f"{self.speedup:.2f}x" if self.fits else "too large"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def forward_cost(config: Mapping[str, Any], plan: Plan | None, setting: Setting) -> ForwardCost:
    """Cost of a whole forward pass, of the original where plan is None.

    Raises AbreastError for a plan of another model, FamilyError for an unknown one.
    """
    shape = shape_of(config)
    if plan is not None:
        plan.check_layers(shape.num_layers)
    groups = plan.groups if plan is not None else ()
    singles = shape.num_layers - sum(len(group.layers) for group in groups)
    total = _outside(shape, setting) + _stage(shape, None, setting) * singles
    for group in groups:
        total = total + _stage(shape, group, setting)
    return total


def stage_cost(
    config: Mapping[str, Any], group: Group | None, setting: Setting, *, part: Part = "both"
) -> float:
    """Seconds of one stage: a group, or a single layer where group is None.

    Stages add up to a forward pass (plus what lies outside the layers) where program or device is
    the slower one throughout. Raises FamilyError for an unknown model.
    """
    return _stage(shape_of(config), group, setting, part).seconds


def stage_seconds(config: Mapping[str, Any], plan: Plan, setting: Setting) -> tuple[float, ...]:
    """Seconds of every stage of a plan, in order, and last of what lies outside the layers.

    Their sum is the time of a forward pass where program or device is the slower one throughout,
    and more than it elsewhere.
    """
    shape = shape_of(config)
    costs = [_stage(shape, plan.group_of(stage), setting) for stage in plan.stages]
    return tuple(cost.seconds for cost in (*costs, _outside(shape, setting)))


def speedup(config: Mapping[str, Any], plan: Plan, setting: Setting) -> float:
    """Seconds of the original / seconds under the plan."""
    original = forward_cost(config, None, setting.baseline)
    return original.seconds / forward_cost(config, plan, setting).seconds


def estimate(config: Mapping[str, Any], plan: Plan, setting: Setting) -> Estimate:
    """Original against plan, with what limits the speed and the memory per device.

    Raises as `forward_cost` does.
    """
    shape, baseline = shape_of(config), setting.baseline
    original = forward_cost(config, None, baseline)
    under = forward_cost(config, plan, setting)
    attentions, ffns = map(
        sum, zip(*(setting.held(plan.group_of(stage)) for stage in plan.stages), strict=True)
    )
    layers = shape.attention * attentions + (shape.ffn + shape.experts) * ffns
    outside = (shape.head + shape.embedding) * setting.held(None)[0]
    weights = (layers + outside) * BYTES[setting.dtype]
    kv_cache = _context_bytes(config, setting) * attentions / shape.num_layers
    return Estimate(
        hardware=setting.hardware.name,
        phase=setting.phase,
        runtime=setting.runtime,
        batch=setting.batch,
        context=setting.context,
        dtype=setting.dtype,
        ranks=setting.devices,
        baseline_ranks=baseline.devices,
        original=original.seconds,
        converted=under.seconds,
        speedup=original.seconds / under.seconds,
        bound="program" if under.host > under.device else "device",
        all_reduces=(
            _count_all_reduces(shape, Plan(num_layers=shape.num_layers), baseline),
            _count_all_reduces(shape, plan, setting),
        ),
        weights=int(weights),
        kv_cache=int(kv_cache),
        fits=weights + kv_cache < setting.hardware.memory,
        refused=_refused(config, plan, setting),
    )


def ways(config: Mapping[str, Any], plan: Plan, setting: Setting) -> dict[str, Estimate]:
    """The plan sharded, replicated and on one device, where each can be; nothing for one device.
    Raises as `estimate`."""
    if setting.devices == 1:
        return {}
    settings = {way: replace(setting, unpaired=way) for way in get_args(Unpaired)}
    settings["on one device"] = replace(setting, ranks=1, baseline_ranks=None, unpaired="shard")
    estimates = {way: estimate(config, plan, own) for way, own in settings.items()}
    return {way: entry for way, entry in estimates.items() if entry.refused is None}


def fastest_way(by_way: Mapping[str, Estimate]) -> str | None:
    """Which of the `ways` that fit into the devices' memory takes the least time, if any fits."""
    fitting = {way: entry.converted for way, entry in by_way.items() if entry.fits}
    return min(fitting, key=fitting.__getitem__) if fitting else None


def _refused(config: Mapping[str, Any], plan: Plan, setting: Setting) -> str | None:
    """Why no engine splits a plan over the devices, None where one does."""
    if setting.devices == 1:
        return None
    family, unpaired = family_of(config), setting.unpaired
    engines = (TORCH_TP,) if unpaired == "replicate" else (VLLM, TORCH_TP)
    reasons = [
        next(refusals(e, config, family, plan, setting.devices, unpaired), None) for e in engines
    ]
    return reasons[0] if all(reasons) else None


def _context_bytes(config: Mapping[str, Any], setting: Setting) -> int:
    """Bytes of keys and values of all layers; grouping does not change them."""
    per_token = 2 * shape_of(config).keys * num_layers_of(config)
    return int(per_token * setting.batch * setting.context * setting.cache_bytes)


def _stage(shape: Shape, group: Group | None, setting: Setting, part: Part = "both") -> ForwardCost:
    """With a bypass, whichever is faster: exchanging attentions or repeating the neighbours'."""
    ways = (False, True) if part == "both" and setting.repeated(group) is not None else (False,)
    costs = [_stage_way(shape, group, setting, part, repeats) for repeats in ways]
    return min(costs, key=lambda cost: cost.seconds)


def _stage_way(
    shape: Shape, group: Group | None, setting: Setting, part: Part, repeats: bool
) -> ForwardCost:
    kernels_of = table()["runtimes"][setting.runtime]["kernels"]
    width = len(group.layers) if group is not None else 1
    attentions, ffns = setting.held(group)
    attentions += (setting.repeated(group) or 0.0) * repeats
    device, kernels = 0.0, 0
    steps = {"attention": width if shape.own_attentions else _attentions(group), "ffn": 1}
    for half, elements in (("attention", shape.attention * attentions), ("ffn", shape.ffn * ffns)):
        if part in ("both", half):
            device += _matrix_seconds(elements, setting.tokens, setting)
            kernels += kernels_of[half] * (steps[half] if setting.fused else width)
    if shape.experts and part != "attention":
        device += _expert_seconds(shape, ffns, setting)
        kernels += table()["expert_kernels"] * (1 if setting.fused else width)
    if part != "ffn":
        device += _attention_seconds(shape, attentions, setting)
    all_reduces = _all_reduces(shape, group, setting, part, repeats)
    for nbytes, ranks in all_reduces:
        device += setting.hardware.all_reduce(nbytes, ranks)
    return _launched(kernels, len(all_reduces), device, setting)


def _outside(shape: Shape, setting: Setting) -> ForwardCost:
    """Embedding, last norm, output head (of one position per row), choice of the token; and, where
    graphs are replayed, how long the device waits for the next one."""
    ranks = 1 if setting.unpaired == "replicate" else setting.devices
    device = _matrix_seconds(shape.head / ranks, setting.batch, setting)
    device += 2 * setting.hardware.all_reduce(setting.batch * shape.hidden * 2.0, ranks)
    runtime = table()["runtimes"][setting.runtime]
    device += 0.0 if setting.hardware.synchronous else runtime["token"]
    return _launched(runtime["kernels"]["outside"], 2 if ranks > 1 else 0, device, setting)


def _attentions(group: Group | None) -> int:
    """How many attentions of a stage run one after another."""
    return len(group.layers) if group is not None and group.is_in_order else 1


def _matrix_seconds(elements: float, tokens: float, setting: Setting) -> float:
    hardware, fractions = setting.hardware, table()["fractions"]
    read = elements * BYTES[setting.dtype] / (hardware.bandwidth * fractions["bandwidth"])
    return max(read, 2 * elements * tokens / (hardware.peak(setting.dtype) * fractions["flops"]))


def _expert_seconds(shape: Shape, layers: float, setting: Setting) -> float:
    """Reading the experts that any token chooses, as if at random, and multiplying by them."""
    read = 1 - (1 - shape.chosen) ** setting.tokens
    return _matrix_seconds(
        layers * shape.experts * read, setting.tokens * shape.chosen / read, setting
    )


def _attention_seconds(shape: Shape, layers: float, setting: Setting) -> float:
    """Reading the KV cache and multiplying by it; layers: how many layers' heads, or what share."""
    hardware, fractions, context = setting.hardware, table()["fractions"], setting.context
    cache = 2 * shape.keys * setting.batch * context * setting.cache_bytes * layers
    pairs = context * context / 2 if setting.phase == "prefill" else context
    products = 4 * shape.queries * setting.batch * pairs * layers
    return max(
        cache / (hardware.bandwidth * fractions["attention"]),
        products / (hardware.peak(setting.dtype) * fractions["attention_flops"]),
    )


def _launched(kernels: int, all_reduces: int, device: float, setting: Setting) -> ForwardCost:
    """The cost with the time to launch kernels and all-reduces, and the gaps between kernels."""
    runtime = table()["runtimes"][setting.runtime]
    host = all_reduces * runtime["host_collective"]
    if setting.hardware.synchronous:
        return ForwardCost(host + kernels * table()["synchronous_kernel"], device, True)
    return ForwardCost(host + kernels * runtime["host_kernel"], device + kernels * table()["gap"])


def _all_reduces(
    shape: Shape, group: Group | None, setting: Setting, part: Part = "both", repeats: bool = False
) -> list[tuple[float, int]]:
    """(bytes, ranks) of every all-reduce of a stage; an exchange with neighbours counts as one."""
    ranks = setting.devices
    nbytes = setting.tokens * shape.hidden * 2.0
    if ranks == 1 or (group is None and setting.unpaired == "replicate"):
        return []
    whole = group is not None and group.is_in_order and setting.unpaired == "replicate"
    if whole:  # every device computes all attentions
        return [(nbytes, ranks)] * (part != "attention")
    if part != "both":
        return [(nbytes, ranks)] * (_attentions(group) if part == "attention" else 1)
    if group is None or not setting.deals(group):
        return [(nbytes, ranks)] * (_attentions(group) + 1)
    within_member = [(nbytes, ranks // len(group.layers))] if ranks > len(group.layers) else []
    neighbours = [(nbytes, 2)] if group.ffn_band and not repeats else []
    return [(nbytes, ranks), *within_member, *neighbours]


def _count_all_reduces(shape: Shape, plan: Plan, setting: Setting) -> int:
    stages = sum(len(_all_reduces(shape, plan.group_of(stage), setting)) for stage in plan.stages)
    return stages + (2 if setting.devices > 1 and setting.unpaired == "shard" else 0)
