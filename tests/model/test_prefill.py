"""Sequential prefill: prompt tokens in the original order, all others abreast, however they come.

The reference computes every position anew from the definition, without a cache; transformers'
generation runs on it as on any model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from abreast.convert.rewrite import convert
from abreast.model import cache_name, cache_of
from abreast.model.grouping import apply, decoder_layers, grouped, load
from abreast.plan import Plan

PLANS = {"llama": "1|2:1 3~4", "gemma3_text": "1~2 3+4"}
NEW = 8
FAMILIES = {
    "llama": {},
    "gemma3_text": {"layer_types": ["sliding_attention"] * 5 + ["full_attention"]},
}
NORMS = {  # after attention, before and after the FFN
    "llama": (None, "post_attention_layernorm", None),
    "gemma3_text": (
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}


def attended(layer: Any, x: torch.Tensor, kwargs: dict[str, Any], names: Any) -> torch.Tensor:
    out = layer.self_attn(layer.input_layernorm(x), **kwargs)[0]
    return getattr(layer, names[0])(out) if names[0] else out


def fed(layer: Any, y: torch.Tensor, names: Any) -> torch.Tensor:
    out = layer.mlp(getattr(layer, names[1])(y))
    return getattr(layer, names[2])(out) if names[2] else out


def reference(model: Any, plan: Plan, prompt: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Logits [B, L, V] where the positions of which `prompt` [L] is true run in original order."""
    names = NORMS[model.config.model_type]
    arguments, entering = [], []

    def record(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        entering.append(args[0])
        arguments.append({**kwargs, "past_key_values": None})

    layers = decoder_layers(model)
    hooks = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
    type(model).forward(model, **inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    x, prompt = entering[0], prompt[None, :, None]
    for stage in plan.stages:
        group = plan.group_of(stage)
        if group is None:
            x = layers[stage[0]](x, **arguments[stage[0]])
            continue
        in_order, outputs = x, []
        for j, sees in zip(stage, group.attention_sees, strict=True):
            abreast = x + sum(a for a, seen in zip(outputs, sees, strict=False) if seen)
            mixed = torch.where(prompt, in_order, abreast)
            outputs.append(attended(layers[j], mixed, arguments[j], names))
            y = in_order + outputs[-1]
            in_order = y + fed(layers[j], y, names)
        abreast = x + sum(outputs)
        for j, sees in zip(stage, group.ffn_sees, strict=True):
            y = x + sum(a for a, seen in zip(outputs, sees, strict=True) if seen)
            abreast = abreast + fed(layers[j], y, names)
        x = torch.where(prompt, in_order, abreast)
    return model.lm_head(model.model.norm(x))


@contextmanager
def as_reference(model: Any, plan: str, prompt: torch.Tensor) -> Iterator[None]:
    """Let `model` generate from the reference; tokens after `prompt` are decoded."""
    parsed = Plan.parse(plan, len(decoder_layers(model)))

    def forward(input_ids: Any = None, attention_mask: Any = None, **inputs: Any) -> Any:
        known = {n: inputs[n] for n in ("position_ids", "inputs_embeds") if n in inputs}
        length = (known["inputs_embeds"] if input_ids is None else input_ids).shape[1]
        own = torch.zeros(length, dtype=torch.bool)
        own[: len(prompt)] = prompt[:length]
        known |= {"input_ids": input_ids, "attention_mask": attention_mask}
        return CausalLMOutputWithPast(logits=reference(model, parsed, own, **known))

    model.forward = forward
    try:
        yield
    finally:
        del model.forward


def text(model: Any, ids: torch.Tensor, mask: Any = None, **options: Any) -> list[list[int]]:
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    torch.manual_seed(0)
    out = model.generate(ids, attention_mask=mask, pad_token_id=0, eos_token_id=None, **options)
    return getattr(out, "sequences", out)[:, ids.shape[1] :].tolist()


def expected(model: Any, ids: torch.Tensor, mask: Any = None, **options: Any) -> list[list[int]]:
    prompt = options.pop("prompt", torch.ones(ids.shape[1], dtype=torch.bool))
    with as_reference(model, PLANS[model.config.model_type], prompt):
        return text(model, ids, mask, use_cache=False, **options)


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 128, shape, generator=torch.Generator().manual_seed(seed))


# A prompt that repeats itself: prompt lookup finds candidates in it.
IDS = tokens(1, 6).repeat(1, 2)


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folders(family, tiny_checkpoint, tmp_path_factory):
    settings = FAMILIES[family] | ({"sliding_window": 5} if family == "gemma3_text" else {})
    original = tiny_checkpoint(family, **settings)
    out = tmp_path_factory.mktemp("sequential") / "out"
    convert(original, PLANS[family], out, prefill="sequential")
    return original, out


@pytest.fixture(scope="module")
def original(folders):
    return load(folders[0])[0]


@pytest.fixture(scope="module", params=["converted", "grouped"])
def model(request, folders, family):
    """What is tested: the converted checkpoint, and the original under the plan in memory."""
    loaded = load(folders[request.param == "converted"])[0]
    if request.param == "grouped":
        apply(loaded, PLANS[family], prefill="sequential")
    return loaded


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "without cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 5},
    "chunked prefill, static cache": {
        "prefill_chunk_size": 5,
        "cache_implementation": "static",
    },
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ids", [IDS, IDS[:, :1]], ids=["prompt", "one token"])
@torch.inference_mode()
def test_text_is_the_references(model, original, mode, ids):
    assert text(model, ids, **MODES[mode]) == expected(original, ids)


@torch.inference_mode()
def test_prompt_and_decoding_differ(original, family):
    """Otherwise the tests here would prove nothing."""
    exact = expected(original, IDS)
    assert exact != text(original, IDS)
    with grouped(original, PLANS[family]):
        assert exact != text(original, IDS)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"do_sample": True, "temperature": 3.0}, {"prefill_chunk_size": 5}],
    ids=["greedy", "beams", "sampling", "chunks"],
)
@torch.inference_mode()
def test_padded_batches(model, original, options):
    ids, mask = tokens(3, 12, seed=1), torch.ones(3, 12, dtype=torch.long)
    for row, pad in enumerate((0, 4, 7)):
        ids[row, :pad] = mask[row, :pad] = 0
    reference_options = {k: v for k, v in options.items() if k != "prefill_chunk_size"}
    assert text(model, ids, mask, **options) == expected(original, ids, mask, **reference_options)


@torch.inference_mode()
def test_assisted_generation(model, original, tiny_checkpoint, family):
    draft = load(tiny_checkpoint(family, num_layers=2, seed=5))[0]
    for assistant in (draft, original):
        assert text(model, IDS, assistant_model=assistant) == expected(original, IDS)


@torch.inference_mode()
def test_prompts_as_embeddings(model, original):
    embedded = original.get_input_embeddings()(IDS)
    ids = torch.empty(1, 0, dtype=torch.long)
    mask = torch.ones_like(IDS)
    assert text(model, ids, mask, inputs_embeds=embedded) == expected(original, IDS)


@torch.inference_mode()
def test_a_conversation_goes_on_in_its_cache(model, original):
    """What was decoded in the first turn stays as it is; the second turn is a prompt again."""
    first = model.generate(
        IDS, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, eos_token_id=None
    )
    cached = cache_of(first).get_seq_length()
    ids = torch.cat([first.sequences, tokens(1, 5, seed=3)], 1)
    prompt = torch.ones(ids.shape[1], dtype=torch.bool)
    prompt[IDS.shape[1] : cached] = False
    want = expected(original, ids, prompt=prompt)
    assert want != expected(original, ids)
    assert text(model, ids, past_key_values=copy.deepcopy(cache_of(first))) == want
    only_new = model.generate(
        ids[:, cached:],
        attention_mask=torch.ones_like(ids),
        past_key_values=cache_of(first),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
    )
    assert only_new[:, ids.shape[1] - cached :].tolist() == want


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    return bool((got - want).abs().max() <= 1e-4 * (want.max() - want.min()))


@torch.inference_mode()
def test_passes_without_a_length(model, original):
    """An empty cache is filled with a prompt; what follows is not one, however long."""
    plan = Plan.parse(PLANS[original.config.model_type], len(decoder_layers(original)))
    ids = tokens(2, 12)
    whole = torch.ones(12, dtype=torch.bool)
    assert close(
        model(ids, use_cache=False).logits, reference(original, plan, whole, input_ids=ids)
    )
    prompt = torch.arange(12) < 5
    want = reference(original, plan, prompt, input_ids=ids)
    first = model(ids[:, :5], use_cache=True)
    then = model(ids[:, 5:], **{cache_name(model): cache_of(first)})
    assert close(torch.cat([first.logits, then.logits], 1), want)
    cache = DynamicCache(config=model.config)
    pieces = [model(ids[:, :5], **{cache_name(model): cache}), None]
    pieces[1] = model(ids[:, 5:], **{cache_name(model): cache}, prompt_tokens=7)
    exact = reference(original, plan, whole, input_ids=ids)
    assert close(torch.cat([piece.logits for piece in pieces], 1), exact)


@torch.inference_mode()
def test_a_pass_over_the_end_of_a_prompt(model, original):
    plan = Plan.parse(PLANS[original.config.model_type], len(decoder_layers(original)))
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    ids[0, :3] = mask[0, :3] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    out = model(**inputs, prompt_tokens=7, use_cache=False, output_hidden_states=True)
    want = reference(original, plan, torch.arange(12) < 7, **inputs)
    assert close(out.logits[mask.bool()], want[mask.bool()])
    assert {state.shape[:2] for state in out.hidden_states} == {(2, 12)}
    assert cache_of(out) is None
