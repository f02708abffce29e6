"""A transformers model in memory: load it, run a plan on it, and undo that; nothing is copied.

The members of a group keep their own weights, norms and places in the KV cache; only the order of
execution changes. Each member's `forward` is replaced on the instance: all but the last pass their
input on and leave behind what the model handed them (mask, positions, cache), and the last one
runs the whole group. So every member attends under its own mask, and the model's own loop,
hooks and caches stay untouched.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn

from abreast.checkpoint import check_has_layers, open_checkpoint, plan_for, resolve
from abreast.errors import AbreastError, CheckpointError, first_line, is_fault
from abreast.families import FAMILIES, Branches, Family, as_ours
from abreast.model.branches import GroupMember, by_name, is_parallel, lacks
from abreast.model.devices import as_converted, check_device, dequantised, named_dtype
from abreast.model.forward import CACHES
from abreast.plan import Group, Norms, Plan
from abreast.targets import format_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Prefill = Literal["grouped", "sequential"]
_MARK = "_abreast_replaced"
_KERNEL = re.compile(r'"_?(attn|experts)_implementation(_internal)?": [^,}]*/')

_MOST_TOKENS = 1 << 24  # 64 times as many as the largest vocabulary known has


class GroupingError(AbreastError):
    """A model on which a plan cannot run."""


def load(
    model: str | Path,
    *,
    plan: Plan | str | None = None,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | Mapping[str, Any] = "cpu",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    norms: Norms = "own",
) -> tuple[PreTrainedModel, Any]:
    """Load a model and its tokenizer; return (model, tokenizer), the tokenizer None if it has none.

    model: folder or Hugging Face id of an original or a converted checkpoint. plan: run it grouped
    under this plan, which may also be the path of a plan file, and with these norms, see `apply`.
    dtype: "auto" keeps that of the checkpoint, see `fitting_dtype`. device: one device; "auto"
    spreads a model larger than one over all there are and, where these do not suffice, memory and
    disk; or transformers' device_map. Code inside the checkpoint never runs unless
    trust_remote_code is set; converted checkpoints need none of it here.
    Raises AbreastError for whatever the user can fix.
    """
    import transformers

    import abreast.modeling  # noqa: F401  registers the converted architectures

    folder, _ = resolve(model, revision=revision)
    checkpoint = open_checkpoint(folder)
    if plan is not None:
        plan = plan_for(checkpoint, plan)
    spread = device == "auto" or isinstance(device, Mapping)
    if not spread:
        check_device(device)
    elif find_spec("accelerate") is None:
        raise CheckpointError("--device auto needs accelerate: pip install accelerate")
    if isinstance(dtype, str) and dtype != "auto":
        dtype = named_dtype(dtype)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    options |= {"device_map": device} if spread else {}
    options |= {"attn_implementation": attn_implementation} if attn_implementation else {}
    config, names = as_ours(checkpoint.config)
    if isinstance(count := config.get("num_hidden_layers", config.get("n_layer")), int):
        check_has_layers(checkpoint, count)
    joined = format_of(checkpoint.config) != "mlx"  # whose layers are the original's
    # Left alone, transformers fills what is missing or does not fit with random numbers.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    if numbers := dtype != "auto" and dequantised(checkpoint.config.get("quantization_config")):
        options["quantization_config"] = numbers
    if not trust_remote_code and _KERNEL.search(json.dumps(checkpoint.wrapper or config)):
        raise CheckpointError(
            f"config.json of '{model}' asks for code from the Hub (an attn_implementation with a "
            "/ in it); take that key out, or allow it with --trust-remote-code"
        )
    try:
        if config["model_type"] != checkpoint.config["model_type"]:  # written for other engines
            own = transformers.AutoConfig.for_model(**config)
            options |= {"config": own, "key_mapping": names}
        kind = "ImageTextToText" if checkpoint.wrapper else "CausalLM"
        loader = getattr(transformers, f"AutoModelFor{kind}").from_pretrained
        loaded, report = loader(folder, **options)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # every architecture raises kinds of its own
        reason = first_line(error)
        if "trust_remote_code" in str(error):
            reason = (
                "it holds code of its own; if you trust it, allow that with --trust-remote-code"
            )
        raise CheckpointError(f"'{model}' cannot be loaded: {reason}") from error
    _check_loaded(folder, report)
    loaded = as_converted(loaded, checkpoint).to(dtype) if numbers else loaded
    loaded = loaded.eval() if spread else loaded.to(device).eval()
    if not joined and plan is None:
        written = str(checkpoint.config["abreast"].get("plan"))
        plan = Plan.parse(written, len(decoder_layers(loaded)))
        apply(loaded, plan, prefill=config.get("abreast_prefill", "grouped"))
    elif plan is not None:
        apply(loaded, plan, norms=norms)
    return loaded, load_tokenizer(folder, trust_remote_code=trust_remote_code)


def device_of(model: nn.Module) -> torch.device:
    """Where a model takes its inputs, also where accelerate spread it and its weights wait."""
    device = getattr(getattr(model, "_hf_hook", None), "execution_device", None)
    return next(model.parameters()).device if device is None else torch.device(device)


def _check_loaded(folder: Path, report: dict[str, Any]) -> None:
    for name in sorted(report["missing_keys"]):
        raise CheckpointError(f"tensor '{name}' is missing from '{folder}'; download it again")
    for name, stored, expected in sorted(report["mismatched_keys"]):
        raise CheckpointError(
            f"tensor '{name}' in '{folder}' has shape {list(stored)}, config.json says "
            f"{list(expected)}; weights and config do not belong together"
        )


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a folder, or None. Raises AbreastError for one that cannot be loaded."""
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    if not any((folder / name).is_file() for name in names):
        return None
    spm = folder / "tokenizer.model"
    if (
        not (folder / "tokenizer.json").is_file()
        and spm.is_file()
        and not find_spec("sentencepiece")
    ):
        with spm.open("rb") as file:
            if file.read(1) == b"\n":  # a protocol buffer; tiktoken's files are text
                raise CheckpointError(
                    f"the tokenizer in '{folder}' is SentencePiece's; pip install sentencepiece"
                )
    for name in ("tokenizer.json", "vocab.json"):
        if (folder / name).is_file():
            _check_ids(folder / name)
    import transformers  # takes seconds, which a folder without a tokenizer need not wait for

    import abreast.modeling  # noqa: F401  or transformers warns of an unknown model_type

    try:
        return transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code
        )
    except BaseException as error:  # every tokenizer class raises kinds of its own
        if not is_fault(error):
            raise
        raise CheckpointError(
            f"the tokenizer in '{folder}' cannot be loaded: {first_line(error)}"
        ) from None


def _check_ids(file: Path) -> None:
    """Refuse ids for which tokenizers sets aside gigabytes, or aborts without them."""
    text, numbers = file.read_bytes(), []
    if not re.search(rb":\s*\d{8,}", text):
        return
    with suppress(ValueError, AttributeError, RecursionError):  # for transformers to judge
        data = json.loads(text)
        vocabulary = data["model"].get("vocab", {}) if "model" in data else data
        numbers = [number for number in vocabulary.values() if isinstance(number, int)]
    if (largest := max(numbers, default=0)) >= _MOST_TOKENS:
        raise CheckpointError(f"'{file}' numbers tokens up to {largest}; download it again")


@contextmanager
def grouped(
    model: nn.Module, plan: Plan | str, *, prefill: Prefill = "grouped", norms: Norms = "own"
) -> Iterator[nn.Module]:
    """Run `model` under `plan` inside the block, and as it was after it.

    model: any loaded transformers causal language model of a known family; its weights are neither
    copied nor changed. plan: a Plan or its shorthand. prefill, norms: as for `apply`. Raises as
    `apply`.
    """
    apply(model, plan, prefill=prefill, norms=norms)
    try:
        yield model
    finally:
        remove(model)


def apply(
    model: nn.Module, plan: Plan | str, *, prefill: Prefill = "grouped", norms: Norms = "own"
) -> None:
    """Make `model` run under `plan` until `remove`.

    A group computes, for its common input x of shape [batch, length, hidden], the attention
    branches a_j(x + sum of the a_k that attention j sees) and the FFN branches f_j(y_j) with
    y_j = x + sum of the a_k that FFN j sees, and returns x + sum_j a_j + sum_j f_j. The plan's
    wiring says who sees what: lp (arXiv 2502.02790, section 3), cqil (arXiv 2404.06709,
    section 3.2). In families whose FFN reads the layer's input, it reads what attention j reads.

    prefill: "sequential" runs prompts in the original order, exactly as the unchanged model, and
    what follows them under the plan: see `modeling.Passes` for what counts as a prompt.

    norms: whose norms stand before the branches of a group of p members; those after a branch and
    within attention always stay their member's. "own", as conversions have it: N_j and M_j before
    attention j and FFN j. "shared": N_1 and M_1, the first member's, everywhere. "split", what the
    authors' code of Layer Parallelism computes on p devices, each with a slice of every FFN and the
    norms of one member: N_j before attention j, and FFN j cut along its intermediate size into p
    parts (as by `torch.tensor_split`), of which the r-th reads M_r(y_j).

    Raises GroupingError for an unknown family, a missing submodule, a model without weights or
    already grouped, norms that the family does not tell apart, and PlanError for a plan of another
    number of layers; the model is then left as it was.
    """
    layers = decoder_layers(model)
    if isinstance(plan, str):
        plan = Plan.parse(plan, len(layers))
    plan.check_layers(len(layers))
    if prefill not in get_args(Prefill):
        raise GroupingError(f"prefill '{prefill}' is not one of {', '.join(get_args(Prefill))}")
    if hasattr(model, _MARK):
        raise GroupingError("the model is grouped already; remove that plan first")
    unloaded = (module for module in model.modules() if not hasattr(module, "_hf_hook"))
    if any(tensor.is_meta for module in unloaded for tensor in module.parameters(recurse=False)):
        raise GroupingError("the model is on the meta device and has no weights; load it first")
    branches = branches_of(model, by_parts=prefill == "sequential")
    last_matrix = check_norms(model, norms)
    for group in plan.groups:
        for layer in group.layers:
            if name := lacks(layers[layer], branches):
                raise GroupingError(
                    f"layer {layer} ({type(layers[layer]).__name__}) has no submodule '{name}'; "
                    "this version of the architecture cannot run grouped"
                )
    for group in plan.groups:
        members = [layers[layer] for layer in group.layers]
        # What stands on the instance, such as accelerate's dispatch, comes back later.
        before = [vars(member).get("forward") for member in members]
        together = _Forwards(members, before, group, branches, norms, last_matrix)
        for index, member in enumerate(members):
            member.forward = _Forward(together, index)  # type: ignore[assignment,unused-ignore]
    classes: list[tuple[nn.Module, type]] = []
    if prefill == "sequential":
        from abreast import modeling

        decoder, _ = _decoder(model)
        classes = [(decoder, type(decoder)), (model, type(model))]
        modeling.mix(decoder, modeling.Passes, prompts_in_order=True, cache_heads=())
        modeling.mix(model, modeling.CountPrompt)
    setattr(model, _MARK, classes)


def remove(model: nn.Module) -> None:
    """Undo `apply`. Raises GroupingError when the model is not grouped."""
    classes = getattr(model, _MARK, None)
    if classes is None:
        raise GroupingError("the model is not grouped; there is no plan to remove")
    for layer in decoder_layers(model):
        replaced = layer.__dict__.get("forward")
        if isinstance(replaced, _Forward):
            del layer.forward
            if (before := replaced.together.before[replaced.index]) is not None:
                layer.forward = before
    for module, kind in classes:
        module.__class__ = kind
        for name in {"prompts_in_order", "cache_heads"} & vars(module).keys():
            delattr(module, name)
    delattr(model, _MARK)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a transformers causal language model. Raises GroupingError."""
    return _decoder(model)[1]


def _decoder(model: nn.Module) -> tuple[Any, nn.ModuleList]:
    """The submodule that holds the decoder layers, and these."""
    base = getattr(model, "base_model", model)
    holders = (base, *(getattr(base, name, None) for name in ("language_model", "decoder")))
    for holder, name in product(holders, ("layers", "h", "blocks")):
        layers = getattr(holder, name, None)
        if isinstance(layers, nn.ModuleList) and len(layers):
            return holder, layers
    raise GroupingError(
        f"{type(model).__name__} has no list of decoder layers 'layers' in its base model; "
        "give a decoder language model"
    )


def branches_of(model: nn.Module, *, by_parts: bool = False) -> Branches:
    """The names of a decoder layer's submodules.

    by_parts: the attention and the FFN are needed as modules of their own. Raises GroupingError
    where they are none, and for an unknown family.
    """
    family = _family_of(model)
    if by_parts and family.branches.mixers:
        raise GroupingError(
            f"the attention and FFN of a {family.model_type} are no modules of their own, which "
            "this needs (sequential prefill, repairs)"
        )
    return family.branches


def returned(model: nn.Module, hidden_states: torch.Tensor) -> Any:
    """What a decoder layer of this model returns, if these are its output."""
    try:
        return (hidden_states, None) if branches_of(model).tuples else hidden_states
    except GroupingError:  # of a family that is not known, whose layers run one by one
        return hidden_states


def _family_of(model: nn.Module) -> Family:
    config = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if config is not None else None
    model_type = getattr(text, "model_type", None)
    if model_type not in FAMILIES:
        raise GroupingError(
            f"model_type '{model_type}' cannot run grouped; known are {', '.join(sorted(FAMILIES))}"
        )
    family = FAMILIES[model_type]
    for key, value in family.only:
        if getattr(text, key, value) != value:
            raise GroupingError(
                f"layers of a {model_type} with {key} {getattr(text, key)} norm what they add to, "
                "and cannot run grouped"
            )
    return family


def check_norms(model: nn.Module, norms: str) -> str:
    """The name of the FFN's last matrix, which "split" needs, and "" for other norms.

    Raises GroupingError for a family in which these norms mean nothing, or cannot be had.
    """
    family = _family_of(model)
    if norms not in get_args(Norms):
        raise GroupingError(f"norms '{norms}' are not one of {', '.join(get_args(Norms))}")
    if norms != "own" and family.branches.mixers:
        raise GroupingError(
            f"the norms of a {family.model_type} are not told from its branches; use norms own"
        )
    if norms != "own" and not family.norms:
        raise GroupingError(
            f"a {family.model_type} has no gains in norms before its branches, so norms '{norms}' "
            "would change nothing; use own"
        )
    plain = () if family.routes else family.matrices
    last = [m.name for m in plain if m.name.startswith("mlp.") and m.join == "columns"]
    if norms == "split" and not last:
        raise GroupingError(
            f"norms 'split' cut an FFN along its width, and that of a {family.model_type} is not "
            "known as plain matrices; use own or shared"
        )
    return last[0].removeprefix("mlp.") if norms == "split" else ""


@dataclass(eq=False)
class _Forwards:
    """A group in a model: its members, and what the model handed each of them in this pass."""

    members: list[nn.Module]
    before: list[Callable[..., Any] | None]  # what stood on the instances
    group: Group
    branches: Branches
    norms: Norms
    last_matrix: str  # of the FFN, see `check_norms`
    arguments: list[dict[str, Any]] = field(default_factory=list)
    recompute: bool = False  # in this pass, see `_Forward`

    def run(self, arguments: Sequence[dict[str, Any]], x: torch.Tensor) -> torch.Tensor:
        """The group's output from its input, both [batch, length, hidden]."""
        group, branches = self.group, self.branches
        members = [
            GroupMember(layer, self.members, branches, own, received, self.norms, self.last_matrix)
            for layer, own, received in zip(self.members, self.forwards, arguments, strict=True)
        ]
        read: list[torch.Tensor] = []
        attended: list[torch.Tensor] = []
        for member, sees in zip(members, group.attention_sees, strict=True):
            read.append(_plus(x, attended, sees))
            # Members may compute on different devices; each one's submodules fetch their inputs.
            attended.append(member.attend(read[-1]).to(x.device))
        everything = (True,) * len(members)
        sums = {everything: _plus(x, attended, everything)}
        out = sums[everything]
        for index, (member, sees) in enumerate(zip(members, group.ffn_sees, strict=True)):
            if branches.mixers and not branches.ffns:
                break
            if is_parallel(member.layer, branches):
                y = read[index]
            else:
                y = sums[sees] if sees in sums else sums.setdefault(sees, _plus(x, attended, sees))
            out = out + member.feed(y).to(x.device)
        return out

    @property
    def forwards(self) -> list[Callable[..., Any]]:
        """What ran each member by itself, before it was grouped."""
        pairs = zip(self.members, self.before, strict=True)
        return [before or partial(type(member).forward, member) for member, before in pairs]


@dataclass(eq=False)
class _Forward:
    """Replaces a member's `forward`: all but the last pass x on, and the last runs the group.

    An object and no closure, so that a model's copies and pickles hold members of their own.
    """

    together: _Forwards
    index: int

    def __call__(
        self, hidden_states: torch.Tensor, *args: Any, in_order: bool = False, **kwargs: Any
    ) -> Any:
        if in_order:
            return self.together.forwards[self.index](hidden_states, *args, **kwargs)
        out = self._run(hidden_states, args, kwargs)
        return (out, None) if self.together.branches.tuples else out

    def _run(
        self, hidden_states: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor:
        together, members = self.together, self.together.members
        member: Any = members[self.index]
        last: Any = members[-1]
        together.arguments = [*together.arguments[: self.index], by_name(member, args, kwargs)]
        # Where transformers checkpoints in the layer's `__call__` (5.22 and before), it would run
        # this again, without what the other members were handed. So the last is told not to.
        around = type(last).__call__ is not nn.Module.__call__
        if member is not last:
            if around and self.index + 2 == len(members):
                together.recompute = getattr(last, "gradient_checkpointing", False)
                last.gradient_checkpointing = False
            return hidden_states
        arguments, together.arguments = together.arguments, []
        if around and together.recompute:
            last.gradient_checkpointing, together.recompute = True, False
        if last.training and getattr(last, "gradient_checkpointing", False):
            run = partial(together.run, [_without_cache(kwargs) for kwargs in arguments])
            out: torch.Tensor = last._gradient_checkpointing_func(run, hidden_states)
            return out
        return together.run(arguments, hidden_states)


def _without_cache(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Recomputing a layer would write to the cache twice; stock layers leave it out as well."""
    off = {**dict.fromkeys(CACHES), "use_cache": False}
    return {**kwargs, **{name: value for name, value in off.items() if name in kwargs}}


def _plus(x: torch.Tensor, outputs: Sequence[torch.Tensor], sees: Sequence[bool]) -> torch.Tensor:
    """x and the sum of the outputs that are seen."""
    seen = [output for output, shown in zip(outputs, sees, strict=False) if shown]
    return x + sum(seen[1:], seen[0]) if seen else x


@contextmanager
def inference(*models: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every submodule is as it was."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        with torch.inference_mode():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
