"""vLLM plugin: registers converted checkpoints with every vLLM process on this machine.

vLLM calls `register` through the entry point `vllm.general_plugins`, in its main process and in
every worker, perhaps more than once, whatever model it serves. So nothing here may fail or cost
much where no converted checkpoint is involved: classes are registered by name only.

Some families have native classes, built of vLLM's own parallel layers (models.py). The others run
through vLLM's transformers backend (backend.py), on the model classes of modeling.py.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from abreast.errors import AbreastError
from abreast.families import CONVERTIBLE
from abreast.plan import Plan
from abreast.targets import SERVE_GROUPED, VLLM, Unpaired, refusals

OLDEST = (0, 32)  # the first to size its KV cache layer by layer, and the one that is tested
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
    _prepare_sequential_prefill()


def is_too_old(version: str) -> bool:
    """Whether a version of vLLM, "0.32.0+cpu", is older than OLDEST. Development builds are not."""
    numbers = [part for part in version.split("+")[0].split(".")[:2] if part.isdigit()]
    release = tuple(int(number) for number in numbers)
    return len(release) == 2 and release != (0, 0) and release < OLDEST


def check(config: Any, tensor_parallel: int, quantization: str | None = None) -> None:
    """Raise ServingError if vLLM cannot run a converted model of this config at this degree.

    config: transformers' config object. quantization: how vLLM takes its weights to be quantised,
    or shall quantise them. vLLM calls this in its main process, before its workers.
    """
    known = config.to_dict()
    if quantization is not None and not known.get("quantization_config"):
        known["quantization_config"] = {"quant_method": quantization}
    family = CONVERTIBLE.get(config.model_type.removeprefix("abreast_"))
    unpaired: Any = getattr(config, "abreast_unpaired", "shard")
    if unpaired not in get_args(Unpaired):
        raise ServingError(
            f"abreast_unpaired is {unpaired!r}, not one of {', '.join(get_args(Unpaired))}"
        )
    for reason in refusals(VLLM, known, family, degree=tensor_parallel, unpaired=unpaired):
        raise ServingError(reason)


def is_sequential(vllm_config: Any) -> bool:
    """Whether vLLM serves a converted checkpoint that asks for sequential prefill."""
    config = getattr(vllm_config.model_config, "hf_config", None)
    return getattr(config, "abreast_prefill", None) == "sequential"


def _prepare_sequential_prefill() -> bool:
    """Choose the model runner that can mark prompts, and keep blocks of the prefix cache apart.

    What was generated has other keys and values than the same text in a prompt. So the hash of a
    block with generated tokens says where in it they begin; the hashes of later blocks depend on
    it. `Scheduler` is what every process that hashes makes before the first request. Returns
    whether this vLLM has what it takes.
    """
    try:
        from vllm.config import VllmConfig
        from vllm.v1.core import kv_cache_utils
        from vllm.v1.core.sched.scheduler import Scheduler

        lacks: Any = VllmConfig._get_v2_model_runner_unsupported_features
        start, keys = Scheduler.__init__, kv_cache_utils.generate_block_hash_extra_keys
    except (ImportError, AttributeError):
        return False
    if start.__globals__ is globals():
        return True

    @functools.wraps(lacks)
    def lacks_sequential_prefill(self: Any) -> list[str]:
        return lacks(self) + ["sequential prefill"] * is_sequential(self)

    @functools.wraps(start)
    def start_scheduler(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        if is_sequential(vllm_config):
            kv_cache_utils.generate_block_hash_extra_keys = keys_with_prompts_end
        start(self, vllm_config, *args, **kwargs)

    @functools.wraps(keys)
    def keys_with_prompts_end(request: Any, first: int, end: int, *args: Any) -> Any:
        extra, following = keys(request, first, end, *args)
        if end > request.num_prompt_tokens:
            extra = (*(extra or ()), ("generated", max(request.num_prompt_tokens - first, 0)))
        return extra, following

    VllmConfig._get_v2_model_runner_unsupported_features = lacks_sequential_prefill
    Scheduler.__init__ = start_scheduler
    return True


def _unserved(vllm_config: Any) -> Iterator[str]:
    """What asks for something that is not there under sequential prefill."""
    if vllm_config.lora_config is not None:
        yield "LoRA adapters"
    if vllm_config.model_config.quantization is not None:
        yield "quantised weights"
    if vllm_config.parallel_config.use_ubatching:
        yield "microbatches (DBO)"
    if vllm_config.use_v2_model_runner:
        yield "VLLM_USE_V2_MODEL_RUNNER=1"
    if not _prepare_sequential_prefill():
        yield "this version of vLLM"


def streams_of(config: Any, layers: Sequence[int]) -> tuple[int, ...]:
    """Before which layers of a conversion the streams stand that its original has before `layers`.

    EAGLE-3 heads (arXiv 2503.01840, section 3.1) read such streams. Inside a group there is none:
    where it ends is the next. Raises ServingError where two are the same one.
    """
    record = getattr(config, "abreast", None) or {}
    names = ", ".join(map(str, layers))
    try:
        plan = Plan.parse(record["plan"], record["num_layers"])
        ends = [0, *(max(block.ffns, default=-1) + 1 for block in plan.blocks)]
        streams = tuple(min(i for i, end in enumerate(ends) if end >= own) for own in layers)
    except (KeyError, TypeError, ValueError):
        raise ServingError(
            f"the EAGLE-3 head reads the streams before layers {names}, which the original of this "
            "conversion does not have; use the head of that original"
        ) from None
    if len(set(streams)) < len(layers):
        raise ServingError(
            f"the EAGLE-3 head reads the streams before layers {names}, of which plan "
            f"{plan.shorthand} makes fewer; use another draft, or a plan with no group between them"
        )
    return streams


def default_streams(config: Any) -> tuple[int, ...]:
    """vLLM's own choice for the original, see `streams_of`."""
    count = (getattr(config, "abreast", None) or {}).get("num_layers", 0)
    return 2, count // 2, count - 3


class StreamsOfOriginal:
    """Mixed into a model: EAGLE-3 heads count the layers of its original."""

    config: Any
    hf_to_vllm_mapper: Any

    def get_eagle3_default_aux_hidden_state_layers(self) -> tuple[int, ...]:
        return default_streams(self.config)

    def set_aux_hidden_state_layers(self, layers: Sequence[int]) -> None:
        super().set_aux_hidden_state_layers(streams_of(self.config, layers))  # type: ignore[misc]


class _Check:
    """The hook that vLLM calls for an architecture while it builds its configuration."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        return

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        config, parallel = vllm_config.model_config.hf_config, vllm_config.parallel_config
        drafts = vllm_config.speculative_config
        try:
            quantization = vllm_config.model_config.quantization
            check(config, parallel.tensor_parallel_size, quantization)
            if drafts is not None and drafts.method == "eagle3":
                head = drafts.draft_model_config.hf_config
                named = getattr(head, "eagle_aux_hidden_state_layer_ids", None)
                streams_of(config, named or default_streams(config))
            for thing in _unserved(vllm_config) if is_sequential(vllm_config) else ():
                raise ServingError(f"{thing} cannot go with sequential prefill; {SERVE_GROUPED}")
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
