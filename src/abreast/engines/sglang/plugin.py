"""SGLang plugin: hands SGLang the config of a conversion as that of its original.

SGLang sizes its KV cache for layers that are all alike. So it gets the original's number of layers
and of heads, in which every member of a group has a cache of its own; models.py reads the plan for
the rest. SGLang calls `register` through the entry point `sglang.srt.plugins`, in each process and
before it reads a config.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any

from abreast.errors import AbreastError
from abreast.families import CONVERTIBLE, Family
from abreast.plan import Plan
from abreast.targets import SGLANG, layers_of, planned_layers, refusals

PACKAGE = "abreast.engines.sglang"
VARIABLE = "SGLANG_EXTERNAL_MODEL_PACKAGE"


def register() -> None:
    """Let transformers, in this process, read configs of conversions as SGLang needs them."""
    from transformers import AutoConfig, PretrainedConfig

    for family in CONVERTIBLE.values():
        body = {
            "model_type": family.converted_type,
            "from_dict": staticmethod(functools.partial(_read, family)),
        }
        kind = type(f"{family.converted}InSGLang", (PretrainedConfig,), body)
        AutoConfig.register(family.converted_type, kind, exist_ok=True)


def _read(family: Family, config: Mapping[str, Any], **kwargs: Any) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if os.environ.get(VARIABLE) != PACKAGE:
        raise AbreastError(
            f"the checkpoint is a conversion by abreast; start SGLang with {VARIABLE}={PACKAGE}"
        )
    return CONFIG_MAPPING[family.model_type].from_dict(original_config(config, family), **kwargs)


def original_config(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """config.json of a conversion, as that of its original, but for its architecture and record.

    Raises AbreastError for what the models here cannot run, and where the record of the plan does
    not say what the layers are.
    """
    for reason in refusals(SGLANG, config, family):
        raise AbreastError(reason)
    own = ("per_layer_config", "abreast_members", "abreast_bypass", "abreast_prefill", "auto_map")
    original = {key: value for key, value in config.items() if key not in own}
    try:
        plan = plan_of(config["abreast"])
        original.update(num_hidden_layers=plan.num_layers, model_type=family.model_type)
        if kinds := config.get("layer_types"):
            pairs = zip(plan.blocks, kinds, strict=True)
            original["layer_types"] = [kind for block, kind in pairs for _ in block.attentions]
        fits = planned_layers(original, family, plan) == layers_of(config)
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise AbreastError(
            "config.json has no record of a plan that gives its layers; convert the model again"
        )
    return original


def plan_of(record: Mapping[str, Any]) -> Plan:
    """The plan that `abreast` of a config.json records. Raises KeyError, TypeError, ValueError."""
    return Plan.parse(record["plan"], record["num_layers"])
