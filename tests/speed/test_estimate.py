"""The latency model: limits that can be worked out by hand, and what the papers measured."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from abreast.cli.main import cli
from abreast.errors import AbreastError
from abreast.families.row import FamilyError
from abreast.plan import Group, Plan
from abreast.speed.hardware import HardwareError, hardware_of, table
from abreast.speed.prediction import (
    BYTES,
    Setting,
    estimate,
    forward_cost,
    speedup,
    stage_cost,
    stage_seconds,
    ways,
)
from abreast.speed.shape import read_config, shape_of, typical_plan

ROOT = Path(__file__).resolve().parents[2]
CONFIG = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}
PAIRS = Plan.parse("14+15 16+17 18+19 20+21", 32)
MEMBERS = Plan.parse("14|15 16|17 18|19 20|21", 32)
PAIR = Group(layers=(14, 15))


def on(hardware: str, **options) -> Setting:
    return Setting(hardware_of(hardware), **options)


def test_sizes_are_those_of_the_matrices():
    shape = shape_of(CONFIG)
    assert shape.attention == 2 * 4096 * 4096 + 2 * 4096 * 1024
    assert shape.ffn == 3 * 4096 * 11008
    assert (shape.head, shape.embedding) == (32000 * 4096, 32000 * 4096)
    assert shape_of({**CONFIG, "tie_word_embeddings": True}).embedding == 0


def test_decode_on_an_ideal_device_is_the_time_to_read_everything():
    ideal = replace(hardware_of("H100"), bandwidth=1e9, flops=(("bfloat16", 1e30),))
    fraction = table()["fractions"]
    shape = shape_of(CONFIG)
    weights = 32 * (shape.attention + shape.ffn) + shape.head
    cache = 2 * 1024 * 5000 * 32
    want = 2 * (weights / fraction["bandwidth"] + cache / fraction["attention"]) / 1e9
    seconds = forward_cost(CONFIG, None, Setting(ideal, context=5000)).seconds
    assert seconds == pytest.approx(want, rel=1e-3)  # the rest are the gaps between kernels
    # The same weights are read in groups: nothing but kernels can be won on one device.
    assert speedup(CONFIG, PAIRS, Setting(ideal, context=5000)) == pytest.approx(1, rel=1e-3)


def test_tokens_read_only_the_experts_that_they_choose():
    """Qwen3-30B-A3B: 30.5e9 parameters, 3.3e9 active, says its model card."""
    config = {
        **{"model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48},
        **{"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128},
        **{"intermediate_size": 6144, "moe_intermediate_size": 768, "vocab_size": 151936},
        **{"num_experts": 128, "num_experts_per_tok": 8},
    }
    ideal = replace(hardware_of("H100"), bandwidth=1e9, flops=(("bfloat16", 1e30),))
    group = Plan.parse("14+15", 48)
    assert estimate(config, group, Setting(ideal)).weights / 2 == pytest.approx(30.5e9, rel=0.01)

    def read(batch: int) -> float:
        cost = forward_cost(config, None, Setting(ideal, context=1, batch=batch))
        return cost.seconds * 1e9 * table()["fractions"]["bandwidth"] / 2

    assert read(1) + 151936 * 2048 == pytest.approx(3.35e9, rel=0.02)  # with the embedding
    assert read(1) < read(2) < 2 * read(1)
    assert read(500) == pytest.approx(30.2e9, rel=0.02)
    eager = Setting(hardware_of("A100"), runtime="eager")
    dense = forward_cost(CONFIG, None, eager).host / 32
    assert forward_cost(config, None, eager).host / 48 > dense, "experts launch more"


def test_attentions_that_stay_whole_are_launched_one_by_one():
    """Of DeepSeek V3 a pair saves the launches of an FFN, and still an exchange of two."""
    config = {
        **{"model_type": "deepseek_v3", "hidden_size": 2048, "num_hidden_layers": 32},
        **{"num_attention_heads": 16, "intermediate_size": 8192, "vocab_size": 32000},
        **{"n_routed_experts": 64, "num_experts_per_tok": 6, "moe_intermediate_size": 1408},
        **{"kv_lora_rank": 512, "q_lora_rank": None, "v_head_dim": 128},
        **{"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "n_shared_experts": 2},
    }
    kernels = table()["runtimes"]["eager"]["kernels"]
    eager = on("A100", runtime="eager")
    costs = [forward_cost(config, plan, eager).host for plan in (None, Plan.parse("14+15", 32))]
    saved = kernels["ffn"] + table()["expert_kernels"]
    assert costs[0] - costs[1] == pytest.approx(saved * table()["runtimes"]["eager"]["host_kernel"])
    assert estimate(config, Plan.parse("14+15", 32), on("2xA100-NVLink")).all_reduces == (66, 64)


def test_long_prompts_are_bound_by_arithmetic():
    shape = shape_of(CONFIG)
    tokens = 4 * 512
    flops = 2 * 32 * (shape.attention + shape.ffn) * tokens
    least = flops / (9.89e14 * table()["fractions"]["flops"])
    cost = forward_cost(CONFIG, None, on("H100", batch=4, context=512, phase="prefill"))
    assert least < cost.seconds < 1.2 * least


def test_where_the_program_decides_the_speed_up_is_that_of_depth():
    slow = speedup(CONFIG, PAIRS, on("2xH100-NVLink", runtime="eager", context=16))
    assert slow == pytest.approx(32 / 28, rel=0.02)
    estimated = estimate(CONFIG, PAIRS, on("2xH100-NVLink", runtime="eager", context=16))
    assert estimated.bound == "program"
    assert estimate(CONFIG, PAIRS, on("2xH100-NVLink")).bound == "device"


def test_collectives_are_counted_as_the_theory_says():
    two = "2xA100-NVLink"
    # Two for a single layer and for an lp group, one for a cqil group, two around the layers.
    assert estimate(CONFIG, PAIRS, on(two)).all_reduces == (66, 24 * 2 + 4 * 2 + 2)
    assert estimate(CONFIG, MEMBERS, on(two)).all_reduces == (66, 24 * 2 + 4 * 1 + 2)
    # An attention in order costs one each, the FFNs of its group one together.
    in_order = Plan.parse("14~15~16 18~19", 32)
    assert estimate(CONFIG, in_order, on(two)).all_reduces == (66, 27 * 2 + 4 + 3 + 2)
    # Four devices for two members: those that share one add its attention up among themselves.
    assert estimate(CONFIG, MEMBERS, on("4xA100-NVLink")).all_reduces[1] == 24 * 2 + 4 * 2 + 2
    mixed = Plan.parse("14~15~16 18|19|20", 32)  # attentions of ff and single layers are whole
    whole = estimate(CONFIG, mixed, on(two, unpaired="replicate"))
    assert whole.all_reduces == (0, 2)
    shape, cache = shape_of(CONFIG), 2 * 1024 * 1024 * 2
    assert whole.kv_cache == pytest.approx(cache * (26 + 3 + 2))
    layers = shape.attention * (26 + 3 + 2) + shape.ffn * (26 + 2 + 2)
    assert whole.weights == pytest.approx(2 * (layers + shape.head + shape.embedding))
    one = estimate(CONFIG, MEMBERS, on(two, unpaired="replicate"))
    assert one.all_reduces == (0, 4)
    assert (one.ranks, one.baseline_ranks) == (2, 1)
    assert estimate(CONFIG, PAIRS, on("A100")).all_reduces == (0, 0)


def test_members_that_devices_do_not_share_evenly():
    """As `torch_tp` holds them: split as all layers are, or dealt out, with one more for some."""
    three = Plan.parse("18|19|20", 32)
    split = estimate(CONFIG, three, on("2xA100-NVLink"))
    assert split.all_reduces[1] == 29 * 2 + 2 + 2 and split.refused is None
    group = three.groups[0]
    dealt = on("2xA100-NVLink", unpaired="replicate")
    assert dealt.held(group) == (2, 2) and on("3xA100-NVLink").held(group) == (1, 1)
    assert estimate(CONFIG, three, dealt).all_reduces[1] == 1


def test_the_device_with_a_member_more_repeats_no_attentions():
    """It is the first, so that with d = 1 two devices run two attentions and two or one FFNs."""
    own, before = (Group(layers=(18, 19, 20), wiring="cqil", bypass=b) for b in (0, 1))
    two = on("2xA100-NVLink", unpaired="replicate")
    assert (two.repeated(own), two.repeated(before)) == (None, 0)
    assert stage_cost(CONFIG, before, two) == pytest.approx(stage_cost(CONFIG, own, two))
    four = Group(layers=(18, 19, 20, 21), wiring="cqil", bypass=1)
    assert two.repeated(four) == 1 and stage_cost(CONFIG, four, two) > stage_cost(
        CONFIG, before, two
    )


@pytest.mark.parametrize("devices", [2, 4])
def test_a_bypass_is_repeated_where_exchanging_takes_longer(devices):
    """A layer's attention on A100s: 42 MB at 1.7 TB/s, 24 us, half of it on each of two devices."""
    plain, bypass = (Group(layers=(1, 2), wiring="cqil", bypass=b) for b in (0, 1))

    def more(link: float) -> float:
        setting = Setting(hardware_of("A100").joined(devices, link))
        return stage_cost(CONFIG, bypass, setting) - stage_cost(CONFIG, plain, setting)

    attention = 2 * shape_of(CONFIG).attention / (2.039e12 * table()["fractions"]["bandwidth"])
    repeated = more(1000.0)
    assert repeated == pytest.approx(attention / (devices // 2), rel=0.2)
    assert repeated == pytest.approx(more(300.0)) and more(5.0) < repeated / 1.5


def test_hardware_joined_by_another_link():
    four = hardware_of("2xA100-NVLink").joined(4, 300.0)
    assert (four.name, four.count) == ("4xA100-NVLink, link of 300 us", 4)
    volume = 2 * 3 / 4 * 8192 / 3e11
    assert four.all_reduce(8192, 4) == pytest.approx(300e-6 + volume)
    assert hardware_of("2xA100-NVLink").joined().all_reduce(1, 2) > 0
    for ranks, link in ((None, 300.0), (0, None), (2, -1.0), (2, float("nan"))):
        with pytest.raises(HardwareError, match="makes no sense; give 2 devices or more"):
            hardware_of("A100").joined(ranks, link)


def test_the_ways_to_hold_a_conversion_are_compared(tmp_path, run):
    compared = ways(CONFIG, MEMBERS, on("2xM3Ultra-Thunderbolt"))
    assert list(compared) == ["shard", "replicate", "on one device"]
    seconds = {way: entry.converted for way, entry in compared.items()}
    assert seconds["replicate"] < seconds["on one device"] < seconds["shard"]
    weights = [entry.weights for entry in compared.values()]
    assert weights[0] < weights[1] < weights[2]
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    options = ("--plan", MEMBERS.shorthand, "--hardware", "2xM3Ultra-Thunderbolt")
    status, out, _ = run("estimate", tmp_path, *options)
    assert status == 0 and "fastest: replicate" in out
    status, out, _ = run("estimate", tmp_path, "--hardware", "M3Ultra")
    assert status == 0 and "fastest" not in out


def test_devices_that_no_engine_splits_a_plan_over_are_named():
    uneven = {**CONFIG, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 128}
    uneven["intermediate_size"] = 9 * 1024
    assert "layer 0 has 9 attention heads" in estimate(uneven, PAIRS, on("2xH100")).refused
    for config, setting in (
        (CONFIG, on("2xH100")),
        (uneven, on("2xH100", unpaired="replicate")),
        (uneven, on("3xH100")),
        (uneven, on("H100")),
    ):
        assert estimate(config, PAIRS, setting).refused is None


@pytest.mark.parametrize(("layers", "stages"), [(4, 3), (16, 13), (30, 25), (80, 67)])
def test_a_typical_plan_leaves_five_sixths(layers, stages):
    assert typical_plan({**CONFIG, "num_hidden_layers": layers}).depth == stages


@pytest.mark.parametrize(
    ("change", "plan"),
    [
        ({"num_hidden_layers": 2}, "0+1"),
        ({"num_hidden_layers": 16}, "5+6 7+8 9+10"),
        ({"model_type": "gemma3_text", "num_hidden_layers": 12}, "2+3 6+7"),
        ({"model_type": "gemma2", "num_hidden_layers": 12}, "4~5 6~7"),
        ({"model_type": "gemma2", "num_hidden_layers": 1}, ""),
    ],
    ids=str,
)
def test_a_typical_plan_can_be_converted(change, plan):
    """Windows lie as they do: a pair never mixes kinds, but for ff where all neighbours do."""
    assert typical_plan({**CONFIG, **change}).shorthand == plan


def test_without_a_plan_many_machines_are_shown(tmp_path, run):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    status, out, _ = run("estimate", tmp_path)
    assert status == 0 and "32 -> 27 stages" in out and "8xH100" in out and "Try first" in out
    status, out, _ = run("estimate", tmp_path, "--json")
    assert status == 0 and len(json.loads(out)["estimates"]) == 85
    status, out, _ = run("estimate", tmp_path, "--hardware", "2xA100-NVLink")
    assert status == 0 and "32 -> 27 stages on 2xA100-NVLink" in out and "Try first" not in out
    status, out, _ = run("estimate", tmp_path, "--dtype", "int4")
    assert status == 0 and "32 -> 27 stages on H100, int4" in out


def test_every_number_of_devices_is_refused_by_name(tmp_path, run):
    uneven = {**CONFIG, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 128}
    uneven["intermediate_size"] = 9 * 1024
    (tmp_path / "config.json").write_text(json.dumps(uneven))
    _, out, _ = run("estimate", tmp_path)
    text = " ".join(out.split())
    for degree in (8, 2):
        assert f"refused: tensor parallel size {degree} does not fit this model" in text
    assert "possible: 1, 3" in text and "--hardware 3xH100-NVLink" in text
    status, out, _ = run("estimate", tmp_path, "--hardware", "3xH100-NVLink")
    assert status == 0 and "no engine splits" not in out


@pytest.mark.parametrize(
    ("machine", "nbytes", "least", "most"),
    [
        ("2xM3Ultra-Thunderbolt", 8192, 290e-6, 310e-6),  # J. Geerling, 2025: 300 us
        ("2xM3Ultra-RDMA", 8192, 0, 50e-6),  # the same: below 50 us
        (
            "2xH100-fused",
            32 * 8192 * 2,
            7e-6,
            11e-6,
        ),  # vLLM, pull request 22086: 10 us, norm included
    ],
)
def test_published_exchanges_are_explained(machine, nbytes, least, most):
    assert least <= hardware_of(machine).all_reduce(nbytes, 2) <= most


def test_slower_links_make_fewer_collectives_worth_more():
    wins = [speedup(CONFIG, PAIRS, on(f"2xA100-{link}")) for link in ("NVLink", "PCIe")]
    assert 1 < wins[0] < wins[1]
    assert speedup(CONFIG, MEMBERS, on("2xA100-PCIe")) > wins[1]


def test_stages_add_up_to_the_forward_pass():
    hardware = on("2xH100-NVLink")
    single = stage_cost(CONFIG, None, hardware)
    pair = stage_cost(CONFIG, PAIR, hardware)
    original = forward_cost(CONFIG, None, hardware).seconds
    under = forward_cost(CONFIG, PAIRS, hardware).seconds
    assert original - under == pytest.approx(4 * (2 * single - pair))
    assert stage_cost(CONFIG, PAIR, replace(hardware, fused=False)) > pair
    stages = stage_seconds(CONFIG, PAIRS, hardware)
    assert len(stages) == 28 + 1
    assert stages[14] == pair
    assert sum(stages) == pytest.approx(under)
    in_order = Group(layers=(14, 15, 16), wiring="ff")
    for group in (None, PAIR, in_order):
        halves = [stage_cost(CONFIG, group, hardware, part=p) for p in ("attention", "ffn")]
        assert sum(halves) == pytest.approx(stage_cost(CONFIG, group, hardware))
    # Attentions in order take what single ones take, FFNs what those of an lp group take.
    attention, ffn = (
        stage_cost(CONFIG, group, hardware, part=p)
        for group, p in ((None, "attention"), (Group(layers=(14, 15, 16)), "ffn"))
    )
    assert stage_cost(CONFIG, in_order, hardware) == pytest.approx(3 * attention + ffn)


@given(
    batch=st.integers(1, 256),
    context=st.integers(1, 32768),
    phase=st.sampled_from(["prefill", "decode"]),
    runtime=st.sampled_from(["graphs", "eager"]),
    dtype=st.sampled_from(list(BYTES)),
    hardware=st.sampled_from(["A100", "2xA100-PCIe", "8xH100-NVLink", "2xXeon-gloo"]),
)
def test_no_plan_of_pairs_is_ever_slower_and_more_work_takes_longer(
    batch, context, phase, runtime, dtype, hardware
):
    setting = on(hardware, phase=phase, runtime=runtime, dtype=dtype, batch=batch, context=context)
    assert 1 <= speedup(CONFIG, PAIRS, setting) < 32 / 28 + 1e-9
    now = forward_cost(CONFIG, None, setting).seconds
    for more in (replace(setting, batch=batch + 1), replace(setting, context=context + 1)):
        assert now <= forward_cost(CONFIG, None, more).seconds


PUBLISHED = runpy.run_path(str(ROOT / "benchmarks" / "estimate_published.py"))


@pytest.mark.parametrize("row", PUBLISHED["predicted"](), ids=lambda row: row["figure"])
def test_published_speed_ups_within_ten_percent(row):
    assert abs(row["error_percent"]) <= 10
    # FFN Fusion is only partly explained: its fused FFNs also read their weights faster.
    if row["figure"] != "FFN Fusion":
        assert abs(row["gain_error_percent"]) <= 10


def test_the_gap_is_calibrated_to_the_405b():
    calibrated = PUBLISHED["calibration"]()
    assert calibrated["predicted"] == pytest.approx(calibrated["published"], rel=0.05)


def test_memory_per_device():
    estimated = estimate(CONFIG, PAIRS, on("2xA100-NVLink", batch=2, context=1000))
    shape = shape_of(CONFIG)
    parameters = 32 * (shape.attention + shape.ffn) + shape.head + shape.embedding
    assert estimated.weights == parameters * 2 // 2
    assert estimated.kv_cache == 2 * 1024 * 32 * 2 * 1000 * 2 // 2
    assert estimated.fits
    assert not estimate(CONFIG, PAIRS, on("L40S", batch=64, context=8192)).fits


@pytest.mark.parametrize("text", ["2xV100", "", "x", "0xA100", "A100-gloo", "2x A100 NVLink", "-"])
def test_unknown_hardware_lists_the_known(text):
    with pytest.raises(
        HardwareError, match=r"known are A100 \(NVLink, PCIe, one-shot, NCCL\), .*H200.*B200"
    ):
        hardware_of(text)


def test_part_of_a_name_of_hardware_gets_suggestions():
    with pytest.raises(HardwareError, match=r"did you mean rtx4090-pcie-host or .*\? known are"):
        hardware_of("2x4090")


def test_hardware_is_read_generously():
    assert hardware_of("2xa100-nvlink").link == "NVLink"
    assert hardware_of("4xA100-PCIe").bandwidth == 1.935e12  # the PCIe card, a device of its own
    assert hardware_of("2xL40S").link == "PCIe"
    assert hardware_of("H200").count == 1
    for name in table()["devices"]:
        assert table()["devices"][name]["source"]
        assert hardware_of(name).peak("bfloat16") > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "at least 1"),
        ({"dtype": "int3"}, "'int3' is not one of float32"),
        ({"phase": "train"}, "'train' is not one of prefill, decode"),
        ({"ranks": 3}, "is 2 devices; 3 cannot share"),
        ({"plan": Plan.parse("1+2", 16)}, "the plan is for 16 layers, the model has 32"),
    ],
)
def test_senseless_requests_are_refused(options, message):
    plan = options.pop("plan", MEMBERS)
    with pytest.raises(AbreastError, match=message):
        estimate(CONFIG, plan, on("2xA100-NVLink", **options))


def test_converted_models_are_refused():
    with pytest.raises(FamilyError, match="give the original"):
        speedup({**CONFIG, "model_type": "abreast_llama"}, PAIRS, on("A100"))


def test_verb(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    arguments = ["estimate", str(path), "--plan", "14+15 16+17", "--hardware", "2xA100-NVLink"]
    shown = CliRunner().invoke(cli, [*arguments, "--batch", "1,8"])
    assert shown.exit_code == 0, shown.output
    assert "computed, not measured" in shown.output
    assert "66 -> 62 collectives" in shown.output
    dumped = CliRunner().invoke(cli, [*arguments, "--context", "128", "--json"])
    rows = json.loads(dumped.stdout)["estimates"]
    assert [(row["runtime"], row["phase"]) for row in rows] == [
        ("graphs", "prefill"),
        ("graphs", "decode"),
        ("eager", "prefill"),
        ("eager", "decode"),
    ]
    assert rows[1]["speedup"] == pytest.approx(
        speedup(CONFIG, Plan.parse("14+15 16+17", 32), on("2xA100-NVLink", context=128))
    )
    assert read_config(tmp_path) == CONFIG


def test_the_verb_says_which_way_to_hold_a_model_wins(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    arguments = ["estimate", str(tmp_path), "--plan", "14|15", "--batch", "8,1"]
    two = [*arguments, "--hardware", "2xM3Ultra-Thunderbolt"]
    printed = json.loads(CliRunner().invoke(cli, [*two, "--json"]).stdout)
    plan, setting = Plan.parse("14|15", 32), on("2xM3Ultra-Thunderbolt", batch=8)
    expected = {way: entry.to_dict() for way, entry in ways(CONFIG, plan, setting).items()}
    assert printed["ways"] == json.loads(json.dumps(expected))
    assert {*printed["ways"]} == {"shard", "replicate", "on one device"}
    assert printed["fastest"] == min(expected, key=lambda way: expected[way]["converted"])
    text = " ".join(CliRunner().invoke(cli, two).stdout.split())
    assert f"fastest: {printed['fastest']}" in text
    assert f"shard {1e3 * expected['shard']['converted']:.2f} ms" in text
    alone = CliRunner().invoke(cli, [*arguments, "--hardware", "M3Ultra", "--json"])
    assert json.loads(alone.stdout)["ways"] == {}


def test_verb_on_bad_input(tmp_path):
    for model, message in (
        (tmp_path / "none.json", "give a model folder"),
        (tmp_path, "has no config.json"),
        ("nope", "no model at 'nope'"),
    ):
        outcome = CliRunner().invoke(
            cli, ["estimate", str(model), "--plan", "1+2", "--hardware", "A100"]
        )
        assert isinstance(outcome.exception, AbreastError)
        assert message in str(outcome.exception)


def test_estimating_needs_no_torch():
    code = "import abreast.speed.prediction, sys; sys.exit('torch' in sys.modules)"
    environment = {"PYTHONPATH": str(ROOT / "src"), "PATH": ""}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
