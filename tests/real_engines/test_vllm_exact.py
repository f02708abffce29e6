"""Sequential prefill in vLLM: prompts as the original reads them, answers as transformers gives."""

from __future__ import annotations

import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import test_vllm_serving as serving
from agreement import compare
from test_vllm_features import compiled, generate, ids_of
from test_vllm_parity import SLIDING

from abreast.convert.rewrite import convert
from abreast.demo import model_folder
from abreast.model.grouping import load

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from prefill import PLANS as DEPTHS
from prefill import answered, few_shot

PLANS = {"lp": DEPTHS[-1], "lp and cqil": "1+2+3 5|6 8|9:1 11+12"}
LENGTHS = (1, 5, 31, 32, 33, 64, 100, 130)
PROMPTS = [ids_of(count, count) for count in LENGTHS]
OTHERS = [ids_of(7 + 8 * n, 1000 + n) for n in range(16)]


@pytest.fixture(scope="module")
def converted(converted) -> Any:
    return partial(converted, prefill="sequential")


def check(source: Path, folder: Path, prompts: list[list[int]], answers: list[Any]) -> None:
    """All tokens as by transformers, the first one's log probabilities as by the original."""
    compare(folder, prompts, answers)
    firsts = [{"ids": answer["ids"][:1], "logprobs": answer["logprobs"][:1]} for answer in answers]
    compare(source, prompts, firsts)


def in_company(llm: Any, prompts: list[list[int]], others: list[list[int]]) -> dict[str, Any]:
    """Among others, alone, and once more from the prefix cache."""
    half = len(others) // 2
    mixed = generate(llm, others[:half] + prompts + others[half:], 64)
    assert llm.reset_prefix_cache()
    alone = [generate(llm, [prompt], 64)[0] for prompt in prompts]
    mixed = mixed[half : half + len(prompts)]
    return {"mixed": mixed, "alone": alone, "again": generate(llm, prompts, 8)}


@pytest.mark.parametrize("chunk", [48, 2048])
@pytest.mark.parametrize("plan", PLANS)
def test_alone_and_among_others(in_engine, converted, plan, chunk):
    folder = converted(model_folder(), PLANS[plan])
    arguments = {"prompts": PROMPTS, "others": OTHERS}
    done = in_engine(
        folder,
        in_company,
        arguments=arguments,
        max_num_batched_tokens=chunk,
        max_num_seqs=24,
        block_size=32,
    )
    assert {len(answer["ids"]) for answer in done["mixed"] + done["alone"]} == {64}
    assert [answer["cached"] for answer in done["alone"]] == [0] * len(PROMPTS)
    assert done["again"][-1]["cached"] == 128
    for answers in done.values():
        check(model_folder(), folder, PROMPTS, answers)


def turns(llm: Any, prompts: list[list[int]]) -> dict[str, Any]:
    """Answers, then the conversations so far as prompts of their own, then the first once more."""
    first = generate(llm, prompts, 64)
    longer = [
        prompt + answer["ids"] + [7, 8] for prompt, answer in zip(prompts, first, strict=True)
    ]
    second = generate(llm, longer, 8)
    return {"first": first, "longer": longer, "second": second, "again": generate(llm, prompts, 64)}


def test_what_was_generated_is_read_again_as_a_prompt(in_engine, converted):
    """Its blocks in the prefix cache were computed abreast: only those before it may serve."""
    folder, prompts = converted(model_folder(), PLANS["lp"]), [ids_of(32, 1), ids_of(40, 2)]
    done = in_engine(folder, turns, arguments={"prompts": prompts}, block_size=32)
    check(model_folder(), folder, prompts, done["first"])
    check(model_folder(), folder, done["longer"], done["second"])
    assert [answer["cached"] for answer in done["second"]] == [32, 32]
    check(model_folder(), folder, prompts, done["again"])


def preempted(llm: Any, prompts: list[list[int]]) -> dict[str, Any]:
    from vllm.v1.core.sched.scheduler import Scheduler

    stock, times = Scheduler._preempt_request, []

    def count(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        times.append(request.num_output_tokens)
        return stock(self, request, *args, **kwargs)

    Scheduler._preempt_request = count
    return {"answers": generate(llm, prompts, 64), "times": times}


@pytest.mark.parametrize("cached", [True, False])
def test_preempted_requests_go_on_abreast(in_engine, converted, cached):
    """Their generated tokens are computed again, in one chunk with the prompt."""
    folder, prompts = converted(model_folder(), PLANS["lp"]), [ids_of(20, n) for n in range(4)]
    few = {"num_gpu_blocks_override": 9, "block_size": 32, "enable_prefix_caching": cached}
    done = in_engine(folder, preempted, arguments={"prompts": prompts}, **few)
    assert max(done["times"]) > 12  # so that a block of it holds both kinds
    check(model_folder(), folder, prompts, done["answers"])


FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 8, "tied": True},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 5},
    "qwen3": {},
    "ministral": {"sliding_window": 8, "layer_types": SLIDING[:8]},
    "seed_oss": {"attention_bias": True, "mlp_bias": False},
}


@pytest.mark.parametrize("tensor_parallel", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_native_family(in_engine, converted, tiny_checkpoint, family, tensor_parallel):
    source = tiny_checkpoint(family, head_dim=32, num_layers=8, **FAMILIES[family])
    folder = converted(source, "1+2 3|4 5|6:1")
    arguments = {"prompts": [ids[:40] for ids in PROMPTS[1:5]], "others": OTHERS[:2]}
    arguments = {
        name: [[i % 128 for i in ids] for ids in lists] for name, lists in arguments.items()
    }
    options = {"skip_tokenizer_init": True, "max_num_batched_tokens": 24, "max_num_seqs": 8}
    done = in_engine(folder, in_company, tensor_parallel, arguments, **options)
    for answers in done.values():
        check(source, folder, arguments["prompts"], answers)


def whole(llm: Any, **arguments: Any) -> dict[str, Any]:
    (heads,) = llm.apply_model(lambda model: model.model.layers[0].self_attn.num_heads)
    return {**in_company(llm, **arguments), "heads": heads}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_beside_single_layers_whole_on_every_rank(in_engine, converted, tiny_checkpoint, family):
    source = tiny_checkpoint(family, head_dim=32, num_layers=8)
    folder = converted(source, "1+2 3|4 5|6:1")
    prompts, others = [
        [[i % 128 for i in ids[:40]] for ids in some] for some in (PROMPTS[1:5], OTHERS[:2])
    ]
    options = {"hf_overrides": {"abreast_unpaired": "replicate"}, "skip_tokenizer_init": True}
    options |= {"max_num_batched_tokens": 24, "max_num_seqs": 8}
    done = in_engine(folder, whole, 2, {"prompts": prompts, "others": others}, **options)
    assert done.pop("heads") == 4
    for answers in done.values():
        check(source, folder, prompts, answers)


def test_more_ranks_than_key_value_heads(in_engine, converted, tiny_checkpoint):
    source = tiny_checkpoint("qwen3", head_dim=32, num_key_value_heads=1)
    folder, prompts = converted(source, "1+2 3|4"), [list(range(3, 20)), [5, 99, 7]]
    arguments = {"prompts": prompts, "new_tokens": 8}
    done = in_engine(folder, generate, 2, arguments, skip_tokenizer_init=True)
    check(source, folder, prompts, done)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on a CPU needs g++")
def test_decoding_is_compiled(in_engine, converted, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")
    source = tiny_checkpoint(head_dim=32, num_layers=6)
    folder, prompts = converted(source, "1+2 3|4:1"), [list(range(3, 20)), [5, 99, 7]]
    options = {"enforce_eager": False, "skip_tokenizer_init": True}
    done = in_engine(folder, compiled, arguments={"prompts": prompts}, **options)
    assert done["models"] == 1, done["mode"]
    assert done["mode"] != "NONE"
    check(source, folder, prompts, done["answers"])


def test_few_shot_copying_is_right_as_often_as_in_transformers(in_engine, converted):
    """The task of benchmarks/prefill.py, which grouped prefill fails."""
    folder, tasks = converted(model_folder(), PLANS["lp"]), few_shot(count=24)
    model, tokenizer = load(folder, dtype="float32")
    prompts = [tokenizer(prompt)["input_ids"] for prompt, _ in tasks]
    arguments = {"prompts": prompts, "new_tokens": 12}
    done = in_engine(folder, generate, arguments=arguments)
    right = [
        tokenizer.decode(written["ids"]).startswith(answer)
        for (_, answer), written in zip(tasks, done, strict=True)
    ]
    assert right == answered(model, tokenizer, tasks)
    assert sum(right) >= 6
    model.config.abreast_prefill = "grouped"
    assert sum(answered(model, tokenizer, tasks)) < sum(right)


def speculated(llm: Any, prompts: list[list[int]], others: list[list[int]]) -> dict[str, Any]:
    """Among others in small chunks, so that prompts and several drafts of a request share steps."""
    done = serving.generate(llm, prompts + others)
    again = serving.generate(llm, prompts)["answers"]
    return {**done, "answers": done["answers"][: len(prompts)], "again": again}


DRAFTS = {
    "lookup": {"method": "ngram", "prompt_lookup_max": 3},
    "original": {"method": "draft_model", "model": str(model_folder())},
    "eagle": {"method": "eagle3"},
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("drafts", DRAFTS)
def test_drafts_are_checked_abreast(in_engine, converted, tmp_path, drafts, plan):
    """Whoever drafts, the answers are those without drafts: several tokens of a request in a step,
    of which none is its prompt's."""
    folder, settings = converted(model_folder(), PLANS[plan]), dict(DRAFTS[drafts])
    if drafts == "eagle":
        streams = {"eagle_aux_hidden_state_layer_ids": [4, 10, 13]}
        head = serving.eagle_head(folder, tmp_path / "head", **streams)
        settings["model"] = str(head)
    prompts = [ids_of(11, 5) * 4, *PROMPTS[4:7]]
    done = in_engine(
        folder,
        speculated,
        arguments={"prompts": prompts, "others": OTHERS[:6]},
        speculative_config={**settings, "num_speculative_tokens": 3},
        disable_log_stats=False,
        max_num_batched_tokens=64,
        block_size=32,
    )
    assert serving.drafted(done, "draft") > 0
    assert serving.drafted(done) > 0 or drafts == "eagle"  # whose head is random
    check(model_folder(), folder, prompts, done["answers"])
    check(model_folder(), folder, prompts, done["again"])


def test_a_conversion_drafts_for_its_original(in_engine, converted):
    """Its drafts are checked by the original, whose answers these are."""
    folder = converted(model_folder(), PLANS["lp and cqil"])
    done = in_engine(
        model_folder(),
        serving.generate,
        arguments={"prompts": PROMPTS[2:6]},
        speculative_config={
            "method": "draft_model",
            "model": str(folder),
            "num_speculative_tokens": 3,
        },
        disable_log_stats=False,
    )
    compare(model_folder(), PROMPTS[2:6], done["answers"])
    assert serving.drafted(done) > 0.2 * serving.drafted(done, "draft")


def test_structured_output(in_engine, converted):
    folder = converted(model_folder(), PLANS["lp and cqil"])
    prompt = load(folder)[1]("import os\nimport sys\n\ndef main(")["input_ids"]
    choice, number, text = in_engine(
        folder,
        serving.constrained,
        arguments={"prompt": prompt},
        structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
    )
    assert choice in ("none of it", "all of it")
    assert len(number) == 6 and number[3] == "-" and number.replace("-", "").isdigit()
    assert isinstance(json.loads(text)["b"], bool)


REFUSED = {
    "LoRA adapters": {"enable_lora": True},
    "quantised weights": {"quantization": "fp8"},
}


@pytest.mark.parametrize("thing", REFUSED)
def test_what_cannot_go_with_it_is_refused(in_engine, converted, tiny_checkpoint, thing):
    folder = converted(tiny_checkpoint(head_dim=32), "1+2")
    with pytest.raises(RuntimeError, match=f"{thing} cannot go with sequential prefill; serve it"):
        in_engine(folder, generate, skip_tokenizer_init=True, **REFUSED[thing])


def test_other_families_are_refused_or_served_grouped(in_engine, tiny_checkpoint, tmp_path):
    source = tiny_checkpoint("granite", head_dim=32, num_layers=4)
    convert(source, "1+2", tmp_path / "exact", prefill="sequential")
    convert(source, "1+2", tmp_path / "grouped")
    prompts = [list(range(3, 20))]
    arguments = {"prompts": prompts, "new_tokens": 4}
    with pytest.raises(RuntimeError, match="qwen2, qwen3 and seed_oss only; serve it gr"):
        in_engine(tmp_path / "exact", generate, arguments=arguments, skip_tokenizer_init=True)
    override = {"skip_tokenizer_init": True, "hf_overrides": {"abreast_prefill": None}}
    done = in_engine(tmp_path / "exact", generate, arguments=arguments, **override)
    compare(tmp_path / "grouped", prompts, done)
