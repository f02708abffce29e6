"""What people serve with, on conversions: drafts, constrained output, adapters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from agreement import compare
from safetensors.torch import load_file, save_file

from abreast.convert import convert, convert_adapter
from abreast.demo import model_folder
from abreast.model import load

PLAN = "2+3 8|9 10|11:1"
LAYERS = 16  # of the bundled model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "out"
    convert(model_folder(), PLAN, out, dtype="float32")
    return out


@pytest.fixture(scope="module")
def prompts(folder) -> list[list[int]]:
    tokenizer = load(folder)[1]
    texts = [
        "import os\nimport sys\n\ndef main(",
        "    def __init__(self, a, b):\n        self.a = a\n",
    ]
    return [tokenizer(text)["input_ids"] for text in texts]


def generate(llm: Any, prompts: list[list[int]], **more: Any) -> dict[str, Any]:
    """Greedy answers, and what vLLM counted of drafts."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=24, logprobs=5, ignore_eos=True)
    requests = [{"prompt_token_ids": ids} for ids in prompts]
    answers = [
        {
            "ids": list(answer.outputs[0].token_ids),
            "logprobs": [{t: e.logprob for t, e in s.items()} for s in answer.outputs[0].logprobs],
        }
        for answer in llm.generate(requests, sampling, use_tqdm=False, **more)
    ]
    metrics = llm.get_metrics() if llm.llm_engine.log_stats else []
    counted = {
        m.name: m.value
        for m in metrics
        if m.name.startswith("vllm:spec_decode_num_") and hasattr(m, "value")
    }
    return {"answers": answers, "counted": counted}


def drafted(done: dict[str, Any], what: str = "accepted") -> float:
    return float(done["counted"][f"vllm:spec_decode_num_{what}_tokens"])


def test_drafts_by_prompt_lookup(in_engine, folder, prompts):
    settings = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    repeated = [prompts[1] * 3]
    done = in_engine(
        folder,
        generate,
        arguments={"prompts": repeated},
        speculative_config=settings,
        disable_log_stats=False,
    )
    compare(folder, repeated, done["answers"])
    assert drafted(done) > 0


@pytest.mark.parametrize("draft", ["original", "conversion"])
def test_drafts_by_a_model(in_engine, folder, prompts, draft):
    """A conversion checked by its original's drafts, and, the useful way, the other way round."""
    models = [folder, model_folder()]
    target, drafter = models if draft == "original" else models[::-1]
    done = in_engine(
        target,
        generate,
        arguments={"prompts": prompts},
        speculative_config={
            "method": "draft_model",
            "model": str(drafter),
            "num_speculative_tokens": 3,
        },
        disable_log_stats=False,
    )
    compare(target, prompts, done["answers"])
    assert drafted(done) > 0.2 * drafted(done, "draft")


def with_streams(llm: Any, prompts: list[list[int]]) -> dict[str, Any]:
    """Also the streams that a head reads."""
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    return generate(llm, prompts) | {"streams": runner.model.model.aux_hidden_state_layers}


def eagle_head(folder: Path, out: Path, **more: Any) -> Path:
    """A random EAGLE-3 head for a model of the bundled one's hidden size."""
    base = json.loads((model_folder() / "config.json").read_text())
    hidden, words, wide = base["hidden_size"], base["vocab_size"], 64
    heads, size = 2, 32
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": size,
        "vocab_size": words,
        "draft_vocab_size": words,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "dtype": "float32",
        **more,
    }
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "fc.weight": (hidden, 3 * hidden),
        "norm.weight": (hidden,),
        "lm_head.weight": (words, hidden),
        "midlayer.input_layernorm.weight": (hidden,),
        "midlayer.hidden_norm.weight": (hidden,),
        "midlayer.post_attention_layernorm.weight": (hidden,),
        **{f"midlayer.self_attn.{n}_proj.weight": (heads * size, 2 * hidden) for n in "qkv"},
        "midlayer.self_attn.o_proj.weight": (hidden, heads * size),
        **{f"midlayer.mlp.{n}_proj.weight": (wide, hidden) for n in ("gate", "up")},
        "midlayer.mlp.down_proj.weight": (hidden, wide),
    }
    out.mkdir()
    (out / "config.json").write_text(json.dumps(config))
    tensors = {
        name: torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        for name, shape in shapes.items()
    }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize(
    ("named", "streams"),
    [
        (None, [2, 7, 10]),  # before layers 2, 8 and 13 of 16
        ([4, 10, 12], [3, 8, 9]),
        ([3, 9, 12], [3, 8, 9]),  # inside groups: where they end
    ],
    ids=["default", "between groups", "inside groups"],
)
def test_drafts_by_eagle_heads_of_the_original(
    in_engine, folder, prompts, tmp_path, named, streams
):
    more = {"eagle_aux_hidden_state_layer_ids": named} if named else {}
    head = eagle_head(folder, tmp_path / "head", **more)
    done = in_engine(
        folder,
        with_streams,
        arguments={"prompts": prompts},
        speculative_config={"method": "eagle3", "model": str(head), "num_speculative_tokens": 2},
        disable_log_stats=False,
    )
    compare(folder, prompts, done["answers"])
    assert done["streams"] == tuple(streams)
    assert drafted(done, "draft") > 0


def test_eagle_heads_whose_streams_are_one(in_engine, folder, prompts, tmp_path):
    head = eagle_head(folder, tmp_path / "head", eagle_aux_hidden_state_layer_ids=[2, 3, 4])
    with pytest.raises(RuntimeError, match="EAGLE-3 head reads the streams before layers 2, 3, 4"):
        in_engine(
            folder,
            generate,
            arguments={"prompts": prompts},
            speculative_config={
                "method": "eagle3",
                "model": str(head),
                "num_speculative_tokens": 2,
            },
        )


def constrained(llm: Any, prompt: list[int]) -> list[str]:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    schema = {
        "type": "object",
        "properties": {
            "a": {"type": "integer", "minimum": 0, "maximum": 99},
            "b": {"type": "boolean"},
        },
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    ways = [
        StructuredOutputsParams(choice=["none of it", "all of it"]),
        StructuredOutputsParams(regex="[0-9]{3}-[0-9]{2}"),
        StructuredOutputsParams(json=schema),
    ]
    return [
        llm.generate(
            [{"prompt_token_ids": prompt}],
            SamplingParams(temperature=0, max_tokens=48, structured_outputs=way),
            use_tqdm=False,
        )[0]
        .outputs[0]
        .text
        for way in ways
    ]


def test_structured_output(in_engine, folder, prompts):
    """The choice is the one of the higher probability, as transformers has it."""
    choice, number, text = in_engine(
        folder,
        constrained,
        arguments={"prompt": prompts[0]},
        structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
    )
    model, tokenizer = load(folder, dtype="float32")
    first = [tokenizer(words)["input_ids"][0] for words in ("none of it", "all of it")]
    with torch.inference_mode():
        scores = model(torch.tensor([prompts[0]])).logits[0, -1]
    assert choice in ("none of it", "all of it")
    if first[0] != first[1]:
        assert choice == ("none of it", "all of it")[int(scores[first[1]] > scores[first[0]])]
    assert len(number) == 6 and number[3] == "-" and number.replace("-", "").isdigit()
    assert isinstance(json.loads(text)["b"], bool)


def original_adapter(
    folder: Path, modules: tuple[str, ...], base: Path | None = None, layers: int = LAYERS
) -> dict[str, torch.Tensor]:
    """Writes a random adapter of a model; returns the model's weights with it merged."""
    weights = load_file((base or model_folder()) / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    adapter, merged = {}, {name: tensor.float() for name, tensor in weights.items()}
    for layer in range(layers):
        for module in modules:
            name = f"model.layers.{layer}.{module}"
            rows, columns = weights[f"{name}.weight"].shape
            a = torch.randn(4, columns, generator=generator) * columns**-0.5
            b = torch.randn(rows, 4, generator=generator) * 0.02
            adapter |= {
                f"base_model.model.{name}.lora_A.weight": a,
                f"base_model.model.{name}.lora_B.weight": b,
            }
            merged[f"{name}.weight"] += b @ a * 4
    folder.mkdir()
    save_file(adapter, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "target_modules": list(modules)}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return merged


def adapted(llm: Any, prompts: list[list[int]], adapter: str) -> Any:
    from vllm.lora.request import LoRARequest

    return generate(llm, prompts, lora_request=LoRARequest("own", 1, adapter))["answers"]


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_adapter_of_the_original(in_engine, prompts, tmp_path, tensor_parallel):
    """Folded and served, against the original with the adapter merged, run under the plan."""
    modules = [f"self_attn.{n}_proj" for n in "qkvo"] + [
        f"mlp.{n}_proj" for n in ("gate", "up", "down")
    ]
    merged = original_adapter(tmp_path / "adapter", tuple(modules))
    convert(model_folder(), "2+3+4 8+9", tmp_path / "out", dtype="float32")
    convert_adapter(tmp_path / "adapter", tmp_path / "out", tmp_path / "folded")
    done = in_engine(
        tmp_path / "out",
        adapted,
        tensor_parallel,
        {"prompts": prompts, "adapter": str(tmp_path / "folded")},
        enable_lora=True,
        max_lora_rank=16,
    )
    whole = shutil.copytree(model_folder(), tmp_path / "whole")
    save_file(merged, whole / "model.safetensors", metadata={"format": "pt"})
    compare(whole, prompts, done, plan="2+3+4 8+9")


@pytest.mark.parametrize("native", [True, False], ids=["native", "backend"])
def test_adapter_that_vllm_would_ignore(
    in_engine, folder, prompts, tiny_checkpoint, tmp_path, native
):
    """Members that stand apart are none of vLLM's matrices: it would leave their adapter out."""
    if native:
        original_adapter(tmp_path / "adapter", ("mlp.gate_proj",))
    else:
        folder, base, prompts = tmp_path / "out", tiny_checkpoint("olmo2", head_dim=32), [[5, 9]]
        convert(base, "1+2", folder)
        original_adapter(tmp_path / "adapter", ("mlp.gate_proj",), base, 6)
    convert_adapter(tmp_path / "adapter", folder, tmp_path / "folded")
    with pytest.raises(RuntimeError, match=r"mlp\.gate_proj, whose members stand apart"):
        in_engine(
            folder,
            adapted,
            arguments={"prompts": prompts, "adapter": str(tmp_path / "folded")},
            enable_lora=True,
            max_lora_rank=8,
            skip_tokenizer_init=True,
        )
