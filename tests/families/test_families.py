"""The family table against what transformers saves, and configs that describe no model."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from abreast import modeling
from abreast.checkpoint import as_loaded, open_checkpoint
from abreast.convert.rules import attention_kinds
from abreast.families.row import (
    FamilyError,
    all_tensors,
    head_dim_of,
    is_tied,
    layer_tensors,
    num_layers_of,
    sizes,
)
from abreast.families.table import CONVERTIBLE, FAMILIES, complete, family_of
from abreast.families.wrappers import WRAPPERS

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("options", [{}, {"head_dim": 24, "biases": True}], ids=str)
@pytest.mark.parametrize("family", CONVERTIBLE)
def test_tensors_are_those_that_transformers_saves(
    tiny_checkpoint: Callable[..., Path], family: str, options: dict[str, Any], tied: bool
) -> None:
    if family == "olmoe" or CONVERTIBLE[family].own_attentions:  # have no other size of head
        options = {key: value for key, value in options.items() if key != "head_dim"}
    folder = tiny_checkpoint(family, tied=tied, **options)
    config = complete(json.loads((folder / "config.json").read_text()))
    row = family_of(config)
    saved = open_checkpoint(folder).tensors
    if row.routes or row.renames:  # saved one by one, or by other names
        saved = as_loaded(open_checkpoint(folder), row).tensors
        own = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        assert {name for name in own if name != row.head or not tied} == set(saved)
    assert all_tensors(row, config) == {name: tensor.shape for name, tensor in saved.items()}
    assert is_tied(config) == tied
    assert config["architectures"] == [row.stock]


@pytest.mark.parametrize("family", CONVERTIBLE.values(), ids=CONVERTIBLE)
def test_rows_are_sound(family: Any) -> None:
    for matrix in family.matrices:
        if matrix.columns in ("A", "L"):  # reads a latent vector
            assert family.own_attentions and matrix.join == "rows"
            continue
        # what reads the residual stream may have a norm before it; what writes it has none
        reads = matrix.join == "rows"
        assert reads == (matrix.columns == "D") == (matrix.rows != "D")
        assert family.norm_of(matrix) in (family.norms if reads and family.norms else (None,))
    with pytest.raises(dataclasses.FrozenInstanceError):
        family.model_type = "other"


def test_modeling_lists_the_same_families() -> None:
    """modeling.py travels alone, so it has a list of its own."""
    from abreast import modeling

    rows = [row for row in FAMILIES.values() if row.matrices]
    assert set(modeling.FAMILIES) == {row.class_name for row in rows}
    assert {row.class_name: name for name, row in WRAPPERS.items()} == modeling.WRAPPERS
    for name in modeling.WRAPPERS.values():
        config = AutoConfig.for_model(f"abreast_{name}")
        assert type(config).__name__ == f"Abreast{WRAPPERS[name].class_name}WrapperConfig"
        theirs = AutoConfig.for_model(name)
        assert bool(theirs.tie_word_embeddings) == WRAPPERS[name].tied
        if name != "llava":  # may hold any
            assert theirs.text_config.model_type == WRAPPERS[name].decoder
    for family in CONVERTIBLE.values():
        model = getattr(modeling, family.converted)
        assert model.config_class.model_type == family.converted_type
        assert getattr(modeling, family.converted.replace("ForCausalLM", "Model"))


def test_rows_name_known_models() -> None:
    from transformers import CONFIG_MAPPING

    assert [name for name in FAMILIES if name not in CONFIG_MAPPING] == []


@pytest.mark.parametrize("family", CONVERTIBLE)
def test_defaults_are_those_of_transformers(family: str) -> None:
    from transformers import AutoConfig

    theirs = AutoConfig.for_model(family)
    ours = complete({"model_type": family})
    assert is_tied(ours) == bool(theirs.tie_word_embeddings)
    for matrix in CONVERTIBLE[family].matrices + CONVERTIBLE[family].dense:
        if matrix.bias not in ("", "always"):
            assert bool(ours.get(matrix.bias)) == bool(getattr(theirs, matrix.bias, False))
    shape = {key: getattr(theirs, key) for key in ("hidden_size", "num_attention_heads")}
    derived = shape["hidden_size"] // shape["num_attention_heads"]
    assert head_dim_of({**ours, **shape}) == (getattr(theirs, "head_dim", None) or derived)


@pytest.mark.parametrize("count", [1, 6, 13])
@pytest.mark.parametrize("family", CONVERTIBLE)
def test_attention_kinds_are_those_of_transformers(family: str, count: int) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(family, num_hidden_layers=count).to_dict()
    theirs = config.pop("layer_types", None) or [""] * count
    config.pop("no_rope_layers", None)
    ours = [kind.removesuffix(" without RoPE") for kind in attention_kinds(config)]
    if len(set(theirs)) > 1:
        assert ours == theirs
    else:
        assert len(set(ours)) == 1


def test_layers_without_rope_are_a_kind_of_their_own() -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model("smollm3", num_hidden_layers=10).to_dict()
    theirs = config.pop("no_rope_layers")
    assert set(theirs) == {0, 1}
    for listed in ({}, {"no_rope_layers": theirs}):
        kinds = attention_kinds({**config, **listed})
        assert [int("without RoPE" not in kind) for kind in kinds] == theirs


@given(
    st.integers(1, 12),
    st.booleans(),
    st.none() | st.integers(1, 100),
    st.integers(0, 14),
)
def test_attention_kinds_follow_qwen2(
    count: int, use: bool, window: int | None, first: int
) -> None:
    from transformers import Qwen2Config

    settings = {
        "num_hidden_layers": count,
        "use_sliding_window": use,
        "sliding_window": window,
        "max_window_layers": first,
    }
    expected = Qwen2Config(**settings).layer_types
    assert list(attention_kinds({**CONFIG, **settings})) == expected
    assert list(
        attention_kinds({**CONFIG, "num_hidden_layers": count, "layer_types": expected})
    ) == (expected)


def test_defaults() -> None:
    assert sizes(CONFIG) == {"D": 64, "Q": 64, "K": 32, "W": 192, "F": 96, "V": 128}
    without = {key: value for key, value in CONFIG.items() if key != "num_key_value_heads"}
    assert sizes(without)["K"] == 64
    assert head_dim_of({**CONFIG, "head_dim": None}) == 16
    assert sizes({**CONFIG, "head_dim": 10}) == {
        **{"D": 64, "Q": 40, "K": 20},
        **{"W": 120, "F": 96, "V": 128},
    }
    assert num_layers_of(CONFIG) == 6
    assert "self_attn.q_proj.bias" not in layer_tensors(CONVERTIBLE["llama"], CONFIG)
    assert "self_attn.q_proj.bias" in layer_tensors(CONVERTIBLE["qwen2"], CONFIG)
    assert "self_attn.o_proj.bias" not in layer_tensors(CONVERTIBLE["qwen2"], CONFIG)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"model_type": None}, "no model_type"),
        ({"model_type": ["llama"]}, "no model_type"),
        ({"model_type": "gptj"}, "model_type 'gptj' is not supported; supported are llama"),
        ({"model_type": "abreast_llama"}, "converted already"),
        ({"model_type": "bloom"}, "a bloom cannot be written as wide layers"),
        ({"model_type": "gpt2"}, "its matrices are stored transposed"),
        (
            {"model_type": "gpt_neox", "use_parallel_residual": False},
            "its FFN reads the attention's result (use_parallel_residual)",
        ),
        (
            {"model_type": "stablelm", "use_parallel_residual": True},
            "its FFN reads what its attention reads (use_parallel_residual)",
        ),
        ({"model_type": "mixtral"}, "how many experts (num_local_experts)"),
        ({"model_type": "mixtral", "num_local_experts": [4, 8]}, "num_local_experts"),
        (
            {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 5},
            "num_experts_per_tok",
        ),
        (
            {"model_type": "deepseek_v3", "n_routed_experts": 4, "num_experts_per_tok": 2},
            "no kv_lora_rank",
        ),
        ({"hidden_size": None}, "no hidden_size"),
        ({"hidden_size": "64"}, "hidden_size must be a positive whole number, not '64'"),
        ({"hidden_size": 64.0}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": 63}, "4 heads do not divide hidden_size 63"),
        ({"num_attention_heads": -4}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3 key-value heads"),
        ({"num_key_value_heads": 8}, "cannot share"),
        ({"num_key_value_heads": 0}, "num_key_value_heads"),
        ({"head_dim": 0}, "head_dim"),
        ({"head_dim": "16"}, "head_dim"),
        ({"vocab_size": [128]}, "vocab_size"),
        ({"intermediate_size": {}}, "intermediate_size"),
        ({"num_hidden_layers": 6.5}, "num_hidden_layers"),
    ],
    ids=str,
)
def test_config_that_describes_no_model(change: dict[str, Any], fault: str) -> None:
    config = {**CONFIG, **change}
    with pytest.raises(FamilyError) as caught:
        all_tensors(family_of(config), config)
    assert fault in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"layer_types": "full_attention"},
        {"layer_types": ["full_attention"] * 5},
        {"layer_types": []},
        *(
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": value}
            for value in (None, "3", 3.0, -1, True, [])
        ),
    ],
    ids=str,
)
def test_layer_kinds_that_make_no_sense(change: dict[str, Any]) -> None:
    with pytest.raises(FamilyError, match=r"layer_types|max_window_layers") as caught:
        attention_kinds({**CONFIG, **change})
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("family", modeling.FAMILIES)
def test_classes_are_found_by_model_type(family):
    made = getattr(modeling, f"Abreast{family}Config")
    assert modeling.MODEL_TYPES[made.model_type] == family
    assert type(AutoConfig.for_model(made.model_type)) is made


@pytest.mark.parametrize(
    ("module", "renamed", "family", "end"),
    [
        ("olmo2", "Olmo2DecoderLayer", "Olmo2", "Config"),
        ("mixtral", "MixtralModel", "Mixtral", "ForCausalLM"),
        ("qwen2_5_vl", "Qwen2_5_VLDecoderLayer", "Qwen2_5_VLText", "Model"),
        ("llava", "LlavaForConditionalGeneration", "Llava", "WrapperConfig"),
    ],
)
def test_a_class_that_transformers_renamed_breaks_its_own_family_only(
    monkeypatch, module, renamed, family, end
):
    monkeypatch.delattr(import_module(f"transformers.models.{module}.modeling_{module}"), renamed)
    for name in [name for name in vars(modeling) if name.startswith(f"Abreast{family}")]:
        monkeypatch.delitem(vars(modeling), name)
    with pytest.raises(ValueError, match=f"has not all of {family}: .*{renamed}"):
        getattr(modeling, f"Abreast{family}{end}")
    assert modeling.AbreastLlamaConfig.model_type == "abreast_llama"
    assert modeling.AbreastGemma3ForConditionalGeneration.config_class is not None


@pytest.mark.slow
def test_importing_makes_no_family():
    """So that none of them can break the import for the others, and it is quick."""
    code = (
        "import sys, abreast.modeling, transformers\n"
        "parts = [n.split('.') for n in sys.modules if n.startswith('transformers.models.')]\n"
        "made = [p for p in parts if p[2] != 'auto' and p[-1].startswith('modeling_')]\n"
        "assert not made, made\n"
        "config = transformers.AutoConfig.for_model('abreast_llama')\n"
        "assert type(config).__name__ == 'AbreastLlamaConfig'\n"
        "assert type(config) in transformers.AutoModelForCausalLM._model_mapping\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_windows_begin_at_layer_28_where_a_qwen_does_not_say():
    """The default of max_window_layers in transformers' Qwen 2 and 3."""
    config = {"model_type": "qwen2", "num_hidden_layers": 30, "sliding_window": 16}
    kinds = attention_kinds({**config, "use_sliding_window": True})
    assert kinds == ("full_attention",) * 28 + ("sliding_attention",) * 2
    assert set(attention_kinds(config)) == {"full_attention"}
