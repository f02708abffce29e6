"""What vLLM does besides plain decoding, on layers of different width."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from agreement import compare
from safetensors.torch import load_file, save_file

import abreast.modeling  # noqa: F401  teaches transformers the layers of different width
from abreast.convert.rewrite import convert
from abreast.demo import model_folder

PLAN = "2+3 8|9 10|11:1"
CHUNK = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "out"
    convert(model_folder(), PLAN, out, dtype="float32")
    return out


def ids_of(count: int, seed: int) -> list[int]:
    return torch.randint(5, 4000, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def generate(llm: Any, prompts: list[list[int]], new_tokens: int, **more: Any) -> list[Any]:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, logprobs=5, ignore_eos=True)
    requests = [{"prompt_token_ids": ids} for ids in prompts]
    return [
        {
            "ids": list(answer.outputs[0].token_ids),
            "logprobs": [{t: e.logprob for t, e in s.items()} for s in answer.outputs[0].logprobs],
            "cached": answer.num_cached_tokens,
        }
        for answer in llm.generate(requests, sampling, use_tqdm=False, **more)
    ]


def crowd(llm: Any, prompts: list[list[int]]) -> dict[str, Any]:
    """Many requests at once, with little room; then the first again."""
    from vllm.v1.core.sched.scheduler import Scheduler

    steps: list[dict[str, int]] = []
    stock = Scheduler.schedule

    def schedule(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = stock(self, *args, **kwargs)
        steps.append(dict(out.num_scheduled_tokens))
        return out

    Scheduler.schedule = schedule
    return {
        "answers": generate(llm, prompts, 12),
        "steps": steps,
        "again": generate(llm, prompts[:1], 12),
    }


def test_chunked_prefill_batching_and_prefix_cache(in_engine, folder):
    shared = ids_of(64, 0)
    prompts = [
        shared + ids_of(60, 1),
        shared + ids_of(9, 2),
        *(ids_of(5 + 9 * n, n) for n in range(8)),
    ]
    done = in_engine(
        folder,
        crowd,
        arguments={"prompts": prompts},
        max_num_batched_tokens=CHUNK,
        max_num_seqs=4,
        block_size=32,
    )
    compare(folder, prompts, done["answers"])
    compare(folder, prompts[:1], done["again"])
    assert done["answers"][0]["cached"] == 0
    assert done["again"][0]["cached"] >= 96  # whole blocks of what was computed before
    steps = [step for step in done["steps"] if step]
    assert max(sum(step.values()) for step in steps) == CHUNK  # a prompt of 124 came in chunks
    assert any(1 in s.values() and max(s.values()) > 1 for s in steps)  # beside others' decoding
    assert max(map(len, steps)) == 4


def compiled(llm: Any, prompts: list[list[int]]) -> dict[str, Any]:
    from vllm.compilation.counter import compilation_counter

    return {
        "answers": generate(llm, prompts, 8),
        "models": compilation_counter.num_models_seen,
        "mode": llm.llm_engine.vllm_config.compilation_config.mode.name,
    }


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on a CPU needs g++")
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_compiled(in_engine, tiny_checkpoint, tmp_path, monkeypatch, tensor_parallel):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")
    source = tiny_checkpoint(head_dim=32, num_layers=6, intermediate_size=2048)
    convert(source, "1+2 3|4:1", tmp_path / "out")  # wide enough for packed gates and ups
    prompts = [list(range(3, 20)), [5, 99, 7]]
    done = in_engine(
        tmp_path / "out",
        compiled,
        tensor_parallel,
        {"prompts": prompts},
        enforce_eager=False,
        skip_tokenizer_init=True,
    )
    assert done["models"] == 1, done["mode"]
    assert done["mode"] != "NONE"
    compare(tmp_path / "out", prompts, done["answers"])


RANK, ALPHA = 4, 32.0
# In a cqil group only matrices that stayed one linear map can have an adapter.
ADAPTED = {
    1: ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"),  # a layer alone
    2: (
        "self_attn.q_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.down_proj",
    ),
    7: ("self_attn.k_proj", "mlp.down_proj"),  # cqil
}


def with_adapter(llm: Any, prompts: list[list[int]], adapter: str) -> dict[str, Any]:
    from vllm.lora.request import LoRARequest

    request = LoRARequest("wide", 1, adapter)
    adapted = generate(llm, prompts, 8, lora_request=request)
    return {"adapted": adapted, "plain": generate(llm, prompts, 8)}


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_lora_on_wide_layers(in_engine, folder, tmp_path, tensor_parallel):
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    adapter, merged = {}, dict(weights)
    for layer, names in ADAPTED.items():
        for name in names:
            key = f"model.layers.{layer}.{name}"
            rows, columns = weights[f"{key}.weight"].shape
            a = torch.randn(RANK, columns, generator=generator) * columns**-0.5
            b = torch.randn(rows, RANK, generator=generator) * 0.02
            adapter |= {
                f"base_model.model.{key}.lora_A.weight": a,
                f"base_model.model.{key}.lora_B.weight": b,
            }
            merged[f"{key}.weight"] = weights[f"{key}.weight"] + b @ a * (ALPHA / RANK)
    there = tmp_path / "adapter"
    there.mkdir()
    save_file(adapter, there / "adapter_model.safetensors")
    modules = sorted({n.split(".")[-1] for names in ADAPTED.values() for n in names})
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": modules}
    (there / "adapter_config.json").write_text(json.dumps({**settings, "bias": "none"}))
    shutil.copytree(folder, tmp_path / "merged")
    save_file(merged, tmp_path / "merged" / "model.safetensors", metadata={"format": "pt"})
    prompts = [ids_of(20, 3), ids_of(7, 4)]
    done = in_engine(
        folder,
        with_adapter,
        tensor_parallel,
        {"prompts": prompts, "adapter": str(there)},
        enable_lora=True,
        max_lora_rank=8,
    )
    compare(tmp_path / "merged", prompts, done["adapted"])
    compare(folder, prompts, done["plain"])
    assert done["adapted"] != done["plain"]


def refused(llm: Any) -> None:
    raise AssertionError("it should not have loaded")


def test_bad_degree_is_one_line_before_anything_is_loaded(in_engine, folder, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path / name)  # without weights: they would be missed
    with pytest.raises(RuntimeError) as failure:
        in_engine(tmp_path, refused, 3)
    assert str(failure.value).strip().splitlines()[-1] == (
        "RuntimeError: tensor parallel size 3 does not fit this model: "
        "layer 0 has 4 attention heads; possible: 1, 2, 4"
    )


def test_replicate_is_refused_where_the_transformers_backend_runs_it(
    converted, tiny_checkpoint, tmp_path, run
):
    folder = converted(tiny_checkpoint("granite", head_dim=32), "1+2")
    config = json.loads((folder / "config.json").read_text()) | {"abreast_unpaired": "replicate"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    engine = ("--backend", "vllm", "--vllm", f"{sys.executable} -m abreast.engines.vllm.bench")
    few = ("--context", 32, "--new-tokens", 4)
    status, out, err = run("bench", tmp_path, *engine, *few, "--ranks", 2, "--task", "decode")
    assert (status, out) == (2, "")
    assert "abreast_unpaired: replicate runs in vLLM for llama, mistral" in err.splitlines()[-1]


def test_old_version_is_one_line(folder, tmp_path, run_apart):
    code = f"""
import vllm
vllm.__version__ = "0.20.1"
from abreast.engines.vllm import register
register()
register()
vllm.LLM({str(folder)!r})
"""
    done = run_apart(code)
    assert done.returncode != 0
    line = done.stderr.strip().splitlines()[-1]
    assert line == (
        "RuntimeError: vLLM 0.20.1 is too old for converted checkpoints; install vLLM 0.32 or newer"
    )
