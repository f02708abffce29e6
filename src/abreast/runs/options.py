"""How a field of a settings dataclass becomes an option of the command line."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def option(default: Any, text: str, name: str | None = None, **more: Any) -> Any:
    """A field with a default that is an option, see `cli.console`, which reads the metadata.

    text: its help. name: what it is called if not like the field. more: other metadata.
    """
    named = {} if name is None else {"option": name}
    return field(default=default, metadata={"help": text, **named, **more})
