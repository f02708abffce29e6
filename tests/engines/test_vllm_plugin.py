"""The vLLM plugin without vLLM: what it would refuse, and that it costs nothing to be there."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoConfig

import abreast.modeling  # noqa: F401  registers the config classes
from abreast.convert.rewrite import convert
from abreast.engines.vllm.plugin import ServingError, check, default_streams, is_too_old, streams_of

ELSEWHERE = r", or 2 in torch_tp \(abreast bench --backend tp --unpaired replicate\)"
OVERRIDE = r""", or 2 with --hf-overrides '\{"abreast_unpaired": "replicate"\}'"""


@pytest.mark.parametrize(
    ("family", "plan", "degree", "message"),
    [
        ("llama", "1+2", 3, "layer 0 has 4 attention heads; possible: 1, 2, 4"),
        ("llama", "1|2|3", 2, f"layer 1 is a cqil group of 3 members; possible: 1{ELSEWHERE}"),
        ("granite", "1|2", 2, f"which this family cannot split; possible: 1{ELSEWHERE}"),
    ],
)
def test_degree_that_does_not_fit(tiny_checkpoint, tiny_conversion, family, plan, degree, message):
    config = AutoConfig.from_pretrained(tiny_conversion(tiny_checkpoint(family), plan))
    check(config, 1)
    with pytest.raises(ServingError, match=f"^tensor parallel size {degree} .*{message}$") as error:
        check(config, degree)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ffn", "plan", "message"),
    [
        (6, 3, 96, "1+2 3|4", f"layer 0 has 3 key-value heads; possible: 1, 6{OVERRIDE}"),
        (8, 2, 95, "1+2 3~4", f"layer 0 has intermediate size 95; possible: 1{OVERRIDE}"),
        # vLLM itself divides these, whatever layers are made
        (9, 3, 96, "1+2", f"layer 0 has 9 attention heads; possible: 1, 3{ELSEWHERE}"),
        (9, 3, 96, "0+1 2+3+4+5", f"the original has 9 .*; possible: 1, 3{ELSEWHERE}"),
    ],
)
def test_what_replicate_lifts(tiny_checkpoint, tmp_path, heads, kv_heads, ffn, plan, message):
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_size": 144}
    source = tiny_checkpoint(head_dim=16, intermediate_size=ffn, **sizes)
    convert(source, plan, tmp_path / "out", force=True)
    config = AutoConfig.from_pretrained(tmp_path / "out")
    with pytest.raises(ServingError, match=f"^tensor parallel size 2 .*: {message}$"):
        check(config, 2)
    config.abreast_unpaired = "replicate"
    if OVERRIDE in message:
        check(config, 2)
    else:
        with pytest.raises(ServingError, match=f"^tensor parallel size 2 .*: {message}$"):
            check(config, 2)


@pytest.mark.parametrize(("family", "plan"), [("granite", "1+2"), ("mixtral", "1+2")])
def test_replicate_is_refused_where_no_layer_is_held_whole(
    tiny_checkpoint, tiny_conversion, family, plan
):
    config = AutoConfig.from_pretrained(tiny_conversion(tiny_checkpoint(family), plan))
    check(config, 2)
    config.abreast_unpaired = "replicate"
    with pytest.raises(ServingError, match=r"replicate runs in vLLM for llama, .* only; leave it"):
        check(config, 2)


def test_sequential_prefill(tiny_checkpoint, tmp_path):
    """Members are split one by one, so that two ranks may share a group of three."""
    convert(tiny_checkpoint(), "1|2|3", tmp_path / "native", prefill="sequential")
    config = AutoConfig.from_pretrained(tmp_path / "native")
    check(config, 2)
    with pytest.raises(ServingError, match=r"size 8 .* layer 0 has 4 .* possible: 1, 2, 4$"):
        check(config, 8)
    config.abreast_unpaired = "whole"
    with pytest.raises(ServingError, match=r"is 'whole', not one of shard, replicate$"):
        check(config, 2)
    convert(tiny_checkpoint("granite"), "1+2", tmp_path / "other", prefill="sequential")
    config = AutoConfig.from_pretrained(tmp_path / "other")
    with pytest.raises(ServingError, match=r"qwen2, qwen3 and seed_oss only; .*hf-overrides"):
        check(config, 1)
    config.abreast_prefill = None  # what the override that the message names does
    check(config, 1)


def test_streams_that_eagle_heads_read():
    """Layers 0, 1, 2+3, 4, 5|6|7, 8, 9: a stream inside a group is the next one."""
    config = SimpleNamespace(abreast={"num_layers": 10, "plan": "2+3 5|6|7"})
    assert default_streams(config) == (2, 5, 7)
    before = {0: 0, 1: 1, 2: 2, 3: 3, 4: 3, 5: 4, 6: 5, 7: 5, 8: 5, 9: 6, 10: 7}
    assert {layer: streams_of(config, [layer])[0] for layer in before} == before
    assert streams_of(config, default_streams(config)) == (2, 4, 5)
    with pytest.raises(ServingError, match="before layers 3, 4, 9, of which plan"):
        streams_of(config, [3, 4, 9])
    in_order = SimpleNamespace(abreast={"num_layers": 6, "plan": "1~2~3"})
    assert streams_of(in_order, [1, 2, 5]) == (1, 4, 5)  # 3 layers of attention, one has the FFNs


@pytest.mark.parametrize("record", [None, {}, {"num_layers": 4, "plan": "1+2"}])
def test_streams_that_the_original_does_not_have(record):
    with pytest.raises(ServingError, match="use the head of that original"):
        streams_of(SimpleNamespace(abreast=record), [2, 5])


@pytest.mark.parametrize(
    ("version", "old"),
    [
        ("0.31.9", True),
        ("0.8.5.post1", True),
        ("0.32.0", False),
        ("0.32.0+cpu", False),
        ("0.33.0rc1", False),
        ("1.0", False),
        ("0.0.0.dev1+gabc", False),
        ("dev", False),
    ],
)
def test_version(version, old):
    assert is_too_old(version) is old


def test_entry_point_names_the_function():
    points = [e for e in entry_points(group="vllm.general_plugins") if e.name == "abreast"]
    assert points, "abreast is not installed, or was before it had a plugin: pip install -e ."
    from abreast.engines import vllm

    assert points[0].load() is vllm.register


def test_plugin_module_is_light():
    """vLLM loads it in every process; it must not load torch before it knows that vLLM is there."""
    source = Path(__file__).resolve().parents[2] / "src"
    code = "import sys, abreast.engines.vllm; sys.exit('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(source)}
    )
    assert done.returncode == 0
