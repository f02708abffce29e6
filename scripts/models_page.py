"""Write docs/models.md: what the table of families and the list of known checkpoints say.

python scripts/models_page.py
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from abreast.cli.tables import by_reason
from abreast.convert import known_models
from abreast.convert.rules import check_format, check_plan
from abreast.errors import AbreastError
from abreast.families import FAMILIES, FORMATS, Family, complete
from abreast.families.wrappers import HOLDERS, OTHERS, WRAPPERS
from abreast.plan import Plan
from abreast.speed import Setting, estimate, hardware_of, typical_plan
from abreast.targets import VLLM, members_of, refusals

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
SIZES = {
    **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 12, "vocab_size": 128},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
}
EXPERTS = {
    **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    **{"first_k_dense_replace": 0, "moe_layer_start_index": 0},
}
WIRINGS = {"lp": "+", "cqil": "|", "ff": "~"}
HEAD = """# Models

`python scripts/models_page.py` makes this page. Tests convert and compare every family
(`test_parity.py`, `test_wrappers.py`, run in vLLM by `test_vllm_backend.py`) and every checkpoint
(`test_known.py`), as a tiny random one with the same keys in its config.json.

## Families

*stock*: a group is one stock layer of another width. *members*: it keeps parts of members apart and
needs the classes that travel in the checkpoint. *exact*: prompts may run in the original order
(`--prefill sequential`). vLLM, for lp and ff groups: *native* layers, or its transformers
*backend*. Formats are those of `convert --format`, and *gguf* for `abreast export`.

| model types | lp | cqil | ff | exact | vLLM | formats |
|---|---|---|---|---|---|---|
"""
KNOWN_HEAD = """
## Known checkpoints

As `abreast inspect --known` prints: what a typical plan (five sixths of the layers left as stages)
would bring when decoding at batch 1 in bfloat16, by `abreast estimate`. *no*: see above. *refused*:
see below. *too large*: the weights do not fit. `src/abreast/convert/known.yaml` has the configs and
their sources.

| checkpoints, model type | pairs | 1 H100 | 8 H100 |
|---|---|---|---|
"""


def page() -> str:
    """The text of docs/models.md."""
    lines = [HEAD, *(f"|{'|'.join(cells)}|\n" for cells in families())]
    lines.append(
        "\nDecoders within models that read images, converted where they are: "
        f"{', '.join(WRAPPERS)}.\n\nOnly grouped in memory (`abreast.grouped`, `plan`, "
        "`eval --plan`), and why:\n\n"
    )
    known = {**FAMILIES, **HOLDERS}
    lines += _lines({name: row.unfoldable for name, row in known.items() if row.unfoldable})
    lines.append("\nRefused, and why:\n\n")
    lines += [*_lines(OTHERS), KNOWN_HEAD]
    lines += [f"|{'|'.join(cells)}|\n" for cells in checkpoints()]
    lines += ["\nRefused on 8, since:\n\n", *_lines(refused())]
    return "".join(lines)


def _lines(reasons: Mapping[str, str]) -> list[str]:
    """A line of Markdown per reason, with the names that have it."""
    return [f"- {line}.\n" for line in by_reason(reasons)]


def families() -> Iterator[tuple[str, ...]]:
    """A row for the families that can be converted and agree in everything it says."""
    names: dict[tuple[str, ...], list[str]] = {}
    for name, row in FAMILIES.items():
        if row.matrices:
            config = complete({"model_type": name, **SIZES, **(EXPERTS if row.routes else {})})
            config |= {"layer_types": None, "sliding_window": None}
            cells = (
                *(_group(row, config, _plan(config, wiring)) for wiring in WIRINGS),
                _yes(_exact(row, config)),
                _vllm(row, config),
                ", ".join(_formats(row, config)),
            )
            names.setdefault(cells, []).append(f"`{name}`")
    yield from ((", ".join(same), *cells) for cells, same in names.items())


def checkpoints() -> Iterator[tuple[str, ...]]:
    """A row for the known checkpoints that agree in everything it says."""
    names: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for model in known_models():
        cells: tuple[str, ...] = ("no", "", "")
        if model.reason is None:
            plan = typical_plan(model.decoder)
            on = (Setting(hardware_of(name)) for name in ("H100", "8xH100"))
            one, eight = (estimate(model.decoder, plan, setting).gain for setting in on)
            cells = (f"{len(plan.groups)} {plan.groups[0].wiring}", one, eight)
        names.setdefault((model.config["model_type"], cells), []).append(model.name)
    for (model_type, cells), same in names.items():
        yield (f"{', '.join(same)}, `{model_type}`", *cells)


def refused() -> dict[str, str]:
    """Why no engine splits the typical plan of a known checkpoint over 8 devices, in short."""
    on, reasons = Setting(hardware_of("8xH100")), {}
    for model in known_models():
        if model.reason is None:
            entry = estimate(model.decoder, typical_plan(model.decoder), on)
            if entry.refused is not None:
                reason = entry.refused.partition(";")[0]
                reasons[model.name] = reason.rpartition("fit this model: ")[2]
    return reasons


def _plan(config: dict[str, Any], wiring: str) -> Plan:
    """Two neighbours that the typical plan would join, joined so."""
    first, second = typical_plan(config).groups[0].layers
    return Plan.parse(f"{first}{WIRINGS[wiring]}{second}", SIZES["num_hidden_layers"])


def _group(row: Family, config: dict[str, Any], plan: Plan) -> str:
    if not _allows(check_plan, config, plan):
        return "-"
    return "members" if any(members_of(row, block) > 1 for block in plan.blocks) else "stock"


def _exact(row: Family, config: dict[str, Any]) -> bool:
    plans = (_plan(config, wiring) for wiring in WIRINGS)
    return row.alone and any(_allows(check_plan, config, p, prefill="sequential") for p in plans)


def _vllm(row: Family, config: dict[str, Any]) -> str:
    if not row.alone or any(refusals(VLLM, config, row, _plan(config, "lp"))):
        return "-"
    return "native" if row.vllm_layers else "backend"


def _formats(row: Family, config: dict[str, Any]) -> list[str]:
    if not row.alone:
        return []
    gguf = ["gguf"] if row.deci_lacks is None else []
    return gguf + [form for form in FORMATS if _written(form, config, row)]


def _written(form: str, config: dict[str, Any], row: Family) -> bool:
    wiring = "ff" if FORMATS[form].wirings == ("ff",) else "lp"
    return _allows(check_format, form, config, row, _plan(config, wiring))


def _allows(check: Any, *arguments: Any, **options: Any) -> bool:
    try:
        check(*arguments, **options)
    except AbreastError:
        return False
    return True


def _yes(value: bool) -> str:
    return "yes" if value else "-"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
