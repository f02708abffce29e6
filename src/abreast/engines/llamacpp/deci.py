"""Any checkpoint in terms of llama.cpp's architecture `deci`: shapes, metadata, or why not.

llama.cpp made it for pruned Llamas (src/models/deci.cpp): it reads the number of heads, of
key-value heads and the FFN's size as one array entry per layer. That is what an lp group is: a
stock layer of its own width. It knows no q and k norms, no norms after a branch, no sliding window
and no cqil wiring. Nothing is read here but config and headers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from abreast.checkpoint import DTYPES, Checkpoint, as_loaded
from abreast.convert import attention_kinds
from abreast.errors import AbreastError, CheckpointError
from abreast.families import (
    CONVERTIBLE,
    Family,
    head_dim_of,
    is_tied,
    layer_configs,
    positive,
    sizes,
)
from abreast.targets import LLAMACPP, refusals

ARCHITECTURE = "deci"

_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_MATRICES = {  # name in the checkpoint -> names in the file, one for each part
    "self_attn.q_proj": ("attn_q",),
    "self_attn.k_proj": ("attn_k",),
    "self_attn.v_proj": ("attn_v",),
    "self_attn.qkv_proj": ("attn_q", "attn_k", "attn_v"),
    "self_attn.o_proj": ("attn_output",),
    "mlp.gate_proj": ("ffn_gate",),
    "mlp.up_proj": ("ffn_up",),
    "mlp.gate_up_proj": ("ffn_gate", "ffn_up"),
    "mlp.down_proj": ("ffn_down",),
}


class ExportError(AbreastError):
    """A model that llama.cpp cannot express."""


@dataclass(frozen=True)
class Piece:
    """One tensor of the file: rows start..stop of `source`. head_dim: if not 0, the rows of every
    head of that size are put into llama.cpp's order for rotation. scale: factor that folds in.
    """

    name: str
    source: str
    start: int
    stop: int
    columns: tuple[int, ...]
    dtype: torch.dtype
    head_dim: int = 0
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.stop - self.start, *self.columns)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class GgufLayout:
    """A model in deci's terms. checkpoint: as transformers loads it. heads, kv_heads, ffn: one for
    each layer. rope_factors: divisors of the rotation's frequencies, empty where they are all 1.
    rope: other metadata of the rotation.
    """

    checkpoint: Checkpoint
    family: Family
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    ffn: tuple[int, ...]
    context: int
    rope_theta: float
    rope: Mapping[str, Any]
    rope_factors: tuple[float, ...]
    pieces: tuple[Piece, ...]
    warnings: tuple[str, ...]

    @property
    def config(self) -> Mapping[str, Any]:
        return self.checkpoint.config

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)


def lay_out_gguf(checkpoint: Checkpoint, dtype: str | None = None) -> GgufLayout:
    """Say what would be written. Raises ExportError for what llama.cpp cannot express."""
    family = CONVERTIBLE.get(str(checkpoint.config.get("model_type")).removeprefix("abreast_"))
    config = {**dict(family.defaults if family else ()), **checkpoint.config}
    with _named("per_layer_config"):
        for reason in refusals(LLAMACPP, config, family):
            raise ExportError(reason)
        assert family is not None  # else refused
        checkpoint = as_loaded(checkpoint, family)
        config = checkpoint.config
        layers = layer_configs(config)
    head_dim = head_dim_of(config)
    cast = parse_dtype(dtype)
    context, warnings = _context(family, config)
    with _named("rope_parameters"):
        theta, rope, factors = _rope(config, head_dim, context)
    return GgufLayout(
        checkpoint=checkpoint,
        family=family,
        heads=tuple(own["num_attention_heads"] for own in layers),
        kv_heads=tuple(sizes(own)["K"] // head_dim for own in layers),
        ffn=tuple(own["intermediate_size"] for own in layers),
        context=context,
        rope_theta=theta,
        rope=rope,
        rope_factors=factors,
        pieces=tuple(_pieces(checkpoint, family, config, layers, cast)),
        warnings=checkpoint.warnings + warnings,
    )


@contextmanager
def _named(key: str) -> Iterator[None]:
    """Turns what a malformed part of config.json raises into one line that names it."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, AbreastError):
            raise
        raise CheckpointError(
            f"config.json: {key} makes no sense ({type(error).__name__}: {error}); "
            "download it again"
        ) from None


def parse_dtype(name: str | None) -> torch.dtype | None:
    """The dtype of this name, None for None. Raises ExportError for any other."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name is not None and name not in known:
        raise ExportError(f"dtype '{name}' is not one of {', '.join(known)}")
    return known[name] if name else None


def _context(family: Family, config: Mapping[str, Any]) -> tuple[int, tuple[str, ...]]:
    """Longest context, cut to where a sliding window does not slide yet."""
    longest = positive(config, "max_position_embeddings")
    window = config.get("sliding_window")
    slides = family.slides or "sliding_attention" in attention_kinds(config)
    if not isinstance(window, int) or not slides or window >= longest:
        return longest, ()
    return window, (
        f"its attention slides over {window} tokens, llama.cpp's would not: the file says that its "
        f"context is {window} tokens instead of {longest}",
    )


def _rope(
    config: Mapping[str, Any], head_dim: int, context: int
) -> tuple[float, dict[str, Any], tuple[float, ...]]:
    """Base, metadata by the writer's method, and factors of the frequencies."""
    settings = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = settings.get("rope_type") or settings.get("type") or "default"
    theta = float(settings.get("rope_theta") or config.get("rope_theta") or 10000.0)
    part = settings.get("partial_rotary_factor", config.get("partial_rotary_factor")) or 1.0
    if part != 1.0:
        raise ExportError(
            f"it rotates only {part:.0%} of every head, llama.cpp's {ARCHITECTURE} all of it; "
            "serve it with vLLM or transformers"
        )
    factor = float(settings.get("factor") or 1.0)
    if kind == "default":
        return theta, {}, ()
    if kind == "linear":
        return theta, {"type": "linear", "factor": factor}, ()
    original = settings.get("original_max_position_embeddings") or context
    if kind == "llama3":
        return theta, {}, llama3_factors(theta, head_dim, settings, original)
    usual = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "mscale": 0, "mscale_all_dim": 0}
    odd = [key for key, value in usual.items() if (settings.get(key) or value) != value]
    if settings.get("truncate") is False:
        odd.append("truncate")
    if kind != "yarn" or odd:
        raise ExportError(
            f"llama.cpp's {ARCHITECTURE} has no RoPE scaling of kind {kind}"
            f"{' with ' + ', '.join(odd) if kind == 'yarn' else ''}; "
            "serve it with vLLM or transformers"
        )
    rope = {"type": "yarn", "factor": factor, "orig_ctx_len": int(original)}
    if settings.get("attention_factor") is not None:
        # llama.cpp multiplies this one with the usual one.
        rope["attn_factors"] = settings["attention_factor"] / (0.1 * math.log(factor) + 1.0)
    return theta, rope, ()


def llama3_factors(
    theta: float, head_dim: int, settings: Mapping[str, Any], original: int
) -> tuple[float, ...]:
    """What Llama 3.1's scaling divides every frequency by; transformers' modeling_rope_utils."""
    factor, low, high = (
        float(settings[key]) for key in ("factor", "low_freq_factor", "high_freq_factor")
    )
    divisors = []
    for index in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (index / head_dim)
        if wavelength < original / high:
            divisors.append(1.0)
        elif wavelength > original / low:
            divisors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            divisors.append(1.0 / ((1.0 - smooth) / factor + smooth))
    return tuple(divisors)


def _pieces(
    checkpoint: Checkpoint,
    family: Family,
    config: Mapping[str, Any],
    layers: list[dict[str, Any]],
    cast: torch.dtype | None,
) -> Iterator[Piece]:
    scales = _scales(family, config, head_dim_of(config))

    def piece(name: str, source: str, start: int, stop: int, head_dim: int = 0) -> Piece:
        tensor = checkpoint.tensors[source]
        own = torch.promote_types(DTYPES[tensor.dtype], torch.bfloat16)
        own = torch.float32 if own == torch.float64 else DTYPES[tensor.dtype]
        dtype = torch.float32 if len(tensor.shape) == 1 else cast or own
        scale = scales.get(name.split(".")[-2], 1.0)
        return Piece(name, source, start, stop, tensor.shape[1:], dtype, head_dim, scale)

    def whole(name: str, source: str) -> Piece:
        return piece(name, source, 0, checkpoint.tensors[source].shape[0])

    yield whole("token_embd.weight", family.embedding)
    yield whole("output_norm.weight", f"{family.final_norm}.weight")
    if not is_tied(config):
        yield whole("output.weight", family.head)
    elif scales.get("token_embd", 1.0) * scales.get("output", 1.0) != 1.0:
        yield whole("output.weight", family.embedding)
    for index, own in enumerate(layers):
        size, head_dim = sizes(own), own["head_dim"]
        for norm, name in _NORMS.items():
            yield whole(f"blk.{index}.{name}.weight", f"{family.layer_prefix}{index}.{norm}.weight")
        for matrix in family.matrices:
            start = 0
            for part, name in zip(matrix.rows, _MATRICES[matrix.name], strict=True):
                stop = start + size[part]
                rotated = head_dim if name in ("attn_q", "attn_k") else 0
                for ending in ("weight", "bias"):
                    source = f"{family.layer_prefix}{index}.{matrix.name}.{ending}"
                    if source in checkpoint.tensors:
                        yield piece(f"blk.{index}.{name}.{ending}", source, start, stop, rotated)
                start = stop


def _scales(family: Family, config: Mapping[str, Any], head_dim: int) -> dict[str, float]:
    """Granite's multipliers, folded into the matrices that they multiply."""
    if family.branches.scale is None:
        return {}
    residual = float(config.get(family.branches.scale, 1.0))
    return {
        "token_embd": float(config.get("embedding_multiplier", 1.0)),
        "output": 1.0 / float(config.get("logits_scaling", 1.0)),
        "attn_q": float(config.get("attention_multiplier", 1.0)) * math.sqrt(head_dim),
        "attn_output": residual,
        "ffn_down": residual,
    }
