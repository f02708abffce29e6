"""Slower links, simulated: what each wiring gains over processes, sharded and replicated.

A random Llama of many thin layers is made on the fly, or --model taken, and joined in its middle;
every variant is timed by `abreast bench --backend tp` against the sharded original, the models
taking turns, at several delays that every exchange waits in addition. With E exchanges per token a
token should take T + E w at a delay of w, with T measured at w = 0: that is the prediction beside
the measurement.

--baselines times the sharded original itself: torch_tp's against a plain loop over the same parts
and transformers' own tensor parallelism, which puts hooks around every product; then lp pairs with
whole single layers against a loop that runs them as the code of Layer Parallelism's authors does.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from abreast.checkpoint import read_manifest
from abreast.convert import convert, inspect_model
from abreast.demo import model_folder
from abreast.engines.torch_tp import launched, load_parallel
from abreast.model import grouped
from abreast.plan import Group, Plan
from abreast.speed import Case, Contender, Job, bench, run

VARIANTS = ("lp", "cqil", "cqil-full", "ff")


def random_llama(folder: Path, hidden: int, layers: int) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def variants(original: Path, folder: Path, pairs: int) -> list[Contender]:
    layers = inspect_model(original).num_layers
    first = (layers - 2 * pairs) // 2
    starts = range(first, first + 2 * pairs, 2)
    contenders = [Contender("original", str(original))]
    for name in VARIANTS:
        groups = tuple(Group.wired((start, start + 1), name) for start in starts)
        convert(original, Plan(num_layers=layers, groups=groups), folder / name)
        contenders.append(Contender(name, str(folder / name)))
    return contenders


class PlainLoop(nn.Module):
    """A rank's part of a Llama, as anyone would write it down: two all-reduces per layer."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config, self.dtype = model, model.config, model.dtype

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def forward(
        self, input_ids: Tensor, past_key_values: Any = None, logits_to_keep: int = 0, **_: Any
    ) -> Any:
        body, cache = self.model.model, {} if past_key_values is None else past_key_values
        past, length = (cache[0][0].shape[2] if cache else 0), input_ids.shape[1]
        x = body.embed_tokens(input_ids)
        rotation = body.rotary_emb(x, torch.arange(past, past + length)[None])
        x = self.layers(x, rotation, cache)
        logits = self.model.lm_head(body.norm(x[:, -logits_to_keep:]))
        return SimpleNamespace(logits=logits, past_key_values=cache)

    def layers(self, x: Tensor, rotation: Any, cache: dict[int, Any]) -> Tensor:
        for index, layer in enumerate(self.model.model.layers):
            x = x + summed(attend(layer, x, rotation, cache, index))
            x = x + summed(feed(layer.mlp, layer.post_attention_layernorm(x)))
        return x


class AuthorsLoop(PlainLoop):
    """Pairs of a whole Llama as the code of Layer Parallelism runs them on two devices.

    Layers in no pair are whole on both. In a pair a rank has the attention of its member, and half
    of each FFN behind the norm of its member (`norms="split"` of `abreast.model.grouped`).
    """

    def __init__(self, model: Any, plan: Plan) -> None:
        super().__init__(model)
        self.stages, self.rank = plan.stages, dist.get_rank()
        layers = model.model.layers
        self.halves = nn.ModuleDict(
            {
                str(pair[0]): self.half([layers[k].mlp for k in pair])
                for pair in self.stages
                if pair[1:]
            }
        )

    def half(self, ffns: list[Any]) -> nn.Module:
        def joined(name: str, dim: int) -> nn.Linear:
            parts = [getattr(ffn, name).weight.tensor_split(2, dim)[self.rank] for ffn in ffns]
            linear = nn.Linear(1, 1, bias=False)
            linear.weight = nn.Parameter(torch.cat(parts, dim).contiguous(), requires_grad=False)
            return linear

        names = {"gate_proj": 0, "up_proj": 0, "down_proj": 1}
        return nn.ModuleDict({name: joined(name, dim) for name, dim in names.items()})

    def layers(self, x: Tensor, rotation: Any, cache: dict[int, Any]) -> Tensor:
        layers = self.model.model.layers
        for index, stage in enumerate(self.stages):
            layer = layers[stage[self.rank if stage[1:] else 0]]
            out = attend(layer, x, rotation, cache, index)
            x = x + (summed(out) if stage[1:] else out)
            mlp = self.halves[str(stage[0])] if stage[1:] else layer.mlp
            out = feed(mlp, layer.post_attention_layernorm(x))
            x = x + (summed(out) if stage[1:] else out)
        return x


def attend(layer: Any, x: Tensor, rotation: Any, cache: dict[int, Any], index: int) -> Tensor:
    """The attention branch of [B, L, D]; `cache` has keys and values by place."""
    own, y, (cos, sin) = layer.self_attn, layer.input_layernorm(x), rotation

    def rotated(heads: Tensor) -> Tensor:
        first, second = heads.chunk(2, -1)
        return heads * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]

    q, k, v = (
        part(y).unflatten(-1, (-1, own.head_dim)).transpose(1, 2)
        for part in (own.q_proj, own.k_proj, own.v_proj)
    )
    q, k = rotated(q), rotated(k)
    if index in cache:
        k, v = (torch.cat(pair, 2) for pair in zip(cache[index], (k, v), strict=True))
    cache[index] = k, v
    causal = x.shape[1] > 1
    out = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    result: Tensor = own.o_proj(out.transpose(1, 2).flatten(2))
    return result


def feed(mlp: Any, y: Tensor) -> Tensor:
    result: Tensor = mlp.down_proj(nn.functional.silu(mlp.gate_proj(y)) * mlp.up_proj(y))
    return result


def summed(partial: Tensor) -> Tensor:
    dist.all_reduce(partial)
    return partial


def baselines(folder: str, rounds: int, steps: int) -> None:
    """On every rank; rank 0 prints."""
    from transformers import AutoModelForCausalLM

    def original(**options: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()

    thin = load_parallel(folder, dtype="float32")
    hooked = original(tp_plan="auto")
    models = {"torch_tp": thin, "plain loop": PlainLoop(thin), "transformers' hooks": hooked}
    timed(models, thin, rounds, steps)
    joined = Path(folder).with_name("lp")
    if joined.is_dir():
        plan, whole = read_manifest(joined).plan, original()
        models = {
            "lp, replicate": load_parallel(joined, dtype="float32", unpaired="replicate"),
            "lp, the authors' loop": AuthorsLoop(whole, plan),
        }
        with grouped(original(), plan, norms="split") as reference:
            timed(models, reference, rounds, steps)
    dist.destroy_process_group()


def timed(models: dict[str, Any], reference: Any, rounds: int, steps: int) -> None:
    """All must predict what `wanted` does."""
    ids = torch.arange(3, 19)[None]
    with torch.inference_mode():
        want, *others = (
            m(input_ids=ids, logits_to_keep=1).logits for m in (reference, *models.values())
        )
    for logits in others:
        torch.testing.assert_close(logits, want, rtol=1e-3, atol=1e-3)
    result = bench(
        models, task="decode", context=64, new_tokens=steps, rounds=rounds, barrier=dist.barrier
    )
    if dist.get_rank() == 0:
        for name, timing in result.timings.items():
            gain = [timing.ratio_low, timing.ratio, timing.ratio_high]
            row = {"baseline": name, "ms_per_token": 1e3 * timing.median / steps, "gain": gain}
            print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="?", const=str(model_folder()), help="bundled: no folder")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--delays", default="0,50,300,1000", help="microseconds")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--baselines", nargs="?", const="", help="of a folder, or of one made here")
    args = parser.parse_args()
    if launched():
        return baselines(args.baselines, args.rounds, args.steps)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        location = Path(folder)
        random = None if args.model else random_llama(location / "made", args.hidden, args.layers)
        contenders = variants(random or Path(args.model), location, args.pairs)
        if args.baselines is not None:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc-per-node=2", __file__, "--rounds", str(args.rounds), "--baselines"]
            command += [args.baselines or contenders[0].model, "--steps", str(args.steps)]
            subprocess.run(command, env={"OMP_NUM_THREADS": "1", **os.environ}, check=True)
            return None
        at_zero: dict[str, float] = {}
        for delay in map(int, args.delays.split(",")):
            job = Job(
                tuple(contenders),
                (Case("decode", 1, 64, args.steps),),
                backend="tp",
                rounds=args.rounds,
                dtype="float32",
                unpaired=("shard", "replicate"),
                link_delay=delay,
            )
            result = run(job).results[0]
            exchanges = {n: (m.exchanges or 0) / args.steps for n, m in result.memory.items()}
            tokens = {name: t.median / args.steps for name, t in result.timings.items()}
            at_zero = at_zero or tokens
            due = {n: at_zero[n] + exchanges[n] * delay * 1e-6 for n in tokens}
            for name, timing in result.timings.items():
                row = {
                    "link": f"simulated, {delay} us" if delay else "gloo, as it is",
                    "model": name,
                    "exchanges": exchanges[name],
                    "ms_per_token": 1e3 * tokens[name],
                    "gain": [timing.ratio_low, timing.ratio, timing.ratio_high],
                    "predicted_gain": due["original"] / due[name],
                    "weights": asdict(result.memory[name])["weights"],
                }
                rows.append(row)
                print(json.dumps(row), flush=True)
    print(json.dumps({"benchmark": "links", "settings": vars(args), "rows": rows}))
    return None


if __name__ == "__main__":
    main()
