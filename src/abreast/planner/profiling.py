"""Seconds of each kind of stage: timed here, or computed for other hardware."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from abreast.checkpoint import read_json, scratch, write
from abreast.convert import convert
from abreast.errors import AbreastError
from abreast.families import CONVERTIBLE, num_layers_of
from abreast.model import decoder_layers, load
from abreast.plan import Group, Plan
from abreast.planner.calibration import Calibration
from abreast.planner.front import Profile, kind_of
from abreast.speed import Setting, bench, hardware_of, read_config, stage_cost, stage_seconds
from abreast.targets import Unpaired

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from abreast.speed import Hardware

PROFILED_TOKENS = 16  # decoded per round of a profile


class NoisyTiming(AbreastError):
    """Timings that tell nothing about the speed of a stage."""


def profile_here(
    calibration: Calibration,
    kinds: Set[str],
    out: str | Path,
    *,
    rounds: int = 12,
    context: int = 128,
    step: Callable[[str], None] = lambda message: None,
) -> Profile:
    """As `saved_profile`, of these kinds of groups, packed from the candidates of a calibration."""
    settings = calibration.settings
    timing = ProfileSettings(settings.dtype, settings.device, rounds, context, settings.seed)
    return saved_profile(
        calibration.checkpoint,
        [group for group in calibration.candidates if kind_of(group) in kinds],
        Path(out),
        timing,
        trust_remote_code=settings.trust_remote_code,
        step=step,
    )


def saved_profile(
    folder: Path,
    groups: Sequence[Group],
    out: Path,
    timing: ProfileSettings,
    *,
    trust_remote_code: bool = False,
    step: Callable[[str], None] = lambda message: None,
) -> Profile:
    """The profile in out/profile.json, measured now (see `measured_profile`) where it has none.

    One of more rounds and with more kinds of stage than are needed will do.
    """
    path = out / "profile.json"
    kinds = {kind_of(group) for group in groups}
    record = read_json(path) if path.is_file() else {}
    about = record.get("rests_on", {})
    rounds = max(timing.rounds, about.get("rounds", 0))
    if kinds <= {*about.get("kinds", ())} and about == {
        **about,
        **asdict(timing),
        "rounds": rounds,
    }:
        saved = Profile(**record["profile"])
        if saved.impossible() is None:
            return saved
    step("time each kind of stage")
    profile = measured_profile(folder, groups, out, timing, trust_remote_code=trust_remote_code)
    rests_on = {"kinds": sorted(kinds), **asdict(timing)}
    write(path, json.dumps({"rests_on": rests_on, "profile": asdict(profile)}, indent=1) + "\n")
    return profile


def estimated_profile(
    model: str | Path,
    groups: Sequence[Group],
    hardware: str | Hardware,
    *,
    unpaired: Unpaired = "shard",
    batch: int = 1,
    context: int = 1024,
    revision: str | None = None,
) -> Profile:
    """Predicted seconds of decoding per kind of stage on other hardware (see `estimate`).

    hardware: or a name such as "2xA100-NVLink". unpaired: as in `torch_tp`; under replicate groups
    with fewer members than devices take for ever. Raises AbreastError for unknown hardware.
    """
    config = read_config(model, revision=revision)
    hardware = hardware_of(hardware) if isinstance(hardware, str) else hardware
    setting = Setting(hardware, batch=batch, context=context, unpaired=unpaired)
    kinds = {kind_of(group): group for group in groups}
    *_, rest = stage_seconds(config, Plan(num_layers=num_layers_of(config)), setting)
    return Profile(
        about=f"estimate for {hardware.name}, {unpaired}, decode at batch {batch}, "
        f"context {context}",
        single=stage_cost(config, None, setting),
        groups={
            kind: math.inf
            if unpaired == "replicate" and len(group.layers) < hardware.count
            else stage_cost(config, group, setting)
            for kind, group in kinds.items()
        },
        rest=rest,
    )


@dataclass(frozen=True)
class ProfileSettings:
    """How decoding is timed for a profile; context in tokens."""

    dtype: str
    device: str
    rounds: int = 12
    context: int = 128
    seed: int = 0


def measured_profile(
    folder: Path,
    groups: Sequence[Group],
    work: Path,
    settings: ProfileSettings,
    *,
    trust_remote_code: bool = False,
) -> Profile:
    """Time decoding here and solve for the seconds per kind of stage.

    Timed in turn against the model: the model with half of its layers, and for each kind among
    `groups` a conversion (grouped in memory for families that cannot be converted) with as many
    groups of that kind as fit one after another; one of them is in memory at a time. work: folder
    for the conversions. Raises NoisyTiming where noise leaves no time for a kind of stage, and as
    `convert`, `load` and `bench` do.
    """

    seconds: dict[str, float] = {}

    def loaded(checkpoint: Path, plan: Plan | None = None) -> PreTrainedModel:
        model, _ = load(
            checkpoint,
            plan=plan,
            dtype=settings.dtype,
            device=settings.device,
            trust_remote_code=trust_remote_code,
        )
        return model

    def timed(kind: str, model: PreTrainedModel) -> tuple[float, float]:
        timings = bench(
            {"whole": whole, kind: model},
            task="decode",
            rounds=settings.rounds,
            context=settings.context,
            new_tokens=PROFILED_TOKENS,
            seed=settings.seed,
        ).timings
        return timings["whole"].median, timings[kind].median

    whole, shorter = loaded(folder), loaded(folder)
    layers = decoder_layers(shorter)
    count, half = len(layers), len(layers) // 2
    del layers[half:]
    original, seconds["half"] = timed("half", shorter)
    seconds["whole"] = original
    del shorter, layers
    plans = _plans_by_kind(groups, count)
    for kind, plan in plans.items():
        with scratch(".profile.partial-", work) as staging:
            target, converted = staging / "converted", None
            row = CONVERTIBLE.get(whole.config.model_type)
            if row is not None and row.converts(whole.config.to_dict()):
                convert(folder, plan, target, force=True)
                converted = loaded(target)
            # what the machine does at the time slows both
            beside, own = timed(kind, converted or loaded(folder, plan))
            seconds[kind] = own * original / beside
    seconds = {name: median / PROFILED_TOKENS for name, median in seconds.items()}
    # What lies outside the layers takes no less than nothing; the layers then take all there is.
    rest = max(0.0, (count * seconds["half"] - half * seconds["whole"]) / (count - half))
    single = (seconds["whole"] - rest) / count
    profile = Profile(
        about=f"decode at context {settings.context}, {settings.dtype}, {settings.device}, "
        f"median of {settings.rounds} rounds",
        single=single,
        groups={
            kind: (seconds[kind] - rest - (plan.depth - len(plan.groups)) * single)
            / len(plan.groups)
            for kind, plan in plans.items()
        },
        rest=rest,
    )
    if (stage := profile.impossible()) is not None:
        raise NoisyTiming(
            f"the timing is too noisy to predict speed: {stage} would take no time; "
            "try again when this machine is quiet, or name one with --hardware"
        )
    return profile


def _plans_by_kind(groups: Sequence[Group], num_layers: int) -> dict[str, Plan]:
    """For each kind of group, a plan with as many of them as fit one after another."""
    plans: dict[str, Plan] = {}
    for group in groups:
        plan = plans.get(kind_of(group), Plan(num_layers=num_layers))
        if not plan.groups or plan.groups[-1].layers[-1] < group.layers[0]:
            longer = Plan(num_layers=num_layers, groups=(*plan.groups, group))
            plans[kind_of(group)] = longer
    return plans
