"""Run consecutive layers of a large language model side by side instead of one after another."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "AbreastError": "errors",
    "Group": "plan",
    "Plan": "plan",
    "convert": "convert",
    "grouped": "grouped",
    "load": "load",
    "verify": "verify",
}

__all__ = ["AbreastError", "Group", "Plan", "__version__", "convert", "grouped", "load", "verify"]

if TYPE_CHECKING:
    from abreast.convert import convert as convert
    from abreast.errors import AbreastError as AbreastError
    from abreast.grouped import grouped as grouped
    from abreast.load import load as load
    from abreast.plan import Group as Group
    from abreast.plan import Plan as Plan
    from abreast.verify import verify as verify


class _Package(ModuleType):
    """Lets a public function win over the submodule of the same name (convert, grouped, load, ...).

    Importing a submodule binds it to its package under its own name; whoever had imported
    `abreast.convert` first would otherwise find a module where the function should be.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOME and isinstance(value, ModuleType):
            value = getattr(value, name, value)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'abreast' has no attribute '{name}'")
    value = getattr(import_module(f"abreast.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
