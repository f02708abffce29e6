"""Every family that docs/models.md says runs through vLLM's transformers backend, in vLLM."""

from __future__ import annotations

import re
from typing import Any

import pytest
from agreement import PAGES, compare
from test_vllm_parity import HEAD_DIM, PROMPTS, complete

from abreast.checkpoint import open_checkpoint
from abreast.convert.rules import obstacle
from abreast.families import CONVERTIBLE

COLUMNS = "model types", "lp", "cqil", "ff", "exact", "vLLM", "formats"
WINDOW = {"sliding_window": 8}  # prompts are longer
# Phi 3's own tokens that start, end and pad are not among 128 words
OWN: dict[str, dict[str, Any]] = {"phi3": {"bos_token_id": 1, "eos_token_id": 2}}


def claimed() -> dict[str, dict[str, str]]:
    """The rows of docs/models.md for the families that are said to run so."""
    rows = {}
    for line in (PAGES / "models.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line[1:-1].split("|")]
        if len(cells) == len(COLUMNS) and cells[COLUMNS.index("vLLM")] == "backend":
            row = dict(zip(COLUMNS, cells, strict=True))
            rows |= dict.fromkeys(re.findall(r"`(\w+)`", row["model types"]), row)
    return rows


CLAIMED = claimed()


def test_the_page_claims_some() -> None:
    assert {"granite", "gemma2", "olmo2"} <= CLAIMED.keys() <= CONVERTIBLE.keys()


@pytest.mark.slow
@pytest.mark.parametrize("family", CLAIMED)
def test_a_family_runs_through_the_transformers_backend(
    in_engine, converted, tiny_checkpoint, family
):
    row, said = CONVERTIBLE[family], CLAIMED[family]
    sizes = {"hidden_size": 4 * HEAD_DIM, "head_dim": HEAD_DIM, "num_layers": 8}
    windows = WINDOW if row.window_period or row.slides else {}
    source = tiny_checkpoint(family, **sizes, **windows, **OWN.get(family, {}))
    plan = "1+2" if said["lp"] != "-" else "1~2"
    plan += " 3~4" if said["ff"] != "-" else ""
    same_kinds = obstacle(open_checkpoint(source).config, (5, 6)) is None
    folder = converted(source, plan + (" 5|6" if said["cqil"] != "-" and same_kinds else ""))
    arguments = {"prompts": PROMPTS, "new_tokens": 8, "native": False}
    done = in_engine(folder, complete, 1, arguments, skip_tokenizer_init=True)
    compare(folder, PROMPTS, done["answers"])
