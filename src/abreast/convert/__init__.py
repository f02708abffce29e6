"""Rewriting a checkpoint under a plan, and proving the result."""

from typing import TYPE_CHECKING

from abreast.lazy import attach

if TYPE_CHECKING:
    from abreast.convert.adapter import convert_adapter
    from abreast.convert.inspect import inspect_model, known_models
    from abreast.convert.rewrite import convert, hash_inputs, preview
    from abreast.convert.rules import attention_kinds, check_format, obstacle, stays_apart
    from abreast.convert.verification import Verification, verify

attach(__name__)
