"""Checkpoints on disk: tensors in and out, the manifest of a conversion, atomic writes."""

from typing import TYPE_CHECKING

from abreast.lazy import attach

if TYPE_CHECKING:
    from abreast.checkpoint.files import (
        INDEX,
        MANIFEST,
        Manifest,
        check_free,
        companions,
        copy_companions,
        damaged,
        finite,
        hash_entry,
        left_behind,
        model_hash,
        publish,
        read_json,
        read_manifest,
        replacing,
        resolve,
        sha256_of,
        write,
        write_manifest,
    )
    from abreast.checkpoint.tensors import (
        DTYPES,
        MAX_SHARD_BYTES,
        Checkpoint,
        NewTensor,
        TensorInfo,
        as_loaded,
        lay_out,
        open_checkpoint,
        plan_for,
        read_rows,
        write_shards,
    )

attach(__name__)
