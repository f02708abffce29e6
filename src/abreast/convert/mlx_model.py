"""A decoder whose layers run abreast by a plan, for mlx-lm on one machine or several.

This file travels inside checkpoints, where config.json names it as model_file and mlx-lm runs it
under --trust-remote-code; it imports mlx and mlx_lm only. Layers and weights are the original's.

On several ranks the members of a group go to one rank each, or some. What cannot be dealt out so
follows ABREAST_UNPAIRED: shard, the default, divides heads and FFN columns among the ranks, as
mlx-lm does with all layers; replicate has every rank run it whole and exchange nothing.
"""

import hashlib
import json
import os
import sys
from dataclasses import dataclass
from functools import partial, reduce
from itertools import combinations
from operator import add
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import shard_inplace
from mlx.utils import tree_flatten
from mlx_lm.models.activations import swiglu
from mlx_lm.models.base import BaseModelArgs, create_attention_mask, scaled_dot_product_attention
from mlx_lm.models.cache import KVCache, RotatingKVCache
from mlx_lm.models.rope_utils import initialize_rope


@dataclass
class ModelArgs(BaseModelArgs):
    """abreast: groups (layers, bypass, in_order) and how layers are built, see abreast.convert."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    abreast: dict
    abreast_prefill: str = "grouped"
    sliding_window: int | None = None


class Norm(nn.Module):
    def __init__(self, size: int, args: ModelArgs):
        super().__init__()
        self.weight = mx.ones((size,))
        self.offset, self.eps = args.abreast["gain_offset"], args.rms_norm_eps

    def __call__(self, x: mx.array) -> mx.array:
        weight = self.weight + self.offset if self.offset else self.weight
        return mx.fast.rms_norm(x, weight, self.eps)


class Attention(nn.Module):
    def __init__(self, args: ModelArgs, kind: str):
        super().__init__()
        size, built = args.head_dim, args.abreast
        self.heads, self.kv_heads = args.num_attention_heads, args.num_key_value_heads
        self.scale, self.normed = built["attention_scale"], built["head_norms"]
        linear = partial(_linear, built["biases"], "self_attn")
        self.q_proj = linear("q_proj", args.hidden_size, self.heads * size)
        self.k_proj = linear("k_proj", args.hidden_size, self.kv_heads * size)
        self.v_proj = linear("v_proj", args.hidden_size, self.kv_heads * size)
        self.o_proj = linear("o_proj", self.heads * size, args.hidden_size)
        if self.normed:
            self.q_norm, self.k_norm = Norm(size, args), Norm(size, args)
        rope = built["rope"][kind]
        self.rope = initialize_rope(size, rope["rope_theta"], False, rope)

    def __call__(self, x: mx.array, mask: Any, cache: Any) -> mx.array:
        B, L, _ = x.shape
        q = self.q_proj(x).reshape(B, L, self.heads, -1)
        k = self.k_proj(x).reshape(B, L, self.kv_heads, -1)
        v = self.v_proj(x).reshape(B, L, self.kv_heads, -1).transpose(0, 2, 1, 3)
        if self.normed:
            q, k = self.q_norm(q), self.k_norm(k)
        offset = 0 if cache is None else cache.offset
        q = self.rope(q.transpose(0, 2, 1, 3), offset=offset)
        k = self.rope(k.transpose(0, 2, 1, 3), offset=offset)
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        out = scaled_dot_product_attention(q, k, v, cache=cache, scale=self.scale, mask=mask)
        return self.o_proj(out.transpose(0, 2, 1, 3).reshape(B, L, -1))

    def divide(self, group: mx.distributed.Group) -> None:
        """Keep this rank's part of the heads."""
        ranks = group.size()
        for heads, name in ((self.heads, "attention heads"), (self.kv_heads, "KV heads")):
            _check_even(ranks, heads, name)
        self.heads, self.kv_heads = self.heads // ranks, self.kv_heads // ranks
        _divide((self.q_proj, self.k_proj, self.v_proj), self.o_proj, group)


class MLP(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.width, built = args.intermediate_size, args.abreast
        self.gated = {"silu": swiglu, "gelu": _geglu}[built["activation"]]
        linear = partial(_linear, built["biases"], "mlp")
        self.gate_proj = linear("gate_proj", args.hidden_size, self.width)
        self.up_proj = linear("up_proj", args.hidden_size, self.width)
        self.down_proj = linear("down_proj", self.width, args.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(self.gated(self.gate_proj(x), self.up_proj(x)))

    def divide(self, group: mx.distributed.Group) -> None:
        """Keep this rank's part of the columns."""
        _check_even(group.size(), self.width, "FFN columns")
        _divide((self.gate_proj, self.up_proj), self.down_proj, group)


def _geglu(gate: mx.array, x: mx.array) -> mx.array:
    return nn.gelu_approx(gate) * x


def _linear(biases: list, branch: str, name: str, columns: int, rows: int) -> nn.Linear:
    return nn.Linear(columns, rows, bias=f"{branch}.{name}" in biases)


def _check_even(ranks: int, count: int, name: str) -> None:
    if count % ranks:
        raise ValueError(
            f"{ranks} ranks cannot share {count} {name} evenly; use ABREAST_UNPAIRED=replicate, or "
            "a number of ranks that divides them"
        )


def _divide(readers: tuple, writer: nn.Module, group: mx.distributed.Group) -> None:
    """Keep this rank's rows of the maps that read the input, and its columns of the one after."""
    if hasattr(writer, "group_size"):
        blocks = writer.scales.shape[-1]
        _check_even(group.size(), blocks, f"quantised blocks of {writer.group_size} columns")
    for reader in readers:
        shard_inplace(reader, "all-to-sharded", group=group)
    shard_inplace(writer, "sharded-to-all", group=group)
    if group.rank():
        writer.pop("bias", None)  # which is to be added once


class Layer(nn.Module):
    """The branches of one layer of the original: less those that only other ranks run."""

    def __init__(self, args: ModelArgs, index: int):
        super().__init__()
        self.index, self.kind = index, args.abreast["kinds"][index]
        self.sandwiched = args.abreast["post_norms"]
        self.self_attn, self.mlp = Attention(args, self.kind), MLP(args)
        names = ["input_layernorm", "post_attention_layernorm"]
        if self.sandwiched:
            names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        for name in names:
            self[name] = Norm(args.hidden_size, args)

    def run(self, branch: str, x: mx.array, masks: dict, caches: dict) -> mx.array:
        if branch == "self_attn":
            mask, cache = masks[self.kind], caches.get(self.index)
            return self.self_attn(self.input_layernorm(x), mask, cache)
        before = "pre_feedforward_layernorm" if self.sandwiched else "post_attention_layernorm"
        return self.mlp(self[before](x))

    def after(self, branch: str, x: mx.array) -> mx.array:
        """What is added to the stream: the whole output of a branch, normed in some families."""
        if not self.sandwiched:
            return x
        name = "post_attention" if branch == "self_attn" else "post_feedforward"
        return self[f"{name}_layernorm"](x)


def deal(members: int, loads: list, attention: int, ffn: int, bypass: int = 0) -> list:
    """Every rank's range of the members of a group, one each at least.

    Where members are no multiple of the ranks, the rank that has most to run of this group has as
    little as possible, since all wait for it, and then the fullest ranks of all groups so far.
    loads: bytes that every rank has of the groups before, to which this one's are added. attention,
    ffn: bytes of a member's. bypass: how many attentions before its own a rank runs as well.
    """
    ranks = range(len(loads))

    def owned(most: tuple) -> list:
        counts = [members // len(loads) + (rank in most) for rank in ranks]
        return [range(sum(counts[:rank]), sum(counts[: rank + 1])) for rank in ranks]

    def added(most: tuple) -> list:
        return [
            (len(own) + min(bypass, own.start)) * attention + len(own) * ffn for own in owned(most)
        ]

    def judged(most: tuple) -> tuple:
        new = added(most)
        return max(new), sorted(map(add, loads, new), reverse=True)

    chosen = min(combinations(ranks, members % len(loads)), key=judged)
    loads[:] = map(add, loads, added(chosen))
    return owned(chosen)


def _bytes(module: nn.Module) -> int:
    return sum(array.nbytes for _, array in tree_flatten(module.parameters()))


class Stage:
    """The members of a group, which read one input, or one layer by itself.

    bypass: FFN j reads attentions j - bypass .. j; None where all read the sum of all. in_order:
    attentions run one after another. own: the members whose outputs this rank adds to the stream.
    spread: how the ranks run each branch: all of it on each (""), a part of every member (heads),
    or whole members (members).
    """

    def __init__(self, layers: list, bypass: int | None = None, in_order: bool = False):
        self.layers, self.bypass, self.in_order = layers, bypass, in_order
        self.own, self.group = range(len(layers)), None
        self.spread = {"self_attn": "", "mlp": ""}

    def __call__(self, x: mx.array, masks: dict, caches: dict, prompt: bool) -> mx.array:
        def run(branch: str, inputs: dict) -> dict:
            return self.outputs(branch, inputs, masks, caches)

        def step(branch: str, members: Any, x: mx.array) -> mx.array:
            return x + self.total(branch, run(branch, dict.fromkeys(members, x)), x)

        members = range(len(self.layers))
        if prompt:
            for member in members:
                x = step("mlp", [member], step("self_attn", [member], x))
            return x
        if self.bypass is None:
            for together in ([m] for m in members) if self.in_order else [members]:
                x = step("self_attn", together, x)
            return step("mlp", members, x)
        a = run("self_attn", dict.fromkeys(members, x))
        seen = {m: range(max(0, m - self.bypass), m + 1) for m in self.own}
        f = run("mlp", {m: x + reduce(add, (a[k] for k in seen[m])) for m in self.own})
        return x + self.total("mlp", {m: a[m] + f[m] for m in self.own}, x)

    def outputs(self, branch: str, inputs: dict, masks: dict, caches: dict) -> dict:
        """What a branch of the members in `inputs` makes, as far as it runs on this rank."""
        here = {m: x for m, x in inputs.items() if branch in self.layers[m]}
        out = {m: self.layers[m].run(branch, x, masks, caches) for m, x in here.items()}
        if self.spread[branch] == "heads":
            parts = list(out.values())
            if self.bypass is None and not self.layers[0].sandwiched:
                parts = [reduce(add, parts)]  # nobody reads them one by one
            parts = mx.stack(parts) if len(parts) > 1 else parts[0][None]
            whole = mx.distributed.all_sum(parts, group=self.group)
            out = dict(zip(out, whole, strict=False))
        return {m: self.layers[m].after(branch, x) for m, x in out.items()}

    def total(self, branch: str, outputs: dict, x: mx.array) -> mx.array:
        """The sum of outputs over all members, wherever they run."""
        if self.spread[branch] != "members":
            return reduce(add, outputs.values())
        own = [out for member, out in outputs.items() if member in self.own]
        part = reduce(add, own) if own else mx.zeros_like(x)
        return mx.distributed.all_sum(part, group=self.group)

    def divide(self, group: mx.distributed.Group, replicate: bool, loads: list) -> None:
        """Keep this rank's part. loads: see `deal`. Raises ValueError where parts are too few."""
        size, ranks = len(self.layers), group.size()
        if replicate and size == 1:
            return
        if replicate and ranks > size:
            raise ValueError(
                f"layers {self.layers[0].index} to {self.layers[-1].index} are a group of {size}, "
                f"too few for {ranks} ranks; use at most {size}, or ABREAST_UNPAIRED=shard"
            )
        even = size % ranks == 0 or self.bypass is not None
        members = 1 < size >= ranks and (even or replicate)
        attention = members and not self.in_order
        self.group = group
        self.spread["mlp"] = "members" if members else "heads"
        self.spread["self_attn"] = "members" if attention else "" if replicate else "heads"
        if members:
            first = self.layers[0]
            costs = attention * _bytes(first.self_attn), _bytes(first.mlp)
            self.own = deal(size, loads, *costs, bypass=self.bypass or 0)[group.rank()]
        read = range(self.own.start - (self.bypass or 0), self.own.stop)
        for member, layer in enumerate(self.layers):
            if self.spread["self_attn"] == "heads":
                layer.self_attn.divide(group)
            elif attention and member not in read:
                layer.pop("self_attn")
            if not members:
                layer.mlp.divide(group)
            elif member not in self.own:
                layer.pop("mlp")


class Decoder(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [Layer(args, index) for index in range(len(args.abreast["kinds"]))]
        self.norm = Norm(args.hidden_size, args)


class Model(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args, self.model_type, self.model = args, args.model_type, Decoder(args)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)
        groups = {group["layers"][0]: group for group in args.abreast["groups"]}
        self._stages, layers = [], self.layers
        while layers:
            group = groups.get(layers[0].index, {"layers": [0], "bypass": None, "in_order": False})
            size = len(group["layers"])
            self._stages.append(Stage(layers[:size], group["bypass"], group["in_order"]))
            layers = layers[size:]

    def __call__(
        self,
        inputs: mx.array,
        cache: list | None = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        x = self.model.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        if self.args.abreast["embedding_scale"] != 1.0:
            x = x * mx.array(self.args.abreast["embedding_scale"], x.dtype)
        prompt = self._is_prompt(x.shape[1], cache)
        attending = [layer for layer in self.layers if "self_attn" in layer]
        indices = [layer.index for layer in attending]
        caches = {} if cache is None else dict(zip(indices, cache, strict=True))
        masks: dict = {}
        for layer in attending:
            if layer.kind not in masks:
                window = self.args.sliding_window if layer.kind == "sliding_attention" else None
                own = caches.get(layer.index)
                masks[layer.kind] = create_attention_mask(x, own, window_size=window)
        for stage in self._stages:
            x = stage(x, masks, caches, prompt)
        x = self.model.norm(x)
        head = self.model.embed_tokens.as_linear if self.args.tie_word_embeddings else self.lm_head
        return head(x)

    def _is_prompt(self, length: int, cache: list | None) -> bool:
        """Whether to run in the original's order. mlx-lm runs all but the last token of a prompt,
        then that one, which the cache remembers; a draft's tokens look like a prompt."""
        if self.args.abreast_prefill != "sequential":
            return False
        if not cache:
            return True
        prompt = length > 1 or getattr(cache[0], "before_prompt_ends", True)
        cache[0].before_prompt_ends = length > 1
        return prompt

    @property
    def layers(self) -> list:
        return self.model.layers

    def make_cache(self) -> list:
        """A cache for every attention that runs on this rank."""
        window = self.args.sliding_window
        return [
            RotatingKVCache(window) if layer.kind == "sliding_attention" else KVCache()
            for layer in self.layers
            if "self_attn" in layer
        ]

    def sanitize(self, weights: dict) -> dict:
        if self.args.tie_word_embeddings:
            weights.pop("lm_head.weight", None)
        return weights

    def shard(self, group: mx.distributed.Group | None = None) -> None:
        """Keep what this rank runs. Where that cannot be, every rank ends, with status 2: mlx-lm's
        server would go on without a model."""
        group = group or mx.distributed.init()
        unpaired, loads = os.environ.get("ABREAST_UNPAIRED", "shard"), [0] * group.size()
        try:
            for what, mark, advice in (
                ("ABREAST_UNPAIRED", unpaired.encode(), "set the same on"),
                ("checkpoint", _marked(self.args), "copy the same one to"),
            ):
                _check_same(what, hashlib.sha256(mark).hexdigest()[:8], advice, group)
            if unpaired not in ("shard", "replicate"):
                raise ValueError(f"ABREAST_UNPAIRED is {unpaired!r}, not one of shard, replicate")
            for stage in self._stages if group.size() > 1 else ():
                stage.divide(group, unpaired == "replicate", loads)
        except ValueError as reason:
            if group.rank() == 0:
                print(f"error: {reason}", file=sys.stderr, flush=True)
            os._exit(2)


def _check_same(what: str, own: str, advice: str, group: mx.distributed.Group) -> None:
    """Raise ValueError unless all ranks have the same hash, of 8 digits."""
    mark = mx.array([int(own, 16)], mx.uint32)
    hashes = [f"{one:08x}" for one in mx.distributed.all_gather(mark, group=group).tolist()]
    for rank, one in enumerate(hashes):
        if one != hashes[0]:
            raise ValueError(
                f"rank {rank} has another {what} than rank 0 (hashes {one} and {hashes[0]}); "
                f"{advice} every machine"
            )


def _marked(args: ModelArgs) -> bytes:
    """What tells this checkpoint from others: arguments, and of every tensor name, type, shape and
    some values, read from the files, since arrays that are looked at stay in memory whole."""
    samples = {}
    for path in Path(__file__).parent.glob("model*.safetensors"):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length))
            entries.pop("__metadata__", None)
            for name, entry in entries.items():
                first, last = entry.pop("data_offsets")
                samples[name] = [entry]
                for start in (first, (first + last) // 2, max(first, last - 512)):
                    file.seek(8 + length + start)
                    samples[name].append(file.read(min(512, last - start)))
    return repr((args, sorted(samples.items()))).encode()
