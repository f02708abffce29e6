"""vLLM: a plugin that serves converted checkpoints, and its latency benchmark."""

from typing import TYPE_CHECKING

from abreast.lazy import attach

if TYPE_CHECKING:
    from abreast.engines.vllm.bench import VllmFailure, latency
    from abreast.engines.vllm.plugin import register

attach(__name__)
