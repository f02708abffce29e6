"""vLLM plugin: registers converted checkpoints with every vLLM process on this machine.

vLLM calls `register` through the entry point `vllm.general_plugins`, in its main process and in
every worker, perhaps more than once, whatever model it serves. So nothing here may fail or cost
much where no converted checkpoint is involved: classes are registered by name only.

Four families have native classes, built of vLLM's own parallel layers (models.py). The others run
through vLLM's transformers backend (backend.py), on the model classes of modeling.py.
"""

from __future__ import annotations

from typing import Any

from abreast.errors import AbreastError
from abreast.families import CONVERTIBLE
from abreast.targets import VLLM, refusals

OLDEST = (0, 32)  # the first to size its KV cache layer by layer, and the one that is tested
_LAYER_KEYS = (
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "abreast_members",
    "abreast_bypass",
)
_CLASSES = "abreast.engines.vllm.models"
_BACKEND = "abreast.engines.vllm.backend:AbreastForCausalLM"


class ServingError(AbreastError):
    """A checkpoint that vLLM cannot serve, or not at this degree."""


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
    except ImportError:  # not a public name; without it, vLLM's own terser checks apply
        MODELS_CONFIG_MAP = {}
    try:  # what vLLM does not run in float16, by model_type
        from vllm.config.model import _FLOAT16_NOT_SUPPORTED_MODELS as no_float16
    except ImportError:
        no_float16 = {}

    for family in CONVERTIBLE.values():
        if family.converted not in ModelRegistry.get_supported_archs():
            where = f"{_CLASSES}:{family.converted}" if family.vllm_layers else _BACKEND
            ModelRegistry.register_model(family.converted, where)
        MODELS_CONFIG_MAP[family.converted] = _Check
        if family.model_type in no_float16:
            no_float16[family.converted_type] = no_float16[family.model_type]


def is_too_old(version: str) -> bool:
    """Whether a version of vLLM, "0.32.0+cpu", is older than OLDEST. Development builds are not."""
    numbers = [part for part in version.split("+")[0].split(".")[:2] if part.isdigit()]
    release = tuple(int(number) for number in numbers)
    return len(release) == 2 and release != (0, 0) and release < OLDEST


def check(config: Any, tensor_parallel: int) -> None:
    """Raise ServingError if vLLM cannot run a converted model of this config at this degree.

    config: transformers' config object. vLLM calls this in its main process, before its workers.
    """
    layers = [config.per_layer_config[i] for i in range(config.num_hidden_layers)]
    entries = {
        str(i): {key: getattr(layer, key, None) for key in _LAYER_KEYS}
        for i, layer in enumerate(layers)
    }
    as_json = {
        "num_hidden_layers": len(layers),
        "per_layer_config": entries,
        "abreast_prefill": getattr(config, "abreast_prefill", None),
    }
    family = CONVERTIBLE.get(config.model_type.removeprefix("abreast_"))
    for reason in refusals(VLLM, as_json, family, degree=tensor_parallel):
        raise ServingError(reason)


class _Check:
    """The hook that vLLM calls for an architecture while it builds its configuration."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        return

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        config, parallel = vllm_config.model_config.hf_config, vllm_config.parallel_config
        try:
            check(config, parallel.tensor_parallel_size)
        except ServingError as error:
            # vLLM's configurations are pydantic classes, which wrap a ValueError in several lines.
            raise RuntimeError(str(error)) from None


def _refuse_to_load(version: str) -> None:
    """Let an old vLLM serve other models and stop at the config of a converted one."""
    from transformers import AutoConfig, PretrainedConfig

    oldest = ".".join(map(str, OLDEST))

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError(  # not a ValueError, as above
            f"vLLM {version} is too old for converted checkpoints; install vLLM {oldest} or newer"
        )

    for family in CONVERTIBLE.values():
        body = {"model_type": family.converted_type, "from_dict": refuse}
        stub = type(f"{family.converted}TooOld", (PretrainedConfig,), body)
        AutoConfig.register(family.converted_type, stub, exist_ok=True)
