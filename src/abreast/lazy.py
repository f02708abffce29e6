"""Packages whose public names are imported at first use, so that importing them costs nothing.

A package lists its public names once, as ordinary imports under `if TYPE_CHECKING:`, where type
checkers and import-linter see them, and calls `attach(__name__)`.
"""

from __future__ import annotations

import ast
import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _Package(ModuleType):
    """A package that finds its public names when they are asked for.

    An exported function wins over the submodule of the same name (abreast.convert, heal.heal),
    which the import system would otherwise bind to the package.
    """

    _homes: dict[str, str]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name not in self._homes:
            raise AttributeError(f"module '{self.__name__}' has no attribute '{name}'")
        value = getattr(import_module(self._homes[name]), name)
        super().__setattr__(name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and name in self._homes):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._homes})


def attach(package: str) -> None:
    """Make the names that `package` imports under TYPE_CHECKING its lazy attributes."""
    module = sys.modules[package]
    homes = {}
    loader: Any = module.__loader__
    for block in ast.parse(loader.get_source(package)).body:
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING":
            for node in block.body:
                if isinstance(node, ast.ImportFrom) and node.module is not None:
                    homes.update({alias.name: node.module for alias in node.names})
    module.__dict__.update(
        _homes=homes, __all__=sorted({*homes, *module.__dict__} & {*homes, "__version__"})
    )
    module.__class__ = _Package


# Modules that task files, notebooks and docs/api.md of the first releases name by their old paths.
_MOVED = {
    "abreast.estimate": "abreast.speed.prediction",
    "abreast.grouped": "abreast.model.grouping",
    "abreast.harness": "abreast.evaluate.tasks",
    "abreast.load": "abreast.model.grouping",
    "abreast.measure": "abreast.planner.measuring",
    "abreast.planning": "abreast.planner.find",
    "abreast.verify": "abreast.convert.verification",
}


class _OldPaths(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in _MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = import_module(_MOVED[module.__name__])


def keep_old_paths() -> None:
    """Let `import abreast.measure` and its like find the modules where they are now."""
    if not any(isinstance(finder, _OldPaths) for finder in sys.meta_path):
        sys.meta_path.append(_OldPaths())
