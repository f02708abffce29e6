"""What `abreast estimate` computes beside every speed that the papers publish.

LP (arXiv 2502.02790): decode at batch 1, 2 x A100 SXM4 80 GB, plain PyTorch (eager); three of its
figures come without a plan, and the pairs nearest to their depth are taken. CQIL (arXiv
2404.06709): a member per GPU, against the sequential model on one GPU; 48.3 % on LLaMA-33B comes
without a plan, and 10 groups of 4 are taken. FFN Fusion (arXiv 2503.18908): 49 FFNs without
attention become 4, 8 x H100, FP8; the time before is the published one, and only what is saved is
computed.

published.yaml has what others measured of the parts: single all-reduces on the links that
hardware.yaml knows, and decoding on one device and several.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

from abreast.plan import Group, Plan
from abreast.speed.hardware import hardware_of
from abreast.speed.prediction import Setting, forward_cost, speedup, stage_cost

LLAMA = {"model_type": "llama"}
MODELS: dict[str, dict[str, Any]] = {
    "Llama 2 7B": {
        **LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    },
    "Llama 3.2 3B": {
        **LLAMA,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "LLaMA 33B": {
        **LLAMA,
        "hidden_size": 6656,
        "intermediate_size": 17920,
        "num_hidden_layers": 60,
        "num_attention_heads": 52,
        "vocab_size": 32000,
    },
    "Llama 2 70B": {
        **LLAMA,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    },
    "Llama 3.1 405B": {
        **LLAMA,
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
CONTEXT = 1024


def groups(first: int, count: int, size: int, sign: str) -> str:
    starts = range(first, first + count * size, size)
    return " ".join(sign.join(map(str, range(start, start + size))) for start in starts)


# Name, model, plan, hardware, published speed-up, whether single layers run whole, plan is given.
CASES = (
    ("LP 32 -> 25", "Llama 2 7B", groups(14, 7, 2, "+"), "2xA100-NVLink", 1.29, False, True),
    ("LP 28 -> 23", "Llama 3.2 3B", groups(15, 5, 2, "+"), "2xA100-NVLink", 1.22, False, True),
    ("LP at -1.5 %", "Llama 2 7B", groups(16, 5, 2, "+"), "2xA100-NVLink", 1.19, False, False),
    ("LP aggressive", "Llama 2 7B", groups(12, 9, 2, "+"), "2xA100-NVLink", 1.38, False, False),
    ("LP last version", "Llama 2 7B", groups(10, 10, 2, "+"), "2xA100-NVLink", 1.46, False, False),
    ("CQIL P2 S12 E30", "Llama 2 7B", groups(12, 9, 2, "|"), "2xA100-NVLink", 0.262, True, True),
    ("CQIL P4 S14 E30", "Llama 2 7B", groups(14, 4, 4, "|"), "4xA100-NVLink", 0.374, True, True),
    ("CQIL best", "LLaMA 33B", groups(16, 10, 4, "|"), "4xA100-NVLink", 0.483, True, False),
)


def predicted() -> list[dict[str, Any]]:
    rows = []
    for name, model, plan, hardware, figure, replicated, fitted in CASES:
        config = MODELS[model]
        parsed = Plan.parse(plan, config["num_hidden_layers"])
        unpaired = "replicate" if replicated else "shard"
        setting = Setting(
            hardware_of(hardware), context=CONTEXT, runtime="eager", unpaired=unpaired
        )
        speed_up = speedup(config, parsed, setting)
        published = 1 / (1 - figure) if figure < 1 else figure
        rows.append(_row(name, model, f"depth {parsed.depth}", published, speed_up, fitted))
    rows.append(_row(*_ffn_fusion(), True))
    return rows


def _ffn_fusion() -> tuple[str, str, str, float, float]:
    config, hardware = MODELS["Llama 3.1 405B"], hardware_of("8xH100-NVLink")
    setting = Setting(hardware, dtype="float8", context=CONTEXT)
    ffn = [
        stage_cost(config, group, setting, part="ffn")
        for group in (None, Group(layers=tuple(range(12))), Group(layers=tuple(range(13))))
    ]
    saved = 49 * ffn[0] - 3 * ffn[1] - ffn[2]
    before = 1 / 63.38
    return "FFN Fusion", "Ultra 253B", "49 FFNs -> 4", 70.92 / 63.38, before / (before - saved)


def _row(
    name: str, model: str, plan: str, published: float, predicted_gain: float, fitted: bool
) -> dict[str, Any]:
    return {
        "figure": name,
        "model": model,
        "plan": plan,
        "plan_given": fitted,
        "published": round(published, 3),
        "predicted": round(predicted_gain, 3),
        "error_percent": round(100 * (predicted_gain / published - 1), 1),
        "gain_error_percent": round(100 * ((predicted_gain - 1) / (published - 1) - 1), 1),
    }


def calibration() -> dict[str, float]:
    """The absolute speed, in tokens/s, that the gap between kernels is calibrated to."""
    config, hardware = MODELS["Llama 3.1 405B"], hardware_of("8xH100-NVLink")
    cost = forward_cost(config, None, Setting(hardware, dtype="float8", context=CONTEXT))
    return {"published": 41.44, "predicted": round(1 / cost.seconds, 2)}


def measured() -> list[dict[str, Any]]:
    """Every row of published.yaml, with what is computed for it: microseconds of an all-reduce, or
    tokens/s of decoding."""
    published = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text())
    rows = []
    for source in published["sources"]:
        for source_row in source["rows"]:
            prediction = _all_reduce(source_row) if "bytes" in source_row else _decode(source_row)
            error = round(100 * (prediction / source_row["published"] - 1), 1)
            rows.append(
                {**source_row, "predicted": round(prediction, 2), "error_percent": error}
                | {key: source[key] for key in ("title", "address")}
            )
    return rows


def _all_reduce(row: dict[str, Any]) -> float:
    hardware = hardware_of(row["machine"])
    return 1e6 * hardware.all_reduce(row["bytes"], hardware.count)


def _decode(row: dict[str, Any]) -> float:
    setting = Setting(hardware_of(row["machine"]), dtype=row["dtype"], context=row["context"])
    return 1 / forward_cost(MODELS[row["model"]], None, setting).seconds


def main() -> None:
    rows, parts = predicted(), measured()
    for row in (*rows, *parts):
        print(row, file=sys.stderr)
    results = {"rows": rows, "parts": parts, "calibration": calibration()}
    print(json.dumps({"benchmark": "estimate", **results}))


if __name__ == "__main__":
    main()
