"""Run folders, which a later call continues, and the record of the environment."""

from typing import TYPE_CHECKING

from abreast.lazy import attach

if TYPE_CHECKING:
    from abreast.runs.environment import hardware, record_environment
    from abreast.runs.folder import (
        JOURNAL,
        check_tokens,
        cut,
        gather,
        model_hash,
        open_run,
        stream_of,
        to_csv,
        tokens_hash,
        window_bytes,
        windows_at_once,
    )

attach(__name__)
