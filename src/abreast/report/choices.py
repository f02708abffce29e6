"""What a run folder offers to run beside the original: the plans of its front, conversions."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from abreast.checkpoint import MANIFEST, open_checkpoint, read_json, resolve
from abreast.errors import AbreastError
from abreast.families import num_layers_of
from abreast.plan import Plan
from abreast.planner import FRONT_FILE, STATS_FILE, Cost, Front, Profile, Stats
from abreast.runs import model_hash

LEFT_BY = "the folder that `abreast plan` or `abreast optimize` left, or a converted checkpoint"


@dataclass(frozen=True)
class Choice:
    """What may answer beside the original: a plan, and how it runs.

    folder: the converted checkpoint, None to run the original's own weights grouped in memory.
    cost: on the calibration text, None where it was not measured. speedup: of decoding, predicted.
    healed: the healed checkpoint's record (see heal.py), with kl_before and kl_after.
    """

    plan: Plan
    cost: Cost | None = None
    speedup: float | None = None
    folder: Path | None = None
    healed: dict[str, Any] | None = None

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

    model: as it was asked for. choices: the original first, then by falling depth; within a depth
    the conversions first, healed before others and those of the cheapest plan before those of other
    plans, and last the cheapest plan grouped. speed: what the predicted speed-ups rest on, None
    without any.
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
        made = [choice.plan.depth for choice in self.choices if choice.folder is not None]
        return min(made, default=self.depths[0])

    def at(self, depth: float) -> tuple[Choice, ...]:
        """The choices of the depth that is nearest."""
        near = min(self.depths, key=lambda each: (abs(each - depth), each))
        return tuple(choice for choice in self.choices if choice.plan.depth == near)


def read_choices(folder: str | Path, against: str | None = None) -> Choices:
    """Read a run folder (see optimize.py), or a converted checkpoint.

    against: where the original lies, if not where the run or the conversion says. A run's original
    is compared with the hash in the run.
    Raises AbreastError for any other folder, a run without a front, and an original that is gone or
    another one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise AbreastError(f"no folder '{folder}'; give {LEFT_BY}")
    if (folder / "config.json").is_file():
        return _pair(folder, against)
    statistics, record = folder / "calibration" / STATS_FILE, folder / FRONT_FILE
    if not record.is_file():
        if not (folder / "calibration").is_dir():
            raise AbreastError(f"'{folder}' is no run folder; give {LEFT_BY}")
        source = Stats.load(statistics).source if statistics.is_file() else "MODEL"
        raise AbreastError(
            f"the run in '{folder}' is half finished, it has no {record.name}; "
            f"go on with `abreast plan {source} -o {folder} --depth N`"
        )
    front = _front(record, Stats.load(statistics))
    model = against or front.stats.source
    found = _original(model, front.stats.num_layers, "run")
    if model_hash(found) != front.stats.identity.get("model"):
        raise AbreastError(
            f"'{model}' is not the model of the run in '{folder}', its weights differ; "
            "name the right one with --against"
        )
    profile = _profile(folder / "profile.json")
    best = front.best()
    made = _conversions(folder / "plans")
    choices = [Choice(Plan(num_layers=front.stats.num_layers))]
    for depth, plan in best.items():
        others = sorted({plan for plan in made if plan.depth == depth} - {plan}, key=str)
        for each in (plan, *others):
            known = Choice(each, cost=front.plans.get(each), speedup=_speedup(profile, each))
            choices += [replace(known, folder=at, healed=of) for at, of in made.get(each, [])]
        choices.append(Choice(plan, cost=front.plans[plan], speedup=_speedup(profile, plan)))
    return Choices(model, tuple(choices), profile.about if profile else None)


def _front(record: Path, stats: Stats) -> Front:
    try:
        rows = json.loads(record.read_text(encoding="utf-8"))["plans"]
        plans = {
            Plan.parse(row["plan"], stats.num_layers): Cost(
                **{name: value for name, value in row.items() if name != "plan"}
            )
            for row in rows
        }
    except (ValueError, LookupError, TypeError, AttributeError):
        raise AbreastError(
            f"'{record}' is damaged; delete it and run `abreast plan` again, "
            "which measures nothing twice"
        ) from None
    return Front(stats, plans, {})


def _profile(path: Path) -> Profile | None:
    if not path.is_file():
        return None
    try:
        return Profile(**read_json(path)["profile"])
    except (LookupError, TypeError):
        raise AbreastError(f"'{path}' is damaged; delete it") from None


def _speedup(profile: Profile | None, plan: Plan) -> float | None:
    try:
        return profile.speedup(plan) if profile is not None else None
    except AbreastError:  # a kind of group that was not timed
        return None


def _conversions(plans: Path) -> dict[Plan, list[tuple[Path, dict[str, Any] | None]]]:
    """The converted checkpoints of a run by plan, healed ones first."""
    found: dict[Plan, list[tuple[Path, dict[str, Any] | None]]] = {}
    for path in sorted(plans.glob(f"*/converted*/{MANIFEST}"), reverse=True):
        plan, manifest = _manifest(path.parent)
        found.setdefault(plan, []).append((path.parent, manifest.get("healed")))
    return found


def _manifest(folder: Path) -> tuple[Plan, dict[str, Any]]:
    manifest = read_json(folder / MANIFEST)
    try:
        return Plan.parse(manifest["shorthand"], manifest["num_layers"]), manifest
    except (LookupError, TypeError, AttributeError, AbreastError):
        raise AbreastError(f"'{folder / MANIFEST}' is damaged; convert again") from None


def _pair(folder: Path, against: str | None) -> Choices:
    if not (folder / MANIFEST).is_file():
        raise AbreastError(f"'{folder}' is a checkpoint that abreast did not make; give {LEFT_BY}")
    plan, manifest = _manifest(folder)
    model = against or str(manifest.get("source", {}).get("name"))
    _original(model, plan.num_layers, "conversion")
    original = Choice(Plan(num_layers=plan.num_layers))
    return Choices(model, (original, Choice(plan, folder=folder, healed=manifest.get("healed"))))


def _original(model: str, num_layers: int, kind: str) -> Path:
    try:
        found, _ = resolve(model)
    except AbreastError as error:
        raise AbreastError(
            f"the {kind}'s original is gone: {error}. Say where it is with --against MODEL"
        ) from None
    layers = num_layers_of(open_checkpoint(found).config)
    if layers != num_layers:
        raise AbreastError(
            f"'{model}' has {layers} layers, the {kind}'s original {num_layers}; "
            "name the right one with --against"
        )
    return found
