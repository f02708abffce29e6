"""Stock llama.cpp's server in this process, for the tests that compare with it."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import xllamacpp


def serve(path: Path, **options: Any) -> xllamacpp.Server:
    """The file in llama.cpp, one thread, float32 cache, 256 tokens unless told otherwise."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 256, 1, False, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.no_extra_bufts = True  # repacked weights crash on CPUs with AMX
    for name, value in options.items():
        setattr(params, name, value)
    return xllamacpp.Server(params)


def post(server: xllamacpp.Server, path: str, data: Any) -> Any:
    request = urllib.request.Request(
        f"{server.listening_address}{path}",
        json.dumps(data).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())
