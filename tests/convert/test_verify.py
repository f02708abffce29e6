"""`verify` says yes to right conversions and no, in words, to every kind of wrong one."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from abreast.convert.rewrite import convert
from abreast.convert.verification import Verification, verify
from abreast.demo import model_folder
from abreast.errors import AbreastError
from abreast.families.table import CONVERTIBLE

FAMILIES = ("llama", "mistral", "qwen2")
CORE = ("phi3", "gemma3_text", "nemotron")
# One kind of attention, where a family mixes them otherwise.
FULL = {"layer_types": ["full_attention"] * 6}
ALIKE = {
    "smollm3": {"no_rope_layers": [1] * 6},
    "cohere": {"use_qk_norm": True},
    "granitemoe": {"seed": 1},  # with seed 0, noise does 70 times as much as folding
    **dict.fromkeys(("gemma2", "gemma3_text", "cohere2", "olmo3", "exaone4", "gpt_oss"), FULL),
}
MIXED = "1+2 3|4:1"
SLOW = pytest.mark.slow
PLAN = "1+2 3+4"  # stages 0, 1+2, 3+4, 5: the groups are layers 1 and 2 of the conversion
Weights = dict[str, torch.Tensor]


def checked(out: Path, original: Path) -> Verification:
    return verify(out, original, num_tokens=48, new_tokens=8)


@pytest.fixture
def made(tiny_checkpoint, tiny_conversion, tmp_path) -> Callable[..., tuple[Path, Path]]:
    """(original, conversion that may be spoilt)."""

    def factory(family: str = "llama", **settings: Any) -> tuple[Path, Path]:
        original = tiny_checkpoint(family, **settings)
        shutil.copytree(tiny_conversion(original, PLAN), tmp_path / "out")
        return original, tmp_path / "out"

    return factory


def record(out: Path, name: str) -> None:
    """Enter the hash of a changed file in the manifest, as if it had been written like that."""
    manifest = json.loads((out / "abreast.json").read_text())
    data = (out / name).read_bytes()
    manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (out / "abreast.json").write_text(json.dumps(manifest))


def spoil(out: Path, change: Callable[[Weights], None]) -> None:
    weights = load_file(out / "model.safetensors")
    change(weights)
    weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    record(out, "model.safetensors")


def edit_plan(out: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((out / "abreast.json").read_text())
    change(manifest["plan"])
    (out / "abreast.json").write_text(json.dumps(manifest))


def swap_gains(original: Path, stage: str, members: tuple[int, int], names: list[str]) -> Any:
    """Fold each member's matrices with the other one's norm: the classic mistake."""
    source = load_file(original / "model.safetensors")
    layers = [f"model.layers.{member}." for member in members]

    def change(weights: Weights) -> None:
        for name in names:
            norm = "post_attention_layernorm" if name.startswith("mlp") else "input_layernorm"
            folded = [
                source[f"{layer}{name}.weight"].float() * source[f"{other}{norm}.weight"].float()
                for layer, other in zip(layers, reversed(layers), strict=True)
            ]
            target = weights[f"{stage}{name}.weight"]
            weights[f"{stage}{name}.weight"] = torch.cat(folded).to(target.dtype)

    return change


def refuted(result: Verification) -> None:
    assert not result.ok and not result.to_dict()["ok"]
    assert any("not what the original's fold to" in f for f in result.faults), result.faults
    assert any(f.startswith("logits without cache differ by") for f in result.faults), result.faults
    assert any(f.startswith("logits with cache differ by") for f in result.faults), result.faults
    assert result.uncached > result.tolerance and result.cached > result.tolerance


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_good_conversion_passes(made, family, dtype):
    original, out = made(family, dtype=dtype, biases=family == "llama")
    result = checked(out, original)
    assert result.ok, result.faults
    assert (result.plan, result.dtype) == (PLAN, dtype)
    assert 0 < result.uncached < result.tolerance
    assert 0 < result.cached < result.tolerance < 1e-5
    assert result.tensors == len(load_file(out / "model.safetensors"))
    assert -1e-6 < result.kl < 1e-6
    assert (result.num_tokens, result.generated_tokens) == (48, 8)
    assert result.same_tokens == 8
    assert json.loads(json.dumps(result.to_dict()))["ok"] is True


def test_a_cast_conversion_is_held_to_its_own_dtype(tiny_checkpoint, tmp_path):
    original = tiny_checkpoint("llama")
    convert(original, PLAN, tmp_path / "out", dtype="bfloat16")
    result = checked(tmp_path / "out", original)
    assert result.ok and result.dtype == "bfloat16", result.faults
    assert 0 < result.uncached < result.tolerance < 1e-5


# Where attentions stay whole, only what FFNs do is rounded otherwise: less than the noise says.
PLANS = {"deepseek_v3": "1~2~3"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("family", "plan"),
    [
        pytest.param(name, PLANS.get(name, MIXED), marks=() if name in CORE else SLOW)
        for name in CONVERTIBLE
    ]
    + [("gemma3_text", "1~2 3|4:1"), ("nemotron", "1~2~3"), ("starcoder2", "1~2 3+4")],
)
def test_every_family_passes(tiny_checkpoint, tmp_path, family, plan, dtype):
    """The noise that is allowed is of the size of the difference: not less, not many times it."""
    original = tiny_checkpoint(family, dtype=dtype, **ALIKE.get(family, {}))
    convert(original, plan, tmp_path / "out")
    result = verify(tmp_path / "out", original, num_tokens=24, new_tokens=4)
    assert result.ok, result.faults
    assert result.tolerance < 1e-4
    assert result.tolerance / 60 < max(result.uncached, result.cached) < result.tolerance / 1.5


@pytest.mark.parametrize("family", [n for n, row in CONVERTIBLE.items() if row.own_attentions])
def test_attentions_that_stay_whole(tiny_checkpoint, tmp_path, family):
    original = tiny_checkpoint(family)
    convert(original, "1+2 3|4:1", tmp_path / "out")
    result = verify(tmp_path / "out", original, num_tokens=24, new_tokens=4)
    assert result.ok, result.faults
    assert max(result.uncached, result.cached) < result.tolerance / 1.5 < 1e-4
    name = "model.layers.3.self_attn.kv_b_proj.weight"  # its FFN is in layer 4
    spoil(tmp_path / "out", lambda weights: weights[name].mul_(2))
    refuted(verify(tmp_path / "out", original, num_tokens=24, new_tokens=4))


def test_not_a_number_is_valid_json(made):
    original, out = made()
    (out / "generation_config.json").unlink()
    text = json.dumps(checked(out, original).to_dict(), allow_nan=False)
    assert json.loads(text)["uncached"] is None


@pytest.mark.parametrize("name", ["mlp.up_proj", "self_attn.q_proj", "self_attn.v_proj"])
def test_trained_weights_with_one_members_norm_mixed_up(tmp_path, name):
    """Of the logits' range this changes as little as 5e-3."""
    original, out = model_folder(), tmp_path / "out"
    convert(original, "5+6", out)
    spoil(out, swap_gains(original, "model.layers.5.", (5, 6), [name]))
    result = verify(out, original, num_tokens=32, new_tokens=2)
    assert any(f"model.layers.5.{name}.weight" in fault for fault in result.faults)
    assert result.uncached > result.tolerance


def test_it_is_seeded(made):
    original, out = made()
    first, second = (checked(out, original) for _ in range(2))
    assert first == second != verify(out, original, num_tokens=48, new_tokens=8, seed=1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "names",
    [["mlp.gate_proj"], ["mlp.up_proj"], ["self_attn.q_proj"], ["self_attn.v_proj"]],
    ids=lambda names: "-".join(names),
)
def test_a_norm_mixed_up_in_one_matrix_of_one_group(made, names, dtype):
    """Gains of N(1, 0.3): the tolerance for half precision is still far below the damage."""
    original, out = made(dtype=dtype)
    spoil(out, swap_gains(original, "model.layers.1.", (1, 2), names))
    result = checked(out, original)
    refuted(result)
    assert result.uncached > 2 * result.tolerance


def test_the_sabotage_itself_is_not_what_is_seen(made):
    """Rewritten with the right gains, file and hash pass: the tests above see the gains."""
    original, out = made()
    source = load_file(original / "model.safetensors")

    def change(weights: Weights) -> None:
        layers = [f"model.layers.{member}." for member in (1, 2)]
        weights["model.layers.1.mlp.gate_proj.weight"] = torch.cat(
            [
                source[f"{layer}mlp.gate_proj.weight"]
                * source[f"{layer}post_attention_layernorm.weight"]
                for layer in layers
            ]
        )

    spoil(out, change)
    assert checked(out, original).ok


@pytest.mark.parametrize("name", ["q_proj", "v_proj"])
def test_one_bias_set_to_zero(made, name):
    original, out = made("qwen2")
    spoil(out, lambda weights: weights[f"model.layers.1.self_attn.{name}.bias"].zero_())
    refuted(checked(out, original))


@pytest.mark.parametrize("name", ["self_attn.o_proj", "mlp.down_proj", "mlp.gate_proj"])
def test_one_llama_bias_set_to_zero(made, name):
    original, out = made("llama", biases=True)
    spoil(out, lambda weights: weights[f"model.layers.2.{name}.bias"].zero_())
    refuted(checked(out, original))


def test_a_summed_bias_taken_from_one_member_only(made):
    original, out = made("llama", biases=True)
    source = load_file(original / "model.safetensors")

    def change(weights: Weights) -> None:
        name = "mlp.down_proj.bias"
        weights[f"model.layers.1.{name}"] = source[f"model.layers.1.{name}"]

    spoil(out, change)
    refuted(checked(out, original))


def test_the_members_outputs_swapped(made):
    original, out = made()

    def change(weights: Weights) -> None:
        first, second = weights["model.layers.1.mlp.down_proj.weight"].chunk(2, 1)
        weights["model.layers.1.mlp.down_proj.weight"] = torch.cat([second, first], 1)

    spoil(out, change)
    refuted(checked(out, original))


def test_a_changed_layer_outside_the_groups(made):
    original, out = made()
    spoil(out, lambda weights: weights["model.layers.3.input_layernorm.weight"].mul_(1.05))
    refuted(checked(out, original))


def test_widths_that_do_not_fit_the_weights_are_an_error_in_words(made):
    original, out = made()
    config = json.loads((out / "config.json").read_text())
    for entry in config["per_layer_config"].values():
        entry["intermediate_size"] += 32
    (out / "config.json").write_text(json.dumps(config))
    record(out, "config.json")
    with pytest.raises(AbreastError, match=r"mlp\.\w+_proj"):
        checked(out, original)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), "up_proj.weight' is missing"),
        (lambda w: w.update(more=torch.ones(1)), "'more' is none of the original's"),
        (lambda w: w.update({"model.norm.weight": torch.ones(3)}), r"has shape \[3\], not \[64\]"),
        (
            lambda w: w.update({"model.norm.weight": w["model.norm.weight"].bfloat16()}),
            "has dtype BF16, not F32",
        ),
    ],
    ids=["gone", "more", "shape", "dtype"],
)
def test_tensors_that_do_not_fit(made, change, fault):
    """transformers would make one up, leave one out, or cast."""
    original, out = made()
    spoil(out, change)
    (difference,) = checked(out, original).faults
    assert re.search(fault, difference)


@pytest.mark.parametrize("where", [0.3, 0.9])
def test_one_bit_of_a_shard(made, where):
    original, out = made()
    path = out / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 1
    path.write_bytes(data)
    result = checked(out, original)
    assert not result.ok
    assert result.faults == ("file model.safetensors is not the one recorded in abreast.json",)


@pytest.mark.parametrize("name", ["modeling.py", "config.json"])
def test_a_changed_companion(made, name):
    original, out = made()
    (out / name).write_text((out / name).read_text() + "\n")
    assert checked(out, original).faults == (
        f"file {name} is not the one recorded in abreast.json",
    )


def test_a_lost_file(made):
    original, out = made()
    (out / "generation_config.json").unlink()
    assert checked(out, original).faults == ("file generation_config.json is missing",)


def test_another_original(made, tiny_checkpoint):
    original, out = made()
    with pytest.raises(AbreastError, match="was not made from"):
        checked(out, tiny_checkpoint("llama", seed=1))
    with pytest.raises(AbreastError, match="was not made from"):
        checked(out, out)
    assert checked(out, original).ok


def test_no_conversion_at_all(made):
    original, out = made()
    with pytest.raises(AbreastError, match=r"abreast\.json"):
        checked(original, original)
    (out / "abreast.json").unlink()
    with pytest.raises(AbreastError, match=r"abreast\.json"):
        checked(out, original)


@pytest.mark.parametrize(
    "groups",
    [
        [{"layers": [1, 2], "wiring": "lp"}, {"layers": [4, 5], "wiring": "lp"}],
        [{"layers": [1, 2], "wiring": "cqil", "bypass": 0}, {"layers": [3, 4], "wiring": "lp"}],
        [],
    ],
    ids=["other-layers", "other-wiring", "none"],
)
def test_a_plan_edited_in_the_manifest(made, groups):
    original, out = made()
    edit_plan(out, lambda plan: plan.update(groups=groups))
    assert not checked(out, original).ok


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: plan.update(num_layers=8),
        lambda plan: plan.update(groups=[{"layers": [2, 1]}]),
        lambda plan: plan.update(groups=7),
        lambda plan: plan.update(unknown=1),
        lambda plan: plan.clear(),
    ],
    ids=["another-depth", "descending", "no-list", "unknown-key", "empty"],
)
def test_a_plan_that_is_none_is_an_error_in_words(made, change):
    original, out = made()
    edit_plan(out, change)
    with pytest.raises(AbreastError) as caught:
        checked(out, original)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["plan", "files", "source"])
@pytest.mark.parametrize("value", [None, [], "x", {}, {"a": 1}], ids=repr)
def test_a_manifest_with_a_key_of_the_wrong_kind(made, key, value):
    original, out = made()
    manifest = json.loads((out / "abreast.json").read_text())
    manifest[key] = value
    (out / "abreast.json").write_text(json.dumps(manifest))
    with pytest.raises(AbreastError):
        checked(out, original)
    if value is None:
        del manifest[key]
        (out / "abreast.json").write_text(json.dumps(manifest))
        with pytest.raises(AbreastError):
            checked(out, original)


def test_it_leaves_both_folders_as_they_were(made, tmp_path):
    original, out = made()
    before = tmp_path / "before"
    shutil.copytree(out, before)
    checked(out, original)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        p.name: p.read_bytes() for p in before.iterdir()
    }
