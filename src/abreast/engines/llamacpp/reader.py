"""GGUF file -> checkpoint, published whole or not at all.

transformers has a reader of its own, which dequantises the weights and brings them into the
family's order. For what it does not know (scaled or partial rotations, biases, windows, how text is
split) it takes defaults in silence. So configuration and tokenizer are made here from the file
alone, and every tensor and every key of the architecture must be accounted for.
"""

from __future__ import annotations

import importlib.util
import math
import mmap
import os
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from abreast.checkpoint import (
    MAX_SHARD_BYTES,
    as_loaded,
    check_free,
    open_checkpoint,
    publish,
)
from abreast.engines.llamacpp.deci import llama3_factors, parse_dtype
from abreast.engines.llamacpp.tokenizer import make_tokenizer, special_ids
from abreast.errors import AbreastError, CheckpointError, first_line, install
from abreast.families import CONVERTIBLE, Family, all_tensors, complete

# Architectures whose layers were compared with llama.cpp's -> model_type
ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "phi3": "phi3",
    "starcoder2": "starcoder2",
    "nemotron": "nemotron",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
}
_KEYS = {  # without the architecture's name -> key in config.json
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_EPSILONS = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")
_PARTIAL = {"phi3", "nemotron"}  # may rotate a part of every head
_SAY_NOTHING = {"vocab_size", "rope.scaling.finetuned", "attention.causal"}
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# The largest Gemmas divide by another size than the head's, which files leave to their depth.
_LARGEST_GEMMAS = {("gemma2", 46), ("gemma3", 62)}
_NUMBERS = {0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4", 7: "?"} | {
    10: "u8",
    11: "i8",
    12: "f8",
}
_STRING, _ARRAY = 8, 9


class ImportRefused(AbreastError):
    """A GGUF file from which no checkpoint can be made."""


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: shape as torch has it, ggml's name of its type, place in the file."""

    shape: tuple[int, ...]
    kind: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class File:
    """A GGUF file without its weights. name: as the user wrote it. facts: its metadata."""

    path: Path
    name: str
    facts: Mapping[str, Any]
    tensors: Mapping[str, Stored]

    @property
    def kinds(self) -> dict[str, int]:
        """Type -> number of values, the most frequent type first."""
        counts: Counter[str] = Counter()
        for tensor in self.tensors.values():
            counts[tensor.kind] += math.prod(tensor.shape)
        return dict(counts.most_common())


def import_gguf(
    model: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    revision: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Write the GGUF file `model` as a checkpoint into the new folder `out`; return what it is.

    model: a path, or ORG/NAME:FILE.gguf on the Hugging Face Hub, in a revision if given. dtype:
    "float32", "bfloat16" or "float16"; None for that of unquantised weights, bfloat16 for others.
    dry_run: check everything that needs no weights and write nothing. Peak memory: the
    weights in `dtype`, twice the largest tensor in float32, and some GB for a large vocabulary.

    Raises AbreastError for what is no whole GGUF file of a language model, or of one that this
    package or transformers' reader does not know; `out` is then absent.
    """
    target = Path(out)
    check_free(target)
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ImportRefused(f"reading GGUF needs packages: {install('gguf')}")
    file = read_file(*_locate(str(model), revision))
    matrices = {t.kind for t in file.tensors.values() if len(t.shape) > 1}
    own = _PLAIN[matrices.pop()] if len(matrices) == 1 and matrices <= {*_PLAIN} else torch.bfloat16
    cast = parse_dtype(dtype) or own
    family, config = _config(file)
    shapes = _check_tensors(file, family, config)
    tokenizer = make_tokenizer(file.facts, file.name, config["vocab_size"])
    config.update(special_ids(file.facts), dtype=str(cast).removeprefix("torch."))
    nbytes = sum(map(math.prod, shapes.values())) * cast.itemsize
    if not dry_run:
        with publish(target, needed_bytes=nbytes + (64 << 20)) as staging:
            _write(file, config, tokenizer, cast, max_shard_bytes, staging)
            as_loaded(open_checkpoint(staging), family)
    return {
        "out": str(target),
        "source": file.name,
        "family": family.model_type,
        "layers": config["num_hidden_layers"],
        "dtype": config["dtype"],
        "bytes": nbytes,
        "kinds": file.kinds,
        "quantized": not {*file.kinds} <= {*_PLAIN},
        "tokens": len(file.facts["tokenizer.ggml.tokens"]),
        "chat_template": bool(tokenizer.chat_template),
    }


def _locate(model: str, revision: str | None) -> tuple[Path, str]:
    """The file's path, downloaded if need be, and its name."""
    repo, colon, name = model.partition(":")
    if os.path.isfile(model):
        return Path(model), model
    if os.path.isdir(model):
        raise ImportRefused(f"'{model}' is a folder; give the .gguf file in it")
    if not colon or repo.count("/") != 1 or not name.endswith(".gguf"):
        raise ImportRefused(f"no file '{model}'; give a GGUF file, or ORG/NAME:FILE.gguf")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, name, revision=revision)), model
    except Exception as error:  # the client raises many kinds; all mean that it is not available
        raise ImportRefused(
            f"the Hugging Face Hub does not give '{model}' ({first_line(error)}); "
            "check the name, the connection, or HF_TOKEN"
        ) from None


def read_file(path: Path, name: str) -> File:
    """Metadata and the places of the tensors. Raises CheckpointError for a damaged file."""
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise CheckpointError(f"'{name}' is not a GGUF file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return File(path, name, *_Reader(data, name).read())
    except OSError as error:
        raise CheckpointError(f"'{name}' cannot be read: {error.strerror}") from None
    except (
        struct.error,
        ValueError,
        ArithmeticError,
        LookupError,
        MemoryError,
        TypeError,
    ) as error:
        if isinstance(error, AbreastError):
            raise
        raise CheckpointError(
            f"'{name}' is not a whole GGUF file, or a damaged one; download it again"
        ) from None


class _Reader:
    """Goes through a file's bytes. Past their end struct and numpy raise."""

    def __init__(self, data: mmap.mmap, name: str) -> None:
        self.data, self.name, self.offset = data, name, 4

    def number(self, kind: str) -> Any:
        return self.numbers(kind, 1)[0]

    def numbers(self, kind: str, count: int) -> list[Any]:
        values = np.frombuffer(self.data, np.dtype(kind).newbyteorder("<"), count, self.offset)
        self.offset += values.nbytes
        return values.tolist()

    def string(self) -> str:
        length = self.number("u8")
        start, self.offset = self.offset, self.offset + length
        if self.offset > len(self.data):
            raise ValueError
        return self.data[start : self.offset].decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.number(_NUMBERS[kind])
        kind, count = self.number("u4"), self.number("u8")
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        return self.numbers(_NUMBERS[kind], count) if count else []

    def read(self) -> tuple[dict[str, Any], dict[str, Stored]]:
        import gguf

        version = self.number("u4")
        if version not in (2, 3):
            raise CheckpointError(
                f"'{self.name}' is of GGUF version {version}; llama.cpp converts it to version 3"
            )
        tensors, pairs = self.number("u8"), self.number("u8")
        facts = {self.string(): self.value(self.number("u4")) for _ in range(pairs)}
        entries = []
        for _ in range(tensors):
            name, dimensions = self.string(), self.number("u4")
            shape = tuple(reversed(self.numbers("u8", dimensions)))
            entries.append((name, shape, self.number("u4"), self.number("u8")))
        start = -self.offset % facts.get("general.alignment", 32) + self.offset
        stored = {}
        for name, shape, number, offset in entries:
            kind = gguf.GGMLQuantizationType(number)
            values, nbytes = gguf.GGML_QUANT_SIZES[kind]
            nbytes = math.prod(shape) // values * nbytes
            if start + offset + nbytes > len(self.data):
                raise CheckpointError(
                    f"'{self.name}' ends before tensor '{name}' does; download it again"
                )
            stored[name] = Stored(shape, kind.name, start + offset, nbytes)
        return facts, stored


def _architecture(file: File) -> str:
    facts, name = file.facts, f"'{file.name}'"
    if facts.get("split.count", 1) not in (0, 1):
        raise ImportRefused(
            f"{name} is one of {facts['split.count']} pieces; join them first: "
            "llama-gguf-split --merge FIRST_PIECE WHOLE.gguf"
        )
    kind = facts.get("general.type", "model")
    architecture = facts.get("general.architecture")
    embedding = file.tensors.get("token_embd.weight")
    if kind != "model" or architecture is None or embedding is None:
        what = f"of type {kind}" if kind != "model" else f"of architecture {architecture}"
        raise ImportRefused(f"{name} holds no language model, it is {what}; give the model's file")
    if architecture not in ARCHITECTURES:
        raise ImportRefused(
            f"{name} is of architecture {architecture}, which cannot be imported; "
            f"those that can are {', '.join(ARCHITECTURES)}"
        )
    if len(embedding.shape) != 2:
        raise CheckpointError(
            f"tensor 'token_embd.weight' in {name} is no matrix; download the file again"
        )
    return str(architecture)


def _config(file: File) -> tuple[Family, dict[str, Any]]:
    """The family and config.json, of which nothing is left to a default that files may state."""
    from transformers import AutoConfig

    architecture = _architecture(file)
    model_type = ARCHITECTURES[architecture]
    family, default = CONVERTIBLE[model_type], AutoConfig.for_model(model_type)
    prefix = f"{architecture}."
    own = {k.removeprefix(prefix): v for k, v in file.facts.items() if k.startswith(prefix)}
    for key, value in own.items():
        if isinstance(value, list):
            if len({*value}) != 1:
                raise ImportRefused(
                    f"'{file.name}' has layers of different shape ({prefix}{key}), which a "
                    f"{model_type} cannot have; give the checkpoint that it was made from"
                )
            value = own[key] = value[0]
        if isinstance(value, str) != (key == "rope.scaling.type"):
            raise CheckpointError(f"'{file.name}' has no valid {prefix}{key}; download it again")
    config: dict[str, Any] = {}
    for key, name in _KEYS.items():
        if key in own and (hasattr(default, name) or name == "head_dim"):
            config[name] = own.pop(key)
    for name in ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size"):
        if not isinstance(config.get(name), int) or config[name] < 1:
            key = next(key for key, entry in _KEYS.items() if entry == name)
            raise CheckpointError(f"'{file.name}' has no valid {prefix}{key}; download it again")
    if config["num_hidden_layers"] > len(file.tensors):  # also spares us names without end
        raise CheckpointError(
            f"the metadata of '{file.name}' say {config['num_hidden_layers']} layers, it holds "
            f"only {len(file.tensors)} tensors; they do not belong together"
        )
    heads = config["num_attention_heads"]
    head_dim = config.setdefault("head_dim", config["hidden_size"] // heads)
    config.setdefault("num_key_value_heads", heads)
    names = ("rms_norm_eps", "norm_epsilon", "norm_eps")
    epsilon = next(name for name in names if hasattr(default, name))
    key = next((key for key in _EPSILONS if key in own), _EPSILONS[epsilon != "rms_norm_eps"])
    if key not in own:
        raise CheckpointError(f"'{file.name}' has no valid {prefix}{key}; download it again")
    config[epsilon] = _short(own.pop(key))
    if hasattr(default, "query_pre_attn_scalar"):
        largest = (architecture, config["num_hidden_layers"]) in _LARGEST_GEMMAS
        config["query_pre_attn_scalar"] = config["hidden_size"] // heads if largest else head_dim
    named = _names(architecture, 1)
    for matrix in family.matrices:
        if matrix.bias not in ("", "always"):
            bias = named(f"{family.layer_prefix}0.{matrix.name}.bias")
            config[matrix.bias] = bias in file.tensors
    rope = _rope(file, own, head_dim, model_type)
    if model_type == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": own.pop("rope.freq_base_swa", 10000.0)}
        rope = {"full_attention": rope, "sliding_attention": local}
    config |= {
        "model_type": model_type,
        "rope_parameters": rope,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
    }
    if own.pop("attention.value_length", head_dim) != head_dim:
        raise ImportRefused(f"'{file.name}' has values of another size than keys; not supported")
    for key in own.keys() - _SAY_NOTHING:
        raise ImportRefused(f"'{file.name}' says {prefix}{key} = {own[key]}, not known here")
    return family, AutoConfig.for_model(**config).to_dict()


def _short(value: float) -> float:
    """A float32 as it was written: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope(file: File, own: dict[str, Any], head_dim: int, model_type: str) -> dict[str, Any]:
    """rope_parameters of config.json; takes the keys that it understands out of `own`."""
    theta = _short(own.pop("rope.freq_base", 10000.0))
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    rotated = own.pop("rope.dimension_count", head_dim)
    if model_type in _PARTIAL:
        rope["partial_rotary_factor"] = rotated / head_dim
    elif rotated != head_dim:
        raise ImportRefused(
            f"'{file.name}' rotates {rotated} of {head_dim} dimensions, which a {model_type} cannot"
        )
    kind, factor = own.pop("rope.scaling.type", "linear"), own.pop("rope.scaling.factor", 0.0)
    original = own.pop("rope.scaling.original_context_length", None)
    if kind != "none" and factor not in (0.0, 1.0):
        if kind not in ("linear", "yarn") or (kind == "yarn" and original is None):
            raise ImportRefused(f"'{file.name}' has RoPE scaling of kind {kind}, not known here")
        rope |= {"rope_type": kind, "factor": _short(factor)}
        if kind == "yarn":
            rope["original_max_position_embeddings"] = original
    if "rope_freqs.weight" in file.tensors:
        rope |= _llama3(file, theta, head_dim)
    return rope


def _llama3(file: File, theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3's scaling, of which a file holds only what it divides the frequencies by."""
    stored = file.tensors["rope_freqs.weight"]
    divisors = np.fromfile(file.path, "<f4", math.prod(stored.shape), offset=stored.offset)
    scaling = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "factor": float(divisors.max())}
    expected = llama3_factors(theta, head_dim, scaling, 8192)
    if len(divisors) != len(expected) or not np.allclose(divisors, expected, rtol=1e-4):
        raise ImportRefused(
            f"'{file.name}' scales frequencies (rope_freqs.weight) in another way than Llama 3 does"
        )
    return {"rope_type": "llama3", "original_max_position_embeddings": 8192, **scaling}


def _names(architecture: str, layers: int) -> Callable[[str], str]:
    """From transformers' names of tensors to those in a file."""
    import gguf

    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, layers)

    def named(name: str) -> str:
        stem, _, ending = name.rpartition(".")
        return f"{names.get_name(stem)}.{ending}"

    return named


def _check_tensors(
    file: File, family: Family, config: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    """The tensors of the checkpoint, name -> shape; the file must hold these and no others."""
    shapes = all_tensors(family, complete(config))
    named = _names(file.facts["general.architecture"], config["num_hidden_layers"])
    expected = {named(name): shape for name, shape in shapes.items()}
    for name in file.tensors.keys() - expected.keys() - {"rope_freqs.weight"}:
        raise ImportRefused(
            f"tensor '{name}' in '{file.name}' has no place in a {family.model_type}; "
            "give the checkpoint that the file was made from"
        )
    for name, shape in expected.items():
        if name not in file.tensors:
            raise CheckpointError(f"tensor '{name}' is missing from '{file.name}'; it is damaged")
        if file.tensors[name].shape != shape:
            raise CheckpointError(
                f"tensor '{name}' in '{file.name}' has shape {list(file.tensors[name].shape)}, "
                f"its metadata say {list(shape)}; they do not belong together"
            )
    return shapes


def _write(
    file: File,
    config: Mapping[str, Any],
    tokenizer: Any,
    dtype: torch.dtype,
    max_shard_bytes: int,
    staging: Path,
) -> None:
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    # Newer versions can keep the weights of some architectures as they are stored.
    settings = getattr(transformers, "GgufConfig", None)
    plain = {} if settings is None else {"quantization_config": settings(dequantize=True)}
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            file.path.parent,
            gguf_file=file.path.name,
            config=AutoConfig.for_model(**config),
            dtype=dtype,
            output_loading_info=True,
            **plain,
        )
    except (ImportError, NotImplementedError, ValueError) as error:
        raise ImportRefused(
            f"transformers cannot read '{file.name}': {first_line(error)}"
        ) from None
    for name in report["missing_keys"]:
        raise ImportRefused(f"transformers finds no tensor '{name}' in '{file.name}'")
    model.hf_quantizer = None  # else it refuses to save
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    # Generation ends at the end of a text, of a turn, or of a message.
    keys = [f"tokenizer.ggml.{end}_token_id" for end in ("eos", "eot", "eom")]
    ids = sorted({file.facts[key] for key in keys if key in file.facts})
    model.generation_config.eos_token_id = ids if len(ids) > 1 else next(iter(ids), None)
    model.save_pretrained(staging, max_shard_size=max_shard_bytes)
    tokenizer.save_pretrained(staging)
