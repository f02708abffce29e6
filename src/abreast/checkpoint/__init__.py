"""Checkpoints on disk: shards in and out, the manifest of a conversion, atomic publishing."""

from typing import TYPE_CHECKING

from abreast.lazy import attach

if TYPE_CHECKING:
    from abreast.checkpoint.atomic import check_free, finite, publish, write
    from abreast.checkpoint.files import (
        DTYPES,
        MANIFEST,
        MAX_SHARD_BYTES,
        Checkpoint,
        NewTensor,
        TensorInfo,
        companions,
        lay_out,
        open_checkpoint,
        read_json,
        read_rows,
        resolve,
        sha256_of,
        write_shards,
    )
    from abreast.checkpoint.manifest import damaged, read_manifest

attach(__name__)
