"""vLLM against transformers in float32: the same greedy tokens, the same log probabilities.

Tolerance: 1e-3 of a log probability, as the project promises; differences seen are about 1e-5.
"""

from __future__ import annotations

import collections
from typing import Any

import pytest
from agreement import compare

from abreast.demo import model_folder
from abreast.model.grouping import load
from abreast.plan import Plan

NEW_TOKENS = 64
PLANS = {
    "lp": "2+3 4+5 6+7 10+11",
    "cqil": "8|9 10|11",
    "cqil-1": "8|9:1 10|11:1",
    "ff": "2~3 8~9~10",
}
THREE_KV_HEADS = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 192}
PROMPTS = [list(range(3, 20)), [5, 99, 7], list(range(100, 60, -1))]
TEXTS = ("def main():", "import os\nimport sys\n\n", "class Foo(object):\n    def __init__(self")


def complete(
    llm: Any, prompts: list[list[int]], new_tokens: int, native: bool | None = None
) -> dict[str, Any]:
    """Greedy tokens and top-5 log probabilities, and how often ranks talked per decoded token."""
    from vllm import SamplingParams
    from vllm.distributed.parallel_state import GroupCoordinator
    from vllm.model_executor.models.utils import PPMissingLayer

    (name,) = llm.apply_model(lambda model: type(model).__module__)
    assert native is None or (name == "abreast.engines.vllm.models") == native, name

    def ask(prompts: list[list[int]], count: int) -> Any:
        sampling = SamplingParams(temperature=0, max_tokens=count, logprobs=5, ignore_eos=True)
        requests = [{"prompt_token_ids": ids} for ids in prompts]
        return llm.generate(requests, sampling, use_tqdm=False)

    calls: collections.Counter[str] = collections.Counter()
    for name in ("all_reduce", "all_gather", "gather", "broadcast", "send", "recv"):
        stock = getattr(GroupCoordinator, name)

        def counted(
            self: Any, *args: Any, _stock: Any = stock, _name: str = name, **kw: Any
        ) -> Any:
            calls[_name] += self.world_size > 1
            return _stock(self, *args, **kw)

        setattr(GroupCoordinator, name, counted)
    answers = [
        {
            "ids": list(answer.outputs[0].token_ids),
            "logprobs": [
                {token: entry.logprob for token, entry in step.items()}
                for step in answer.outputs[0].logprobs
            ],
        }
        for answer in ask(prompts, new_tokens)
    ]
    counts = []
    for count in (2, 3):
        calls.clear()
        ask(prompts[:1], count)
        counts.append(dict(calls))
    more = {name: counts[1][name] - counts[0].get(name, 0) for name in counts[1]}
    (elsewhere,) = llm.apply_model(
        lambda model: sum(isinstance(part, PPMissingLayer) for part in model.modules())
    )
    per_token = {name: n for name, n in more.items() if n}
    return {"answers": answers, "per_token": per_token, "elsewhere": elsewhere}


def expected(source_layers: int, plan: str, joined: int = 0) -> dict[str, int]:
    """Collectives per token: 4 for two single layers, 3 for an ff pair, 2 for lp, 1 for cqil.

    joined: extra all-reduces of cqil groups whose members are spread over several ranks.
    """
    stages = Plan.parse(plan, source_layers)
    groups = [stages.group_of(stage) for stage in stages.stages]
    cqil = [group for group in groups if group and group.wiring == "cqil"]
    exchanges = 0 if joined else sum(group.bypass > 0 for group in cqil)
    alone = sum(not block.ffns for block in stages.blocks)  # attentions of ff groups
    return {
        # 1: the embedding
        "all_reduce": 2 * (len(groups) - len(cqil)) + len(cqil) + alone + joined + 1,
        "all_gather": exchanges + 1,  # 1: the logits
    }


@pytest.mark.parametrize("tensor_parallel", [1, 2])
@pytest.mark.parametrize("plan", PLANS)
def test_bundled_model_is_the_one_of_transformers(in_engine, converted, plan, tensor_parallel):
    folder = converted(model_folder(), PLANS[plan])
    tokenizer = load(folder)[1]
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    arguments = {"prompts": prompts, "new_tokens": NEW_TOKENS}
    done = in_engine(folder, complete, tensor_parallel, arguments)
    assert [len(answer["ids"]) for answer in done["answers"]] == [NEW_TOKENS] * len(prompts)
    compare(folder, prompts, done["answers"])
    assert done["per_token"] == (expected(16, PLANS[plan]) if tensor_parallel > 1 else {})


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("sizes", [{}, THREE_KV_HEADS], ids=["even heads", "3 KV heads"])
def test_single_layers_whole_on_every_rank(in_engine, converted, tiny_checkpoint, family, sizes):
    """lp takes two exchanges, cqil one, with a bypass two, ff one; all else none."""
    source = tiny_checkpoint(family, head_dim=HEAD_DIM, num_layers=10, biases=True, **sizes)
    folder = converted(source, MIXED)
    arguments = {"prompts": PROMPTS, "new_tokens": NEW_TOKENS, "native": True}
    options = {"hf_overrides": {"abreast_unpaired": "replicate"}, "skip_tokenizer_init": True}
    done = in_engine(folder, complete, 2, arguments, **options)
    compare(folder, PROMPTS, done["answers"])
    assert done["per_token"] == {"all_reduce": 1 + 2 + 1 + 1 + 1, "all_gather": 1 + 1}


def test_two_layers_in_a_row_need_four_exchanges(in_engine):
    """The count above, on the original in vLLM's own Llama: 16 layers, 2 each."""
    done = in_engine(model_folder(), complete, 2, {"prompts": PROMPTS, "new_tokens": 4})
    assert done["per_token"] == expected(16, "") == {"all_reduce": 33, "all_gather": 1}


SLIDING = ["full_attention"] * 5 + ["sliding_attention"] * 5
FAMILIES = {
    "llama": {"biases": True},
    "mistral": {"sliding_window": 8, "tied": True},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 5},
    "qwen3": {"biases": True},
    "ministral": {"sliding_window": 8, "layer_types": SLIDING},
    "seed_oss": {"biases": True},
}
# gpt-oss, whose pairs of layers 1 + 2 and 3 ~ 4 are of one kind, and of two
ALIKE = ["full_attention", *["sliding_attention"] * 3, "full_attention", "sliding_attention"]
YARN = {  # the only RoPE that vLLM's gpt-oss has
    **{"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "truncate": False},
    **{"beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 128},
}
HEAD_DIM = 32  # vLLM's attention on a CPU knows no 16
# Of layers 0 to 9: an lp pair, a cqil pair, one with a bypass (in Qwen 2 past its sliding window),
# and an ff pair
MIXED = "1+2 3|4 5|6:1 7~8"


@pytest.mark.parametrize("tensor_parallel", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_native_family(in_engine, converted, tiny_checkpoint, family, tensor_parallel):
    folder = converted(
        tiny_checkpoint(family, head_dim=HEAD_DIM, num_layers=10, **FAMILIES[family]), MIXED
    )
    arguments = {"prompts": PROMPTS, "new_tokens": 16, "native": True}
    done = in_engine(folder, complete, tensor_parallel, arguments, skip_tokenizer_init=True)
    compare(folder, PROMPTS, done["answers"])
    assert done["per_token"] == (expected(10, MIXED) if tensor_parallel > 1 else {})


@pytest.mark.parametrize("tensor_parallel", [1, 2])
@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("mixtral", {}),
        ("qwen3_moe", {"norm_topk_prob": True, "mlp_only_layers": [5], "attention_bias": True}),
        ("gpt_oss", {"layer_types": ALIKE, "sliding_window": 8, "rope_parameters": YARN}),
    ],
)
def test_native_family_with_experts(
    in_engine, converted, tiny_checkpoint, family, more, tensor_parallel
):
    more = {**more, "moe_intermediate_size": 64, "intermediate_size": 128}
    source = tiny_checkpoint(family, head_dim=HEAD_DIM, num_layers=6, **more)
    folder = converted(source, "1+2 3~4")
    arguments = {"prompts": PROMPTS, "new_tokens": 16, "native": True}
    done = in_engine(folder, complete, tensor_parallel, arguments, skip_tokenizer_init=True)
    compare(folder, PROMPTS, done["answers"])
    assert done["per_token"] == (expected(6, "1+2 3~4") if tensor_parallel > 1 else {})


@pytest.mark.parametrize(
    ("plan", "tensor_parallel", "joined"),
    [("1|2 3|4:1", 4, 2), ("1|2|3|4:2", 2, 0)],
    ids=["two ranks per member", "two members per rank"],
)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_members_and_ranks_need_not_be_equal(
    in_engine, converted, tiny_checkpoint, family, plan, tensor_parallel, joined
):
    source = tiny_checkpoint(family, head_dim=HEAD_DIM, num_layers=6, **FAMILIES[family])
    folder = converted(source, plan)
    arguments = {"prompts": PROMPTS, "new_tokens": 8, "native": True}
    done = in_engine(folder, complete, tensor_parallel, arguments, skip_tokenizer_init=True)
    compare(folder, PROMPTS, done["answers"])
    assert done["per_token"] == expected(6, plan, joined)


@pytest.mark.parametrize(
    ("family", "plan", "prefill", "tensor_parallel"),
    [
        ("llama", "1+2 3~4 5|6:1", "grouped", 2),  # the first of two stages ends after 3
        ("llama", "1+2 3|4", "sequential", 1),
        ("granite", "1+2 3|4", "grouped", 1),
    ],
    ids=["grouped", "sequential", "backend"],
)
def test_pipeline_parallel(
    in_engine, converted, tiny_checkpoint, family, plan, prefill, tensor_parallel
):
    folder = converted(
        tiny_checkpoint(family, head_dim=HEAD_DIM, num_layers=8), plan, prefill=prefill
    )
    arguments = {"prompts": PROMPTS, "new_tokens": 16, "native": family == "llama"}
    options = {"pipeline": 2, "skip_tokenizer_init": True}
    done = in_engine(folder, complete, tensor_parallel, arguments, **options)
    compare(folder, PROMPTS, done["answers"])
    assert done["elsewhere"] >= 3  # half of 6 layers, in the later stage


FULL = {"layer_types": ["full_attention"] * 6}


@pytest.mark.parametrize(
    ("family", "more", "plan", "tensor_parallel"),
    [
        ("granite", {}, "1+2", 2),
        ("granite", {}, "1+2 3|4:1", 1),
        ("granite", {}, "1~2 3+4", 2),
        ("gemma2", FULL, "1+2 3|4", 1),
        ("olmo2", {}, "1+2 3|4", 1),
        ("gemma3_text", FULL, "1+2 3|4:1", 1),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_families_run_through_the_transformers_backend(
    in_engine, converted, tiny_checkpoint, family, more, plan, tensor_parallel
):
    folder = converted(tiny_checkpoint(family, head_dim=HEAD_DIM, num_layers=6, **more), plan)
    arguments = {"prompts": PROMPTS, "new_tokens": 8, "native": False}
    done = in_engine(folder, complete, tensor_parallel, arguments, skip_tokenizer_init=True)
    compare(folder, PROMPTS, done["answers"])
