"""Run folders, which a later call continues, and the record of the environment."""

from typing import TYPE_CHECKING

from abreast.lazy import attach

if TYPE_CHECKING:
    from abreast.runs.folder import (
        JOURNAL,
        RIVALS_FOLDER,
        TEXT_FOLDER,
        Journal,
        check_least,
        check_run,
        check_tokens,
        check_window,
        damaged_record,
        environment,
        hardware,
        identity_of,
        open_run,
        read_journal,
        read_record,
        record_environment,
        recorded_dtype,
        to_csv,
        tokens_hash,
        versions_of,
        whole_windows,
        window_bytes,
        windows_at_once,
    )
    from abreast.runs.options import option
    from abreast.runs.own_text import (
        Author,
        Role,
        in_bfloat16,
        rows_at_once,
        save_texts,
        saved_texts,
    )
    from abreast.runs.text import conversations, share_written, token_stream

attach(__name__)
