"""Checkpoint x plan -> checkpoint: streaming, in bounded memory, published whole or not at all.

Nothing is instantiated. Every output tensor follows a rule (see fold.py) and is made row chunk by
row chunk, so that memory depends neither on the checkpoint's size nor on that of its largest
tensor. The result is an ordinary Hugging Face checkpoint whose layers differ in width.
"""

from __future__ import annotations

import json
import math
import platform
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import reduce
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from abreast.checkpoint import (
    DTYPES,
    INDEX,
    MAX_SHARD_BYTES,
    Checkpoint,
    NewTensor,
    as_loaded,
    check_free,
    companions,
    copy_companions,
    hash_entry,
    lay_out,
    left_behind,
    model_hash,
    open_checkpoint,
    publish,
    weights_hash,
    write_manifest,
    write_shards,
)
from abreast.convert import fp8
from abreast.convert.config import REMOTE_CODE, converted_config, write_tokenizer
from abreast.convert.fold import TensorRule, tensor_rules
from abreast.convert.rules import attention_kinds, check_format, check_plan, unreadable
from abreast.convert.stream import CHUNK_BYTES, stream
from abreast.errors import AbreastError, CheckpointError
from abreast.families import (
    DECI_CODE,
    FORMATS,
    MLX_CODE,
    Family,
    decoder_config,
    family_of,
    format_config,
    mlx_config,
    name_in,
    num_layers_of,
    padding_in,
    wrapped_config,
    wrapped_name,
)
from abreast.plan import Plan
from abreast.targets import refused_by
from abreast.version import __version__

_SAFETENSORS_NAME = {dtype: name for name, dtype in DTYPES.items()}
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Preview:
    """What a conversion would do. Sizes in bytes; peak_memory is over the interpreter's own.

    format_bytes: how many of bytes_written the format adds. refused_by: the engines that will not
    load the result, and why.
    """

    source: str
    family: str
    plan: str
    num_layers: int
    depth: int
    stages: tuple[tuple[int, ...], ...]
    architecture: str
    dtype: str
    bytes_read: int
    bytes_written: int
    format_bytes: int
    shards: tuple[str, ...]
    peak_memory: int
    warnings: tuple[str, ...]
    refused_by: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Rewrite:
    """A conversion that has passed every check that needs no weights.

    tensors: what the rules make. quantised: which of them are written as two, see fp8.
    """

    checkpoint: Checkpoint
    family: Family
    plan: Plan
    config: dict[str, Any]
    rules: tuple[TensorRule, ...]
    tensors: dict[str, NewTensor]
    quantised: frozenset[str]
    format_bytes: int
    shards: dict[str, list[NewTensor]]
    warnings: tuple[str, ...]

    @property
    def bytes_written(self) -> int:
        return sum(tensor.nbytes for shard in self.shards.values() for tensor in shard)


def preview(
    model: str | Path,
    plan: Plan | str,
    *,
    revision: str | None = None,
    force: bool = False,
    dtype: str | None = None,
    prefill: str = "grouped",
    form: str = "auto",
    quantize: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Preview:
    """Check everything that can be checked without reading weights, and say what would be done.

    Arguments and errors as for `convert`.
    """
    checkpoint = open_checkpoint(model, revision=revision, weights=False)
    job = prepare(checkpoint, plan, force, dtype, prefill, form, max_shard_bytes, quantize)
    return Preview(
        source=job.checkpoint.source,
        family=job.family.model_type,
        plan=job.plan.shorthand,
        num_layers=job.plan.num_layers,
        depth=job.plan.depth,
        stages=job.plan.stages,
        architecture=job.config["architectures"][0],
        dtype=str(job.config["dtype"]),
        bytes_read=job.checkpoint.nbytes,
        bytes_written=job.bytes_written,
        format_bytes=job.format_bytes,
        shards=tuple(job.shards),
        peak_memory=_peak_memory(job),
        warnings=(*job.warnings, *_left_behind(job.checkpoint)),
        refused_by=refused_by(decoder_config(job.config), job.family),
    )


def convert(
    model: str | Path,
    plan: Plan | str,
    out: str | Path,
    *,
    revision: str | None = None,
    force: bool = False,
    dtype: str | None = None,
    prefill: str = "grouped",
    form: str = "auto",
    quantize: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    healed: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Rewrite a checkpoint under a plan into the new folder `out`; return its manifest.

    model: folder or Hugging Face id. plan: a Plan, shorthand, or the path of a plan file; lp groups
    of any size (Layer Parallelism, arXiv 2502.02790, section 3, with every member's own norm kept
    exactly). force: allow groups with the first or last layer. dtype: "float32", "bfloat16" or
    "float16" to cast, None to keep. prefill: "sequential" lets the converted model run prompts in
    the original order and only decode abreast. form: "auto" for our classes, or stock ones where
    all layers come out alike; "deci", "deci-ff", "openelm" for other engines', and "mlx" for the
    original's layers with a model file for mlx-lm (families/formats). quantize: "fp8" for the
    matrices of layers in float8 with a scale for every block of 128 x 128 (fp8), None for none.
    max_shard_bytes: size limit of one safetensors file.
    healed: where `model` holds healed weights: how they were made, and under "source" the entry of
    the true original, which the manifest then names as the source. progress(done, total) is called
    with bytes written.

    The manifest, also written to abreast.json, records the plan and the sha256 of every input and
    output. Raises AbreastError for anything the user can fix; `out` is then absent.
    """
    target = Path(out)
    check_free(target)
    checkpoint = open_checkpoint(model, revision=revision)
    job = prepare(checkpoint, plan, force, dtype, prefill, form, max_shard_bytes, quantize)
    with publish(target, needed_bytes=job.bytes_written + (1 << 20)) as staging:
        _write_companions(job, staging)
        stop = threading.Event()
        with _threads_to_spare(), ThreadPoolExecutor(1) as hasher:
            inputs = hasher.submit(hash_inputs, job.checkpoint, stop)
            try:
                outputs = write_shards(staging, job.shards, _stream(job, progress))
                source_files = inputs.result()
                source, plan = job.checkpoint, job.plan
                if healed is None:  # else `heal` has done so with the true original
                    hashed = {name: row["sha256"] for name, row in source_files.items()}
                    sha256 = model_hash(hashed)
                    plan.check_model({sha256, weights_hash(hashed)}, source.source)
                    plan = plan.made_for(source.source, source.revision, sha256)
            except BaseException:
                stop.set()
                raise
        for path in sorted(p for p in staging.rglob("*") if p.is_file()):
            name = path.relative_to(staging).as_posix()
            if name not in outputs:
                outputs[name] = hash_entry(path)
        return write_manifest(
            staging,
            plan,
            source={
                "name": source.source,
                "revision": source.revision,
                "files": source_files,
                "dropped_tensors": list(job.checkpoint.dropped),
            },
            files=outputs,
            architecture=job.config["architectures"][0],
            warnings=job.warnings,
            versions={
                "python": platform.python_version(),
                "abreast": __version__,
                "torch": torch.__version__,
            },
            healed=healed,
        )


@contextmanager
def _threads_to_spare() -> Iterator[None]:
    """Leave two cores to the threads that hash: OpenMP waits for its slowest thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - 2))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def prepare(
    checkpoint: Checkpoint,
    plan: Plan | str,
    force: bool,
    dtype: str | None,
    prefill: str,
    form: str,
    max_shard_bytes: int,
    quantize: str | None = None,
) -> Rewrite:
    family = family_of(checkpoint.config)
    if quantize is not None:
        fp8.check_request(quantize, form, family)
    num_layers = num_layers_of(checkpoint.config)
    if isinstance(plan, str):
        plan = Plan.read(plan, num_layers)
    plan.check_layers(num_layers)
    checkpoint = read_original(checkpoint, family)
    config = checkpoint.config
    check_format(form, config, family, plan, wrapped=checkpoint.wrapper is not None)
    if checkpoint.wrapper and prefill != "grouped":
        raise AbreastError(f"--prefill {prefill} is for text alone, not for a decoder of images")
    joins = form == "auto" or FORMATS[form].joins
    planned = check_plan(config, plan, force=force, prefill=prefill, joins=joins)
    warnings = [*checkpoint.warnings, *planned]
    if prefill != "grouped" and form != "auto" and joins:
        raise AbreastError(f"--prefill {prefill} needs --format auto or mlx")
    cast = _cast_name(dtype)
    rules = tensor_rules(family, config, plan if joins else plan.ungrouped)
    quantised = frozenset[str]()
    if quantize is not None:
        quantised, warning = fp8.whole_blocks(family, config, rules, checkpoint.tensors)
        warnings += [warning] if warning else []
    if checkpoint.wrapper:
        quantised = frozenset(map(wrapped_name, quantised))
        checkpoint, rules = _with_wrapper(checkpoint, rules)
    new = _new_tensors(rules, checkpoint, cast)
    new |= {name: replace(new[name], dtype="F32") for name in quantised}
    dtypes = {tensor.dtype for name, tensor in new.items() if name not in quantised}
    main = str(DTYPES[next(iter(new.values())).dtype]).removeprefix("torch.")
    folded = sum(tensor.nbytes for tensor in new.values())
    new_config = _config(checkpoint, family, plan, main, prefill, joins)
    if quantised:
        head = wrapped_name(family.head) if checkpoint.wrapper else family.head
        new_config["quantization_config"] = fp8.settings(new, quantised, head)
    if form != "auto" and joins:
        paddings = [padding_in(form, new_config, rule.name) for rule in rules]
        rules = [
            replace(rule, name=name_in(form, rule.name), padding=padding)
            for rule, padding in zip(rules, paddings, strict=True)
        ]
        new = _new_tensors(rules, checkpoint, cast)
        new_config = format_config(form, new_config)
    if len(dtypes) > 1:
        warnings.append(f"the checkpoint mixes dtypes {', '.join(sorted(dtypes))}; they are kept")
    written = [
        part
        for name, tensor in new.items()
        for part in (fp8.stored(tensor) if name in quantised else (tensor,))
    ]
    return Rewrite(
        checkpoint=checkpoint,
        family=family,
        plan=plan,
        config=new_config,
        rules=tuple(rules),
        tensors=new,
        quantised=quantised,
        format_bytes=sum(tensor.nbytes for tensor in new.values()) - folded,
        shards=lay_out(written, max_shard_bytes),
        warnings=tuple(warnings),
    )


def _with_wrapper(
    checkpoint: Checkpoint, rules: Sequence[TensorRule]
) -> tuple[Checkpoint, list[TensorRule]]:
    """With what lies around the decoder, which is copied."""
    wrapped = [replace(rule, name=wrapped_name(rule.name)) for rule in rules]
    copied = [TensorRule(name, "copy", (name,)) for name in checkpoint.others]
    whole = {**checkpoint.tensors, **checkpoint.others}
    return replace(checkpoint, tensors=whole, others={}), wrapped + copied


def _config(
    checkpoint: Checkpoint, family: Family, plan: Plan, dtype: str, prefill: str, joins: bool
) -> dict[str, Any]:
    config = checkpoint.config
    if joins:
        new = converted_config(config, family, plan, dtype=dtype, prefill=prefill)
    else:
        new = mlx_config(config, family, plan, attention_kinds(config), dtype)
        new |= {"abreast_prefill": prefill} if prefill == "sequential" else {}
    return new if checkpoint.wrapper is None else wrapped_config(checkpoint.wrapper, new)


def _cast_name(dtype: str | None) -> str | None:
    if dtype is None:
        return None
    known = {str(d).removeprefix("torch."): n for n, d in DTYPES.items() if d != torch.float64}
    if dtype not in known:
        raise AbreastError(f"dtype '{dtype}' is not one of {', '.join(known)}")
    return known[dtype]


def _left_behind(checkpoint: Checkpoint) -> Iterator[str]:
    read = (*checkpoint.shards, INDEX)
    if names := left_behind(checkpoint.folder, read):
        more = f" and {len(names) - 9} more" if len(names) > 9 else ""
        yield f"left behind as no part of the model: {', '.join(names[:9])}{more}"


def read_original(checkpoint: Checkpoint, family: Family) -> Checkpoint:
    """The checkpoint as transformers loads it. Raises CheckpointError for what cannot be folded."""
    if reason := unreadable(checkpoint.config):
        raise CheckpointError(f"'{checkpoint.source}' {reason}")
    checkpoint = as_loaded(checkpoint, family)
    if not checkpoint.config.pop("auto_map", None):
        return checkpoint
    note = f"its own code (auto_map) stays behind: transformers has its {family.stock} by now"
    return replace(checkpoint, warnings=(*checkpoint.warnings, note))


def _new_tensors(
    rules: Iterable[TensorRule], checkpoint: Checkpoint, cast: str | None
) -> dict[str, NewTensor]:
    """What the rules make, by name: those of one name follow each other, row after row."""
    made: dict[str, NewTensor] = {}
    for rule in rules:
        sources = rule.members or (rule.like,)
        dtypes = [DTYPES[checkpoint.tensors[name].dtype] for name in sources]
        rows, *columns = rule.shape(checkpoint.tensors[sources[0]].shape)
        if (above := made.get(rule.name)) is not None:
            dtypes.append(DTYPES[above.dtype])
            rows += above.shape[0]
        dtype = _SAFETENSORS_NAME[reduce(torch.promote_types, dtypes)]
        if cast and not rule.name.endswith("_correction_bias"):  # which transformers never casts
            dtype = cast
        made[rule.name] = NewTensor(rule.name, dtype, (rows, *columns))
    return made


def hash_inputs(
    checkpoint: Checkpoint, stop: threading.Event | None = None
) -> dict[str, dict[str, Any]]:
    """sha256 and bytes of every file of a checkpoint that conversion reads or copies."""
    folder = checkpoint.folder
    names = ("config.json", *checkpoint.shards, *companions(folder))
    return {name: hash_entry(folder / name, stop=stop) for name in names}


def _write_companions(job: Rewrite, staging: Path) -> None:
    copy_companions(job.checkpoint.folder, staging)
    text = json.dumps(job.config, indent=2, sort_keys=True) + "\n"
    (staging / "config.json").write_text(text, encoding="utf-8")
    model_type = decoder_config(job.config)["model_type"]
    if model_type == job.family.model_type:
        return
    if model_type == job.family.converted_type:
        for name in REMOTE_CODE:
            shutil.copyfile(str(files("abreast") / name), staging / name)
    for key, name in (("auto_map", DECI_CODE), ("model_file", MLX_CODE)):
        if key in job.config and model_type != job.family.converted_type:
            shutil.copyfile(str(files("abreast.convert") / name), staging / name)
    write_tokenizer(job.checkpoint.folder, staging)


def _stream(job: Rewrite, progress: Progress | None) -> Iterator[tuple[str, torch.Tensor]]:
    total, done = job.bytes_written, 0
    for name, piece in stream(job.rules, job.checkpoint, job.tensors, job.quantised):
        done += piece.nbytes
        if progress is not None:  # before the yield: nobody comes back after the last one
            progress(done, total)
        yield name, piece


def _peak_memory(job: Rewrite) -> int:
    # A chunk is read, widened to float32 twice over while folding, and cast; four finished ones
    # wait for the writer, one is being written, and two hash buffers stand beside them.
    widest = max(
        (t.row_bytes for t in job.checkpoint.tensors.values() if len(t.shape) > 1), default=0
    )
    chunk = max(CHUNK_BYTES, max(map(len, job.plan.stages)) * widest)
    packed = [t.shape for t in job.checkpoint.tensors.values() if t.block and len(t.shape) == 3]
    expert = max((12 * math.prod(shape[1:]) for shape in packed), default=0)  # is unpacked whole
    # Rows of a block are collected, joined, divided by their scales and rounded.
    columns = max((job.tensors[name].shape[-1] for name in job.quantised), default=0)
    blocks = 6 * 4 * fp8.BLOCK * columns
    rest = 64 << 20  # buffers of the interpreter, threads, libraries
    return 12 * chunk + expert + blocks + rest
