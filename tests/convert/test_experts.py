"""Groups of layers with experts: who chooses which, how tensors are stored, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_experts import ROUTED
from made_quantised import quantised
from safetensors.torch import load_file, save_file

from abreast.checkpoint import as_loaded, open_checkpoint, read_rows
from abreast.convert import convert, inspect_model, preview, verify
from abreast.convert.rules import obstacle
from abreast.errors import AbreastError
from abreast.families import CONVERTIBLE, complete
from abreast.heal import heal
from abreast.model import decoder_layers, load
from abreast.modeling_members import SCORES
from abreast.planner.calibration import candidates
from abreast.targets import LLAMACPP, TORCH_TP, TRANSFORMERS, VLLM, refusals

OWN: dict[str, dict[str, Any]] = {  # what lets layers share a group, and other rules of choosing
    "gpt_oss": {"layer_types": ["full_attention"] * 6},
    "glm4_moe": {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "norm_topk_prob": False},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True},
}


def routers(model: Any, layer: int) -> list[Any]:
    """The routers of a layer: one, or one for every member of a cqil group."""
    layer = decoder_layers(model)[layer]
    block = layer.mlp if hasattr(layer, "mlp") else layer.block_sparse_moe
    blocks = vars(block).get("narrow") or [block]
    return [block.gate if hasattr(block, "gate") else block.router for block in blocks]


def choices(model: Any, layers: list[int]) -> list[torch.Tensor]:
    """The experts that tokens choose in these layers, [calls, tokens, chosen] each."""
    chosen: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
    for layer in layers:
        for router in routers(model, layer):
            router.register_forward_hook(lambda _, __, out, own=chosen[layer]: own.append(out[2]))
    ids = torch.randint(3, 128, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model(ids, use_cache=False)
    return [torch.stack(outputs) for outputs in chosen.values()]


@pytest.mark.parametrize(
    ("family", "plan"),
    [(family, plan) for plan in ("1+2", "1|2:1", "1~2") for family in ROUTED],
)
def test_every_member_chooses_the_experts_that_it_chose(tiny_checkpoint, tmp_path, family, plan):
    original = tiny_checkpoint(family, **OWN.get(family, {}))
    convert(original, plan, tmp_path / "out")
    first, second = choices(load(original, plan=plan)[0], [1, 2])
    layer = 2 if "~" in plan or CONVERTIBLE[family].own_attentions else 1
    (got,) = choices(load(tmp_path / "out")[0], [layer])
    experts = 8 if family in ("glm4_moe", "qwen3_moe") else 4
    if len(got) == 1:  # one call for both: the second member's follow the first's
        got = got[0].unflatten(-1, (2, -1)).movedim(-2, 0)
        got = got - torch.tensor([0, experts])[:, None, None]
    want = torch.cat([first, second]).sort(-1).values
    assert torch.equal(got.sort(-1).values, want)
    assert len(want.flatten(0, 1).unique(dim=0)) > 2, "all tokens choose the same"


@pytest.fixture
def changed(tiny_checkpoint, tmp_path) -> Callable[..., Path]:
    """A checkpoint with other tensors, and other keys in its config.json."""

    def factory(change: Callable[[dict[str, torch.Tensor]], Any], **settings: Any) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(tiny_checkpoint(**settings), folder)
        weights = load_file(folder / "model.safetensors")
        weights = change(weights) or weights
        save_file({n: t.contiguous() for n, t in weights.items()}, folder / "model.safetensors")
        return folder

    return factory


@pytest.mark.parametrize("family", ROUTED)
def test_experts_stored_together_or_one_by_one(changed, tiny_checkpoint, tmp_path, family):
    """Either way they come out as transformers holds them, and all numbers where they belong."""
    settings = {"family": family, **OWN.get(family, {}), "seed": 1}
    original, row = tiny_checkpoint(**settings), CONVERTIBLE[family]
    loaded = as_loaded(open_checkpoint(original), row).tensors
    own = {n: read_rows(t).view(t.shape) for n, t in loaded.items()}
    model = load(original)[0].state_dict()
    assert all(torch.equal(model[name], tensor) for name, tensor in own.items())
    together = changed(lambda _: own, **settings)
    for name, folder in (("one", original), ("two", together)):
        convert(folder, "1+2 3|4:1", tmp_path / name)
        assert verify(tmp_path / name, folder, num_tokens=24, new_tokens=4).ok
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


EXPERT = "model.layers.3.mlp.experts.2.up_proj.weight"
FAULTS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "missing": (
        lambda w: {name: tensor for name, tensor in w.items() if name != EXPERT},
        f"'{EXPERT}' is missing",
    ),
    "surplus": (
        lambda w: w.update({EXPERT.replace(".2.", ".4."): w[EXPERT].clone()}),
        r"experts.4.up_proj.weight' \(1 in all\) does not belong",
    ),
    "misshapen": (lambda w: w.update({EXPERT: w[EXPERT][1:]}), rf"'{EXPERT}' has shape \[23, 64\]"),
    "mixed dtypes": (lambda w: w.update({EXPERT: w[EXPERT].half()}), f"'{EXPERT}' has dtype F16"),
    "more experts in one layer": (
        lambda w: w.update({"model.layers.3.mlp.gate.weight": torch.zeros(6, 64)}),
        r"'model.layers.3.mlp.gate.weight' has shape \[6, 64\], config.json says \[4, 64\]",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_experts_that_do_not_add_up(changed, tmp_path, fault):
    change, message = FAULTS[fault]
    folder = changed(change, family="qwen3_moe")
    for verb in (lambda: convert(folder, "1+2", tmp_path / "out"), lambda: inspect_model(folder)):
        with pytest.raises(AbreastError, match=message) as caught:
            verb()
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "settings", "key"),
    [
        ("qwen2_moe", {"mlp_only_layers": [2]}, "mlp_only_layers"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step"),
        ("glm4_moe", {"first_k_dense_replace": 2}, "first_k_dense_replace"),
        ("ernie4_5_moe", {"moe_layer_end_index": 1}, "moe_layer_end_index"),
        ("deepseek_v3", {"first_k_dense_replace": 2}, "first_k_dense_replace"),
        ("deepseek_v2", {"first_k_dense_replace": 2}, "first_k_dense_replace"),
        (
            "glm4_moe_lite",
            {"mlp_layer_types": ["dense"] * 2 + ["sparse"] * 4},
            "mlp_layer_types",
        ),
    ],
)
def test_layers_with_and_without_experts_share_no_group(tiny_checkpoint, family, settings, key):
    folder = tiny_checkpoint(family, **settings)
    for plan in ("1+2", "1|2", "1~2"):
        with pytest.raises(AbreastError, match=rf"layer \d has experts, layer \d.*{key}") as caught:
            preview(folder, plan)
        assert "\n" not in str(caught.value)
    assert (1, 2) in {pair[:2] for pair in inspect_model(folder).refused}
    if key == "decoder_sparse_step":  # no two neighbours are alike
        return
    config = complete(open_checkpoint(folder).config)
    groups = candidates(config, max_group=2, wirings=("lp", "ff"))
    assert (1, 2) not in {group.layers for group in groups}
    assert (3, 4) in {group.layers for group in groups}


@pytest.mark.parametrize("key", ["num_local_experts", "num_experts_per_tok"])
def test_layers_with_other_numbers_of_experts_are_refused(changed, tmp_path, key):
    folder = changed(lambda weights: None, family="mixtral")
    path = folder / "config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "per_layer_config": {"2": {key: 3}}})
    )
    with pytest.raises(AbreastError, match=f"layer 2: {key}"):
        convert(folder, "1+2", tmp_path / "out")


@pytest.mark.parametrize("key", ["scoring_func", "topk_method"])
@pytest.mark.parametrize("family", ROUTED)
def test_unknown_routing_is_refused(changed, tmp_path, family, key):
    folder = changed(lambda weights: None, family=family, **OWN.get(family, {}))
    path, known = folder / "config.json", dict(CONVERTIBLE[family].routing)[key]
    config = json.loads(path.read_text())
    for value in known:
        path.write_text(json.dumps({**config, key: value}))
        assert preview(folder, "1+2").depth == 5
    for value in ("wild", "softmax" if "sigmoid" in known else "sigmoid", None, ["greedy"]):
        path.write_text(json.dumps({**config, key: value}))
        for plan in ("1+2", "1|2", "1~2"):
            with pytest.raises(AbreastError, match=rf"routers have {key} .*known is") as caught:
                convert(folder, plan, tmp_path / "out")
            assert repr(value) in str(caught.value) and "\n" not in str(caught.value)
        facts = inspect_model(folder)
        assert facts.stretches == () and all(key in row[2] for row in facts.refused)
    per_layer = {**complete(config), "per_layer_config": {"2": {key: "wild"}}}
    per_layer.pop(key, None)
    said = obstacle(per_layer, (1, 2))
    assert said is not None and f"the router of layer 2 has {key} 'wild'" in said
    assert obstacle(per_layer, (3, 4)) is None


@pytest.mark.parametrize("family", ROUTED)
def test_routing_is_named_as_the_router_computes_it(family):
    row = CONVERTIBLE[family]
    (scores,) = [
        scoring
        for name, scoring in SCORES.items()
        if name.lower() == f"{row.class_name}TopKRouter".lower()
    ]
    assert dict(row.routing)["scoring_func"] == ("sigmoid" if scores == "sigmoid" else "softmax",)


def test_experts_are_not_healed(tiny_checkpoint, tmp_path):
    with pytest.raises(AbreastError, match="a mixtral has experts, which cannot be healed"):
        heal(tiny_checkpoint("mixtral"), "1+2", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ROUTED)
def test_what_loads_them(tiny_checkpoint, tmp_path, family):
    row, original = CONVERTIBLE[family], tiny_checkpoint(family, **OWN.get(family, {}))
    for plan in ("1+2", "1|2"):
        convert(original, plan, tmp_path / plan)
        config = open_checkpoint(tmp_path / plan).config
        assert list(refusals(TRANSFORMERS, config, row)) == []
        assert "experts" in next(refusals(LLAMACPP, config, row))
        assert "experts" in next(refusals(TORCH_TP, config, row, degree=2))
        in_vllm = family in ("mixtral", "qwen3_moe", "gpt_oss") and plan == "1+2"
        said = next(refusals(VLLM, config, row), "")
        assert ("experts" in said) != in_vllm
        sequential = {**config, "abreast_prefill": "sequential"}
        assert next(refusals(VLLM, sequential, row), None) is not None
        if in_vllm:
            assert next(refusals(VLLM, config, row, degree=2), None) is None
            assert "possible: 1, 2, 4" in next(refusals(VLLM, config, row, degree=3))


def test_latent_vectors_stop_no_group(tiny_checkpoint, run):
    """Of DeepSeek V3 only layers with and without experts part, and that is what is said of it."""
    folder = tiny_checkpoint("deepseek_v3", first_k_dense_replace=2)
    facts = inspect_model(folder)
    assert facts.stretches == ((0, 1), (2, 5)) and [row[:2] for row in facts.refused] == [(1, 2)]
    status, out, _ = run("inspect", folder)
    said = " ".join(out.split())
    assert status == 0 and "within 0..1, 2..5" in said and "latent" not in said


@pytest.mark.parametrize("q_lora_rank", [24, None])
def test_block_fp8_with_and_without_latent_queries(tiny_checkpoint, tmp_path, q_lora_rank):
    folder = tiny_checkpoint("deepseek_v3", q_lora_rank=q_lora_rank)
    packed, plain = quantised(folder, "fp8", tmp_path)
    for source, out in ((packed, "one"), (plain, "two")):
        convert(source, "1+2 3|4", tmp_path / out)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and ("model.layers.0.self_attn.q_proj.weight" in one) == (
        q_lora_rank is None
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("family", ["qwen3_moe", "ernie4_5_moe"])
def test_losses_that_balance_experts_read_every_member(tiny_checkpoint, tmp_path, family):
    """Of every member the scores that it has in the grouped original, so the loss is the same."""
    original, losses = tiny_checkpoint(family, tied=True), []
    convert(original, "1+2 3+4", tmp_path / "out")
    ids = torch.arange(3, 43).view(1, -1)
    mask = torch.ones_like(ids)
    for model in (load(original, plan="1+2 3+4")[0], load(tmp_path / "out")[0]):
        with torch.inference_mode():
            losses.append(model(ids, attention_mask=mask, output_router_logits=True).aux_loss)
    assert float(losses[0]) > 0
    torch.testing.assert_close(*losses)


def experts_of(model: Any) -> list[Any]:
    return [m for m in model.modules() if type(m).__name__.endswith("Experts")]


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_every_implementation_of_experts_runs_them(
    tiny_checkpoint, tmp_path, family, implementation
):
    """transformers' own ones, which take the routing of the group's members together."""
    original, plan = tiny_checkpoint(family, **OWN.get(family, {})), "1+2 3|4"
    convert(original, plan, tmp_path / "out")
    ids = torch.arange(3, 27)[None]
    with torch.inference_mode():
        want = load(original, plan=plan)[0](ids).logits
        model = load(tmp_path / "out")[0]
        model.set_experts_implementation(implementation)
        assert {module.config._experts_implementation for module in experts_of(model)} == {
            implementation
        }
        got = model(ids).logits
    assert (got - want).abs().max() <= 1e-4 * (want.max() - want.min())


@pytest.mark.parametrize(("plan", "calls"), [("1+2", 1), ("1~2", 1), ("1|2", 2), ("1|2:1", 2)])
def test_members_are_routed_together_where_their_inputs_are_one(
    tiny_checkpoint, tmp_path, plan, calls
):
    convert(tiny_checkpoint("qwen3_moe"), plan, tmp_path / "out")
    layer = 2 if "~" in plan else 1
    (chosen,) = choices(load(tmp_path / "out")[0], [layer])
    assert len(chosen) == calls
