"""A converted checkpoint computes what the original computes when it runs grouped under the plan.

One runner, `agree`, compares the two in every way a model is called; the tables name the families
and the variants that go through it. A new family joins by a row in EVERY.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, StaticCache

from abreast.convert.config import REMOTE_CODE
from abreast.convert.rewrite import convert
from abreast.convert.rules import FoldError
from abreast.errors import AbreastError
from abreast.families.table import CONVERTIBLE as FAMILY_ROWS
from abreast.heal.student import set_checkpointing
from abreast.model import cache_name, cache_of
from abreast.model.grouping import decoder_layers, grouped, load

PLANS = ("1+2", "1+2 3+4", "1+2+3", "1+2+3+4")
PLAN = "1+2 3+4"  # where one plan is enough
FLOAT32 = 1e-4  # largest logit difference as a fraction of the logits' range
HALF = {"bfloat16": 4e-2, "float16": 5e-3}  # rounding on both sides, and once more in the fold
LENGTH = 24

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
FULL, SLIDING = "full_attention", "sliding_attention"
WINDOW = {"use_sliding_window": True, "sliding_window": 5}

# family -> name -> (plan, arguments of tiny_checkpoint): what only this family can have
VARIANTS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "llama": {
        "biases": (PLAN, {"biases": True}),
        "attention-bias": (PLAN, {"attention_bias": True}),
        "mlp-bias": ("1+2+3", {"mlp_bias": True}),
        "rope-llama3": (PLAN, {"rope_parameters": LLAMA3}),
        "rope-yarn": (PLAN, {"rope_parameters": YARN, "head_dim": 32}),
        "rope-linear": (PLAN, {"rope_parameters": LINEAR}),
        "no-shared-heads": (PLAN, {"num_key_value_heads": 4}),
        "one-kv-head": (PLAN, {"num_key_value_heads": 1, "num_attention_heads": 2, "head_dim": 8}),
        "sharded": (PLAN, {"sharded": True}),
    },
    "mistral": {
        "sliding": (PLAN, {"sliding_window": 5}),
        "no-window": (PLAN, {"sliding_window": None}),
        "rope-yarn": ("1+2+3", {"rope_parameters": YARN}),
    },
    "qwen2": {
        "sliding-tail": (PLAN, {**WINDOW, "max_window_layers": 3}),
        "sliding-mixed": (
            PLAN,
            {**WINDOW, "layer_types": [FULL, SLIDING, SLIDING, FULL, FULL, SLIDING]},
        ),
        "in-order-mixed": (
            "1|2 3~4",
            {**WINDOW, "layer_types": [FULL, SLIDING, SLIDING, FULL, SLIDING, FULL]},
        ),
        "rope-llama3": ("1+2+3", {"rope_parameters": LLAMA3}),
    },
}
FAMILIES = tuple(VARIANTS)
each_family = pytest.mark.parametrize("family", FAMILIES)
Converted = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="module")
def converted(tiny_checkpoint, tmp_path_factory) -> Converted:
    """(original, converted) folders for a family, a plan and arguments of tiny_checkpoint."""
    made: dict[tuple[str, str], tuple[Path, Path]] = {}

    def factory(family: str, plan: str = PLAN, **settings: Any) -> tuple[Path, Path]:
        original = tiny_checkpoint(family, **settings)
        key = (str(original), plan)
        if key not in made:
            out = tmp_path_factory.mktemp("converted") / "out"
            convert(original, plan, out)
            made[key] = (original, out)
        return made[key]

    return factory


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 128, shape, generator=torch.Generator().manual_seed(seed))


def difference(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference as a fraction of the range of `want`; infinite where one is not finite."""
    got, want = got.float(), want.float()
    assert got.shape == want.shape and want.max() > want.min()
    value = float((got - want).abs().max() / (want.max() - want.min()))
    return value if math.isfinite(value) else math.inf


def left_padded() -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """(ids [3, LENGTH], attention mask, the three sequences without their padding)."""
    whole = tokens(3, LENGTH, seed=1)
    mask = torch.ones_like(whole)
    for row, pad in enumerate((0, 7, 15)):
        whole[row, :pad] = 0
        mask[row, :pad] = 0
    return whole, mask, [ids[keep.bool()][None] for ids, keep in zip(whole, mask, strict=True)]


def uncached(model: Any) -> torch.Tensor:
    return model(tokens(2, LENGTH), use_cache=False).logits


def through_cache(model: Any, cache: Any = None) -> torch.Tensor:
    """A prefill of two thirds of the tokens, then one at a time."""
    ids, start = tokens(2, LENGTH), LENGTH * 2 // 3
    step = model(ids[:, :start], **{cache_name(model): cache}, use_cache=True)
    pieces = [step.logits]
    for position in range(start, LENGTH):
        step = model(
            ids[:, position : position + 1], **{cache_name(model): cache_of(step)}, use_cache=True
        )
        pieces.append(step.logits)
    return torch.cat(pieces, 1)


def padded(model: Any) -> torch.Tensor:
    """Logits at the positions that hold tokens, of all sequences one after another."""
    ids, mask, _ = left_padded()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    return logits[mask.bool()][None]


def greedy(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **options: Any) -> Any:
    mask = torch.ones_like(ids) if mask is None else mask
    fixed: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    text = model.generate(ids, attention_mask=mask, eos_token_id=None, **fixed, **options)
    return text[:, ids.shape[1] :].tolist()


def agree(model: Any, reference: Any, tolerance: float = FLOAT32) -> None:
    """The converted model equals the grouped original, however it is called."""
    with torch.inference_mode():
        want = uncached(reference)
        assert difference(uncached(model), want) <= tolerance, "without cache"
        assert difference(through_cache(model), want) <= tolerance, "with cache"
        assert difference(padded(model), padded(reference)) <= tolerance, "left-padded"
        if tolerance > FLOAT32:
            return
        ids, mask, alone = left_padded()
        batch = greedy(model, ids, mask)
        assert batch == greedy(reference, ids, mask), "generation"
        assert batch[-1] == greedy(model, alone[-1])[0], "batched against unbatched"


def pair(folders: tuple[Path, Path], plan: str = PLAN, **options: Any) -> tuple[Any, Any]:
    original, out = folders
    return load(out, **options)[0], load(original, plan=plan, **options)[0]


@contextmanager
def counted(modules: list[torch.nn.Module]) -> Iterator[list[int]]:
    """How often each module is called inside the block."""
    counts = [0] * len(modules)

    def hook(index: int) -> Callable[..., None]:
        def count(*_: Any) -> None:
            counts[index] += 1

        return count

    handles = [m.register_forward_pre_hook(hook(k)) for k, m in enumerate(modules)]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


# Every plan and every family with all four kinds of shapes, though not each with each.
SHAPES = [
    (family, plan, (row + column) % 2 == 1, 24 if column >= 2 else None)
    for row, family in enumerate(FAMILIES)
    for column, plan in enumerate(PLANS)
]


@pytest.mark.parametrize(("family", "plan", "tied", "head_dim"), SHAPES)
def test_every_shape_under_every_plan(converted, family, plan, tied, head_dim):
    agree(*pair(converted(family, plan, tied=tied, head_dim=head_dim), plan))


@pytest.mark.parametrize(
    ("family", "name"), [(family, name) for family, row in VARIANTS.items() for name in row]
)
def test_variants_of_a_family(converted, family, name):
    plan, settings = VARIANTS[family][name]
    agree(*pair(converted(family, plan, **settings), plan))


ALIKE = [SLIDING] * 5 + [FULL]  # so that layers 1 to 4 may share groups
# every family that can be written: what its layers need to be groupable and its parts to show
EVERY: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "ministral": {"layer_types": ALIKE, "sliding_window": 5},
    "qwen2": {},
    "qwen3": {},
    "seed_oss": {},
    "smollm3": {"no_rope_layers": [1, 1, 1, 1, 1, 0]},
    "granite": {"residual_multiplier": 0.7, "attention_multiplier": 0.3, "logits_scaling": 2.0},
    "ernie4_5": {},
    "arcee": {},
    "starcoder2": {},
    "phi3": {},
    "gemma": {},
    "gemma2": {"layer_types": ALIKE, "sliding_window": 5},
    "gemma3_text": {"layer_types": ALIKE, "sliding_window": 5},
    "olmo2": {},
    "cohere2": {"layer_types": ALIKE, "sliding_window": 5},
    "cohere": {"use_qk_norm": True},
    "glm": {},
    "glm4": {},
    "phi": {},
    "nemotron": {},
    "gpt_neox": {},
    "stablelm": {},
    "olmo": {},
    "olmo3": {"layer_types": ALIKE, "sliding_window": 5},
    "exaone4": {"layer_types": ALIKE, "sliding_window": 5},
    "hunyuan_v1_dense": {"head_dim": 16},
    "jais2": {},
    "mixtral": {"sliding_window": 5},
    "qwen2_moe": {},
    "qwen3_moe": {"norm_topk_prob": True},
    "olmoe": {},
    "granitemoe": {"residual_multiplier": 0.7, "attention_multiplier": 0.3},
    "gpt_oss": {"layer_types": ALIKE, "sliding_window": 5, "attention_bias": False},
    "glm4_moe": {
        **{"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "use_qk_norm": True},
        **{"first_k_dense_replace": 1, "routed_scaling_factor": 1.5},
    },
    "ernie4_5_moe": {"moe_layer_start_index": 1},
    "deepseek_v3": {
        **{"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5},
        **{"first_k_dense_replace": 1, "attention_bias": True},
    },
    "deepseek_v2": {
        **{"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5},
        **{"first_k_dense_replace": 1, "topk_method": "group_limited_greedy"},
    },
    "glm4_moe_lite": {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "q_lora_rank": None},
}
# These have output biases, of which a group keeps only the sum.
SUMMED_BIAS = {name for name, row in FAMILY_ROWS.items() if row.norm_bias}


PARALLEL = {name for name, row in FAMILY_ROWS.items() if row.parallel}  # have no ff


def test_no_family_is_forgotten():
    assert set(EVERY) == set(FAMILY_ROWS)


# One family of every kind of layer: plain, packed, per-head norms, norms after a branch, attention
# beside the FFN, biased norms. The others run in `make test`; here under the mixed plan only.
CORE = ("llama", "phi3", "qwen3", "gemma3_text", "cohere", "nemotron")
MIXED = "1+2 3|4:1"
IN_ORDER = "1~2~3"


def matrix(plans: list[str], families: list[str]) -> list[Any]:
    """(family, plan) for all of them; slow but for the core and the mixed plan."""
    return [
        pytest.param(
            *(family, plan), marks=() if family in CORE or plan == MIXED else pytest.mark.slow
        )
        for family in families
        for plan in plans
    ]


@pytest.mark.parametrize(
    ("family", "plan"),
    matrix(
        [MIXED, "1+2+3", "1+2 3+4", "1|2 3|4:1", "1|2|3:1", "1|2|3|4:3"],
        list(EVERY),
    )
    + matrix(["1~2 3|4:1"], [name for name in EVERY if name not in PARALLEL])
    + matrix([IN_ORDER], [name for name in EVERY if name not in PARALLEL]),
)
def test_every_family_under_every_wiring(converted, family, plan):
    agree(*pair(converted(family, plan, **EVERY[family]), plan))


# Three layers without experts before those with, so that either kind fills groups.
LATENT = {**EVERY["deepseek_v3"], "first_k_dense_replace": 3}


@pytest.mark.parametrize(
    ("plan", "settings"),
    [
        ("1+2 3+4", {}),
        ("1|2 3|4:1", {}),
        ("0+1+2 3|4|5:1", {}),
        ("0|1|2:2 3+4+5", {"attention_bias": False}),
        ("1+2 3~4", {"q_lora_rank": None}),
        ("1|2:1 3|4", {"q_lora_rank": None, "rope_interleave": False}),
    ],
    ids=str,
)
def test_attentions_through_latent_vectors(tiny_checkpoint, tmp_path, plan, settings):
    original = tiny_checkpoint("deepseek_v3", **{**LATENT, **settings})
    convert(original, plan, tmp_path / "out", force=True)
    agree(*pair((original, tmp_path / "out"), plan))


@pytest.mark.parametrize("plan", ["1+2 3|4:1", "1|2 3+4"])
def test_every_latent_attention_has_a_cache_of_its_own(converted, plan):
    """As long as the latent vectors, of which grouped execution keeps the same."""
    model, reference = pair(converted("deepseek_v3", plan, **LATENT), plan)
    with torch.inference_mode():
        (got, want) = (
            cache_of(one(tokens(2, LENGTH), use_cache=True)).layers for one in (model, reference)
        )
        hidden = model(tokens(2, LENGTH), output_hidden_states=True).hidden_states
    assert len(got) == len(want) == 6 == len(hidden) - 1
    for mine, theirs in zip(got, want, strict=True):
        assert mine.keys.shape == (2, 1, LENGTH, 20) and mine.values.shape[-1] == 8
        assert difference(mine.keys, theirs.keys) <= FLOAT32
        assert difference(mine.values, theirs.values) <= FLOAT32


@pytest.mark.parametrize(
    ("family", "plan"),
    matrix(["1+2 3+4", "1|2|3:1"], [name for name in EVERY if name not in SUMMED_BIAS])
    + matrix([IN_ORDER], [name for name in EVERY if name not in SUMMED_BIAS | PARALLEL]),
)
def test_sequential_prefill(tiny_checkpoint, tmp_path, family, plan):
    read_in_order(tiny_checkpoint(family, **EVERY[family]), plan, tmp_path / "out")


@pytest.mark.parametrize("plan", ["1+2 3|4:1", "0|1|2:1 3+4"])
def test_sequential_prefill_of_dense_layers_with_latent_attentions(tiny_checkpoint, tmp_path, plan):
    read_in_order(tiny_checkpoint("deepseek_v3", **LATENT), plan, tmp_path / "out")


def read_in_order(original: Path, plan: str, out: Path) -> None:
    """Prompts as the original runs them, single tokens under the plan, whatever the cache."""
    convert(original, plan, out, prefill="sequential", force=True)
    model, reference = load(out)[0], load(original)[0]
    ids, mask, _ = left_padded()
    with torch.inference_mode():
        assert difference(uncached(model), uncached(reference)) <= FLOAT32
        decoded = through_cache(reference)
        with grouped(reference, plan, prefill="sequential"):
            want, text = through_cache(reference), greedy(reference, ids, mask)
            continued = two_prefills(reference)
        assert difference(through_cache(model), want) <= FLOAT32
        assert difference(want, decoded) > 100 * FLOAT32, "decoding is not under the plan"
        assert greedy(model, ids, mask) == text
        assert greedy(model, ids, mask, cache_implementation="static") == text
        assert difference(two_prefills(model), continued) <= FLOAT32
        model.config.abreast_prefill = "grouped"
        with grouped(reference, plan):
            assert difference(uncached(model), uncached(reference)) <= FLOAT32


def two_prefills(model: Any) -> torch.Tensor:
    """The second prompt of a conversation: more than one token on top of a filled cache."""
    ids = tokens(2, LENGTH)
    first = model(ids[:, :10], use_cache=True)
    return model(ids[:, 10:], **{cache_name(model): cache_of(first)}, use_cache=True).logits


@pytest.mark.parametrize(("family", "settings"), [("starcoder2", {}), ("llama", {"biases": True})])
def test_sequential_prefill_needs_the_members_back(tiny_checkpoint, tmp_path, family, settings):
    original = tiny_checkpoint(family, **settings)
    with pytest.raises(AbreastError, match="bias"):
        convert(original, PLAN, tmp_path / "out", prefill="sequential")
    assert not (tmp_path / "out").exists()


def test_rope_scaling_that_depends_on_the_length(converted):
    """Past max_position_embeddings every length has a RoPE of its own: like calls only."""
    settings = {"rope_parameters": DYNAMIC, "max_position_embeddings": 16}
    model, reference = pair(converted("llama", **settings))
    with torch.inference_mode():
        for call in (uncached, through_cache, uncached):
            assert difference(call(model), call(reference)) <= FLOAT32


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("mistral", {"sliding_window": 5}),
        ("qwen2", VARIANTS["qwen2"]["sliding-tail"][1]),
        ("llama", {"rope_parameters": LLAMA3}),
        ("llama", {"rope_parameters": YARN}),
    ],
    ids=["mistral-sliding", "qwen2-sliding", "llama3", "yarn"],
)
def test_a_window_or_a_scaled_rope_shows_in_the_logits(converted, family, settings):
    """Otherwise the variants above would prove nothing about them."""
    plain = {"sliding_window": None} if family == "mistral" else {}
    with torch.inference_mode():
        got = uncached(load(converted(family, **settings)[1])[0])
        without = uncached(load(converted(family, **plain)[1])[0])
    assert difference(got, without) > 100 * FLOAT32


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("qwen2_moe", {"mlp_only_layers": [0, 1, 2]}),
        ("qwen3_moe", {"mlp_only_layers": [0, 1, 2]}),
        ("glm4_moe", {"first_k_dense_replace": 3}),
        ("ernie4_5_moe", {"moe_layer_start_index": 3}),
    ],
)
@pytest.mark.parametrize("plan", ["1+2 3+4", "1|2 3~4"])
def test_layers_without_experts_share_groups_of_their_own(converted, family, settings, plan):
    agree(*pair(converted(family, plan, **settings), plan))


def test_agree_sees_another_plan_and_an_ungrouped_original(converted):
    original, out = converted("llama")
    model = load(out)[0]
    for plan in (None, "1+2", "2+3 4+5", "1|2 3|4"):
        with pytest.raises(AssertionError, match="without cache"):
            agree(model, load(original, plan=plan)[0])


def test_groups_of_unlike_attention_are_refused(tiny_checkpoint, tmp_path):
    mixed = tiny_checkpoint("qwen2", **VARIANTS["qwen2"]["sliding-mixed"][1])
    with pytest.raises(FoldError, match="full_attention and sliding_attention"):
        convert(mixed, "2+3", tmp_path / "out")


@each_family
def test_equally_wide_stages_make_a_stock_checkpoint(tiny_checkpoint, tmp_path, family):
    original, out, plan = tiny_checkpoint(family), tmp_path / "out", "0+1 2+3 4+5"
    convert(original, plan, out, force=True)
    model, reference = pair((original, out), plan)
    assert type(model) is type(reference)
    assert len(decoder_layers(model)) == 3
    agree(model, reference)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("family", "plan"), [*((f, PLAN) for f in FAMILIES), ("llama", IN_ORDER)])
def test_half_precision(converted, family, plan, dtype):
    agree(*pair(converted(family, plan, dtype=dtype), plan), HALF[dtype])


def test_layers_without_ffn_have_no_tensors_of_one(converted):
    """Groups of as many members are still no stock model: their layers are not alike."""
    _, out = converted("llama", IN_ORDER)
    layers = decoder_layers(load(out)[0])
    sizes = [sum(p.numel() for p in layer.mlp.parameters()) for layer in layers]
    assert [size // sizes[0] for size in sizes] == [1, 0, 0, 3, 1, 1]
    assert not [name for name, _ in layers[1].named_parameters() if "post_attention" in name]


@each_family
def test_eager_and_sdpa_agree(converted, family):
    folders = converted(family, **{"mistral": {"sliding_window": 5}}.get(family, {}))
    eager, sdpa = (pair(folders, attn_implementation=name)[0] for name in ("eager", "sdpa"))
    with torch.inference_mode():
        for call in (uncached, through_cache, padded):
            assert difference(call(eager), call(sdpa)) <= FLOAT32


@pytest.mark.parametrize("switch", [("sdpa", "eager"), ("eager", "sdpa")], ids="-to-".join)
@each_family
def test_attention_stays_causal_when_its_implementation_changes(converted, family, switch):
    model, reference = pair(converted(family), attn_implementation=switch[0])
    model.set_attn_implementation(switch[1])
    for module in (model, model.base_model, *decoder_layers(model).modules()):
        assert not hasattr(module, "config") or module.config is model.config
    assert model.config._attn_implementation == switch[1]
    changed = tokens(2, LENGTH)
    changed[:, -1] = (changed[:, -1] + 1) % 128
    with torch.inference_mode():
        before, after = uncached(model), model(changed, use_cache=False).logits
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[:, -1], after[:, -1])
    agree(model, reference)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        *((family, {}) for family in FAMILIES),
        ("mistral", VARIANTS["mistral"]["sliding"][1]),
        ("qwen2", VARIANTS["qwen2"]["sliding-tail"][1]),
    ],
    ids=[*FAMILIES, "mistral-sliding", "qwen2-sliding"],
)
def test_static_cache(converted, family, settings):
    model, reference = pair(converted(family, **settings))
    with torch.inference_mode():
        cache = StaticCache(config=model.config, max_cache_len=LENGTH + 8)
        assert difference(through_cache(model, cache), uncached(reference)) <= FLOAT32
        ids, mask, _ = left_padded()
        static = greedy(model, ids, mask, cache_implementation="static")
        assert static == greedy(reference, ids, mask)


@each_family
def test_gradient_checkpointing_changes_no_gradient(converted, family):
    model = load(converted(family)[1])[0].train()
    attentions = [layer.self_attn for layer in decoder_layers(model)]
    ids = tokens(2, LENGTH)

    def gradients() -> tuple[dict[str, torch.Tensor], list[int]]:
        model.zero_grad()
        with counted(attentions) as calls:
            model(ids, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}, calls

    plain, once = gradients()
    set_checkpointing(model, True)
    again, twice = gradients()
    assert once == [1] * len(attentions) and twice == [2] * len(attentions)
    assert all(plain[name].abs().max() > 0 for name in plain)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("family", "plan"),
    [
        *((f, PLAN) for f in FAMILIES),
        *(("llama", "1~2"), ("gemma3_text", "1~2")),
        *(("qwen3_moe", PLAN), ("qwen2_moe", "1|2 3~4")),
    ],
)
def test_save_pretrained_round_trip(converted, tmp_path, family, plan, tied):
    _, out = converted(family, plan, tied=tied, **EVERY[family])
    model = load(out)[0]
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    with torch.inference_mode():
        assert torch.equal(uncached(again), uncached(model))
    for name in REMOTE_CODE:
        assert (out / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    first, second = (json.loads((p / "config.json").read_text()) for p in (out, tmp_path / "again"))
    for key in ("model_type", "architectures", "auto_map", "per_layer_config", "abreast"):
        assert second[key] == first[key], key
    assert set(second["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert len(second["per_layer_config"]) == len(first["per_layer_config"])


@each_family
def test_auto_model_loads_the_body(converted, family):
    _, out = converted(family)
    body, model = AutoModel.from_pretrained(out).eval(), load(out)[0]
    with torch.inference_mode():
        hidden = body(tokens(2, LENGTH), use_cache=False).last_hidden_state
        assert torch.equal(model.lm_head(hidden), uncached(model))


@pytest.mark.parametrize(
    ("family", "backend"),
    [(family, backend) for family in FAMILIES for backend in ("aot_eager", "inductor")],
)
@pytest.mark.slow
def test_torch_compile(converted, family, backend):
    model, reference = pair(converted(family, "1+2", num_layers=4), "1+2")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    with torch.inference_mode():
        assert difference(uncached(compiled), uncached(reference)) <= FLOAT32
        assert difference(padded(compiled), padded(reference)) <= FLOAT32


REMOTE = """
import json, os, sys
sys.modules["abreast"] = None  # an import of abreast fails, installed or not
import torch
from transformers import AutoModel, AutoModelForCausalLM

job = json.loads(sys.argv[1])
ids, marker = torch.tensor(job["ids"]), job["marker"]
for options in ({}, {"trust_remote_code": False}):
    try:
        AutoModelForCausalLM.from_pretrained(job["trap"], **options)
    except ValueError as error:
        assert "trust_remote_code" in str(error) or "abreast" in str(error), error
    else:
        raise SystemExit("loaded without being trusted")
    assert not os.path.exists(marker), "ran code without being trusted"
AutoModelForCausalLM.from_pretrained(job["trap"], trust_remote_code=True)
assert os.path.exists(marker), "the trap does not work"

results = {}
for family, out in job["folders"].items():
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    body = AutoModel.from_pretrained(out, trust_remote_code=True).eval()
    copy = os.path.join(job["again"], family)
    model.save_pretrained(copy)
    again = AutoModelForCausalLM.from_pretrained(copy, trust_remote_code=True).eval()
    with torch.inference_mode():
        results[family] = model(ids, use_cache=False).logits
        hidden = body(ids, use_cache=False).last_hidden_state
        assert torch.equal(model.lm_head(hidden), results[family]), "AutoModel"
        assert torch.equal(again(ids, use_cache=False).logits, results[family]), "round trip"
        results[family + ".text"] = model.generate(
            ids[:, :8], attention_mask=torch.ones_like(ids[:, :8]), max_new_tokens=10,
            do_sample=False, eos_token_id=None, pad_token_id=0,
        )[:, 8:]
torch.save(results, job["results"])
"""


@pytest.mark.slow
def test_remote_code_without_abreast(converted, tmp_path):
    """Trusted, the checkpoint alone is enough; not trusted, none of its code runs."""
    plans = dict(zip(FAMILIES, (PLAN, "1|2 3~4", "1~2 3+4"), strict=True))
    plans |= {"qwen2_moe": PLAN, "mixtral": "1|2 3~4"}
    folders = {family: converted(family, plan)[1] for family, plan in plans.items()}
    trap = tmp_path / "trap"
    marker = tmp_path / "marker"
    trap.mkdir()
    for path in folders["llama"].iterdir():
        (trap / path.name).write_bytes(path.read_bytes())
    code = (trap / "modeling.py").read_text()
    (trap / "modeling.py").write_text(f"{code}\nopen({str(marker)!r}, 'w').close()\n")
    job = {
        "folders": {family: str(out) for family, out in folders.items()},
        "ids": tokens(2, LENGTH).tolist(),
        "trap": str(trap),
        "marker": str(marker),
        "again": str(tmp_path / "again"),
        "results": str(tmp_path / "results.pt"),
    }
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", REMOTE, json.dumps(job)],
        env=env,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = torch.load(tmp_path / "results.pt")
    for family, plan in plans.items():
        original, out = converted(family, plan)
        model = load(out)[0]
        with torch.inference_mode():
            if family in FAMILIES:
                assert torch.equal(results[family], uncached(model)), family
            else:  # experts are multiplied where they lie, which is elsewhere in another process
                assert difference(results[family], uncached(model)) <= 1e-5, family
            text = greedy(model, tokens(2, LENGTH)[:, :8])
            assert results[f"{family}.text"].tolist() == text, family
            reference = load(original)[0]
            with grouped(reference, plan):
                assert difference(results[family], uncached(reference)) <= FLOAT32, family
        written = json.loads((tmp_path / "again" / family / "config.json").read_text())
        assert set(written["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
        assert (tmp_path / "again" / family / "modeling.py").is_file()


def test_a_norm_that_no_order_has_is_an_error():
    """Otherwise a new family's FFN would run without its norm, silently."""
    from types import SimpleNamespace

    from abreast.modeling import ORDERS, _keep_members

    layer = torch.nn.Module()
    for name in ("input_layernorm", "pre_feedforward_layernorm", "self_attn", "mlp"):
        setattr(layer, name, torch.nn.Identity())
    config = SimpleNamespace(abreast_members=2, abreast_bypass=0, hidden_size=8)
    with pytest.raises(ValueError, match="pre_feedforward_layernorm"):
        _keep_members(layer, config, 2, ORDERS[2], None)
