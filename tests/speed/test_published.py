"""Which published measurements the machines of hardware.yaml explain, and how well."""

from __future__ import annotations

import re
import runpy
from dataclasses import replace
from pathlib import Path

import pytest

from abreast.plan import Plan
from abreast.speed.hardware import hardware_of, table
from abreast.speed.prediction import Setting, estimate, forward_cost

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
PUBLISHED = runpy.run_path(str(BENCHMARKS / "estimate_published.py"))
ROWS = PUBLISHED["measured"]()
WITHIN = {"all-reduce": 20, "decode": 11}  # percent; the worst now are 16.7 and 10.5


def kind(row: dict) -> str:
    return "all-reduce" if "bytes" in row else "decode"


def named(row: dict) -> str:
    return " ".join(
        str(row[key]) for key in ("machine", "bytes", "model", "dtype", "published") if key in row
    )


@pytest.mark.parametrize("row", ROWS, ids=named)
def test_a_published_figure_is_explained_or_said_not_to_be(row):
    explained = abs(row["error_percent"]) <= WITHIN[kind(row)]
    assert explained == ("unexplained" not in row), row
    assert row["title"] and row["address"].startswith("https://")


def test_most_are_explained():
    for which, least in (("all-reduce", 32), ("decode", 7)):
        rows = [row for row in ROWS if kind(row) == which]
        assert sum("unexplained" not in row for row in rows) >= least
    # How decoding scales over devices, whose own speed was limited to 330 W.
    decoding = {(row["machine"], row["model"], row["dtype"]): row for row in ROWS if "model" in row}
    one, eight = (
        decoding[machine, "Llama 2 7B", "bfloat16"] for machine in ("A100", "8xA100-NVLink")
    )
    scaled = [eight[key] / one[key] for key in ("predicted", "published")]
    assert scaled[0] == pytest.approx(scaled[1], rel=0.05)


def test_every_link_has_a_measurement_or_says_that_none_was_found():
    measured = {hardware_of(row["machine"]).link for row in ROWS if "unexplained" not in row}
    for name, link in table()["links"].items():
        assert name in measured or re.search("no published figure|measured:", link["source"]), name
    for group in ("devices", "links", "runtimes"):
        for name, entry in table()[group].items():
            said = re.search(r"https?://|measured|counted|no published figure", entry["source"])
            assert said, f"{group}: {name}"


def test_small_sums_take_as_long_as_users_report():
    """In microseconds, from issue threads and users' reports; 8 kB is a token of an 8B model."""
    for machine, least, most in (
        ("8xH100-one-shot", 4, 10),
        ("8xH100-fused", 4, 10),
        ("8xH100-NCCL", 20, 33),
        ("4xRTX4090-PCIe-host", 30, 60),
        ("4xM3Ultra-Thunderbolt", 250, 1000),
        ("2xRTX4090-2.5GbE", 250, 1000),
        ("4xM3Ultra-RDMA", 5, 60),
    ):
        hardware = hardware_of(machine)
        assert least <= 1e6 * hardware.all_reduce(8192, hardware.count) <= most, machine


def test_one_shot_reads_what_every_other_device_has():
    six = replace(hardware_of("6xH100-one-shot"), latency=0.0, latency_per_doubling=0.0)
    assert six.all_reduce(4.5e11, 6) == pytest.approx(5)
    assert replace(six, one_shot=False).all_reduce(4.5e11, 6) == pytest.approx(2 * 5 / 6)


def test_a_device_waits_between_two_graphs():
    config = PUBLISHED["MODELS"]["Llama 2 7B"]
    graphs = Setting(hardware_of("A100"), context=1)
    ideal = replace(graphs, hardware=replace(hardware_of("A100"), bandwidth=1e30))
    kernels = 32 * 11 + 5
    arithmetic = 2 * 6.61e9 / (3.12e14 * table()["fractions"]["flops"])
    seconds = forward_cost(config, None, ideal).seconds
    assert seconds == pytest.approx(1.6e-4 + kernels * table()["gap"] + arithmetic, rel=0.01)
    assert forward_cost(config, None, replace(graphs, runtime="eager")).host > seconds


# One H200 (benchmarks/accelerator.py), batch 1, context 128: ms of the original, ratios to it.
MEASURED = {
    "SmolLM2-135M": (3.21, {"+": 1.189, "|": 1.169, "~": 1.051}),
    "Llama-3.2-3B": (4.94, {"+": 1.126, "|": 1.127, "~": 1.018}),
    "Llama-2-7B": (6.86, {"+": 1.138, "|": 1.131, "~": 1.034}),
}


@pytest.mark.parametrize("name", MEASURED)
def test_what_cuda_graphs_gained_on_a_gpu(name):
    accelerator = runpy.run_path(str(BENCHMARKS / "accelerator.py"))
    config, (first, last) = accelerator["SHAPES"][name], accelerator["GROUPED"][name]
    setting = Setting(hardware_of("H200"), context=128, runtime="cudagraphs")
    original, ratios = MEASURED[name]
    for sign, measured in ratios.items():
        text = " ".join(f"{k}{sign}{k + 1}" for k in range(first, last, 2))
        plan = Plan.parse(text, config["num_hidden_layers"])
        computed = estimate(config, plan, setting)
        assert computed.speedup == pytest.approx(measured, abs=0.03)
        assert 1e3 * computed.original == pytest.approx(original, rel=0.14)
