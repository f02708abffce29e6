"""The config.json and the tokenizer files of a converted checkpoint."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from abreast.checkpoint import read_json
from abreast.convert.rules import FoldError, attention_kinds, rope_layers
from abreast.families import Family, expert_layers, head_dim_of
from abreast.model import load_tokenizer
from abreast.plan import Block, Plan
from abreast.targets import band_of, members_of

# save_pretrained writes the files back under the names of their modules: keep them the same.
REMOTE_CODE = ("modeling.py", "modeling_members.py")


def converted_config(
    config: Mapping[str, Any], family: Family, plan: Plan, *, dtype: str, prefill: str = "grouped"
) -> dict[str, Any]:
    """config.json of the converted checkpoint.

    Widths live in transformers' own `per_layer_config`. Where all stages come out equally wide the
    result is a stock model and needs none. `abreast` records the plan for tools that want it.
    """
    new, blocks = copy.deepcopy(dict(config)), family.blocks_of(plan)
    for key in ("torch_dtype", "auto_map", "deepstack_layers"):
        new.pop(key, None)
    base = {key: config.get(key) or config["num_attention_heads"] for key in family.wide}
    new.update(
        num_hidden_layers=len(blocks),
        head_dim=head_dim_of(config),
        dtype=dtype,
        abreast={"num_layers": plan.num_layers, "plan": plan.shorthand},
        **base,
        **_per_layer_lists(config, blocks),
        **_expert_places(config, family, blocks),
    )
    sequential = prefill == "sequential"
    if sequential:
        new["abreast_prefill"] = prefill
    apart = sequential or any(members_of(family, block) > 1 for block in blocks)
    width = _common_width(blocks)
    if (
        width
        and not (apart or family.grown_biases or family.derived_head_size)
        and config["hidden_size"] % (width * config["num_attention_heads"]) == 0
    ):
        new.update({key: width * value for key, value in base.items()})
        new.update(model_type=family.model_type, architectures=[family.stock])
        return new
    for key in family.grown_biases:
        new.setdefault(key, False)
    digits = len(str(len(blocks) - 1))
    new["per_layer_config"] = {
        str(index).zfill(digits): _layer_entry(family, config, block, base)
        for index, block in enumerate(blocks)
        if block.group is not None
    }
    if apart:
        # The schema wants a global value for whatever a layer may override.
        new.update(abreast_members=1, abreast_bypass=None)
    if any(family.beside(block) > 1 for block in blocks):
        new["abreast_beside"] = 1
    module, name = REMOTE_CODE[0].removesuffix(".py"), family.converted
    new.update(
        model_type=family.converted_type,
        architectures=[name],
        auto_map={
            "AutoConfig": f"{module}.{name.replace('ForCausalLM', 'Config')}",
            "AutoModel": f"{module}.{name.replace('ForCausalLM', 'Model')}",
            "AutoModelForCausalLM": f"{module}.{name}",
        },
    )
    return new


def _common_width(blocks: Sequence[Block]) -> int | None:
    """The number of layers whose attentions and FFNs every layer holds, None where they differ."""
    widths = {len(members) for block in blocks for members in (block.attentions, block.ffns)}
    return widths.pop() if len(widths) == 1 else None


def _layer_entry(
    family: Family, config: Mapping[str, Any], block: Block, base: Mapping[str, int]
) -> dict[str, Any]:
    """What a layer of a group overrides in the config."""
    attentions, ffns = len(block.attentions), len(block.ffns)
    times = {key: ffns if key == "intermediate_size" else attentions for key in base}
    entry: dict[str, Any] = {key: n * base[key] for key, n in times.items() if n != 1}
    if expert_layers(family, config)[block.attentions[0]] and ffns > 1:
        entry.pop("intermediate_size", None)
        entry |= {key: ffns * config[key] for key in family.expert_keys if config.get(key)}
    for matrix in family.matrices:
        if matrix.bias in family.grown_biases:
            joined = ffns if family.is_ffn(matrix.name) else attentions
            entry |= {matrix.bias: True} if joined > 1 else {}
    members, band = members_of(family, block), band_of(family, block)
    entry |= {"abreast_members": members} if members > 1 else {}
    if (beside := family.beside(block)) > 1:
        entry["abreast_beside"] = beside
    return entry | ({"abreast_bypass": band} if band is not None else {})


def _expert_places(
    config: Mapping[str, Any], family: Family, blocks: Sequence[Block]
) -> dict[str, Any]:
    """Config keys that say which layers of the conversion have experts."""
    if not family.dense:
        return {}
    routed = expert_layers(family, config)
    kinds = [routed[block.attentions[0]] for block in blocks]
    if config.get("mlp_layer_types"):
        return {"mlp_layer_types": ["sparse" if experts else "dense" for experts in kinds]}
    dense = [index for index, experts in enumerate(kinds) if not experts]
    if not {"first_k_dense_replace", "moe_layer_start_index"} & config.keys():
        return {"mlp_only_layers": dense, "decoder_sparse_step": 1}
    first = kinds.index(True) if any(kinds) else len(kinds)
    last = len(kinds) - 1 - kinds[::-1].index(True) if any(kinds) else -1
    if not all(kinds[first : last + 1]):
        raise FoldError(
            f"layers with experts do not follow each other (moe_layer_interval "
            f"{config.get('moe_layer_interval')}), which a conversion cannot say"
        )
    if "first_k_dense_replace" in config:
        return {"first_k_dense_replace": first}
    return {"moe_layer_start_index": first, "moe_layer_end_index": last, "moe_layer_interval": 1}


def _per_layer_lists(config: Mapping[str, Any], blocks: Sequence[Block]) -> dict[str, list[Any]]:
    """Config lists with an entry per layer, rewritten for the layers of the conversion."""
    firsts = [block.attentions[0] for block in blocks]
    lists: dict[str, list[Any]] = {}
    kinds = [kind.removesuffix(" without RoPE") for kind in attention_kinds(config)]
    if config.get("layer_types") is not None or len(set(kinds)) > 1:
        lists["layer_types"] = [kinds[layer] for layer in firsts]
    rotated = rope_layers(config)
    if rotated is not None:
        lists["no_rope_layers"] = [int(rotated[layer]) for layer in firsts]
    return lists


def write_tokenizer(source: Path, folder: Path) -> None:
    """Make the tokenizer files in `folder` give the ids that transformers reads in `source`.

    transformers picks a tokenizer's class by model_type, and some classes build another tokenizer
    than tokenizer.json says. So what was built is written down, with the class that reads it as it
    is. Raises CheckpointError for a tokenizer that cannot be loaded.
    """
    tokenizer = load_tokenizer(source)
    if not getattr(tokenizer, "is_fast", False):
        return
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    for key in ("auto_map", "fix_mistral_regex"):  # code that stays behind; a repair that is done
        settings.pop(key, None)
    defaults = {
        key: getattr(tokenizer, key)
        for key in ("padding_side", "truncation_side", "model_input_names")
    }
    names = {key: value for key, value in tokenizer.special_tokens_map.items() if value is not None}
    settings = {**defaults, **names, **settings, "tokenizer_class": "TokenizersBackend"}
    path.write_text(
        json.dumps(settings, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8"
    )
