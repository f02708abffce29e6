"""Checkpoint -> GGUF file for unmodified llama.cpp: streaming, published whole or not at all."""

from __future__ import annotations

import os
import re
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
)
from abreast.engines.llamacpp.deci import ARCHITECTURE, ExportError, Layout, Piece, lay_out
from abreast.engines.llamacpp.quantizer import check_quantizer, quantize
from abreast.engines.llamacpp.vocabulary import Vocabulary, read_vocabulary
from abreast.errors import CheckpointError
from abreast.families import head_dim_of, positive
from abreast.version import __version__

CHUNK_BYTES = 4 << 20
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

    model: folder or Hugging Face id. quantization: one of quantizer.KINDS, done by llama.cpp's own
    quantiser; None keeps the weights. dtype: "float32", "bfloat16" or "float16" for the matrices,
    None for the checkpoint's own; vectors are float32 always. progress(done, total): bytes written.
    Peak memory is a few chunks of 4 MiB, plus what the quantiser takes.

    Raises AbreastError for whatever llama.cpp cannot express and anything else the user can mend;
    `out` is then absent.
    """
    target = Path(out)
    check_free(target, "file")
    gguf = _gguf()
    if quantization is not None:
        check_quantizer(quantization)
    checkpoint = open_checkpoint(model, revision=revision)
    layout = lay_out(checkpoint, dtype)
    vocabulary = read_vocabulary(checkpoint.folder, positive(layout.config, "vocab_size"))
    needed = layout.nbytes * (2 if quantization else 1) + (64 << 20)
    with publish(target, needed_bytes=needed, kind="file") as staged:
        plain = staged.with_name("plain.gguf") if quantization else staged
        _write(gguf, plain, checkpoint, layout, vocabulary, progress)
        if quantization:
            quantize(plain, staged, quantization)
        size = staged.stat().st_size
    return {
        "out": str(target),
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
        "warnings": list(layout.warnings),
    }


def _gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise ExportError("writing GGUF needs a package: pip install 'abreast[gguf]'") from None
    return gguf


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
    layout: Layout,
    vocabulary: Vocabulary,
    progress: Progress | None,
) -> None:
    types = {
        torch.float32: gguf.GGMLQuantizationType.F32,
        torch.float16: gguf.GGMLQuantizationType.F16,
        torch.bfloat16: gguf.GGMLQuantizationType.BF16,
    }
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    _write_metadata(gguf, writer, checkpoint, layout)
    writer.add_name(_name(checkpoint, vocabulary))
    _write_vocabulary(writer, vocabulary)
    factors = torch.tensor(layout.rope_factors, dtype=torch.float32).numpy()
    if len(factors):
        kind = types[torch.float32]
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for piece in layout.pieces:
        kind = types[piece.dtype]
        writer.add_tensor_info(piece.name, piece.shape, None, piece.nbytes, raw_dtype=kind)
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


def _manifest(checkpoint: Checkpoint) -> Manifest | None:
    converted = (checkpoint.folder / MANIFEST).is_file()
    return read_manifest(checkpoint.folder) if converted else None


def _name(checkpoint: Checkpoint, vocabulary: Vocabulary) -> str:
    """The model's name, as long as it tells llama.cpp nothing wrong about the tokenizer.

    In models whose name holds phi-3, llama.cpp lets special tokens take the space after them, and
    fails to load if some of Phi 3's own are missing (src/llama-vocab.cpp).
    """
    manifest = _manifest(checkpoint)
    source = (manifest.source if manifest else None) or checkpoint.source
    # of a folder its own name, also of "." and "..", of a Hugging Face id what follows the owner
    name = (
        Path(source).resolve().name if os.path.isdir(source) else source.rstrip("/").split("/")[-1]
    )
    own = vocabulary.eats_space and {"<unk>", "<s>", "</s>", "<|endoftext|>"} <= {
        *vocabulary.tokens
    }
    if own and not re.search("phi-?3", name, re.IGNORECASE):
        return f"{name} (Phi-3)"
    return name if own else re.sub("(phi)(-?)(3)", r"\1 \3", name, flags=re.IGNORECASE)


def _write_metadata(gguf: Any, writer: Any, checkpoint: Checkpoint, layout: Layout) -> None:
    config, head_dim = layout.config, head_dim_of(layout.config)
    writer.add_string("abreast.version", __version__)
    manifest = _manifest(checkpoint)
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
    numbers = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}  # llama_ftype in llama.h
    writer.add_file_type(numbers[main])
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
