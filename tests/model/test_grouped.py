"""Running a plan on a loaded model, against definitions made of the stock decoder layers alone.

The reference never looks at a family's row: a member's attention branch is what its stock layer
adds to x with the FFN silenced, its FFN branch what the layer adds to y with attention silenced.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_experts import EXPERTS, ROUTED
from made_in_memory import random_model
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from abreast.errors import AbreastError
from abreast.families.table import FAMILIES
from abreast.heal.student import set_checkpointing
from abreast.model import cache_name, cache_of
from abreast.model.grouping import (
    GroupingError,
    apply,
    branches_of,
    decoder_layers,
    grouped,
    remove,
)
from abreast.plan import Plan, PlanError

LAYERS = 5
LENGTH = 20
TOLERANCE = 1e-5  # of the largest absolute value of what is compared
FULL, SLIDING = "full_attention", "sliding_attention"
MIXED = {"layer_types": [FULL, SLIDING, FULL, SLIDING, SLIDING], "sliding_window": 5}

# case -> (model_type, config keys that differ from SIZES)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name, row in FAMILIES.items() if row.alone and row.matrices},
    "gemma3": ("gemma3", {}),
    **{name: (name, {**EXPERTS, **own}) for name, own in ROUTED.items()},
    "mistral": ("mistral", {"sliding_window": 5}),
    "ministral": ("ministral", {"sliding_window": 5}),
    "mixtral": ("mixtral", {**EXPERTS, **ROUTED["mixtral"], "sliding_window": 5}),
    "qwen2": ("qwen2", {**MIXED, "use_sliding_window": True}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 1, 0, 1, 0]}),
    "starcoder2": ("starcoder2", {"sliding_window": 5}),
    "gemma2": ("gemma2", MIXED),
    "gemma3_text": ("gemma3_text", MIXED),
    "olmo3": ("olmo3", MIXED),
    "cohere": ("cohere", {"use_qk_norm": True}),
    "cohere2": ("cohere2", MIXED),
    "granite": ("granite", {"residual_multiplier": 0.4}),
    "gpt_neox": ("gpt_neox", {"use_parallel_residual": True}),
    "gpt_neox-one-after-another": ("gpt_neox", {"use_parallel_residual": False}),
    "stablelm": ("stablelm", {"use_parallel_residual": False}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True}),
}
# Where the FFN reads the layer's input, every wiring is the same.
PARALLEL = {"cohere", "cohere2", "gpt_neox", "phi", "stablelm-parallel"}
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
each_case = pytest.mark.parametrize("case", CASES)
_MADE: dict[str, PreTrainedModel] = {}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads cost tiny models far more than they give, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(case: str) -> PreTrainedModel:
    """A random model with norms and biases far from 1 and 0; shared, so leave it as it was."""
    if case not in _MADE:
        model_type, own = CASES[case]
        keys: dict[str, Any] = {**SIZES, **own}
        if model_type == "gpt_neox":
            del keys["num_key_value_heads"]
        if model_type == "gemma3":
            keys = {"text_config": {**keys, **MIXED}, "vision_config": VISION}
            keys |= {"mm_tokens_per_image": 4, "image_token_index": 63}
        _MADE[case] = random_model(model_type, keys)
    return _MADE[case]


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 60, shape, generator=torch.Generator().manual_seed(seed))


def logits(model: Any, ids: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens(2, LENGTH) if ids is None else ids, use_cache=False, **options).logits


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float = TOLERANCE) -> bool:
    assert got.shape == want.shape and want.isfinite().all()
    return bool((got - want).abs().max() <= tolerance * want.abs().max())


def left_padded() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids, attention mask, positions) of two sequences, the second with 7 tokens of padding."""
    ids = tokens(2, LENGTH, seed=1)
    mask = torch.ones_like(ids)
    ids[1, :7] = mask[1, :7] = 0
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


# The reference: stock layers only.


@contextmanager
def silenced(module: nn.Module) -> Iterator[None]:
    """Inside the block the module gives zeros, whatever else it returns."""

    def zero(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, torch.Tensor):
            return torch.zeros_like(output)
        return (torch.zeros_like(output[0]), *output[1:])

    handle = module.register_forward_hook(zero)
    try:
        yield
    finally:
        handle.remove()


class Stock:
    """The decoder layers of a model that is not grouped, with what the model passes to each."""

    def __init__(self, model: PreTrainedModel, ids: torch.Tensor, **options: Any) -> None:
        self.layers = decoder_layers(model)
        self.inputs: dict[int, tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]] = {}

        def keep(index: int) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                self.inputs[index] = (args[0], args[1:], kwargs)

            return hook

        with ExitStack() as stack:
            for index, layer in enumerate(self.layers):
                handle = layer.register_forward_pre_hook(keep(index), with_kwargs=True)
                stack.callback(handle.remove)
            logits(model, ids, **options)
        self.first = self.inputs[0][0]

    def layer(self, index: int, x: torch.Tensor) -> torch.Tensor:
        _, args, kwargs = self.inputs[index]
        with torch.no_grad():
            return self.layers[index](x, *args, **kwargs)

    def _part(self, index: int, kinds: tuple[str, ...]) -> nn.Module:
        parts = dict(self.layers[index].named_children())
        (part_of_layer,) = (part for name, part in parts.items() if name in kinds)
        return part_of_layer

    def a(self, index: int, x: torch.Tensor) -> torch.Tensor:
        with silenced(self._part(index, ("mlp", "block_sparse_moe"))):
            return self.layer(index, x) - x

    def f(self, index: int, y: torch.Tensor) -> torch.Tensor:
        with silenced(self._part(index, ("self_attn", "attention"))):
            return self.layer(index, y) - y

    def group(self, plan: str, x: torch.Tensor, parallel: bool) -> torch.Tensor:
        """The definition: x + sum_k a_k(x) + sum_j f_j(y_j), y_j by the wiring."""
        (group,) = Plan.parse(plan, LAYERS).groups
        members = group.layers
        attended = [self.a(member, x) for member in members]
        out = x + sum(attended)
        for j, member in enumerate(members):
            bypass = len(members) if group.wiring == "lp" else group.bypass
            stop = len(members) if group.wiring == "lp" else j + 1
            seen = attended[max(0, j - bypass) : stop]
            out = out + self.f(member, x if parallel else x + sum(seen))
        return out

    def run(self, plan: str, parallel: bool) -> torch.Tensor:
        """The last layer's output under a plan of one group."""
        x = self.first
        for stage in Plan.parse(plan, LAYERS).stages:
            x = self.layer(stage[0], x) if len(stage) == 1 else self.group(plan, x, parallel)
        return x


def last_hidden(model: PreTrainedModel, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """What the last decoder layer gives, before the final norm."""
    states: list[torch.Tensor] = []
    layer = decoder_layers(model)[-1]
    handle = layer.register_forward_hook(lambda _, __, output: states.append(output))
    try:
        logits(model, ids, **options)
    finally:
        handle.remove()
    return states[0]


PLANS = ("1+2", "1|2", "1|2:1", "1+2+3", "1|2|3", "1|2|3:1", "1|2|3:2", "0+1", "3|4", "0+1+2+3+4")


@each_case
def test_groups_equal_their_definition(case):
    model = tiny(case)
    ids, mask, positions = left_padded()
    for options in ({}, {"attention_mask": mask, "position_ids": positions}):
        real = mask.bool() if options else torch.ones_like(mask).bool()
        stock = Stock(model, ids, **options)
        outputs = {}
        for plan in PLANS:
            with grouped(model, plan):
                got = last_hidden(model, ids, **options)
            assert close(got[real], stock.run(plan, case in PARALLEL)[real]), plan
            outputs[plan] = got
        same = close(outputs["1+2"], outputs["1|2"]) and close(outputs["1|2|3"], outputs["1|2|3:1"])
        assert same == (case in PARALLEL)


@each_case
def test_cqil_without_bypass_is_the_sum_of_what_the_layers_add(case):
    """x + sum_j (layer_j(x) - x): a definition that knows of no branches at all."""
    model, ids = tiny(case), tokens(2, LENGTH)
    stock = Stock(model, ids)
    with grouped(model, "1|2|3"):
        got = last_hidden(model, ids)
    x = stock.layer(0, stock.first)
    x = x + sum(stock.layer(index, x) - x for index in (1, 2, 3))
    assert close(got, stock.layer(4, x))


@each_case
def test_a_plan_without_groups_and_a_removed_plan_change_no_bit(case):
    model = tiny(case)
    before = logits(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with grouped(model, Plan(num_layers=LAYERS)):
        assert torch.equal(logits(model), before)
    for plan in ("1+2 3|4", "0|1|2:1"):
        with grouped(model, plan) as same:
            assert same is model
            assert not close(logits(model), before, 1e-2)
        assert torch.equal(logits(model), before)
    assert all("forward" not in layer.__dict__ for layer in decoder_layers(model))
    after = model.state_dict()
    assert after.keys() == state.keys() and all(torch.equal(after[n], state[n]) for n in state)


@each_case
def test_through_the_cache_and_in_batches(case):
    model, ids = tiny(case), tokens(2, LENGTH)
    fixed: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with grouped(model, "0+1 2|3|4:1"), torch.no_grad():
        whole = logits(model, ids)
        step = model(ids[:, :12], use_cache=True)
        pieces = [step.logits]
        for position in range(12, LENGTH):
            step = model(
                ids[:, position : position + 1],
                **{cache_name(model): cache_of(step)},
                use_cache=True,
            )
            pieces.append(step.logits)
        assert close(torch.cat(pieces, 1), whole)
        assert cache_of(step).get_seq_length(0) == LENGTH

        batch, mask, _ = left_padded()
        text = model.generate(batch, attention_mask=mask, eos_token_id=None, **fixed)[:, LENGTH:]
        for row, keep in enumerate(mask.bool()):
            alone = batch[row][keep][None]
            once = model.generate(
                alone, attention_mask=torch.ones_like(alone), eos_token_id=None, **fixed
            )
            assert torch.equal(once[0, alone.shape[1] :], text[row])
        again = alone  # greedy by hand, without a cache
        for _ in range(fixed["max_new_tokens"]):
            again = torch.cat([again, logits(model, again)[:, -1:].argmax(-1)], 1)
        assert torch.equal(again, once)


@pytest.mark.parametrize("case", ["gemma2", "gemma3_text", "cohere2", "qwen2", "olmo3"])
def test_members_keep_the_window_of_their_own_layer(case):
    """Layers 1 and 2 attend within 5 tokens and to all of them: the first token must reach far."""
    model = tiny(case)
    ids = tokens(1, LENGTH)
    assert CASES[case][1]["layer_types"][1:3] == [SLIDING, FULL]
    recorded: dict[str, list[torch.Tensor]] = {"x": [], "out": []}
    first, last = decoder_layers(model)[1], decoder_layers(model)[2]
    with ExitStack() as stack:
        hook = first.register_forward_pre_hook(lambda _, args: recorded["x"].append(args[0]))
        stack.callback(hook.remove)
        hook = last.register_forward_hook(lambda _, __, out: recorded["out"].append(out))
        stack.callback(hook.remove)
        for plan in ("1+2", "1|2"):
            with grouped(model, plan):
                logits(model, ids)
    stock = Stock(model, ids)
    x, moved = recorded["x"][0], recorded["x"][0].clone()
    moved[:, 0] += 1
    reach = [
        (stock.layer(index, moved) - stock.layer(index, x)).abs().amax(-1)[0] for index in (1, 2)
    ]
    assert (reach[0][5:] == 0).all() and (reach[1][5:] > 0).all()  # the fixture is what it says
    for plan, out in zip(("1+2", "1|2"), recorded["out"], strict=True):
        assert close(out, stock.group(plan, x, case in PARALLEL)), plan


def sliced_ffn(layer: nn.Module, y: list[torch.Tensor]) -> torch.Tensor:
    """The FFN of a layer as len(y) devices compute it: a slice of its width each, from y[r]."""
    mlp, total = layer.mlp, 0.0
    first, last = ("gate_proj", "down_proj") if hasattr(mlp, "gate_proj") else ("c_fc", "c_proj")
    act = mlp.act_fn if hasattr(mlp, "act_fn") else mlp.act
    down = getattr(mlp, last)
    width = down.in_features // len(y)
    for rank, read in enumerate(y):
        part = slice(rank * width, (rank + 1) * width)

        def rows(name: str, read: torch.Tensor = read, part: slice = part) -> torch.Tensor:
            matrix = getattr(mlp, name)
            return nn.functional.linear(
                read, matrix.weight[part], None if matrix.bias is None else matrix.bias[part]
            )

        inner = act(rows(first)) * (rows("up_proj") if first == "gate_proj" else 1)
        total = total + inner @ down.weight[:, part].T
    return total if down.bias is None else total + down.bias


@pytest.mark.parametrize("plan", ["1+2", "1|2", "1|2|3:1"])
@pytest.mark.parametrize("case", ["llama", "gemma2", "starcoder2"])
def test_split_norms_are_those_of_the_device_that_holds_a_slice_of_the_ffn(case, plan):
    model, ids = tiny(case), tokens(2, LENGTH)
    stock = Stock(model, ids)
    (group,) = Plan.parse(plan, LAYERS).groups
    members = [decoder_layers(model)[layer] for layer in group.layers]
    name = "pre_feedforward_layernorm" if case == "gemma2" else "post_attention_layernorm"
    x = stock.layer(0, stock.first)
    attended = [stock.a(layer, x) for layer in group.layers]
    out = x + sum(attended)
    with torch.no_grad():
        for member, sees in zip(members, group.ffn_sees, strict=True):
            y = x + sum(a for a, shown in zip(attended, sees, strict=True) if shown)
            ffn = sliced_ffn(member, [getattr(other, name)(y) for other in members])
            out = out + (member.post_feedforward_layernorm(ffn) if case == "gemma2" else ffn)
    for layer in range(group.layers[-1] + 1, LAYERS):
        out = stock.layer(layer, out)
    with grouped(model, plan, norms="split"):
        assert close(last_hidden(model, ids), out)
    with grouped(model, plan):
        assert not close(last_hidden(model, ids), out, 1e-2)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("plan", ["1+2", "1|2|3:1", "2~3"])
@pytest.mark.parametrize("case", ["llama", "gemma2", "starcoder2", "gpt_neox"])
def test_shared_norms_are_the_first_members(case, plan):
    model, ids = tiny(case), tokens(2, LENGTH)
    (group,) = Plan.parse(plan, LAYERS).groups
    overwritten = copy.deepcopy(model)
    first, *others = (decoder_layers(overwritten)[layer] for layer in group.layers)
    second = "pre_feedforward_layernorm" if case == "gemma2" else "post_attention_layernorm"
    for name in ("input_layernorm", second):
        for other in others:
            getattr(other, name).load_state_dict(getattr(first, name).state_dict())
    with grouped(overwritten, plan):
        expected = logits(overwritten, ids)
    with grouped(model, plan, norms="shared"):
        assert close(logits(model, ids), expected)
    with grouped(model, plan):
        assert not close(logits(model, ids), expected, 1e-2)


@pytest.mark.parametrize(
    ("case", "norms", "message"),
    [
        ("olmo2", "shared", "no gains in norms before its branches"),
        ("olmo", "split", "no gains in norms before its branches"),
        ("mixtral", "split", "that of a mixtral is not known as plain matrices"),
        ("llama", "both", "not one of own, split, shared"),
    ],
)
def test_norms_that_mean_nothing_are_refused(case, norms, message):
    model = tiny(case)
    with pytest.raises(GroupingError, match=message) as caught:
        apply(model, "1+2", norms=norms)
    assert "\n" not in str(caught.value)
    with pytest.raises(GroupingError, match="not grouped"):
        remove(model)


def test_a_cache_filled_under_one_plan_is_read_under_another():
    model, ids = tiny("llama"), tokens(1, LENGTH)
    cache = None
    lengths = (8, 14, 17, LENGTH)
    with torch.no_grad():
        for plan, start, stop in zip(
            ("1+2 3+4", "", "1|2|3", "0+1+2+3+4"), (0, *lengths), lengths, strict=False
        ):
            with grouped(model, Plan.parse(plan, LAYERS)):
                step = model(ids[:, start:stop], **{cache_name(model): cache}, use_cache=True)
            cache = cache_of(step)
            assert [cache.get_seq_length(layer) for layer in range(LAYERS)] == [stop] * LAYERS
    assert step.logits.isfinite().all()


def test_cached_keys_lie_where_the_original_layers_would_put_them():
    model, ids = tiny("llama"), tokens(1, LENGTH)
    with torch.no_grad():
        plain = cache_of(model(ids, use_cache=True))
        with grouped(model, "1+2+3"):
            cache = cache_of(model(ids, use_cache=True))
    equal = [
        torch.equal(plain.layers[layer].keys, cache.layers[layer].keys) for layer in range(LAYERS)
    ]
    assert equal == [True, True, False, False, False]  # layer 1 reads the same x as before


@pytest.mark.parametrize("prefill", ["grouped", "sequential"])
def test_prefill(prefill):
    model, ids = tiny("llama"), tokens(1, LENGTH)
    stock = logits(model, ids)
    with grouped(model, "1+2 3|4", prefill=prefill), torch.no_grad():
        assert torch.equal(logits(model, ids), stock) == (prefill == "sequential")
        step = model(ids[:, :-1], use_cache=True)
        last = model(ids[:, -1:], **{cache_name(model): cache_of(step)}, use_cache=True).logits
        assert not close(last, stock[:, -1:], 1e-3)
    with pytest.raises(GroupingError, match="prefill"):
        apply(model, "1+2", prefill="both")  # type: ignore[arg-type]
    assert torch.equal(logits(model, ids), stock)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("case", ["llama", "gemma3_text"])
def test_attention_stays_causal(case, implementation):
    model, ids = copy.deepcopy(tiny(case)), tokens(1, LENGTH)
    changed = ids.clone()
    changed[0, -1] = 61
    with grouped(model, "1+2 3|4"):
        model.set_attn_implementation(implementation)
        before, after = logits(model, ids), logits(model, changed)
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[:, -1], after[:, -1])


def gradients(model: PreTrainedModel, *batches: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of the summed losses of batches, all forwards before the one backward."""
    model.zero_grad()
    masks = [(batch != 0).long() for batch in batches]
    losses = [
        model(ids, attention_mask=mask, labels=ids, use_cache=False).loss
        for ids, mask in zip(batches, masks, strict=True)
    ]
    torch.stack(losses).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", ["llama", "gemma2", "gpt_neox"])
def test_gradient_checkpointing_recomputes_and_changes_no_gradient(case):
    model = copy.deepcopy(tiny(case)).train()
    batches = [tokens(2, LENGTH), left_padded()[0]]
    if "__call__" in vars(GradientCheckpointingLayer):
        # Such a version checkpoints around `forward`: it recomputes with what came by last.
        del batches[0]
    calls = [0] * LAYERS

    def count(index: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            calls[index] += 1

        return hook

    for index, layer in enumerate(decoder_layers(model)):
        getattr(layer, branches_of(model).mlp).register_forward_pre_hook(count(index))
    with grouped(model, "1+2 3|4"):
        plain = gradients(model, *batches)
        assert calls == [len(batches)] * LAYERS
        set_checkpointing(model, True)
        again = gradients(model, *batches)
    assert calls == [3 * len(batches)] * LAYERS  # as often again, and recomputed
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        assert close(again[name], gradient), name


def test_a_backward_pass_reaches_every_member():
    model = copy.deepcopy(tiny("llama"))
    with grouped(model, "1+2+3"):
        gradients_of_group = gradients(model, tokens(2, LENGTH))
    assert gradients_of_group.keys() == dict(model.named_parameters()).keys()
    assert all(gradient.abs().max() > 0 for gradient in gradients_of_group.values())


@pytest.mark.parametrize(
    ("break_it", "plan", "error", "message"),
    [
        (lambda m: None, "1+2+3+4+5", PlanError, "layer 5 does not exist"),
        (lambda m: None, Plan.parse("1+2", 6), PlanError, "for 6 layers, the model has 5"),
        (lambda m: None, "1+3", PlanError, "not consecutive"),
        (
            lambda m: setattr(m.config, "model_type", "unheard_of"),
            "1+2",
            GroupingError,
            "'unheard_of' cannot run grouped; known are .*llama",
        ),
        (
            lambda m: delattr(m.model.layers[2], "post_attention_layernorm"),
            "1+2",
            GroupingError,
            r"layer 2 \(LlamaDecoderLayer\) has no submodule 'post_attention_layernorm'",
        ),
        (
            lambda m: delattr(m.model.layers[1], "self_attn"),
            "0+1",
            GroupingError,
            "layer 1 .* has no submodule 'self_attn'",
        ),
        (lambda m: m.to("meta"), "1+2", GroupingError, "meta device"),
        (lambda m: delattr(m.model, "layers"), "1+2", GroupingError, "no list of decoder layers"),
    ],
    ids=["beyond", "depth", "gap", "type", "norm", "attention", "meta", "layers"],
)
def test_what_cannot_run_is_refused_in_words(break_it, plan, error, message):
    model = copy.deepcopy(tiny("llama"))
    layers = list(decoder_layers(model))
    break_it(model)
    with pytest.raises(error, match=message) as caught:
        apply(model, plan)
    assert isinstance(caught.value, AbreastError) and "\n" not in str(caught.value)
    assert all("forward" not in layer.__dict__ for layer in layers)
    with pytest.raises(GroupingError, match="not grouped"):
        remove(model)


def test_a_refused_plan_leaves_the_model_as_it_was():
    model = copy.deepcopy(tiny("llama"))
    before = logits(model)
    norm = model.model.layers[3].post_attention_layernorm
    del model.model.layers[3].post_attention_layernorm
    with pytest.raises(GroupingError, match="layer 3"):
        apply(model, "0+1 2+3")  # the first group is fine
    model.model.layers[3].post_attention_layernorm = norm
    assert torch.equal(logits(model), before)


def test_applied_twice_and_removed_twice():
    model = tiny("llama")
    before = logits(model)
    apply(model, "1+2")
    try:
        once = logits(model)
        with pytest.raises(GroupingError, match="grouped already"):
            apply(model, "3+4")
        with pytest.raises(GroupingError, match="grouped already"), grouped(model, "1+2"):
            pass
        assert torch.equal(logits(model), once)
    finally:
        remove(model)
    with pytest.raises(GroupingError, match="not grouped"):
        remove(model)
    assert torch.equal(logits(model), before)


def test_an_exception_inside_the_block_removes_the_plan():
    model = tiny("llama")
    before = logits(model)
    with pytest.raises(KeyboardInterrupt), grouped(model, "1+2"):
        raise KeyboardInterrupt
    assert torch.equal(logits(model), before)


def test_a_forward_that_somebody_else_replaced_comes_back():
    """accelerate, for one, dispatches over devices by a forward of its own on every layer."""
    model = copy.deepcopy(tiny("llama"))
    layer = decoder_layers(model)[2]
    stock, calls = layer.forward, []

    def theirs(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return stock(*args, **kwargs)

    layer.forward = theirs
    with grouped(model, "1+2"):
        logits(model)
    assert layer.forward is theirs
    logits(model)
    assert calls == [1]


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any partition of the layers into stages, every group with a wiring of its own."""
    cuts = draw(st.lists(st.booleans(), min_size=LAYERS - 1, max_size=LAYERS - 1))
    stages: list[list[int]] = [[0]]
    for layer, boundary in enumerate(cuts, 1):
        if boundary:
            stages.append([])
        stages[-1].append(layer)
    words = []
    for stage in stages:
        if len(stage) > 1:
            bypass = draw(st.none() | st.integers(0, len(stage) - 1))
            mark = "+" if bypass is None else "|"
            words.append(mark.join(map(str, stage)) + (f":{bypass}" if bypass else ""))
    return Plan.parse(" ".join(words), LAYERS)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(plan=plans())
def test_any_plan_equals_its_definition(plan):
    model, ids = tiny("llama"), tokens(2, 7)
    before = logits(model, ids)
    with grouped(model, plan):
        got = last_hidden(model, ids)
    assert torch.equal(logits(model, ids), before)
    stock = Stock(model, ids)
    want = stock.first
    for stage in plan.stages:
        group = plan.group_of(stage)
        if group is None:
            want = stock.layer(stage[0], want)
        else:
            want = stock.group(group.shorthand, want, parallel=False)
    assert close(got, want)
