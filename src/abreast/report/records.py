"""What `abreast optimize` left in a run folder, read back, and what is missing; knows no torch."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abreast.errors import AbreastError
from abreast.plan import Plan
from abreast.planner import STATS_FILE, Stats
from abreast.runs import damaged_record, read_record

MANIFEST = "abreast.json"
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
    suffix: of the healed ones' files, empty for one that is not healed. The other fields hold the
    results that the verbs write, with "settings" that they rest on.
    """

    folder: Path
    target: Path
    suffix: str
    plan: Plan
    manifest: Mapping[str, Any] | None
    verify: Mapping[str, Any] | None
    quality: Mapping[str, Any] | None
    speed: Mapping[str, Any] | None
    samples: Mapping[str, Any] | None
    tasks: Mapping[str, Any] | None

    @property
    def source(self) -> str | None:
        """The model it was made from, as it was asked for."""
        recorded = (self.manifest or {}).get("source", {}).get("name")
        return recorded or self.plan.source

    @property
    def healed(self) -> Mapping[str, Any] | None:
        """How it was healed, None where it was not."""
        return (self.manifest or {}).get("healed")


@dataclass(frozen=True)
class Missing:
    """A part that a run lacks, and the command that makes it."""

    what: str
    command: str


@dataclass(frozen=True)
class Run:
    """A run folder. last: the conversion of the last call; others: the rest, deepest first.

    results: that call's numbers, None where it did not come to its end. front, baselines: rows
    with plan, depth, kl, kl_stderr, loss_increase, loss_stderr and tokens; baselines' have a
    method as well.
    """

    folder: Path
    stats: Stats | None
    front: tuple[Mapping[str, Any], ...]
    baselines: tuple[Mapping[str, Any], ...]
    results: Mapping[str, Any] | None
    environment: Mapping[str, Any] | None
    last: Conversion | None
    others: tuple[Conversion, ...]

    @property
    def model(self) -> str:
        """The model as it was asked for, MODEL where nobody knows."""
        found = self.last.source if self.last is not None else None
        return found or (self.stats.source if self.stats is not None else None) or "MODEL"

    @property
    def command(self) -> str:
        """The command that made the run, or one that would go on with it."""
        words = (self.environment or {}).get("command")
        if words:
            return shlex.join(words)
        depth = str(self.last.plan.depth) if self.last is not None else "DEPTH"
        words = ["abreast", "optimize", self.model, "-o", str(self.folder), "--depth", depth]
        return shlex.join(words)

    def missing(self) -> tuple[Missing, ...]:
        """The parts that a complete run would have, in the order in which they are made."""
        parts: dict[str, Any] = {
            "what each group costs alone (calibration)": self.stats,
            "the plans measured as a whole (front.json)": self.front,
            "the comparison with the published ways to choose (baselines.json)": self.baselines,
        }
        last = self.last
        manifest, quality = (last.manifest, last.quality) if last is not None else (None, None)
        parts |= {
            "a plan": last,
            "the converted checkpoint": manifest,
            "the verification of the conversion": last and last.verify,
            "the quality on held-out text": quality,
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
        raise AbreastError(f"no folder '{folder}'; give the one that `abreast optimize -o` made")
    signs = ("calibration/measure.json", "front.json", "results.json", "plans")
    if not any((run / sign).exists() for sign in signs):
        raise AbreastError(
            f"'{folder}' is not a run: it holds neither a calibration nor plans; "
            "give the folder that `abreast optimize -o` made"
        )
    results = read_record(run / "results.json")
    found = sorted(_conversions(run / "plans"), key=lambda each: (each.plan.depth, each.target))
    last = _last(found, results)
    stats = run / "calibration" / STATS_FILE
    return Run(
        folder=run,
        stats=Stats.load(stats) if stats.is_file() else None,
        front=_rows(run / "front.json", last.plan.num_layers if last else None),
        baselines=_rows(run / "baselines.json", None),
        results=results,
        environment=read_record(run / "environment.json"),
        last=last,
        others=tuple(each for each in found if each is not last),
    )


def read_conversion(folder: str | Path) -> Conversion:
    """A converted checkpoint and the results beside it, where it lies in a run.

    Raises AbreastError where there is no conversion.
    """
    target = Path(folder)
    manifest = read_record(target / MANIFEST)
    if manifest is None:
        raise AbreastError(f"'{folder}' holds no {MANIFEST}; give a folder that abreast converted")
    if (target.parent / "plan.yaml").is_file() and target.name.startswith("converted"):
        return _conversion(target.parent, target.name.removeprefix("converted"))
    try:
        plan = Plan.model_validate(manifest["plan"])
    except (KeyError, ValueError):
        raise damaged_record(target / MANIFEST) from None
    return Conversion(target.parent, target, "", plan, manifest, *[None] * 5)


def _conversions(plans: Path) -> Iterator[Conversion]:
    for path in sorted(plans.glob("*/plan.yaml")):
        folder = path.parent
        targets = [each for each in folder.glob("converted*") if (each / MANIFEST).is_file()]
        suffixes = sorted(each.name.removeprefix("converted") for each in targets)
        for suffix in suffixes or [""]:
            yield _conversion(folder, suffix)


def _conversion(folder: Path, suffix: str) -> Conversion:
    target = folder / f"converted{suffix}"

    def result(name: str) -> dict[str, Any] | None:
        path = folder / f"{name}{suffix}.json"
        found = read_record(path)
        if found is None:
            return None
        inner, settings = found.get("result", found), found.get("rests_on", {})
        if not isinstance(inner, dict) or not isinstance(settings, dict):
            raise damaged_record(path)
        if not inner.keys() >= _NEEDED.get(name, set()):
            raise damaged_record(path)
        settings = {key: settings[key] for key in settings if key not in ("model", "files")}
        return {"settings": settings, **inner}

    return Conversion(
        folder=folder,
        target=target,
        suffix=suffix,
        plan=Plan.load(folder / "plan.yaml"),
        manifest=read_record(target / MANIFEST),
        verify=result("verify"),
        quality=result("quality"),
        speed=result("speed"),
        samples=result("samples"),
        tasks=result("tasks"),
    )


def _last(found: list[Conversion], results: Mapping[str, Any] | None) -> Conversion | None:
    if results is not None:
        # the paths in it are relative to where the command was given, which may be anywhere
        named = [Path(str(results.get(key, ""))).name for key in ("folder", "converted")]
        for each in found:
            if [each.folder.name, each.target.name] == named:
                return each
    return max(found, key=lambda x: (x.folder / "plan.yaml").stat().st_mtime_ns, default=None)


def _rows(path: Path, num_layers: int | None) -> tuple[Mapping[str, Any], ...]:
    """The rows of front.json, of each depth the best, or of baselines.json, all of them."""
    record = read_record(path)
    if record is None:
        return ()
    try:
        count = int(num_layers or record.get("identity", {}).get("num_layers", 0))
        rows = [dict(row) for row in record["plans"]]
        for row in rows:
            float(row["kl"]), float(row["loss_increase"])
            if "depth" not in row:
                row["depth"] = Plan.parse(row["plan"], count).depth
    except (LookupError, TypeError, ValueError, AttributeError):
        raise damaged_record(path) from None
    if any("method" in row for row in rows):
        return tuple(rows)
    best: dict[int, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: (row["kl"], row["plan"])):
        best.setdefault(row["depth"], row)
    return tuple(best[depth] for depth in sorted(best, reverse=True))
