"""What the dtype "auto" stands for, where a device has no arithmetic in the checkpoint's."""

import json
from dataclasses import replace

import pytest
import torch

from abreast.checkpoint import open_checkpoint
from abreast.errors import AbreastError
from abreast.model import devices, fitting_dtype
from abreast.planner.calibration import calibrate
from abreast.planner.settings import CalibrationSettings


@pytest.fixture
def cpu(monkeypatch):
    """Call it with the CPU's features."""

    def has(**features: bool) -> None:
        devices.is_native.cache_clear()
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)

    yield has
    devices.is_native.cache_clear()


@pytest.fixture
def checkpoint(tiny_checkpoint):
    return open_checkpoint(tiny_checkpoint(dtype="bfloat16", tokenizer=True))


@pytest.mark.parametrize(
    ("features", "dtype"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, "bfloat16"),
        ({"avx512_bf16": False, "amx_bf16": True}, "bfloat16"),
        ({"avx512_bf16": False, "amx_bf16": False, "avx2": True}, "float32"),
        ({"bf16": True}, "bfloat16"),
    ],
)
def test_the_features_of_the_cpu_decide(cpu, checkpoint, features, dtype):
    cpu(**features)
    said = list[str]()
    assert fitting_dtype(checkpoint, "auto", "cpu", step=said.append) == dtype
    assert len(said) == (dtype == "float32")
    assert fitting_dtype(checkpoint, "bfloat16", "cpu") == "bfloat16"
    assert fitting_dtype(checkpoint, "auto", "cpu", recorded="float16") == "float16"


@pytest.mark.parametrize("fast", [True, False])
def test_a_cpu_that_says_nothing_is_timed(cpu, checkpoint, monkeypatch, fast):
    cpu(avx2=True)
    monkeypatch.setattr(devices, "_is_fast", lambda dtype: fast)
    assert fitting_dtype(checkpoint, "auto", "cpu") == ("bfloat16" if fast else "float32")


def test_float32_takes_as_long_as_itself():
    assert devices._is_fast(torch.float32)


def test_float32_is_not_taken_where_it_does_not_fit(cpu, checkpoint, monkeypatch):
    cpu(avx512_bf16=False)
    monkeypatch.setattr(devices.os, "sysconf", lambda name: 100)
    said = list[str]()
    assert fitting_dtype(checkpoint, "auto", "cpu", step=said.append) == "bfloat16"
    assert said == ["bfloat16 is slow on this CPU, and float32 does not fit into its memory"]


def test_a_config_may_leave_the_dtype_to_the_tensors(cpu, checkpoint):
    cpu(avx512_bf16=True)
    open_ended = replace(checkpoint, config={**checkpoint.config, "dtype": "auto"})
    assert fitting_dtype(open_ended, "auto", "cpu") == "bfloat16"


def test_an_unknown_dtype_is_refused(checkpoint):
    with pytest.raises(AbreastError, match="'int7' is not one of"):
        fitting_dtype(checkpoint, "int7", "cpu")


def test_eval_says_and_records_the_dtype(cpu, checkpoint, run):
    cpu(avx512_bf16=False)
    size = ("--data", __file__, "--max-tokens", 64, "--window", 32, "--stride", 16)
    code, out, err = run("eval", checkpoint.folder, *size, "--json")
    assert (code, json.loads(out)["dtype"]) == (0, "float32")
    assert "float32: this CPU has no arithmetic in bfloat16" in err


def test_a_run_keeps_its_dtype_on_another_machine(cpu, checkpoint, tmp_path):
    def dtype(name: str = "auto") -> str:
        settings = CalibrationSettings(data=__file__, num_windows=8, window=16, dtype=name)
        return calibrate(checkpoint.folder, tmp_path / "run", settings).settings.dtype

    cpu(avx512_bf16=False)
    assert dtype() == "float32"
    cpu(avx512_bf16=True)
    assert dtype() == "float32"
    with pytest.raises(AbreastError, match="with other dtype"):
        dtype("bfloat16")
    record = tmp_path / "run" / "measure.json"
    record.write_text(record.read_text().replace('"float32"', '"auto"'))  # as runs before had it
    assert dtype() == "auto"
