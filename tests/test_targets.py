"""What engines refuse, from configs and plans alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from abreast.convert.config import converted_config
from abreast.errors import AbreastError
from abreast.families import CONVERTIBLE, complete
from abreast.plan import Plan
from abreast.targets import (
    LLAMACPP,
    MLX,
    MLX_MODEL,
    SERVERS,
    SGLANG,
    STOCK_SGLANG,
    STOCK_VLLM,
    TORCH_TP,
    TRANSFORMERS,
    VLLM,
    Layer,
    layers_of,
    planned_layers,
    refusals,
    refused_by,
)

CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 6,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 128,
    "hidden_act": "silu",
}
SINGLE = Layer(4, 2, 96)


def config_of(layers: list[Layer]) -> dict[str, object]:
    keys = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    return {
        **CONFIG,
        "num_attention_heads": min(layer.heads for layer in layers),
        "num_hidden_layers": len(layers),
        "per_layer_config": [
            {
                **dict(zip(keys, (layer.heads, layer.kv_heads, layer.intermediate), strict=True)),
                "abreast_members": layer.members,
                "abreast_bypass": layer.band,
            }
            for layer in layers
        ],
    }


@pytest.mark.parametrize(
    ("layers", "family", "degrees"),
    [
        ([SINGLE], "llama", {1, 2, 4}),  # four ranks share two key-value heads
        ([SINGLE, Layer(8, 4, 192, 2)], "llama", {1, 2, 4}),  # the narrow layer decides
        ([Layer(6, 2, 96), Layer(12, 4, 192)], "llama", {1, 2}),  # 6 ranks cannot share 4 heads
        ([Layer(6, 6, 96), Layer(12, 12, 192, 2, 0)], "llama", {1, 2, 6}),
        ([Layer(6, 6, 96), Layer(18, 18, 288, 3, 1)], "llama", {1, 3, 6}),
        ([SINGLE, Layer(16, 8, 384, 4, 0)], "llama", {1, 2, 4}),
        ([Layer(4, 4, 90), Layer(8, 8, 180)], "llama", {1, 2}),
        ([SINGLE, Layer(8, 4, 192, 2)], "granite", {1}),
        ([SINGLE, Layer(8, 4, 192)], "granite", {1, 2, 4}),
    ],
)
def test_degrees_of_vllm(layers, family, degrees):
    config = config_of(layers)
    assert layers_of(config) == tuple(layers)
    row = CONVERTIBLE[family]
    assert {n for n in range(1, 13) if not any(refusals(VLLM, config, row, degree=n))} == degrees


@pytest.mark.parametrize("plan", ["1+2", "1|2|3:1", "1+2 3|4", "0+1 2+3 4+5", "1~2 3|4:1", ""])
@pytest.mark.parametrize("family", CONVERTIBLE)
def test_a_plan_gives_the_layers_of_the_conversion(family, plan):
    config, row = complete({**CONFIG, "model_type": family}), CONVERTIBLE[family]
    config |= {"first_k_dense_replace": 1} if row.own_attentions else {}
    if "num_key_value_heads" not in row.wide:
        del config["num_key_value_heads"]
    parsed = Plan.parse(plan.replace("0+1", "") if row.dense else plan, 6)  # 0 has no experts
    converted = converted_config(config, row, parsed, dtype="float32")
    assert planned_layers(config, row, parsed) == layers_of(converted)


@pytest.mark.parametrize(
    ("target", "family", "plan", "degree", "reason"),
    [
        (VLLM, "llama", "1|2", 2, None),
        (VLLM, "llama", "1|2", 3, "layer 0 has 4 attention heads; possible: 1, 2, 4"),
        (VLLM, "gemma2", "1+2", 2, "which this family cannot split"),
        (VLLM, "granite", "1|2", 2, "which this family cannot split"),
        (VLLM, "seed_oss", "1|2 3|4:1", 2, None),
        (SGLANG, "seed_oss", "1+2", 1, "llama, mistral, qwen2 and qwen3 only"),
        (VLLM, "gpt_neox", "1+2", 1, "vLLM has no converted layers of its family"),
        (TORCH_TP, "stablelm", "1+2", 2, "torch_tp has no converted layers of its family"),
        (TRANSFORMERS, "stablelm", "1|2", 1, None),
        (TORCH_TP, "llama", "1+2", 2, None),
        (TORCH_TP, "gemma2", "1+2", 2, None),
        (TORCH_TP, "llama", "1|2|3", 2, None),
        (TORCH_TP, "llama", "1+2", 4, "cannot share 2 (num_key_value_heads) evenly"),
        (TRANSFORMERS, "gemma2", "1|2", 1, None),
        (TRANSFORMERS, "llama", "1+2", 2, "one process"),
        (TRANSFORMERS, "llama", "1~2", 1, None),
        (TRANSFORMERS, "cohere", "1+2 3~4", 1, "group 3~4 cannot be converted"),
        (TORCH_TP, "llama", "1~2 3+4", 2, None),
        (TORCH_TP, "gemma2", "1~2", 2, None),
        (VLLM, "llama", "1~2", 2, None),
        (SGLANG, "llama", "1+2 3|4:1", 2, None),
        (SGLANG, "qwen3", "1~2", 4, None),
        (SGLANG, "llama", "1|2|3", 2, "layer 1 is a cqil group of 3 members; possible: 1"),
        (SGLANG, "gemma2", "1+2", 1, "llama, mistral, qwen2 and qwen3 only"),
        (SGLANG, "mixtral", "1+2", 1, "llama, mistral, qwen2 and qwen3 only"),
        (LLAMACPP, "llama", "1~2", 1, "ff groups"),
        (LLAMACPP, "llama", "1+2", 1, None),
        (LLAMACPP, "llama", "1|2", 1, "convert with an lp plan"),
        (LLAMACPP, "arcee", "1+2", 1, "its FFN has no gate"),
        (LLAMACPP, "ministral", "1+2", 1, "have not been compared"),
        (LLAMACPP, "unknown", None, 1, "does not know its layers"),
    ],
)
def test_reasons(target, family, plan, degree, reason):
    config, row = {**CONFIG, "model_type": family}, CONVERTIBLE.get(family)
    reasons = list(
        refusals(target, config, row, None if plan is None else Plan.parse(plan, 6), degree)
    )
    assert reason in reasons[0] if reason else not reasons


def test_replicate_has_a_member_for_every_process():
    row, plan = CONVERTIBLE["llama"], Plan.parse("1+2 3|4|5", 6)
    (reason,) = refusals(TORCH_TP, CONFIG, row, plan, 3, "replicate")
    assert reason.startswith("3 processes are more than the 2 members of a group")
    assert not list(refusals(TORCH_TP, CONFIG, row, plan, 2, "replicate"))


BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(
    ("target", "more", "plan", "reason"),
    [
        (VLLM, {"abreast_prefill": "sequential"}, "1~2", "prefill of ff groups .*--hf-overrides"),
        (SGLANG, {"abreast_prefill": "sequential"}, "1+2", "without --prefill sequential"),
        (
            SGLANG,
            {"quantization_config": {"quant_method": "fp8"}},
            "1|2",
            "fp8 weights; use an lp plan",
        ),
        (SGLANG, {"quantization_config": {"quant_method": "fp8"}}, "1+2", None),
        (
            VLLM,
            {"quantization_config": {"quant_method": "awq"}},
            "1|2",
            "awq weights; use compress",
        ),
        (VLLM, {"quantization_config": {"quant_method": "awq"}}, "1+2 3~4", None),
        (VLLM, {"quantization_config": {"quant_method": "torchao"}}, "1|2", None),
        (VLLM, {"quantization_config": {"quant_method": "fp8"}}, "1|2", "fp8 weights; use"),
        (VLLM, {"quantization_config": BLOCKS}, "1|2", None),
    ],
)
def test_reasons_of_one_config(target, more, plan, reason):
    reasons = list(refusals(target, CONFIG | more, CONVERTIBLE["llama"], Plan.parse(plan, 6)))
    assert re.search(reason, reasons[0]) if reason else not reasons


def test_servers_that_refuse_are_named():
    config, row = {**CONFIG, "model_type": "arcee"}, CONVERTIBLE["arcee"]
    assert list(refused_by(config, row)) == ["llama.cpp"]
    assert refused_by(CONFIG, CONVERTIBLE["llama"]) == {}


def test_an_incomplete_config_is_one_line():
    with pytest.raises(AbreastError, match="no number for intermediate_size"):
        layers_of({**CONFIG, "intermediate_size": None})


def test_commands_quote_the_checkpoint_and_name_the_degree():
    assert [target.name for target in SERVERS] == ["vLLM", "transformers", "llama.cpp"]
    assert VLLM.commands("a b", 2).endswith("\nvllm serve 'a b' --tensor-parallel-size 2")
    assert VLLM.commands("OUT").endswith("\nvllm serve OUT")
    assert LLAMACPP.commands("OUT").splitlines()[1:] == [
        "abreast export OUT --gguf model.gguf",
        "llama-server -m model.gguf --flash-attn on",
    ]


def test_the_page_names_the_engines_of_each_format():
    """The table of formats in docs/serving.md."""
    page = (Path(__file__).parents[1] / "docs/serving.md").read_text(encoding="utf-8")
    table = page[page.index("| `--format`") : page.index("`--dry-run` says")].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:] if line]
    assert [row[0].strip("`") for row in rows] == ["deci", "deci-ff", "openelm", "mlx"]
    for form, *_, vllm, mlx, sglang in rows:
        name = form.strip("`")
        assert (vllm == "yes") == (name in STOCK_VLLM.formats), name
        assert mlx.startswith(("yes", "if")) == (name in MLX.formats + MLX_MODEL.formats), name
        assert (sglang == "not run") == (name in STOCK_SGLANG.formats), name


def test_stock_sglang_takes_no_plugin():
    config = CONFIG | {"model_type": "nemotron-nas", "abreast": {"format": "deci-ff"}}
    assert not list(refusals(STOCK_SGLANG, config, None))
    (reason,) = refusals(STOCK_SGLANG, CONFIG | {"abreast": {"format": "deci"}}, None)
    assert "convert again with --format deci-ff" in reason
    assert STOCK_SGLANG.commands("OUT", 2).splitlines() == [
        "pip install sglang",
        "python -m sglang.launch_server --model-path OUT --trust-remote-code --tp-size 2",
    ]
