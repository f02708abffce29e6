"""vLLM plugin: makes converted checkpoints known to every vLLM process on this machine.

vLLM calls `register` through the entry point `vllm.general_plugins`, in its main process and in
every worker, maybe more than once, and also when it serves something else. So nothing here may fail
or cost much where no converted checkpoint is involved: classes are registered by name only.

Four families have native classes, built of vLLM's own parallel layers (vllm_models.py). The others
run through vLLM's transformers backend (vllm_backend.py), on the model classes of modeling.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from abreast.errors import AbreastError
from abreast.families import FAMILIES

OLDEST = (0, 32)  # the first that sizes its KV cache layer by layer, and the one that was tested
NATIVE = ("llama", "mistral", "qwen2", "qwen3")
_CLASSES = "abreast.engines.vllm.models"
_BACKEND = "abreast.engines.vllm.backend:AbreastForCausalLM"


class ServingError(AbreastError):
    """A checkpoint that vLLM cannot serve, or cannot serve as asked."""


@dataclass(frozen=True)
class Width:
    """What tensor parallelism must divide in one layer. bypass: None unless cqil."""

    heads: int
    kv_heads: int
    intermediate: int
    members: int = 1
    bypass: int | None = None


def register() -> None:
    """Register all converted architectures with vLLM and transformers. May be called again."""
    import vllm

    if is_too_old(vllm.__version__):
        _refuse_to_load(vllm.__version__)
        return
    from vllm import ModelRegistry

    import abreast.modeling  # noqa: F401  registers the config classes

    try:
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    except ImportError:  # not a public name; without it vLLM's own, terser checks must do
        MODELS_CONFIG_MAP = {}

    for family in FAMILIES.values():
        native = family.model_type in NATIVE
        if family.converted not in ModelRegistry.get_supported_archs():
            where = f"{_CLASSES}:{family.converted}" if native else _BACKEND
            ModelRegistry.register_model(family.converted, where)
        MODELS_CONFIG_MAP[family.converted] = _Check


def is_too_old(version: str) -> bool:
    """Whether a version of vLLM, "0.32.0+cpu", is older than OLDEST. Development builds are not."""
    numbers = [part for part in version.split("+")[0].split(".")[:2] if part.isdigit()]
    found = tuple(int(number) for number in numbers)
    return len(found) == 2 and found != (0, 0) and found < OLDEST


def check(config: Any, tensor_parallel: int) -> None:
    """Raise ServingError if vLLM cannot run a converted model of this config at this degree.

    config: transformers' config object. Called in vLLM's main process, before it starts workers.
    """
    model_type = config.model_type.removeprefix("abreast_")
    if getattr(config, "abreast_prefill", None) == "sequential":
        raise ServingError(
            "this checkpoint asks for sequential prefill, which vLLM cannot run; serve it grouped "
            "with --hf-overrides '{\"abreast_prefill\": null}', or convert it again without"
        )
    layers = [
        Width(
            heads=own.num_attention_heads,
            kv_heads=getattr(own, "num_key_value_heads", None) or own.num_attention_heads,
            intermediate=own.intermediate_size,
            members=getattr(own, "abreast_members", None) or 1,
            bypass=getattr(own, "abreast_bypass", None),
        )
        for own in (config.per_layer_config[i] for i in range(config.num_hidden_layers))
    ]
    reason = obstacle(layers, tensor_parallel, native=model_type in NATIVE)
    if reason:
        most = max(layer.heads for layer in layers)
        can = [str(n) for n in range(1, most + 1) if not obstacle(layers, n, model_type in NATIVE)]
        raise ServingError(
            f"tensor parallel size {tensor_parallel} does not fit this model: {reason}; "
            f"possible: {', '.join(can)}"
        )


def obstacle(layers: Sequence[Width], degree: int, native: bool) -> str | None:
    """Why these layers cannot be split over `degree` ranks, or None if they can.

    A cqil group of p members splits over p or a multiple of p ranks, and over a divisor of p.
    """
    for index, layer in enumerate(layers):
        if layer.heads % degree:
            return f"layer {index} has {layer.heads} attention heads"
        if layer.kv_heads % degree and degree % layer.kv_heads:
            return f"layer {index} has {layer.kv_heads} key-value heads"
        if layer.intermediate % degree:
            return f"layer {index} has intermediate size {layer.intermediate}"
        if layer.members == 1 or degree == 1:
            continue
        if not native:
            return f"layer {index} keeps members of its group apart, which this family cannot split"
        if layer.bypass is not None and degree % layer.members and layer.members % degree:
            return f"layer {index} is a cqil group of {layer.members} members"
    return None


class _Check:
    """The hook that vLLM calls for an architecture while it puts its configuration together."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        return

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        config, parallel = vllm_config.model_config.hf_config, vllm_config.parallel_config
        try:
            check(config, parallel.tensor_parallel_size)
        except ServingError as error:
            # vLLM's configurations are pydantic classes, which bury a ValueError in several lines.
            raise RuntimeError(str(error)) from None


def _refuse_to_load(version: str) -> None:
    """Let an old vLLM go on with other models and stop at the config of a converted one."""
    from transformers import AutoConfig, PretrainedConfig

    oldest = ".".join(map(str, OLDEST))

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError(  # no ValueError, for the reason given above
            f"vLLM {version} is too old for converted checkpoints; install vLLM {oldest} or newer"
        )

    for family in FAMILIES.values():
        body = {"model_type": family.converted_type, "from_dict": refuse}
        stub = type(f"{family.converted}TooOld", (PretrainedConfig,), body)
        AutoConfig.register(family.converted_type, stub, exist_ok=True)
