"""Families that run abreast in memory only, against a loop over their stock layers.

A member's attention branch is what its stock layer adds to its input while the FFN's output is
put to zero by a hook, and its FFN branch what it adds while the output of whatever mixes tokens is.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from made_in_memory import CASES, FULL, LINEAR, MLA, PARALLEL, SIZES, random_model
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

from abreast.convert import inspect_model
from abreast.families import FAMILIES
from abreast.model import (
    cache_name,
    cache_of,
    decoder_layers,
    grouped,
    load,
    program_of,
    run_programs,
)
from abreast.model.grouping import GroupingError, apply
from abreast.plan import Plan

LAYERS, LENGTH = SIZES["num_hidden_layers"], 18
TOLERANCE = 1e-4  # of the range of what is compared; a recurrence is computed in other chunks
FFNS = ("mlp", "block_sparse_moe", "shared_mlp", "feed_forward", "ffn", "fc2")
QUICK = ("gpt2", "falcon", "bloom", "qwen3_next", "falcon_h1")
PLANS = ("1+2", "2|3|4:1", "1~2", "0+1+2+3+4")
each_case = pytest.mark.parametrize(
    "case",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES],
)
_MADE: dict[str, PreTrainedModel] = {}


def tiny(case: str) -> PreTrainedModel:
    """A random model with norms and biases far from 1 and 0; shared, so leave it as it was."""
    if case not in _MADE:
        model_type, own = CASES[case]
        _MADE[case] = random_model(model_type, {**SIZES, **own})
    return _MADE[case]


def left_padded() -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, attention mask) of two sequences, the second with 5 tokens of padding."""
    ids = torch.randint(3, 60, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[1, :5] = mask[1, :5] = 0
    return ids, mask


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    assert got.shape == want.shape and want.isfinite().all()
    return bool((got - want).abs().max() <= TOLERANCE * (want.max() - want.min()))


def first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def silenced(layer: nn.Module, ffn: bool) -> Iterator[None]:
    """Inside, the FFN of a layer, or all that mixes its tokens, adds nothing."""

    def nothing(_: nn.Module, args: Any, output: Any) -> Any:
        adds = len(args) > 1 and isinstance(args[1], torch.Tensor)  # Bloom's and MPT's residual
        zero = args[1] if adds else torch.zeros_like(first(output))
        return (zero, *output[1:]) if isinstance(output, tuple) else zero

    parts = [
        part
        for name, part in layer.named_children()
        if (name in FFNS) == ffn
        and not name.startswith(("ln", "fc1", "act"))
        and "norm" not in name
    ]
    with ExitStack() as hooks:
        for part in parts:
            hooks.enter_context(part.register_forward_hook(nothing))
        yield


class Stock:
    """The layers of a model that is not grouped, with what the model passes to each."""

    def __init__(self, model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> None:
        self.layers = decoder_layers(model)
        self.inputs: list[Any] = [None] * LAYERS

        def keep(layer: nn.Module, args: Any, kwargs: Any) -> None:
            self.inputs[[*self.layers].index(layer)] = (args, kwargs)

        with ExitStack() as hooks:
            for layer in self.layers:
                hooks.enter_context(layer.register_forward_pre_hook(keep, with_kwargs=True))
            with torch.no_grad():
                model(ids, attention_mask=mask, use_cache=False)
        self.first = self.inputs[0][0][0]

    def layer(self, index: int, x: torch.Tensor) -> torch.Tensor:
        args, kwargs = self.inputs[index]
        with torch.no_grad():
            return first(self.layers[index](x, *args[1:], **kwargs))

    def adds(self, index: int, x: torch.Tensor, *, ffn: bool) -> torch.Tensor:
        with silenced(self.layers[index], ffn=not ffn):
            return self.layer(index, x) - x

    def run(self, plan: Plan, parallel: bool) -> torch.Tensor:
        """x' = x + sum of all a_k + sum of all f_j(y_j): the last layer's output under a plan."""
        x = self.first
        for stage in plan.stages:
            group = plan.group_of(stage)
            if group is None:
                x = self.layer(stage[0], x)
                continue
            attended: list[torch.Tensor] = []
            read = []
            for layer, sees in zip(stage, group.attention_sees, strict=True):
                read.append(x + sum(a for a, s in zip(attended, sees, strict=False) if s))
                attended.append(self.adds(layer, read[-1], ffn=False))
            out = x + sum(attended)
            for index, (layer, sees) in enumerate(zip(stage, group.ffn_sees, strict=True)):
                y = x + sum(a for a, shown in zip(attended, sees, strict=True) if shown)
                out = out + self.adds(layer, read[index] if parallel else y, ffn=True)
            x = out
        return x


def last_hidden(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What the last decoder layer gives, before the final norm."""
    states: list[torch.Tensor] = []
    hook = lambda _, __, output: states.append(first(output))  # noqa: E731
    with decoder_layers(model)[-1].register_forward_hook(hook), torch.no_grad():
        model(ids, attention_mask=mask, use_cache=False)
    return states[0]


def test_every_family_that_runs_in_memory_only_is_here() -> None:
    others = {name for name, row in FAMILIES.items() if not row.matrices}
    assert others == {model_type for model_type, _ in CASES.values()}
    assert all(FAMILIES[name].unfoldable for name in others)


@each_case
def test_groups_equal_their_definition(case: str) -> None:
    model, (ids, mask) = tiny(case), left_padded()
    stock, real = Stock(model, ids, mask), mask.bool()
    before = last_hidden(model, ids, mask)
    with grouped(model, Plan(num_layers=LAYERS)):
        assert torch.equal(last_hidden(model, ids, mask), before)
    assert close(stock.run(Plan(num_layers=LAYERS), False)[real], before[real])
    for text in PLANS:
        plan = Plan.parse(text, LAYERS)
        with grouped(model, plan):
            got = last_hidden(model, ids, mask)
        assert close(got[real], stock.run(plan, case in PARALLEL)[real]), text
        changed = not close(got[real], before[real])
        assert changed or (case in PARALLEL and text == "1~2"), text
    assert torch.equal(last_hidden(model, ids, mask), before)
    assert not any("forward" in vars(module) for module in model.modules())


@each_case
def test_through_the_cache_and_in_batches(case: str) -> None:
    model, (ids, mask) = tiny(case), left_padded()
    whole_ids = ids[:1]
    fixed: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}

    def through_cache() -> float:
        """How far logits are from those without a cache, as a share of their range."""
        whole = model(whole_ids, use_cache=False).logits
        step = model(whole_ids[:, :12], use_cache=True)
        pieces = [step.logits]
        for position in range(12, LENGTH):
            part = whole_ids[:, position : position + 1]
            step = model(part, **{cache_name(model): cache_of(step)}, use_cache=True)
            pieces.append(step.logits)
        return float((torch.cat(pieces, 1) - whole).abs().max() / (whole.max() - whole.min()))

    with torch.no_grad():
        stock = through_cache()  # Mamba's recurrence rounds otherwise, token by token
    with grouped(model, "0+1 2|3|4:1"), torch.no_grad():
        assert through_cache() <= max(TOLERANCE, 2 * stock)
        text = model.generate(ids, attention_mask=mask, pad_token_id=0, **fixed)[:, LENGTH:]
        alone = ids[1:, 5:]
        once = model.generate(alone, attention_mask=torch.ones_like(alone), pad_token_id=0, **fixed)
        if case != "mpt":  # whose class in transformers does not shift its bias by the padding
            assert torch.equal(once[0, alone.shape[1] :], text[1])
        for _ in range(fixed["max_new_tokens"]):  # greedy by hand, without a cache
            logits = model(alone, use_cache=False).logits
            alone = torch.cat([alone, logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(alone, once)


@pytest.mark.parametrize("case", ["falcon_h1", "bloom", "qwen3_next"])
def test_plans_are_scored_as_they_run(case: str) -> None:
    model = tiny(case)
    ids = torch.randint(3, 60, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    plan = Plan.parse("1+2 3+4", LAYERS)
    original = program_of(Plan(num_layers=LAYERS))
    scores = {p: s for p, s, _ in run_programs(model, ids, [original, program_of(plan)])}
    for program, under in ((original, Plan(num_layers=LAYERS)), (program_of(plan), plan)):
        with grouped(model, under), torch.no_grad():
            logits = model(ids, use_cache=False).logits[:, :-1].double()
        losses = nn.functional.cross_entropy(logits.mT, ids[:, 1:], reduction="none").sum(1)
        assert torch.allclose(torch.from_numpy(scores[program][:, 0]), losses, rtol=1e-4)


def test_prompts_in_order() -> None:
    model, ids = tiny("gpt2"), left_padded()[0][:1]
    with torch.no_grad():
        stock = model(ids, use_cache=False).logits
        with grouped(model, "1+2 3+4", prefill="sequential"):
            assert torch.equal(model(ids, use_cache=False).logits, stock)
            cache = cache_of(model(ids[:, :-1], use_cache=True))
            last = model(ids[:, -1:], **{cache_name(model): cache}).logits
    assert not close(last[:, -1], stock[:, -1])


@pytest.mark.parametrize("case", ["lfm2", "falcon"])
def test_what_their_branches_do_not_tell_is_refused(case: str) -> None:
    model = tiny(case)
    with pytest.raises(GroupingError, match="no modules of their own"):
        apply(model, "1+2", prefill="sequential")
    with pytest.raises(GroupingError, match="are not told from its branches"):
        apply(model, "1+2", norms="shared")
    model = copy.deepcopy(model)
    layer = decoder_layers(model)[2]
    for name in [name for name, _ in layer.named_children()]:
        delattr(layer, name)
    with pytest.raises(GroupingError, match=r"layer 2 .* has no submodule '(conv|self_attention)'"):
        apply(model, "1+2")


def test_layers_that_norm_their_sum_are_refused() -> None:
    config = AutoConfig.for_model(
        "opt", **{**SIZES, **CASES["opt"][1], "do_layer_norm_before": False}
    )
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(GroupingError, match="do_layer_norm_before False norm what they add to"):
        apply(model, "1+2")


# What config.json says, and the runs of layers that are of one kind.
KINDS: tuple[tuple[str, dict[str, Any], list[tuple[int, int]]], ...] = (
    ("qwen3_next", {"layer_types": None, "num_hidden_layers": 8}, [(0, 2), (4, 6)]),
    ("qwen3_next", {"layer_types": [LINEAR] * 3 + [FULL] * 2, "mlp_only_layers": [1]}, [(3, 4)]),
    ("lfm2", {"layer_types": None, "full_attn_idxs": [2, 4]}, [(0, 1)]),
    ("granitemoehybrid", {"layer_types": [LINEAR] * 4 + [FULL]}, [(0, 3)]),
    (
        "nemotron_h",
        {"layers_block_type": None, "hybrid_override_pattern": "MM*--"},
        [(0, 1), (3, 4)],
    ),
    ("olmo_hybrid", {"layer_types": None}, [(0, 2)]),
    ("falcon_h1", {}, [(0, 4)]),
    (
        "kimi_linear",
        {
            "layer_types": None,
            "linear_attn_config": {"full_attn_layers": [4], "kda_layers": [1, 2, 3, 5]},
        },
        [(1, 2)],
    ),
    ("gpt2", {}, [(0, 4)]),
    ("mpt", {}, [(0, 4)]),
    ("opt", {"do_layer_norm_before": False}, []),
)


@pytest.mark.parametrize(("case", "keys", "stretches"), KINDS)
def test_inspect_says_which_neighbours_are_alike(
    case: str, keys: dict[str, Any], stretches: list[Any], tmp_path: Path
) -> None:
    tiny(case).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | keys
    config = {key: value for key, value in config.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    facts = inspect_model(tmp_path)
    assert facts.runs_grouped and not facts.fusable
    assert [*facts.stretches] == stretches
    assert len(facts.refused) == facts.num_layers - 1 - sum(b - a for a, b in stretches)


def test_what_is_said_of_them(tmp_path: Path, run: Any) -> None:
    folder = tmp_path / "model"
    tiny("qwen3_next").save_pretrained(folder)
    status, out, _ = run("inspect", folder)
    said = " ".join(out.split())
    assert status == 0 and "consecutive layers within 0..1" in said
    assert "only run grouped in memory (abreast.grouped, or eval with --plan): its linear" in said
    assert "they mix full_attention and linear_attention" in said
    status, _, said = run("convert", folder, "--plan", "1+2", "-o", tmp_path / "out")
    assert status == 2 and len(said.splitlines()) == 1
    assert FAMILIES["qwen3_next"].unfoldable in said


def test_a_saved_one_loads_under_a_plan(tmp_path: Path) -> None:
    tiny("gpt2").save_pretrained(tmp_path)
    ids = left_padded()[0]
    model, _ = load(tmp_path, plan="1+2")
    with grouped(tiny("gpt2"), "1+2"), torch.no_grad():
        want = tiny("gpt2")(ids, use_cache=False).logits
    with torch.no_grad():
        assert close(model(ids, use_cache=False).logits, want)


@pytest.mark.slow
def test_a_decoder_within_a_model_that_reads_images(tmp_path: Path) -> None:
    text = {**SIZES, **MLA, "first_k_dense_replace": 1, "model_type": "deepseek_v3"}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "patch_size": 14}
    config = AutoConfig.for_model(
        "kimi_k25", text_config=text, vision_config=vision, projection_hidden_size=16
    )
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["model_type"] = "kimi_k2"  # as it is on the Hub
    path.write_text(json.dumps(config))
    facts = inspect_model(tmp_path)
    assert facts.model_type == "kimi_k25" and not facts.fusable
    reason = "a kimi_k25's decoder cannot be converted, only run grouped: its vision encoder is"
    assert facts.unfoldable.startswith(reason) and "wqkv" in facts.unfoldable
    with safe_open(tmp_path / "model.safetensors", "pt") as file:  # as the reason says
        stored = set(file.keys())
    loaded = load(tmp_path)[0].state_dict()
    assert any(".wqkv." in name for name in stored)
    assert not any("wqkv" in name for name in loaded)
    ids = left_padded()[0]
    model, _ = load(tmp_path, plan="1+2")
    plain, _ = load(tmp_path)
    with torch.no_grad():
        got, before = (m(input_ids=ids, use_cache=False).logits for m in (model, plain))
        with grouped(plain, "1+2"):
            assert close(got, plain(input_ids=ids, use_cache=False).logits)
    assert not close(got, before)
