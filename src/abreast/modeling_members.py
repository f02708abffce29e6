"""Parts of converted models that stay with one member of a group; see modeling.py, which needs it.

This file travels inside every converted checkpoint, too, and imports torch only.
Shapes: B batch, L length, D hidden, P members, T tokens, E experts of a member, and X any width.
"""

import copy
import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

# How routers score experts: by a softmax over all or over the chosen, or by sigmoids.
SOFTMAX = "Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe", "Ernie4_5_Moe"
SCORES = dict.fromkeys([f"{name}TopKRouter" for name in SOFTMAX], "softmax")
SCORES |= dict.fromkeys(["GraniteMoeTopKRouter", "GptOssTopKRouter"], "chosen")
SIGMOID = "Glm4Moe", "Glm4MoeLite", "DeepseekV3"
SCORES |= dict.fromkeys([f"{name}TopkRouter" for name in SIGMOID], "sigmoid")
SCORES["DeepseekV2TopkRouter"] = "softmax"
FLOAT32 = {"MixtralTopKRouter", "DeepseekV2TopkRouter"}  # routers whose weights stay so
FLOAT32 |= {f"{name}TopkRouter" for name in SIGMOID}


class View(nn.Module):
    """Stands for a module of `holder`, looked up when it is called: adapters and quantisers replace
    modules, offloading and hooks act when one is called."""

    def __init__(self, holder: nn.Module, name: str) -> None:
        super().__init__()
        self.holder_and_name = (holder, name)  # in a tuple, so that the holder is no child

    @property
    def module(self) -> Any:
        return getattr(*self.holder_and_name)

    def is_plain(self) -> bool:
        module = self.module  # nothing but a product with its weight?
        hooked = "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks
        return type(module) is nn.Linear and type(module.weight) is nn.Parameter and not hooked

    def forward(self, *args: Any) -> Tensor:
        return self.module(*args)


class Apart(View):
    """A linear map per member, one below the other: [.., P, in] or [.., P * in] -> [.., P, out].
    A plain module is one batched product; others run on all inputs, and each takes its outputs."""

    def __init__(self, holder: nn.Module, name: str, members: int) -> None:
        super().__init__(holder, name)
        self.members, self.in_features = members, self.module.in_features

    def forward(self, x: Tensor) -> Tensor:
        module, members = self.module, self.members
        if x.shape[-1] != self.in_features:
            x = x.unflatten(-1, (members, self.in_features))
        if not self.is_plain():
            return module(x).unflatten(-1, (members, -1)).diagonal(0, -3, -2).mT
        weight = module.weight.view(members, -1, self.in_features)
        out = torch.einsum("...px,pyx->...py", x, weight)
        return out if module.bias is None else out + module.bias.view(members, -1)


class ThroughViews:
    """Mixed into an attention or an FFN: runs its stock code on views of its modules."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        viewing = self.viewing[0]
        viewing.training = self.training
        viewing._modules = self._modules | viewing._modules  # vLLM adds one
        return viewing.forward(*args, **kwargs)


def through_views(module: Any, views: dict[str, nn.Module]) -> None:
    viewing = copy.copy(module)
    viewing._modules = {name: views.get(name, View(module, name)) for name in module._modules}
    mix(module, ThroughViews, viewing=[viewing])  # in a list, so that it is no child


class Later:
    """Mixed into a layer whose attention runs in the last layer of its group, see Together."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x


class Together(nn.Module):
    """Stands for the attention of a group's last layer: runs that of every layer of the group on
    one input [B, L, D], through its own norm and with its own cache. Returns the sum, or, where
    FFNs see different ones, all of them, [B, L, P, D]."""

    def __init__(self, layers: list[Any], stacked: bool) -> None:
        super().__init__()
        self.layers = tuple(layers)  # in a tuple, so that they are no children
        self.stacked = stacked

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        outputs = [
            layer.self_attn(layer.input_layernorm(hidden_states), *args, **kwargs)[0]
            for layer in self.layers
        ]
        return (torch.stack(outputs, -2) if self.stacked else sum(outputs)), None


def side_by_side(layers: list[Any], stacked: bool) -> None:
    """Let the attentions of a group's layers, of which the last has all FFNs, read one input."""
    *before, last = layers
    for layer in before:
        mix(layer, Later)
    together: dict[str, nn.Module] = {"self_attn": Together(layers, stacked)}
    through_views(last, together | {"input_layernorm": nn.Identity()})


class MemberNorm:
    """Mixed into a stock norm with a row of gains for every member or head, which `lie` in its
    input flat, [.., P * X], as heads, [B, heads, L, X], or are added, [.., P, X] -> [.., X]."""

    def forward(self, x: Tensor) -> Tensor:
        if self.lie == "flat":
            return super().forward(x.unflatten(-1, self.weight.shape)).flatten(-2)
        if self.lie == "heads":
            return super().forward(x.transpose(1, 2)).transpose(1, 2)
        return super().forward(x).sum(-2)


class Member(View):
    """One member's part of a wide module, of which only that is computed if it is plain. Its input
    lies at `spread` (axis, before, after) among zeros, its output at `take` (axis, pieces)."""

    def find(self, small: Any, member: int, members: int, packed: list[int] | None) -> None:
        # small: an unconverted layer's module; packed: sizes of what its output holds in turn
        self.spread = self.take = self.new_axis = None
        wide, after = self.module, members - 1 - member
        if isinstance(wide, nn.Linear):
            rows, columns = small.weight.shape
            if wide.in_features != columns:
                if wide.bias is not None:
                    raise ValueError("biases were added up: prefill cannot be sequential")
                self.spread = -1, member * columns, after * columns
            if wide.out_features != rows:
                sizes = packed or [rows]
                starts = [members * sum(sizes[:i]) + member * n for i, n in enumerate(sizes)]
                self.take = -1, list(zip(starts, sizes, strict=True))
        elif wide.weight.shape != small.weight.shape:
            lie, size = getattr(wide, "lie", ""), wide.weight.shape[0] // members
            size = wide.weight.shape[1] if lie == "flat" else size
            axis = {"flat": -1, "heads": -3}.get(lie, -2)
            self.new_axis = not hasattr(self.holder_and_name[0], "head_dim")  # not of the attention
            self.spread = axis, member * size, after * size
            self.take = None if lie == "added" else (axis, [(member * size, size)])

    def forward(self, x: Tensor) -> Tensor:
        module = self.module
        if self.is_plain():
            weight, bias = self._taken(module.weight, 0), self._taken(module.bias, 0)
            if self.spread:
                weight = weight.narrow(1, self.spread[1], x.shape[-1])
            return nn.functional.linear(x, weight, bias)
        x = x.unsqueeze(-2) if self.new_axis else x
        if self.spread:
            x = nn.functional.pad(x, (0, 0) * (-1 - self.spread[0]) + self.spread[1:])
        out = self._taken(module(x), self.take and self.take[0])
        return out.squeeze(-2) if self.new_axis and self.take else out

    def _taken(self, wide: Any, axis: Any) -> Any:
        if self.take is None or wide is None:
            return wide
        parts = [wide.narrow(axis, start, size) for start, size in self.take[1]]
        return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


class OwnHeadSize:
    """Mixed in before a layer whose attention divides hidden_size by its heads: heeds head_dim, and
    mlp_bias, which StableLM's FFN has not."""

    def __init__(self, config: Any, index: int) -> None:
        plain, wide = copy.copy(config), copy.copy(config)
        plain.num_attention_heads = config.hidden_size // config.head_dim
        wide.hidden_size = config.num_attention_heads * config.head_dim
        super().__init__(plain, index)  # type: ignore[call-arg]
        branch = "self_attn" if hasattr(self, "self_attn") else "attention"
        attention = type(getattr(self, branch))(wide, index)
        setattr(self, branch, attention)
        *read, last = (name for name, one in attention.named_children() if type(one) is nn.Linear)
        for name in (*read, last):
            stock = getattr(attention, name)
            sides = [config.hidden_size, stock.out_features]
            sides = [wide.hidden_size, config.hidden_size] if name == last else sides
            setattr(attention, name, nn.Linear(*sides, bias=stock.bias is not None))
        for name, one in self.mlp.named_children() if getattr(config, "mlp_bias", False) else ():
            if type(one) is nn.Linear and one.bias is None:
                setattr(self.mlp, name, nn.Linear(one.in_features, one.out_features))


class MemberRouter:
    """Mixed into a stock router with the experts of several members, one below the other: each
    chooses among its own, and normalises among them. Returns logits [P * T, E], member after
    member, for losses that balance experts; weights and experts, [T, P * chosen]. Some versions of
    transformers expect all that in the other order."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        name, members = type(self).__name__, self.members
        statics = getattr(self, "moe_statics", self)
        bias = getattr(statics, "e_score_correction_bias", None)
        method = getattr(self, "topk_method", "")  # DeepSeek V2's, which normalises none
        weight = self.weight if bias is None and not method else self.weight.float()
        flat = x.reshape(-1, x.shape[-1]).to(weight.dtype)
        logits = nn.functional.linear(flat, weight, getattr(self, "bias", None))
        logits = logits.unflatten(-1, (members, -1))  # T, P, E
        if SCORES[name] == "chosen":
            best, chosen = logits.topk(self.top_k)
            weights = best.softmax(-1, dtype=torch.float)
        else:
            sigmoid = SCORES[name] == "sigmoid"
            scores = logits.sigmoid() if sigmoid else logits.softmax(-1, dtype=torch.float)
            ranked = scores if bias is None else scores + bias.view(members, -1)
            if method != "greedy" and getattr(self, "num_group", 1) > 1:
                ranked = self._best_groups(ranked, 1 if method else 2)
            chosen = ranked.topk(self.top_k).indices
            weights = scores.gather(-1, chosen)
            if getattr(self, "norm_topk_prob", not method):
                total = weights.sum(-1, keepdim=True)
                weights = weights / total.clamp(min=getattr(self, "norm_min", 1e-20))
            weights = weights * getattr(self, "routed_scaling_factor", 1.0)
        before = torch.arange(members, device=x.device).unsqueeze(-1) * logits.shape[-1]
        weights = weights.flatten(-2)
        weights = weights if name in FLOAT32 else weights.to(x.dtype)
        routed = logits.transpose(0, 1).flatten(0, 1), weights, (chosen + before).flatten(-2)
        return routed[::-1] if self.chosen_first else routed

    def _best_groups(self, ranked: Tensor, deciding: int) -> Tensor:
        """Without the experts of all but the best groups, which so many of their best decide."""
        groups = ranked.unflatten(-1, (self.num_group, -1))
        best = groups.topk(deciding).values.sum(-1).topk(self.topk_group).indices
        left = torch.ones(groups.shape[:-1], dtype=torch.bool, device=ranked.device)
        left.scatter_(-1, best, False)
        return groups.masked_fill(left.unsqueeze(-1), -math.inf).flatten(-2)


class MemberExperts:
    """Mixed into a block of experts. Members of a cqil group have an input each, [B, L, P, D], and
    blocks of their own; others share one, [B, L, D], and maybe an expert that every token uses,
    whose outputs are gated by member."""

    def forward(self, x: Tensor) -> Any:
        if self.narrow:
            outputs: list[Any] = []
            for narrow, own in zip(self.narrow, x.unbind(-2), strict=True):
                narrow.train(self.training)
                outputs.append(run_narrow(narrow, own.contiguous()))
            return sum(out[0] if isinstance(out, tuple) else out for out in outputs)
        if not hasattr(self, "shared_expert_gate"):
            return super().forward(x)
        flat, shared = x.reshape(-1, x.shape[-1]), self.shared_expert
        _, weights, chosen = self.gate(flat)
        inner = shared.act_fn(shared.gate_proj(flat)) * shared.up_proj(flat)
        gates = self.shared_expert_gate(flat).sigmoid()
        gated = inner.unflatten(-1, (gates.shape[-1], -1)) * gates.unsqueeze(-1)
        out = self.experts(flat, chosen, weights) + shared.down_proj(gated.flatten(-2))
        return out.view(x.shape)


def narrowed(narrow: Any, wide_of: Any, packed: dict[str, list[int]]) -> Any:
    """A stock module of one member, without weights: let it run on its part of the wide modules.
    wide_of(path): root of the wide modules, member and members. packed: see `Member.find`."""
    narrow.cuts = []
    for path, small in list(narrow.named_modules()):
        tensors = [*small.named_parameters(recurse=False), *small.named_buffers(recurse=False)]
        if not tensors:
            continue
        root, member, members = wide_of(path)
        above, _, name = path.rpartition(".")
        if isinstance(small, nn.Linear) or name.endswith("norm"):
            view = Member(root.get_submodule(above), name)
            view.find(small, member, members, packed.get(name))
            setattr(narrow.get_submodule(above), name, view)
            continue
        for own, tensor in tensors:
            whole = root.get_submodule(path)
            sizes = enumerate(zip(tensor.shape, getattr(whole, own).shape, strict=True))
            axis = next((axis for axis, (size, of_all) in sizes if size != of_all), None)
            narrow.cuts.append((small, own, whole, axis, member, members))
    return narrow


def run_narrow(narrow: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a module that `narrowed` made; it holds slices of the wide weights only meanwhile."""
    for small, name, whole, axis, member, members in narrow.cuts:
        store = small._parameters if name in small._parameters else small._buffers
        tensor = getattr(whole, name)
        store[name] = tensor if axis is None else tensor.chunk(members, axis)[member]
    try:
        return narrow(*args, **kwargs)
    finally:
        for small, name, *_ in narrow.cuts:
            store = small._parameters if name in small._parameters else small._buffers
            store[name] = None


def mix(module: Any, mixin: type, **attributes: Any) -> None:
    """Put `mixin` before the class of a module, which stays an instance of that class."""
    if not isinstance(module, mixin):
        module.__class__ = _mixed(module.__class__, mixin)
    module.__dict__.update(attributes)


@functools.cache
def _mixed(kind: Any, mixin: Any) -> type:
    parts = (*getattr(kind, "mixed_of", (kind,)), mixin)
    # Its old name lets others know it, but not pickle and copy find it.
    own = {"mixed_of": parts, "__reduce__": lambda self: (_empty, parts, self.__dict__)}
    if "forward" in vars(mixin):
        own["forward"] = forward_of(mixin, kind)
    return type(kind.__name__, (mixin, kind), own | {"__module__": kind.__module__})


def forward_of(mixin: Any, kind: Any) -> Any:
    forward = lambda self, *args, **kwargs: mixin.forward(self, *args, **kwargs)  # noqa: E731
    return functools.wraps(kind.forward)(forward)  # vLLM reads the stock signature and source


def _empty(*parts: Any) -> Any:
    return (kind := functools.reduce(_mixed, parts)).__new__(kind)


class InOrder:
    """Mixed into the layer of a group: can run its members in their original order."""

    def forward(self, x: Tensor, *args: Any, in_order: bool = False, **kwargs: Any) -> Tensor:
        if not in_order:
            return super().forward(x, *args, **kwargs)
        name = "cache" if "cache" in kwargs else "past_key_values"  # before transformers 5.24
        cache, index, added = kwargs.pop(name, None), self.self_attn.layer_idx, []
        for member, narrow in enumerate(self.narrow):
            narrow.train(self.training)
            config, used = narrow.self_attn.config, self.self_attn.config
            config._attn_implementation_internal = used._attn_implementation_internal
            own = MemberCache(cache, index, member, config.num_key_value_heads)
            x = run_narrow(narrow, x, *args, **kwargs, **{name: own})
            added.append(own.added)
        if cache is not None:
            cache.update(*(torch.cat(parts, 1) for parts in zip(*added, strict=True)), index)
        return x


class MemberCache:
    """Replaces the KV cache while one member runs: its heads of the layer's cache, as a copy."""

    def __init__(self, cache: Any, index: int, member: int, heads: int) -> None:
        entry = cache.layers[index] if cache is not None and index < len(cache.layers) else None
        self.entry = None
        if not (entry and (entry.is_initialized or entry.is_compileable)):
            return  # what is empty and can grow returns what it is given
        if hasattr(entry, "_quantized_keys"):
            raise ValueError("sequential prefill cannot continue from a quantized cache")
        self.entry = copy.copy(entry)
        for name, value in vars(entry).items():
            if isinstance(value, Tensor):
                if name in ("keys", "values"):
                    value = value[:, member * heads : (member + 1) * heads]
                setattr(self.entry, name, value.clone())
        self.entry.prefetch()

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
        self.added = key, value
        return (key, value) if self.entry is None else self.entry.update(key, value)
