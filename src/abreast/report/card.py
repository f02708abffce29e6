"""The model card of a converted checkpoint: what it is, what it cost, how to use it; no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from abreast.checkpoint import read_json
from abreast.errors import AbreastError
from abreast.families import FAMILIES
from abreast.report.diagram import describe
from abreast.report.records import Conversion
from abreast.targets import SERVERS, refusals

MARK = "<!-- written by abreast, and written anew by it as long as this line stands here -->"
_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def write_card(conversion: Conversion) -> Path | None:
    """Write README.md into the converted folder; return its path.

    None where there is no checkpoint, or a card that somebody else wrote, which is kept.
    """
    path = conversion.target / "README.md"
    if conversion.manifest is None or not may_write(path):
        return None
    staging = path.with_name(".README.md.new")
    staging.write_text(card(conversion), encoding="utf-8")
    os.replace(staging, path)
    return path


def may_write(path: Path) -> bool:
    """Whether there is no card yet, or one that abreast wrote."""
    return not path.is_file() or MARK in path.read_text(encoding="utf-8", errors="replace")


def card(conversion: Conversion) -> str:
    """The card as Markdown with the Hub's metadata. Raises AbreastError without a manifest."""
    from huggingface_hub import ModelCardData

    manifest, plan = conversion.manifest, conversion.plan
    if manifest is None:
        raise AbreastError(f"'{conversion.target}' holds no conversion; convert first")
    source = str(conversion.source or "an unnamed model")
    inherited = _original_metadata(source, manifest.get("source", {}).get("revision"))
    short = re.sub(r"[^\w.-]+", "-", Path(source).name).strip("-.") or "model"
    name = f"{short}-abreast-{plan.depth}"
    wirings = sorted({f"{group.wiring}-wiring" for group in plan.groups})
    data = ModelCardData(
        base_model=source if _on_hub(source) else None,
        library_name="transformers",
        tags=["abreast", "layer-parallelism", *wirings, *["healed"] * bool(conversion.healed)],
        model_name=name,
        eval_results=_results(conversion) or None,
        **{"pipeline_tag": "text-generation", **inherited},
    )
    body = "\n\n".join(_sections(conversion, name, source))
    return f"---\n{data.to_yaml()}\n---\n\n{body}\n\n{MARK}\n"


def quality_rows(quality: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(measure, original, converted, difference) of an evaluation, as text."""

    def pair(entry: Mapping[str, Any], key: str, digits: int) -> str:
        if entry.get(key) is None:
            return "not finite"
        return f"{entry[key]:.{digits}f}{_error(entry.get(f'{key}_stderr'), digits)}"

    ours, theirs = quality["model"], quality["reference"]
    interval = quality.get("bootstrap") or {}
    loss = f"{quality['nll_difference']:+.4f}{_error(quality['nll_difference_stderr'], 4)} nats"
    finite = ours["perplexity"] is not None and theirs["perplexity"] is not None
    ratio = f"{ours['perplexity'] / theirs['perplexity'] - 1:+.2%}" if finite else ""
    kl = f"{quality['kl']:.4f}{_error(quality['kl_stderr'], 4)} nats"
    top1 = f"{quality['top1_agreement']:.1%}"
    if quality.get("top1_agreement_stderr") is not None:
        top1 += f" ± {quality['top1_agreement_stderr']:.1%}"
    return [
        (
            "perplexity",
            pair(theirs, "perplexity", 2),
            pair(ours, "perplexity", 2),
            f"{ratio}{_interval(interval.get('perplexity_ratio'), 3, ' ratio')}",
        ),
        (
            "loss, nats per token",
            pair(theirs, "nll", 4),
            pair(ours, "nll", 4),
            f"{loss}{_interval(interval.get('nll_difference'), 4)}",
        ),
        ("KL divergence", "", "", f"{kl}{_interval(interval.get('kl'), 4)}"),
        ("same top token", "", "", f"{top1}{_interval(interval.get('top1_agreement'), 3)}"),
    ]


def dtype_of(quality: Mapping[str, Any]) -> str:
    """In what both models were evaluated, in words."""
    named = str(quality.get("settings", {}).get("dtype", "auto"))
    return "the dtype of the checkpoint" if named == "auto" else named


def serving(out: str, conversion: Conversion) -> tuple[list[tuple[str, str]], list[str]]:
    """(engine, commands) that serve a converted checkpoint, and why other engines cannot."""
    config = read_json(conversion.target / "config.json")
    family = FAMILIES.get(str(config.get("model_type")).removeprefix("abreast_"))
    commands, notes = [], []
    for server in SERVERS:
        reason = next(refusals(server, config, family), None)
        if reason is None:
            commands.append((server.name, server.commands(out)))
        else:
            notes.append(f"Not {server.name}: {reason}.")
    return commands, notes


def code(text: object) -> str:
    """Text as a Markdown code span that nothing in it can end, also within a table."""
    plain = " ".join(str(text).split()).replace("|", "\\|")
    longest = max(map(len, re.findall("`+", plain)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {plain} {fence}" if longest else f"`{plain}`"


def _sections(conversion: Conversion, name: str, source: str) -> list[str]:
    manifest, plan = conversion.manifest or {}, conversion.plan
    healed = conversion.healed
    stages = [
        f"- {describe(stage, group)}"
        for stage in plan.stages
        if (group := plan.group_of(stage)) is not None
    ]
    found = [
        f"# {_plain(name)}",
        f"{code(source)} with {plan.num_layers} layers run in {plan.depth} stages: groups of "
        "neighbouring layers work side by side instead of one after another. All weights are "
        "kept, but this is an approximation of that model and answers differently. Made with "
        "abreast by [Layer Parallelism](https://arxiv.org/abs/2502.02790)."
        + (f" Healed afterwards ({code(healed.get('method', 'yes'))})." if healed else ""),
        "## Plan",
        f"{code(plan.shorthand)}; layers count from 0, the others stay as they were.",
        "\n".join(stages),
        *_quality(conversion),
        *_speed(conversion),
        "## Load",
        "`OUT` is this repository's id, or the folder.",
        "```python\nimport abreast.modeling  # or: trust_remote_code=True, without abreast\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("OUT")\n'
        'tokenizer = AutoTokenizer.from_pretrained("OUT")\n```',
        "## Serve",
    ]
    servers, notes = serving("OUT", conversion)
    for engine, commands in servers:
        found += [f"{engine}:", f"```sh\n{commands}\n```"]
    found += notes
    rows = [
        ("converted", code(file), code(entry.get("sha256", "")))
        for file, entry in manifest.get("files", {}).items()
    ]
    rows += [
        ("original", code(file), code(entry.get("sha256", "")))
        for file, entry in manifest.get("source", {}).get("files", {}).items()
    ]
    revision = manifest.get("source", {}).get("revision")
    versions = ", ".join(f"{key} {value}" for key, value in manifest.get("versions", {}).items())
    found += [
        "## Limits",
        "It inherits what the original is for, what it must not be used for, and its faults. "
        "Quality was measured on the text named above only: measure it on yours. A speed-up "
        "depends on machine, batch and engine; prefill and large batches gain little or nothing.",
        "## Provenance",
        f"Made {manifest.get('created', 'at an unknown time')} from {code(source)}"
        + (f", revision {code(revision)}" if revision else "")
        + f", with {_plain(versions)}. `abreast.json` has the whole record.",
        _table(("", "file", "sha256"), rows),
    ]
    return found


def _quality(conversion: Conversion) -> list[str]:
    quality, tasks = conversion.quality, conversion.tasks
    found = ["## Quality"]
    if quality is None and not tasks:
        return [*found, "Not measured."]
    if quality is not None:
        settings = quality.get("settings", {})
        found += [
            f"On {quality['num_tokens']:,} tokens of {code(settings.get('data', 'held-out text'))} "
            f"in windows of {quality['window']}, in {_plain(dtype_of(quality))}; "
            "± is one standard error.",
            _table(("", "original", "converted", "difference"), quality_rows(quality)),
        ]
    if tasks:
        rows = [
            (
                code(task),
                code(row.get("metric", "")),
                *(f"{row[m]:.3f}{_error(row.get(f'{m}_stderr'), 3)}" for m in _MODELS),
                f"{row['kept']:.1%}" if row.get("kept") is not None else "",
            )
            for task, row in tasks.get("tasks", {}).items()
        ]
        found.append(_table(("task", "metric", *_MODELS, "kept"), rows))
    return found


_MODELS = ("original", "converted")


def _speed(conversion: Conversion) -> list[str]:
    if not conversion.speed:
        return ["## Speed", "Not measured."]
    rows = []
    for phase, row in conversion.speed.items():
        if phase != "settings":
            about = f"batch {row['batch_size']}, context {row['context']}"
            rows.append((phase, about, _plain(row["device"]), _plain(row["verdict"])))
    found = _table(("phase", "", "device", "verdict"), rows)
    return ["## Speed", "Where it was made, in PyTorch, against the original:", found]


def _results(conversion: Conversion) -> list[Any]:
    from huggingface_hub import EvalResult

    found: list[Any] = []

    def add(data: str, metric: str, value: float, **options: Any) -> None:
        kind = re.sub(r"[^\w./-]+", "-", data)
        found.append(EvalResult("text-generation", kind, data, metric, value, **options))

    quality = conversion.quality
    if quality is not None:
        data = str(quality.get("settings", {}).get("data", "held-out text"))
        add(data, "perplexity", quality["model"]["perplexity"], metric_name="perplexity")
        add(data, "kl", quality["kl"], metric_name="KL divergence from the original, nats")
    for task, row in (conversion.tasks or {}).get("tasks", {}).items():
        add(task, str(row.get("metric", "score")), row["converted"])
    return found


def _original_metadata(source: str, revision: str | None) -> dict[str, Any]:
    """What the original's own card says of licence and language, where that card is here."""
    from huggingface_hub import ModelCard, try_to_load_from_cache

    path: Any = Path(source).expanduser() / "README.md"
    if not path.is_file():
        path = None
        if _on_hub(source):
            path = try_to_load_from_cache(source, "README.md", revision=revision)
    if not isinstance(path, str | Path):
        return {}
    try:
        data = ModelCard.load(path).data.to_dict()
    except (OSError, ValueError, AttributeError, yaml.YAMLError):  # it may hold anything
        return {}
    return {key: data[key] for key in _INHERITED if isinstance(data.get(key), str | list)}


def _on_hub(source: str) -> bool:
    return bool(_HUB_ID.fullmatch(source)) and not Path(source).exists()


def _error(stderr: float | None, digits: int) -> str:
    return f" ± {stderr:.{digits}f}" if stderr is not None else ""


def _interval(ends: Sequence[float] | None, digits: int, what: str = "") -> str:
    return f"{what} [{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]" if ends else ""


def _plain(text: object) -> str:
    """Text that Markdown and HTML leave as it is."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", " ".join(str(text).split()))


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
