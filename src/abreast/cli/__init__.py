"""The command line."""

from typing import TYPE_CHECKING

from abreast.lazy import attach

if TYPE_CHECKING:
    from abreast.cli.main import main

attach(__name__)
