"""A run folder read back: what `plan` and `optimize` left in it, what is missing, what can play.

Knows no torch. The layout of the folder is described in optimize.py.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from abreast.checkpoint import MANIFEST, Manifest, model_hash, read_manifest
from abreast.errors import AbreastError
from abreast.families import num_layers_of
from abreast.plan import Plan
from abreast.planner import FRONT_FILE, OBJECTIVES, STATS_FILE, Cost, Objective, Profile, Stats
from abreast.rivals import BASELINES_FILE, Measured
from abreast.runs import TEXT_FOLDER, damaged_record, read_record

LEFT_BY = "the folder that `abreast plan` or `abreast optimize` left"
Record = Mapping[str, Any]
_NEEDED = {  # without these a result is none
    "verify": {"ok", "faults", "healed", "uncached"},
    "quality": {"model", "reference", "nll_difference", "kl", "top1_agreement", "num_tokens"},
    "speed": {"prefill", "decode"},
    "samples": {"samples"},
    "tasks": {"tasks"},
}


@dataclass(frozen=True)
class Conversion:
    """One conversion of a run and what was found out about it, None for what was not.

    folder: plans/NAME. target: the checkpoint, which may not be there (then manifest is None).
    suffix: of a healed one's files, empty for one that is not healed. The other fields hold the
    results that the verbs write, with "settings" that they rest on.
    """

    folder: Path
    target: Path
    suffix: str
    plan: Plan
    manifest: Manifest | None
    verify: Record | None = None
    quality: Record | None = None
    speed: Record | None = None
    samples: Record | None = None
    tasks: Record | None = None

    @property
    def source(self) -> str | None:
        """The model it was made from, as it was named."""
        return (self.manifest.source if self.manifest else None) or self.plan.source

    @property
    def healed(self) -> Record | None:
        """How it was healed, None where it was not."""
        return self.manifest.healed if self.manifest else None

    @property
    def data(self) -> str:
        """The text on which quality was measured."""
        quality: Record = self.quality or {}
        source = quality.get("text", {}).get("source") or quality.get("settings", {}).get("data")
        return str(source or "held-out text")

    @property
    def dtype(self) -> str:
        """The dtype in which both models were evaluated, in words."""
        name = str((self.quality or {}).get("settings", {}).get("dtype", "auto"))
        return "the dtype of the checkpoint" if name == "auto" else name

    @property
    def phases(self) -> dict[str, Record]:
        """The timing of each phase."""
        return {phase: row for phase, row in (self.speed or {}).items() if phase != "settings"}

    @property
    def hashes(self) -> list[tuple[str, str, str]]:
        """(whose, file, sha256) of all files of the original and of the conversion."""
        if self.manifest is None:
            return []
        lists = {"original": self.manifest.source_files, "converted": self.manifest.files}
        return [(whose, *entry) for whose, hashes in lists.items() for entry in hashes.items()]


@dataclass(frozen=True)
class Missing:
    """A part that a run lacks, and the command that makes it."""

    what: str
    command: str


@dataclass(frozen=True)
class Run:
    """A run folder. last: the conversion of the last call; others: the rest, deepest first.

    plans: every plan that was measured, with its cost on the calibration text. held_out: the best
    of each depth, with its cost on other text, where that was measured. baselines: the
    planner's and the published ways' plans on held-out text. profile: predicts speed-ups. results:
    the last call's numbers, None where it did not come to its end. texts: what each text was like,
    by the folder of the calibration that it served.
    """

    folder: Path
    stats: Stats | None
    plans: Mapping[Plan, Cost]
    held_out: Mapping[Plan, Cost]
    baselines: tuple[Measured, ...]
    profile: Profile | None
    results: Record | None
    environment: Record | None
    last: Conversion | None
    others: tuple[Conversion, ...]
    texts: Mapping[str, Record] = field(default_factory=dict)

    @property
    def objective(self) -> Objective:
        """What the search made small."""
        score = self.stats.identity.get("score") if self.stats is not None else None
        return OBJECTIVES.get(str(score), OBJECTIVES["kl"])

    @cached_property
    def best(self) -> dict[int, Plan]:
        """The best plan of each depth on the calibration text, deepest first."""
        best: dict[int, Plan] = {}
        value = self.objective.value
        for plan in sorted(self.plans, key=lambda p: (value(self.plans[p]), p.shorthand)):
            best.setdefault(plan.depth, plan)
        return dict(sorted(best.items(), reverse=True))

    @property
    def front(self) -> tuple[Measured, ...]:
        """The best plans with their costs, on held-out text where they were measured there."""
        return tuple(
            Measured("planner", depth, plan.shorthand, self.held_out.get(plan, self.plans[plan]))
            for depth, plan in self.best.items()
        )

    @property
    def conversions(self) -> tuple[Conversion, ...]:
        """All conversions whose checkpoint is there."""
        every = ([self.last] if self.last is not None else []) + list(self.others)
        return tuple(conversion for conversion in every if conversion.manifest is not None)

    @property
    def model(self) -> str:
        """The model as it was named, MODEL if that is unknown."""
        source = self.last.source if self.last is not None else None
        return source or (self.stats.source if self.stats is not None else None) or "MODEL"

    @property
    def command(self) -> str:
        """The command that made the run, or one that would go on with it."""
        words = (self.environment or {}).get("command")
        if words:
            return shlex.join(words)
        depth = str(self.last.plan.depth) if self.last is not None else "DEPTH"
        words = ["abreast", "optimize", self.model, "-o", str(self.folder), "--depth", depth]
        return shlex.join(words)

    def speedup(self, plan: Plan) -> float | None:
        """Predicted speed-up of decoding, None where nothing predicts it."""
        try:
            return self.profile.speedup(plan) if self.profile is not None else None
        except AbreastError:  # a kind of group that was not timed
            return None

    def missing(self) -> tuple[Missing, ...]:
        """The parts that a complete run would have, in the order in which they are made."""
        last = self.last
        parts: dict[str, Any] = {
            "what each group costs alone (calibration)": self.stats,
            "the plans measured as a whole (front.json)": self.plans,
            "the comparison with the published ways to choose (baselines.json)": self.baselines,
            "a plan": last or (self.folder / "plan.yaml").is_file(),
            "the converted checkpoint": last and last.manifest,
            "the verification of the conversion": last and last.verify,
            "the quality on held-out text": last and last.quality,
            "the timing": last and last.speed,
            "text that both models wrote": last and last.samples,
            "the record of the machine and the command (environment.json)": self.environment,
        }
        return tuple(Missing(what, self.command) for what, part in parts.items() if not part)


def read_run(folder: str | Path) -> Run:
    """Read whatever a run folder holds. Raises AbreastError for a folder that is none, or damaged.

    The last conversion is the one that results.json names; without it, the one planned last.
    """
    run = Path(folder)
    if not run.is_dir():
        raise AbreastError(f"no folder '{folder}'; give {LEFT_BY}")
    signs = ("calibration/measure.json", FRONT_FILE, "results.json", "plans")
    if not any((run / sign).exists() for sign in signs):
        raise AbreastError(
            f"'{folder}' is not a run: it holds neither a calibration nor plans; give {LEFT_BY}"
        )
    results = read_record(run / "results.json")
    conversions = sorted(_conversions(run / "plans"), key=lambda c: (c.plan.depth, c.target))
    last = _last(conversions, results)
    path = run / "calibration" / STATS_FILE
    stats = Stats.load(path) if path.is_file() else None
    num_layers = stats.num_layers if stats else last.plan.num_layers if last else None
    return Run(
        folder=run,
        stats=stats,
        plans=_plans(run / FRONT_FILE, num_layers),
        held_out=_plans(run / FRONT_FILE, num_layers, "held_out"),
        baselines=_baselines(run / BASELINES_FILE),
        profile=_profile(run / "profile.json"),
        results=results,
        environment=read_record(run / "environment.json"),
        last=last,
        others=tuple(conversion for conversion in conversions if conversion is not last),
        texts={
            path.parents[1].name: _text(path, read_record(path))
            for path in sorted(run.glob(f"*/{TEXT_FOLDER}/*.json"))
        },
    )


def read_conversion(folder: str | Path) -> Conversion:
    """A converted checkpoint and the results beside it, where it lies in a run.

    Raises AbreastError where there is no conversion.
    """
    target = Path(folder)
    if not (target / MANIFEST).is_file():
        raise AbreastError(f"'{folder}' holds no {MANIFEST}; give a folder that abreast converted")
    if (target.parent / "plan.yaml").is_file() and target.name.startswith("converted"):
        return _conversion(target.parent, target.name.removeprefix("converted"))
    manifest = read_manifest(target)
    return Conversion(target.parent, target, "", manifest.plan, manifest)


def _conversions(plans: Path) -> Iterator[Conversion]:
    for folder in sorted(plans.glob("*/")):
        targets = [path.parent.name for path in folder.glob(f"converted*/{MANIFEST}")]
        suffixes = sorted(name.removeprefix("converted") for name in targets)
        for suffix in suffixes or ([""] if (folder / "plan.yaml").is_file() else []):
            yield _conversion(folder, suffix)


def _conversion(folder: Path, suffix: str) -> Conversion:
    target = folder / f"converted{suffix}"
    manifest = read_manifest(target) if (target / MANIFEST).is_file() else None
    data = (manifest.healed or {}).get("data") if manifest else None
    if isinstance(data, dict) and "parts" in data:
        _text(target / MANIFEST, data)
    return Conversion(
        folder=folder,
        target=target,
        suffix=suffix,
        plan=manifest.plan if manifest else Plan.load(folder / "plan.yaml"),
        manifest=manifest,
        **{
            name: _result(folder / f"{name}{suffix}.json", needed)
            for name, needed in _NEEDED.items()
        },
    )


def _result(path: Path, needed: set[str]) -> Record | None:
    """One result of a conversion, with the settings that it rests on."""
    record = read_record(path)
    if record is None:
        return None
    result, settings = record.get("result", record), record.get("rests_on", {})
    if not isinstance(result, dict) or not isinstance(settings, dict):
        raise damaged_record(path)
    if not result.keys() >= needed:
        raise damaged_record(path)
    if "text" in result:
        _text(path, result["text"])
    settings = {key: settings[key] for key in settings if key not in ("model", "files")}
    return {"settings": settings, **result}


def _text(path: Path, record: Any) -> Record:
    """What a text was like. Raises AbreastError where the record does not say it."""
    kinds = {"source": str, "tokens": int, "documents": int, "num_bytes": int, "beginnings": list}
    parts = record.get("parts") if isinstance(record, dict) else None
    if not isinstance(parts, list) or not all(
        isinstance(part, dict) and all(isinstance(part.get(k), kind) for k, kind in kinds.items())
        for part in parts
    ):
        raise damaged_record(path)
    return dict(record)


def _last(conversions: list[Conversion], results: Record | None) -> Conversion | None:
    if results is not None:
        # the paths in it are relative to where the command was given, which may be anywhere
        names = [Path(str(results.get(key, ""))).name for key in ("folder", "converted")]
        for conversion in conversions:
            if [conversion.folder.name, conversion.target.name] == names:
                return conversion

    def planned(conversion: Conversion) -> int:
        path = conversion.folder / "plan.yaml"
        return path.stat().st_mtime_ns if path.is_file() else 0

    return max(conversions, key=planned, default=None)


def _plans(path: Path, num_layers: int | None, key: str = "plans") -> dict[Plan, Cost]:
    """The plans in front.json with their costs, or those that were measured on held-out text."""
    record = read_record(path) or {"plans": []}
    try:
        # earlier versions measured nothing on held-out text
        written = record[key] if key == "plans" else record.get(key, ())
        count = int(num_layers or record["identity"]["num_layers"]) if written else 1
        plans = [Plan.parse(row["plan"], count) for row in written]
        rows = [
            Measured.from_dict(row, depth=plan.depth)
            for row, plan in zip(written, plans, strict=True)
        ]
    except (LookupError, TypeError, ValueError, AttributeError):
        raise damaged_record(path) from None
    return {plan: row.cost for plan, row in zip(plans, rows, strict=True)}


def _baselines(path: Path) -> tuple[Measured, ...]:
    """The rows of baselines.json."""
    record = read_record(path) or {"plans": []}
    try:
        return tuple(Measured.from_dict(row, depth=int(row["depth"])) for row in record["plans"])
    except (LookupError, TypeError, ValueError, AttributeError):
        raise damaged_record(path) from None


def _profile(path: Path) -> Profile | None:
    record = read_record(path)
    try:
        profile = Profile(**record["profile"]) if record is not None else None
        # Earlier versions wrote what noise had made negative.
        return profile if profile is not None and profile.impossible() is None else None
    except (LookupError, TypeError):
        raise damaged_record(path) from None


@dataclass(frozen=True)
class Choice:
    """What may answer beside the original in the playground: a plan, and how it runs.

    folder: the converted checkpoint, None to run the original's own weights grouped in memory.
    cost: on the calibration text, None where it was not measured. speedup: of decoding, predicted.
    healed: how the checkpoint was healed, with kl_before and kl_after.
    """

    plan: Plan
    cost: Cost | None = None
    speedup: float | None = None
    folder: Path | None = None
    healed: Record | None = None

    @property
    def way(self) -> str:
        """How it runs, in a few words."""
        if self.healed is not None:
            return f"converted and healed ({self.healed.get('method', 'unknown method')})"
        if self.folder is not None:
            return "converted checkpoint"
        return "grouped in memory" if self.plan.groups else "the original again"


@dataclass(frozen=True)
class Choices:
    """The original, and what may answer beside it.

    model: as it was named. choices: the original first, then by falling depth; within a depth the
    conversions first, healed before others and those of the best plan before those of other plans,
    and last the best plan grouped. speed: what the predicted speed-ups rest on, None without any.
    """

    model: str
    choices: tuple[Choice, ...]
    speed: str | None = None

    @property
    def num_layers(self) -> int:
        return self.choices[0].plan.num_layers

    @property
    def depths(self) -> tuple[int, ...]:
        """Every depth there is, rising; the last one is the original's."""
        return tuple(sorted({choice.plan.depth for choice in self.choices}))

    @property
    def first(self) -> int:
        """The depth to begin with: the least that has a conversion, or the least of all."""
        converted = [choice.plan.depth for choice in self.choices if choice.folder is not None]
        return min(converted, default=self.depths[0])

    def at(self, depth: float) -> tuple[Choice, ...]:
        """The choices of the depth that is nearest."""
        nearest = min(self.depths, key=lambda other: (abs(other - depth), other))
        return tuple(choice for choice in self.choices if choice.plan.depth == nearest)


def read_choices(folder: str | Path, against: str | None = None) -> Choices:
    """What a run folder, or a converted checkpoint, offers to the playground.

    against: where the original lies, if not where the run or the conversion says. A run's original
    is compared with the hash in the run. Raises AbreastError for any other folder, a run without a
    front, and an original that is gone or another one.
    """
    folder = Path(folder)
    if (folder / "config.json").is_file():
        return _pair(folder, against)
    run = read_run(folder)
    if not (folder / FRONT_FILE).is_file():
        raise AbreastError(
            f"the run in '{folder}' is half finished, it has no {FRONT_FILE}; "
            f"go on with `abreast plan {run.model} -o {folder} --depth N`"
        )
    stats = run.stats or Stats.load(folder / "calibration" / STATS_FILE)
    model = against or stats.source
    _check_original(model, stats.num_layers, "run", stats.identity.get("model"))
    converted: dict[Plan, list[Conversion]] = {}
    for conversion in sorted(run.conversions, key=lambda c: c.target, reverse=True):
        converted.setdefault(_bare(conversion.plan), []).append(conversion)
    choices = [Choice(Plan(num_layers=stats.num_layers))]
    best = {depth: [plan] for depth, plan in run.best.items()}
    for depth in sorted({*best, *(plan.depth for plan in converted)}, reverse=True):
        others = (plan for plan in converted if plan.depth == depth and [plan] != best.get(depth))
        plans = [*best.get(depth, ()), *sorted(others, key=str)]
        known = [Choice(plan, run.plans.get(plan), run.speedup(plan)) for plan in plans]
        choices += [
            replace(choice, folder=conversion.target, healed=conversion.healed)
            for choice in known
            for conversion in converted.get(choice.plan, [])
        ]
        choices.append(known[0])
    return Choices(model, tuple(choices), run.profile.about if run.profile else None)


def _bare(plan: Plan) -> Plan:
    """The plan without what it was made for, to compare it with others."""
    return Plan(num_layers=plan.num_layers, groups=plan.groups)


def _pair(folder: Path, against: str | None) -> Choices:
    if not (folder / MANIFEST).is_file():
        raise AbreastError(
            f"'{folder}' is a checkpoint that abreast did not make; "
            f"give {LEFT_BY}, or a converted checkpoint"
        )
    manifest = read_manifest(folder)
    plan, model = _bare(manifest.plan), against or str(manifest.source)
    _check_original(model, plan.num_layers, "conversion", model_hash(manifest.source_files))
    original = Choice(Plan(num_layers=plan.num_layers))
    return Choices(model, (original, Choice(plan, folder=folder, healed=manifest.healed)))


def _check_original(model: str, num_layers: int, kind: str, sha256: str | None) -> None:
    """Raise AbreastError unless the model is there and is the original of the run or conversion."""
    from abreast.checkpoint import open_checkpoint

    try:
        checkpoint = open_checkpoint(model)
    except AbreastError as error:
        raise AbreastError(
            f"the {kind}'s original is gone: {error}. Say where it is with --against MODEL"
        ) from None
    layers = num_layers_of(checkpoint.config)
    if layers != num_layers:
        raise AbreastError(
            f"'{model}' has {layers} layers, the {kind}'s original {num_layers}; "
            "name the right one with --against"
        )
    if checkpoint.sha256 != sha256:
        raise AbreastError(
            f"'{model}' is not the original of the {kind}, its weights differ; "
            "name the right one with --against"
        )
