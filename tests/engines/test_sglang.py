"""Converted models in SGLang's layers, against transformers, on a stand-in for SGLang."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path

import pytest
import sglang_stand_in as stand_in
import torch
from safetensors.torch import load_file
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from abreast.convert.rewrite import convert
from abreast.engines import sglang
from abreast.engines.sglang.plugin import PACKAGE, VARIABLE, original_config
from abreast.errors import AbreastError
from abreast.families import CONVERTIBLE
from abreast.model.grouping import load
from abreast.plan import Plan
from abreast.targets import SGLANG, refusals

TOLERANCE = 1e-3
PROMPT, TOKENS = list(range(3, 20)), 12
FAMILIES = {
    "llama": {"biases": True},
    "mistral": {"sliding_window": 8, "tied": True},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 5},
    "qwen3": {"biases": True},
}
# an lp pair, a cqil pair, one with a bypass (in Qwen 2 past its sliding window), an ff pair
MIXED = "1+2 3|4 5|6:1 7~8"


@pytest.fixture(scope="module")
def models():
    with stand_in.installed() as module:
        yield module


def config_of(folder):
    config = json.loads((folder / "config.json").read_text())
    family = CONVERTIBLE[config["model_type"].removeprefix("abreast_")]
    return CONFIG_MAPPING[family.model_type].from_dict(original_config(config, family))


def generate(models, folder, size):
    """Prompt and greedy tokens with their logits on every rank, and exchanges of the last token."""
    config = config_of(folder)
    weights = load_file(folder / "model.safetensors")
    pool = stand_in.pool_of(config, size, len(PROMPT) + TOKENS)
    kind = {entry.__name__: entry for entry in models.EntryClass}[config.architectures[0]]

    def build(rank):
        made = kind(config)
        made.load_weights((name, tensor.clone()) for name, tensor in weights.items())
        return made

    ranks, _ = stand_in.on_ranks(size, build)
    ids, fed, logits = list(PROMPT), PROMPT, []
    for _ in range(TOKENS):
        positions = torch.arange(len(ids) - len(fed), len(ids))
        batch = stand_in.Batch(positions, pool)

        def step(rank, fed=fed, batch=batch):
            return ranks[rank](torch.tensor(fed), batch.positions, batch).next_token_logits

        outputs, exchanges = stand_in.on_ranks(size, step)
        assert all(torch.equal(outputs[0], other) for other in outputs)
        logits.append(outputs[0])
        ids, fed = [*ids, int(outputs[0][-1].argmax())], [int(outputs[0][-1].argmax())]
    return ids, torch.cat(logits), set(exchanges)


def agree(folder, ids, logits):
    model, _ = load(folder, dtype="float32", attn_implementation="eager")
    with torch.inference_mode():
        expected = model(torch.tensor([ids[:-1]])).logits[0]
    assert (logits - expected).abs().max() < TOLERANCE
    assert ids[len(PROMPT) :] == expected.argmax(-1)[len(PROMPT) - 1 :].tolist()


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens(models, tiny_checkpoint, tmp_path, family, size):
    source = tiny_checkpoint(family, num_layers=10, **FAMILIES[family])
    convert(source, MIXED, tmp_path / "out", dtype="float32")
    ids, logits, exchanges = generate(models, tmp_path / "out", size)
    agree(tmp_path / "out", ids, logits)
    # Embedding and logits 1, layers 0 and 9 and lp 2, cqil 1 and with a bypass 2, ff 3
    assert exchanges == {2 + 3 * 2 + 1 + 2 + 3 if size > 1 else 0}


@pytest.mark.parametrize(
    ("plan", "size"),
    [("1+2 3|4 5|6:1", 4), ("1|2|3|4:2 5~6~7", 2), ("1|2|3|4:2 5+6", 4)],
    ids=["ranks share members and heads", "members share ranks", "a member each"],
)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_members_and_ranks_need_not_be_equal(models, tiny_checkpoint, tmp_path, family, plan, size):
    convert(tiny_checkpoint(family, num_layers=9, biases=True), plan, tmp_path / "out")
    ids, logits, _ = generate(models, tmp_path / "out", size)
    agree(tmp_path / "out", ids, logits)


def test_a_member_has_the_cache_of_its_layer(models, tiny_checkpoint, tmp_path):
    convert(tiny_checkpoint(), "1+2 3~4", tmp_path / "out")
    config = config_of(tmp_path / "out")
    (model,), _ = stand_in.on_ranks(1, lambda rank: models.AbreastLlamaForCausalLM(config))
    numbers = [[attn.layer_id for attn in layer.self_attn.attn] for layer in model.model.layers]
    assert numbers == [[0], [1, 2], [3], [4], [5]]


def test_config_is_that_of_the_original(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", dict(CONFIG_MAPPING._extra_content))
    options = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}
    source = tiny_checkpoint("qwen2", num_layers=7, **options)
    convert(source, "1+2 4~5", tmp_path / "out")
    sglang.register()
    sglang.register()
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(AbreastError, match=f"start SGLang with {VARIABLE}={PACKAGE}$"):
        AutoConfig.from_pretrained(tmp_path / "out")
    monkeypatch.setenv(VARIABLE, PACKAGE)
    got, original = (AutoConfig.from_pretrained(path) for path in (tmp_path / "out", source))
    assert type(got) is type(original)
    own = {"architectures", "abreast", "dtype", "transformers_version", "head_dim", "_name_or_path"}
    ours, theirs = (
        {key: value for key, value in config.to_dict().items() if key not in own}
        for config in (got, original)
    )
    assert ours == theirs
    assert got.architectures == ["AbreastQwen2ForCausalLM"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"abreast": {"num_layers": 6}}, "no record of a plan that gives its layers"),
        ({"abreast": {"num_layers": 6, "plan": "1+2 3+4"}}, "no record of a plan"),
        ({"abreast_prefill": "sequential"}, "without --prefill sequential"),
    ],
)
def test_config_that_is_refused(tiny_checkpoint, tiny_conversion, change, message):
    out = tiny_conversion(tiny_checkpoint(), "1+2")
    config = json.loads((out / "config.json").read_text()) | change
    with pytest.raises(AbreastError, match=message):
        original_config(config, CONVERTIBLE["llama"])


@pytest.mark.parametrize(
    ("switch", "size", "message"),
    [
        ({"pp": 2}, 1, "no conversions with --pp-size; start it without"),
        ({"dp": True}, 1, "--enable-dp-attention"),
        ({"lora_paths": ["adapter"]}, 1, "--enable-lora"),
        ({"speculative_algorithm": "EAGLE3"}, 1, "--speculative-algorithm"),
        ({}, 3, "size 3 does not fit this model: layer 0 has 4 attention heads; possible: 1, 2, 4"),
    ],
)
def test_options_that_are_refused(
    models, tiny_checkpoint, tiny_conversion, monkeypatch, switch, size, message
):
    config = config_of(tiny_conversion(tiny_checkpoint(), "1+2"))
    for name, value in switch.items():
        if name in stand_in.SWITCHES:
            monkeypatch.setitem(stand_in.SWITCHES, name, value)
        else:
            monkeypatch.setattr(stand_in.SERVER_ARGS, name, value)
    with pytest.raises(AbreastError, match=message):
        stand_in.on_ranks(size, lambda rank: models.AbreastLlamaForCausalLM(config))


def test_weights_that_do_not_belong(models, tiny_checkpoint, tiny_conversion):
    out = tiny_conversion(tiny_checkpoint(), "1+2")
    config, weights = config_of(out), load_file(out / "model.safetensors")
    more = {**weights, "model.layers.1.self_attn.extra.weight": torch.zeros(1)}
    less = {name: tensor for name, tensor in weights.items() if "norm" not in name}

    def fill(tensors):
        models.AbreastLlamaForCausalLM(config).load_weights(iter(tensors.items()))

    for tensors, message in ((more, "extra.weight is none of"), (less, "is not in the checkpoint")):
        with pytest.raises(AbreastError, match=message):
            stand_in.on_ranks(1, lambda rank, tensors=tensors: fill(tensors))


def test_classes_are_those_of_the_targets_table(models):
    config = {
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
    }
    plan = Plan.parse("1+2", 6)
    taken = {
        family.converted
        for family in CONVERTIBLE.values()
        if not any(refusals(SGLANG, {**config, "model_type": family.model_type}, family, plan))
    }
    assert {kind.__name__ for kind in models.EntryClass} == taken


def test_entry_point_names_the_function():
    project = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    section = r'\[project.entry-points."sglang.srt.plugins"\]\nabreast = "(.+):(.+)"'
    module, name = re.search(section, project).groups()
    assert getattr(import_module(module), name) is sglang.register
