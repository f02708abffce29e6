"""What a module may import, beyond the order of the chapters (import-linter, in pyproject.toml).

The files are parsed, not run, so lazy imports inside functions and imports for type checkers count
as well.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src"
PACKAGE = SOURCE / "abreast"
MAX_LINES = 500
MAX_TOP = 12  # files at the top of the package

# Modules that may import nothing outside the standard library and the package, but these.
ONLY = {
    "errors": set(),
    "plan": {"pydantic", "yaml"},
    "targets": set(),
    "data": {"numpy"},
    "modeling": {"torch", "transformers", "huggingface_hub.dataclasses.strict"},
    "modeling_members": {"torch"},
}
ONLY_LAZILY = {"data": {"datasets", "huggingface_hub"}}
# Read without torch: what a run folder holds, estimates, and the search.
NO_TORCH = {
    *(
        "checkpoint.files",
        "checkpoint.publish",
        "evaluate.statistics",
        "heal.recipe",
        "planner.front",
        "planner.search",
        "planner.objective",
    ),
    *("report.card", "report.charts", "report.diagram", "report.page", "report.records"),
    "report.guard",
    *("rivals.choose", "rivals.measured"),
    *("speed.hardware", "speed.prediction", "speed.shape", "speed.timing"),
}
# What reads or writes pickles, or runs what it reads.
PICKLES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
RUNS_CODE = {"torch.load", "torch.save", "np.load", "numpy.load", "eval", "exec"}
# These may be imported by their own path from outside their chapter.
OPEN = {"abreast.engines"}


def module_name(path: Path) -> str:
    """engines/vllm/plugin.py -> engines.vllm.plugin; engines/__init__.py -> engines."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
CHAPTERS = {name for name, path in FILES.items() if path.name == "__init__.py"} - {"__init__"}


def imports(source: str) -> list[tuple[str, int, bool]]:
    """(dotted name with the imported one, line, inside a function) of every import statement."""
    statements = []

    def visit(node: ast.AST, lazy: bool) -> None:
        if isinstance(node, ast.Import):
            statements.extend((alias.name, node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            statements.extend((f"{base}.{alias.name}", node.lineno, lazy) for alias in node.names)
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, lazy)

    visit(ast.parse(source), False)
    return statements


def calls(source: str) -> set[str]:
    """The functions called, as they are written."""
    return {ast.unparse(n.func) for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)}


def is_inside(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def faults(module: str, source: str) -> list[str]:
    """What is wrong with the imports of one module, one sentence each."""
    wrong = [f"{module}: {name}(...) may run code" for name in sorted(calls(source) & RUNS_CODE)]
    for name, line, lazy in imports(source):
        where = f"{module}, line {line}: {name}"
        if module == "modeling" and name.startswith(".modeling_members."):
            continue  # travels beside it
        if name.split(".")[0] in PICKLES:
            wrong.append(f"{where}: write safetensors and JSON, which run no code")
        elif name.startswith("."):
            wrong.append(f"{where}: write the whole path")
        elif is_inside(name, {"abreast"}):
            if module in ("modeling", "modeling_members"):
                wrong.append(f"{where}: {module} ships without the package and must stand alone")
            elif name.count(".") < 2 and name.removeprefix("abreast.") not in FILES:
                wrong.append(f"{where}: import it from the module it lives in")
            wrong += [f"{where}: import it from {chapter}" for chapter in passed_by(module, name)]
        elif module in NO_TORCH and is_inside(name, {"torch", "transformers"}):
            wrong.append(f"{where}: {module} is read without torch")
        elif module in ONLY:
            lazily = ONLY_LAZILY.get(module, set()) if lazy else set()
            if not is_inside(name, sys.stdlib_module_names | ONLY[module] | lazily):
                wrong.append(f"{where}: {module} may not import it")
    return wrong


def passed_by(module: str, name: str) -> list[str]:
    """The chapter whose __init__ an import from outside goes past, or nothing."""
    *packages, _ = name.split(".")
    if ".".join(packages[1:]) in CHAPTERS:
        return []
    for end in range(2, len(packages)):
        chapter = ".".join(packages[:end])
        if chapter in OPEN or chapter.removeprefix("abreast.") not in CHAPTERS:
            continue
        if not is_inside(f"abreast.{module}", {chapter}):
            return [chapter]
    return []


@pytest.mark.parametrize("module", FILES)
def test_module_imports_what_it_may(module):
    assert not faults(module, FILES[module].read_text(encoding="utf-8"))


def test_no_module_is_too_long():
    lengths = {name: len(path.read_text().splitlines()) for name, path in FILES.items()}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


def test_the_top_of_the_package_stays_small():
    assert {"__init__", "__main__", "cli.main", "errors", "plan"} <= set(FILES)
    assert sum(path.parent == PACKAGE for path in FILES.values()) <= MAX_TOP


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("convert.fold", "from abreast import Plan", "import it from the module it lives in"),
        ("convert.fold", "import abreast", "import it from the module it lives in"),
        ("convert.fold", "from ..plan import Plan", "write the whole path"),
        ("convert.fold", "from abreast.model.grouping import load", "import it from abreast.model"),
        ("convert.fold", "def f():\n    from pickle import loads", "which run no code"),
        ("heal.student", "torch.load('optimizer.pt')", "torch.load(...) may run code"),
        ("errors", "import click", "errors may not import it"),
        ("plan", "def f():\n    import torch", "plan may not import it"),
        ("data", "import datasets", "data may not import it"),
        ("data", "def f():\n    import torch", "data may not import it"),
        ("modeling", "from abreast.errors import AbreastError", "must stand alone"),
        ("modeling", "import numpy", "modeling may not import it"),
        ("modeling", "from huggingface_hub import hf_hub_download", "modeling may not import it"),
        ("planner.search", "def f():\n    import torch.nn", "is read without torch"),
        ("report.page", "from transformers import AutoConfig", "is read without torch"),
    ],
)
def test_checker_finds(module, source, fault):
    wrong = faults(module, source)
    assert len(wrong) == 1
    assert fault in wrong[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("plan", "import re\nimport yaml\nfrom pydantic import BaseModel"),
        ("convert.fold", "from abreast.families import Family\nimport torch"),
        ("convert.fold", "from abreast.convert.rules import check_plan"),
        ("data", "import numpy.random\ndef f():\n    from datasets import load_dataset"),
        ("modeling", "import torch.nn\nfrom huggingface_hub.dataclasses import strict"),
        ("speed.backends", "from abreast.engines.torch_tp import load_parallel"),
    ],
)
def test_checker_accepts(module, source):
    assert faults(module, source) == []


def loaded_by(*arguments: str) -> set[str]:
    """The modules that a fresh interpreter imports, by its own account (-X importtime)."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments],
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = (line for line in done.stderr.splitlines() if line.startswith("import time:"))
    return {line.rsplit("|", 1)[1].strip() for line in lines}


@pytest.mark.parametrize(
    "arguments",
    [
        ("-c", "import abreast, abreast.cli.main, abreast.report, abreast.convert"),
        ("-c", "from abreast.report import read_run; from abreast.speed import estimate"),
        ("-m", "abreast", "--help"),
    ],
    ids=str,
)
def test_starts_without_torch(arguments):
    loaded = loaded_by(*arguments)
    assert "abreast" in loaded  # the account is complete
    assert not loaded & {"torch", "transformers"}


def test_help_imports_no_schema_library():
    """Together they take longer than everything else that --help does."""
    assert not loaded_by("-m", "abreast", "--help") & {"pydantic", "yaml", "numpy"}


@pytest.mark.slow
def test_missing_laziness_would_be_seen():
    assert "torch" in loaded_by("-c", "import torch")


@pytest.mark.slow
def test_a_function_wins_over_the_module_of_its_name():
    code = (
        "import abreast, abreast.convert.rewrite, abreast.heal, abreast.study\n"
        "assert callable(abreast.convert) and callable(abreast.heal.heal)\n"
        "from abreast.study import study; assert callable(study)\n"
        "assert 'convert' in dir(abreast) and abreast.__version__"
    )
    loaded_by("-c", code)


def test_old_module_paths_still_work():
    code = (
        "from abreast.measure import measure; from abreast.planning import find_plan\n"
        "from abreast.estimate import estimate; from abreast.harness import local_data\n"
        "from abreast.grouped import grouped; from abreast.load import load\n"
        "from abreast.verify import verify; from abreast.evaluate import compare\n"
        "import abreast.planner; assert abreast.planner.find_plan is find_plan"
    )
    loaded_by("-c", code)
