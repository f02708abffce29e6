"""Run consecutive layers of a large language model side by side instead of one after another."""

from typing import TYPE_CHECKING

from abreast.lazy import attach, keep_old_paths
from abreast.version import __version__

if TYPE_CHECKING:
    from abreast.convert import convert, verify
    from abreast.errors import AbreastError
    from abreast.model import grouped, load
    from abreast.plan import Group, Plan

attach(__name__)
keep_old_paths()
