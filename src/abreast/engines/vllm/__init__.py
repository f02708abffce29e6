"""vLLM: a plugin that serves converted checkpoints, its latency benchmark, and writing in it."""

from typing import TYPE_CHECKING

from abreast.lazy import attach

if TYPE_CHECKING:
    from abreast.engines.vllm.bench import VllmFailure, latency
    from abreast.engines.vllm.plugin import register
    from abreast.engines.vllm.writing import Continue, Sampling, writer

attach(__name__)
