"""SGLang's own source: what our models and their stand-in take for granted is there.

Read, not imported: SGLang's dependencies need CUDA. `make test-sglang` unpacks the package.
"""

from __future__ import annotations

import ast
import inspect
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / ".venv-sglang"
sys.path.insert(0, str(ROOT / "tests" / "engines"))
import sglang_stand_in as stand_in  # noqa: E402

Found = ast.ClassDef | ast.FunctionDef
NAMES = [(module, name) for module, names in stand_in.MODULES.items() for name in names]


def source_of(module: str) -> Path:
    path = PACKAGE.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def definition(module: str, name: str) -> Found | None:
    """Of a name that one can import from a module, wherever it comes from."""
    path = source_of(module)
    if not path.is_file():
        return None
    body = ast.parse(path.read_text(encoding="utf-8")).body
    for node in body:
        if isinstance(node, Found) and node.name == name:
            return node
    for node in body:
        if isinstance(node, ast.ImportFrom) and {alias.name for alias in node.names} & {name, "*"}:
            parents = module.split(".")[: -node.level or None] if node.level else []
            if node.level and path.name == "__init__.py":
                parents = module.split(".")[: len(module.split(".")) - node.level + 1]
            inner = ".".join([*parents, *([node.module] if node.module else [])])
            if inner.startswith("sglang") and (imported := definition(inner, name)):
                return imported
    return None


def method(module: str, kind: ast.ClassDef, *names: str) -> ast.FunctionDef | None:
    """The first of these methods that a class of SGLang has, or inherits."""
    for name in names:
        for node in kind.body:
            if isinstance(node, ast.FunctionDef) and node.name == name:
                return node
    for base in kind.bases:
        parent = definition(module, ast.unparse(base))
        if isinstance(parent, ast.ClassDef) and (own := method(module, parent, *names)):
            return own
    return None


def check(ours: inspect.Signature, theirs: ast.FunctionDef) -> None:
    """What we must give are its first arguments, in this order; it knows what else we may give."""
    arguments = theirs.args
    ordered = [a.arg for a in (*arguments.posonlyargs, *arguments.args) if a.arg != "self"]
    known = {*ordered, *(a.arg for a in arguments.kwonlyargs)}
    mine = [p for name, p in ours.parameters.items() if name != "self"]
    required = [p.name for p in mine if p.default is p.empty]
    assert ordered[: len(required)] == required, theirs.name
    assert {p.name for p in mine} <= known, theirs.name
    without_default = len(ordered) - len(arguments.defaults)
    assert without_default <= len(required), theirs.name


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_name_has_the_signature_of_the_stand_in(module, name):
    full = f"sglang.srt.{module}"
    theirs, ours = definition(full, name), stand_in.MODULES[module][name]
    assert theirs is not None, f"{full} has no {name}"
    if isinstance(theirs, ast.FunctionDef):
        check(inspect.signature(ours), theirs)
        return
    init, forward = (
        method(full, theirs, "__init__"),
        method(full, theirs, "forward", "forward_cuda"),
    )
    if name != "SiluAndMul":  # takes whatever it is given
        check(inspect.signature(ours.__init__), init)
    check(inspect.signature(ours.forward), forward)
    if "weight_loader" in ast.dump(theirs):
        load = method(full, theirs, "weight_loader")
        check(inspect.signature(ours.load), load)


def test_plugins_and_models_are_looked_for_where_ours_are():
    from abreast.engines.sglang.plugin import VARIABLE

    plugins = source_of("sglang.srt.plugins").read_text()
    assert 'GENERAL_PLUGINS_GROUP = "sglang.srt.plugins"' in plugins
    assert VARIABLE in source_of("sglang.srt.models.registry").read_text()
    assert "EntryClass" in source_of("sglang.srt.models.registry").read_text()
    # one list of attentions a layer, sorted by number, and as many layers as the config says
    setup = source_of("sglang.srt.model_executor.model_runner_components.layer_setup").read_text()
    assert "attention_layers.sort(key=lambda x: x.layer_id)" in setup
    assert 'getattr(model, "end_layer", model_num_layers)' in setup
