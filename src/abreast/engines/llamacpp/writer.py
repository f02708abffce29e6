"""Checkpoint -> GGUF file for unmodified llama.cpp: streaming, published whole or not at all.

Quantising is left to llama.cpp's own quantiser, a program or the Python binding, whichever this
machine has. It runs in a process of its own: where it does not like its input, it aborts.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from abreast.checkpoint import (
    MANIFEST,
    Checkpoint,
    Manifest,
    check_free,
    open_checkpoint,
    publish,
    read_manifest,
    read_rows,
    write,
)
from abreast.engines.llamacpp.deci import ARCHITECTURE, ExportError, GgufLayout, Piece, lay_out_gguf
from abreast.engines.llamacpp.vocabulary import Vocabulary, read_vocabulary
from abreast.errors import CheckpointError, install
from abreast.families import head_dim_of, positive
from abreast.version import __version__

CHUNK_BYTES = 4 << 20
# Names that llama.cpp gives its mixtures of types. Left out are those that need an importance
# matrix.
KINDS = (
    *("Q4_0", "Q4_1", "Q8_0", "Q5_0", "Q5_1", "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S"),
    *("Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "IQ4_NL", "IQ4_XS"),
)
_WITH_BINDING = """
import ctypes, sys
import llama_cpp
options = llama_cpp.llama_model_quantize_default_params()
options.ftype = int(sys.argv[3])
source, target = sys.argv[1].encode(), sys.argv[2].encode()
sys.exit(llama_cpp.llama_model_quantize(source, target, ctypes.byref(options)) and 1)
"""
Progress = Callable[[int, int], None]


def export(
    model: str | Path,
    out: str | Path,
    *,
    quantization: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a checkpoint, converted or not, to the new GGUF file `out`; return what was written.

    model: folder or Hugging Face id. quantization: one of KINDS, done by llama.cpp's own
    quantiser; None keeps the weights. dtype: "float32", "bfloat16" or "float16" for the matrices,
    None for the checkpoint's own; vectors are float32 always. progress(done, total): bytes written.
    Peak memory is a few chunks of 4 MiB, plus what the quantiser takes.

    Raises AbreastError for whatever llama.cpp cannot express and anything else the user can fix;
    `out` is then absent.
    """
    target = Path(out)
    check_free(target, "file")
    gguf = _gguf()
    if quantization is not None:
        check_quantizer(quantization)
    layout = lay_out_gguf(open_checkpoint(model, revision=revision), dtype)
    checkpoint = layout.checkpoint
    vocabulary = read_vocabulary(checkpoint.folder, positive(layout.config, "vocab_size"))
    needed = layout.nbytes * (2 if quantization else 1) + (64 << 20)
    with publish(target, needed_bytes=needed, kind="file") as staging:
        plain = staging.with_name("plain.gguf") if quantization else staging
        _write(gguf, plain, checkpoint, layout, vocabulary, progress)
        if quantization:
            quantize(plain, staging, quantization)
        size = staging.stat().st_size
    modelfile = target.with_name(f"{target.name}.Modelfile")
    write(modelfile, ollama_modelfile(target.name, vocabulary.chat_template))
    return {
        "out": str(target),
        "modelfile": str(modelfile),
        "architecture": ARCHITECTURE,
        "layers": len(layout.heads),
        "heads": list(layout.heads),
        "kv_heads": list(layout.kv_heads),
        "ffn": list(layout.ffn),
        "context": layout.context,
        "quantization": quantization,
        "tokenizer": f"{vocabulary.model}, {vocabulary.pre}",
        "chat_template": vocabulary.chat_template is not None,
        "bytes": size,
        "warnings": [*layout.warnings, *vocabulary.warnings],
    }


def ollama_modelfile(file: str, chat_template: str | None) -> str:
    """What `ollama create` reads, for a GGUF file beside it.

    Ollama knows Jinja templates by heart or not at all, and wants its own language: ChatML is
    written out, any other is left to it.
    """
    lines = [f"FROM ./{file}"]
    if chat_template is not None and "<|im_start|>" in chat_template:
        turn = "<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n"
        answer = "<|im_start|>assistant\n"
        lines += [
            f'TEMPLATE """{{{{- range .Messages }}}}{turn}{{{{ end }}}}{answer}"""',
            'PARAMETER stop "<|im_end|>"',
        ]
    return "\n".join(lines) + "\n"


def _gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise ExportError(f"writing GGUF needs a package: {install('gguf')}") from None
    return gguf


def check_quantizer(kind: str) -> None:
    """Raise ExportError unless `kind` is known and something here can quantise."""
    if kind not in KINDS:
        raise ExportError(f"quantisation '{kind}' is not one of {', '.join(KINDS)}")
    _quantizer(Path(), Path(), kind)


def quantize(source: Path, target: Path, kind: str) -> None:
    """Write `source`, a GGUF file, to `target` in the mixture of types that `kind` names.

    Raises ExportError with the quantiser's last words when it fails.
    """
    done = subprocess.run(
        _quantizer(source, target, kind), capture_output=True, text=True, errors="replace"
    )
    if done.returncode or not target.is_file():
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        reason = lines[-1] if lines else f"exit status {done.returncode}"
        raise ExportError(f"llama.cpp's quantiser failed: {reason}")


def _quantizer(source: Path, target: Path, kind: str) -> list[str]:
    """The command line that quantises."""
    program = shutil.which("llama-quantize")
    if program is not None:
        return [program, str(source), str(target), kind]
    if importlib.util.find_spec("llama_cpp") is not None:
        number = str(int(_gguf().LlamaFileType[f"MOSTLY_{kind}"]))
        return [sys.executable, "-c", _WITH_BINDING, str(source), str(target), number]
    raise ExportError(
        "quantising needs llama.cpp: install it so that llama-quantize is on the PATH "
        "(brew install llama.cpp, or from its releases), or pip install llama-cpp-python"
    )


def rows(checkpoint: Checkpoint, piece: Piece) -> Iterator[torch.Tensor]:
    """The values of one tensor, in chunks of whole heads or rows."""
    source = checkpoint.tensors[piece.source]
    unit = piece.head_dim or 1
    step = max(1, CHUNK_BYTES // max(1, source.row_bytes) // unit) * unit
    for start in range(piece.start, piece.stop, step):
        part = read_rows(source, start, min(piece.stop, start + step))
        if piece.head_dim:
            # transformers rotates dimension i with i + head_dim / 2, llama.cpp 2 i with 2 i + 1.
            halves = part.view(-1, 2, piece.head_dim // 2, *part.shape[1:])
            part = halves.transpose(1, 2).reshape(part.shape)
        if piece.scale != 1.0:
            part = part.to(torch.promote_types(part.dtype, torch.float32)) * piece.scale
        cast = part.to(piece.dtype)
        if not cast.isfinite().all():
            raise CheckpointError(
                f"tensor '{piece.source}' holds NaN or Inf, or exceeds the range of "
                f"{str(piece.dtype).removeprefix('torch.')}; check it, or give --dtype bfloat16"
            )
        yield cast.contiguous()


def _write(
    gguf: Any,
    path: Path,
    checkpoint: Checkpoint,
    layout: GgufLayout,
    vocabulary: Vocabulary,
    progress: Progress | None,
) -> None:
    types = {
        torch.float32: gguf.GGMLQuantizationType.F32,
        torch.float16: gguf.GGMLQuantizationType.F16,
        torch.bfloat16: gguf.GGMLQuantizationType.BF16,
    }
    converted = (checkpoint.folder / MANIFEST).is_file()
    manifest = read_manifest(checkpoint.folder) if converted else None
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    _write_metadata(gguf, writer, manifest, layout)
    writer.add_name(_name((manifest and manifest.source) or checkpoint.source, vocabulary))
    _write_vocabulary(writer, vocabulary)
    factors = torch.tensor(layout.rope_factors, dtype=torch.float32).numpy()
    if len(factors):
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for piece in layout.pieces:
        writer.add_tensor_info(
            piece.name, piece.shape, None, piece.nbytes, raw_dtype=types[piece.dtype]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    file, done = writer.fout[0], 0
    try:
        writer.write_padding(file, file.tell())
        if len(factors):
            file.write(factors.tobytes())
            writer.write_padding(file, factors.nbytes)
        for piece in layout.pieces:
            for part in rows(checkpoint, piece):
                flat = part.view(-1).view(torch.uint8)
                file.write(memoryview(flat.numpy()))  # type: ignore[arg-type]
                done += part.nbytes
                if progress is not None:
                    progress(done, layout.nbytes)
            writer.write_padding(file, piece.nbytes)
    finally:
        file.close()


def _name(source: str, vocabulary: Vocabulary) -> str:
    """Name of the model from `source`, kept from telling llama.cpp a wrong tokenizer.

    In models whose name holds phi-3, llama.cpp lets special tokens take the space after them, and
    fails to load if some of Phi 3's own are missing (src/llama-vocab.cpp).
    """
    # of a folder its own name, also of "." and "..", of a Hugging Face id what follows the owner
    name = (
        Path(source).resolve().name if os.path.isdir(source) else source.rstrip("/").split("/")[-1]
    )
    own = vocabulary.eats_space
    if own and not re.search("phi-?3", name, re.IGNORECASE):
        return f"{name} (Phi-3)"
    return name if own else re.sub("(phi)(-?)(3)", r"\1 \3", name, flags=re.IGNORECASE)


def _write_metadata(gguf: Any, writer: Any, manifest: Manifest | None, layout: GgufLayout) -> None:
    config, head_dim = layout.config, head_dim_of(layout.config)
    writer.add_string("abreast.version", __version__)
    if manifest is not None:
        writer.add_string("abreast.plan", manifest.plan.shorthand)
        writer.add_uint32("abreast.original_layers", manifest.plan.num_layers)
    writer.add_vocab_size(positive(config, "vocab_size"))
    writer.add_context_length(layout.context)
    writer.add_embedding_length(positive(config, "hidden_size"))
    writer.add_block_count(len(layout.heads))
    writer.add_head_count(list(layout.heads))
    writer.add_head_count_kv(list(layout.kv_heads))
    writer.add_feed_forward_length(list(layout.ffn))
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(float(config.get("rms_norm_eps") or 1e-6))
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(layout.rope_theta)
    if "type" in layout.rope:
        writer.add_rope_scaling_type(gguf.RopeScalingType(layout.rope["type"]))
        writer.add_rope_scaling_factor(layout.rope["factor"])
    if "orig_ctx_len" in layout.rope:
        writer.add_rope_scaling_orig_ctx_len(layout.rope["orig_ctx_len"])
    if "attn_factors" in layout.rope:
        writer.add_rope_scaling_attn_factors(layout.rope["attn_factors"])
    main = next(piece.dtype for piece in layout.pieces if len(piece.shape) > 1)
    file_types = {
        torch.float32: gguf.LlamaFileType.ALL_F32,
        torch.float16: gguf.LlamaFileType.MOSTLY_F16,
        torch.bfloat16: gguf.LlamaFileType.MOSTLY_BF16,
    }
    writer.add_file_type(file_types[main])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _write_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    for kind, index in vocabulary.special.items():
        getattr(writer, f"add_{kind}_token_id")(index)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    writer.add_add_space_prefix(vocabulary.space_prefix)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)
