"""The model card of a converted checkpoint, and the checkpoint's way to the Hub; no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from abreast.checkpoint import MANIFEST, damaged, read_json, read_text, write
from abreast.errors import AbreastError, first_line
from abreast.families import FAMILIES
from abreast.report.diagram import describe
from abreast.report.metrics import METRICS
from abreast.report.records import Conversion, read_conversion
from abreast.targets import refused_by, servers_of

MARK = "<!-- written by abreast, and written anew by it as long as this line stands here -->"
_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def write_card(conversion: Conversion) -> Path | None:
    """Write README.md into the converted folder; return its path.

    None where there is no checkpoint, or a card that somebody else wrote, which is kept.
    """
    path = conversion.target / "README.md"
    if conversion.manifest is None or not may_write(path):
        return None
    write(path, card(conversion))
    return path


def may_write(path: Path) -> bool:
    """Whether there is no card yet, or one that abreast wrote."""
    with suppress(UnicodeDecodeError):
        return not path.is_file() or MARK in read_text(path)
    return False


def card(conversion: Conversion) -> str:
    """The card as Markdown with the Hub's metadata. Raises AbreastError without a manifest."""
    from huggingface_hub import ModelCard, ModelCardData

    manifest, plan, quality = conversion.manifest, conversion.plan, conversion.quality
    if manifest is None:
        raise AbreastError(f"'{conversion.target}' holds no conversion; convert first")
    source = str(conversion.source or "an unnamed model")
    path = Path(source).expanduser()  # where it lay is private
    shown = path.name if path.is_absolute() or path.exists() else source
    short = re.sub(r"[^\w.-]+", "-", Path(source).name).strip("-.") or "model"
    name = f"{short}-abreast-{plan.depth}"
    wirings = sorted({f"{group.wiring}-wiring" for group in plan.groups})
    metadata = ModelCardData(
        base_model=source if _on_hub(source) else None,
        library_name="transformers",
        tags=["abreast", "layer-parallelism", *wirings, *["healed"] * bool(conversion.healed)],
        model_name=name,
        eval_results=_eval_results(conversion) or None,
        **{"pipeline_tag": "text-generation", **_original_metadata(source, manifest.revision)},
    )
    servers, notes = serving("OUT", conversion)
    groups = [(stage, group) for stage in plan.stages if (group := plan.group_of(stage))]
    text = ModelCard.from_template(
        metadata,
        template_str=files("abreast.report").joinpath("templates", "card.md.j2").read_text("utf-8"),
        code=code,
        plain=plain,
        table=_table,
        name=name,
        source=shown,
        plan=plan,
        healed=conversion.healed,
        stages=[describe(stage, group) for stage, group in groups],
        quality=quality,
        data=conversion.data,
        dtype=conversion.dtype,
        quality_rows=[metric.row(quality) for metric in METRICS] if quality else [],
        tasks=_task_rows(conversion),
        speed=_speed_rows(conversion),
        servers=servers,
        notes=notes,
        manifest=manifest.record,
        revision=manifest.revision,
        versions=", ".join(f"{k} {v}" for k, v in manifest.record.get("versions", {}).items()),
        hashes=[(whose, code(file), code(sha)) for whose, file, sha in conversion.hashes],
        mark=MARK,
    )
    return re.sub(r"\n{3,}", "\n\n", str(text)).strip() + "\n"


def serving(out: str, conversion: Conversion) -> tuple[list[tuple[str, str]], list[str]]:
    """(engine, commands) that serve a converted checkpoint, and why other engines cannot."""
    config = read_json(conversion.target / "config.json")
    family = FAMILIES.get(str(config.get("model_type")).removeprefix("abreast_"))
    reasons = refused_by(config, family)
    commands = [(s.name, s.commands(out)) for s in servers_of(config) if s.name not in reasons]
    return commands, [f"Not {name}: {reason}." for name, reason in reasons.items()]


def code(text: object) -> str:
    """Text as a Markdown code span that nothing in it can end, also within a table."""
    line = " ".join(str(text).split()).replace("|", "\\|")
    longest = max(map(len, re.findall("`+", line)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {line} {fence}" if longest else f"`{line}`"


def plain(text: object) -> str:
    """Text that Markdown and HTML leave as it is."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", " ".join(str(text).split()))


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _task_rows(conversion: Conversion) -> list[tuple[str, ...]]:
    rows = []
    for task, row in (conversion.tasks or {}).get("tasks", {}).items():
        scores = []
        for model in ("original", "converted"):
            stderr = row.get(f"{model}_stderr")
            scores.append(f"{row[model]:.3f}" + (f" ± {stderr:.3f}" if stderr is not None else ""))
        share = f"{row['kept']:.1%}" if row.get("kept") is not None else ""
        rows.append((code(task), code(row.get("metric", "")), *scores, share))
    return rows


def _speed_rows(conversion: Conversion) -> list[tuple[str, ...]]:
    return [
        (
            phase,
            f"batch {row['batch_size']}, context {row['context']}",
            plain(row["device"]),
            plain(row["verdict"]),
        )
        for phase, row in conversion.phases.items()
    ]


def _eval_results(conversion: Conversion) -> list[Any]:
    from huggingface_hub import EvalResult

    def entry(data: str, metric: str, value: float | None, name: str | None = None) -> Any:
        dataset = re.sub(r"[^\w./-]+", "-", data)
        return EvalResult("text-generation", dataset, data, metric, value, metric_name=name)

    results = []
    if (quality := conversion.quality) is not None:
        for metric in METRICS:
            own = metric.per_model
            value = metric.value(quality) if own is None else quality["model"][own]
            if metric.hub is not None:
                results.append(entry(conversion.data, own or metric.key, value, metric.hub))
    for task, row in (conversion.tasks or {}).get("tasks", {}).items():
        results.append(entry(task, str(row.get("metric", "score")), row["converted"]))
    return results


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


@dataclass(frozen=True)
class Upload:
    """What goes to the Hub. files: name -> bytes. left_out: what lies there and does not go."""

    repo: str
    private: bool
    files: dict[str, int]
    left_out: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return sum(self.files.values())

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "bytes": self.nbytes}


def prepare_upload(out: str | Path, repo: str, *, private: bool = True) -> Upload:
    """Check a converted folder and a name on the Hub; list what would be uploaded. No network.

    README.md is the model card as `push` will write it, or somebody's own. Raises AbreastError for
    a name that cannot be one, and for a folder that is not a whole conversion: every file that the
    manifest names must be there with its recorded hash.
    """
    from abreast.checkpoint import open_checkpoint

    if not _HUB_ID.fullmatch(repo):
        raise AbreastError(f"'{repo}' cannot be a repository on the Hub; write it as ORG/NAME")
    folder = Path(out)
    if not folder.is_dir():
        raise AbreastError(f"no folder '{out}'; give one that abreast converted")
    conversion = read_conversion(folder)
    recorded = conversion.manifest.files if conversion.manifest else {}
    for fault in damaged(folder, recorded):
        raise AbreastError(f"'{out}' is not a whole conversion: {fault}; convert again")
    open_checkpoint(folder)
    sizes = {name: (folder / name).stat().st_size for name in (*recorded, MANIFEST)}
    readme = folder / "README.md"
    ours = may_write(readme)
    sizes["README.md"] = len(card(conversion).encode()) if ours else readme.stat().st_size
    here = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    return Upload(repo, private, dict(sorted(sizes.items())), tuple(sorted(here - set(sizes))))


def push(out: str | Path, repo: str, *, private: bool = True) -> str:
    """Upload the conversion, into a new private repository if there is none; return its address.

    Arguments and errors as for `prepare_upload`; also an AbreastError without a token or the
    network, and where the Hub refuses. An interrupted upload goes on when called again.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import get_session

    if constants.is_offline_mode():
        raise AbreastError("HF_HUB_OFFLINE is set; unset it to push")
    if get_token() is None:
        raise AbreastError("no token for the Hugging Face Hub; run `hf auth login` or set HF_TOKEN")
    upload = prepare_upload(out, repo, private=private)
    write_card(read_conversion(out))
    api = HfApi()
    try:
        # Creating a repository waits for minutes if the Hub does not answer.
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            folder_path=out,
            allow_patterns=list(upload.files),
            commit_message="Upload a conversion made with abreast",
        )
    except OfflineModeIsEnabled:
        raise AbreastError("HF_HUB_OFFLINE is set; unset it to push") from None
    except HfHubHTTPError as error:
        raise AbreastError(f"the Hugging Face Hub refuses '{repo}': {first_line(error)}") from None
    except (OSError, ValueError, RuntimeError) as error:
        raise AbreastError(f"'{repo}' was not uploaded: {first_line(error)}; try again") from None
    except Exception as error:
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests")):
            raise
        endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT)
        raise AbreastError(
            f"no connection to {endpoint} ({first_line(error)}); try again"
        ) from None
    return str(address)
