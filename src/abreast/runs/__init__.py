"""Run folders, which a later call continues, and the record of the environment."""

from typing import TYPE_CHECKING

from abreast.lazy import attach

if TYPE_CHECKING:
    from abreast.runs.folder import (
        JOURNAL,
        Journal,
        check_least,
        check_tokens,
        damaged_record,
        hardware,
        identity_of,
        open_run,
        read_journal,
        read_record,
        record_environment,
        to_csv,
        token_stream,
        tokens_hash,
        versions_of,
        whole_windows,
        window_bytes,
        windows_at_once,
    )

attach(__name__)
