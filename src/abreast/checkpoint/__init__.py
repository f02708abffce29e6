"""Checkpoints on disk: tensors in and out, the manifest of a conversion, atomic writes."""

from typing import TYPE_CHECKING

from abreast.lazy import attach

if TYPE_CHECKING:
    from abreast.checkpoint.files import (
        INDEX,
        MANIFEST,
        Manifest,
        cannot_unpack,
        companions,
        copy_companions,
        damaged,
        finite,
        hash_entry,
        left_behind,
        locate,
        model_hash,
        own_file,
        read_json,
        read_manifest,
        read_text,
        resolve,
        sha256_of,
        unrecorded,
        weights_hash,
        write_manifest,
    )
    from abreast.checkpoint.loaded import as_loaded, check_has_layers, unpacked
    from abreast.checkpoint.publish import (
        LEAVING,
        check_free,
        held,
        publish,
        replacing,
        scratch,
        write,
    )
    from abreast.checkpoint.tensors import (
        ADAPTER,
        DTYPES,
        MAX_SHARD_BYTES,
        Checkpoint,
        NewTensor,
        TensorInfo,
        lay_out,
        open_checkpoint,
        plan_for,
        read_header,
        read_rows,
        write_shards,
    )

attach(__name__)
