"""The house has floors: a module imports only from floors strictly below its own.

The files are parsed, not run, so lazy imports inside functions and imports for type checkers count
as well. `__init__` (which resolves its names lazily) and `__main__` stand apart.
"""

import ast
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src"
PACKAGE = SOURCE / "abreast"
MAX_LINES = 500

FLOORS = (  # from the ground up; "engines" stands for the whole folder
    ("errors",),
    ("plan", "families", "branches", "checkpoint", "modeling", "data", "quantizer", "hardware"),
    ("scoring", "stats", "figures", "manifest", "paired"),
    ("records", "charts", "diagram"),
    ("card",),
    (
        "accuracy",
        "fold",
        "grouped",
        "search",
        "estimate",
        "report",
        "findings",
        "front",
        "vocabulary",
        "timing",
    ),
    ("deci", "sharding"),
    ("load", "interventions", "runs", "losses", "recipe", "resume", "engines"),
    (  # the verbs
        "inspection",
        "convert",
        "verify",
        "measure",
        "study",
        "refit",
        "distill",
        "evaluate",
        "harness",
        "samples",
        "bench",
        "push",
    ),
    ("backends",),
    ("demo", "heal", "planning", "environment", "choices"),
    ("optimize", "play"),
    ("play_view",),
    ("play_page",),
    ("tables", "options"),
    ("cli_checkpoint", "cli_quality", "cli_plan", "cli_heal", "cli_speed", "cli_run", "cli_share"),
    ("cli",),
)
FLOOR_OF = {name: height for height, floor in enumerate(FLOORS) for name in floor}
APART = {"__init__", "__main__"}

# Modules that may import nothing outside the standard library and the package, but these.
ONLY = {
    "errors": set(),
    "plan": {"pydantic", "yaml"},
    "data": {"numpy"},
    "modeling": {"torch", "transformers", "huggingface_hub.dataclasses.strict"},
}
ONLY_LAZILY = {"data": {"datasets"}}
NEVER = {
    name: {"torch", "transformers"}
    for name in (
        *("search", "report", "findings", "stats", "front", "estimate", "timing", "paired"),
        *("records", "charts", "diagram", "card"),
    )
}
# modeling also ships inside checkpoints, where there is no abreast to import from
ALONE = {"modeling"}


@dataclass(frozen=True)
class Import:
    name: str  # dotted and absolute, with the imported name: "abreast.plan.Plan"
    line: int
    lazy: bool = False  # inside a function
    typing: bool = False  # under `if TYPE_CHECKING:`

    def inside(self, names: set[str]) -> bool:
        return any(self.name == name or self.name.startswith(f"{name}.") for name in names)


def module_name(path: Path) -> str:
    """engines/vllm.py -> engines.vllm; engines/__init__.py -> engines."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imports(source: str, module: str, is_folder: bool = False) -> list[Import]:
    """Every import statement, and every import_module or __import__ of a written-out name."""
    here = ["abreast", *(module.split(".") if module not in APART else ["_"])]
    found = []

    def visit(node: ast.AST, lazy: bool, typing: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, lazy, typing) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = len(here) - node.level + is_folder
                base = ".".join([*here[: max(up, 1)], *filter(None, [node.module])])
            for alias in node.names:
                found.append(Import(f"{base}.{alias.name}", node.lineno, lazy, typing))
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func
            called = called.id if isinstance(called, ast.Name) else called
            if called in {"import_module", "__import__"} and isinstance(node.args[0].value, str):
                name = node.args[0].value
                name = f"abreast{name}" if name.startswith(".") else name
                found.append(Import(name, node.lineno, lazy, typing))
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.body:
                visit(child, lazy, True)
            for child in node.orelse:
                visit(child, lazy, typing)
            return
        for child in ast.iter_child_nodes(node):
            visit(child, lazy, typing)

    visit(ast.parse(source), False, False)
    return found


def floor_of(module: str) -> int | None:
    return FLOOR_OF.get(module.split(".")[0])


def faults(module: str, source: str, is_folder: bool = False) -> list[str]:
    """What is wrong with the imports of one module, one sentence each."""
    height = floor_of(module)
    if module not in APART and height is None:
        return [f"{module} is on no floor: add it to FLOORS in tests/test_imports.py"]
    wrong = []
    for item in imports(source, module, is_folder):
        top, _, rest = item.name.partition(".")
        where = f"{module}, line {item.line}: {item.name}"
        if module == "__init__":
            if not (item.lazy or item.typing) and top in {"abreast", "torch", "transformers"}:
                wrong.append(f"{where} is imported at the top; `import abreast` must stay lazy")
        elif module == "__main__":
            if not item.lazy and not item.inside({"abreast.cli"} | sys.stdlib_module_names):
                wrong.append(f"{where}: __main__ only calls the command line")
        elif top == "abreast":
            if module in ALONE:
                wrong.append(f"{where}: {module} ships without the package and must stand alone")
            elif rest == "__version__":
                continue
            elif floor_of(rest) is None:
                wrong.append(f"{where}: import it from the module it lives in")
            elif floor_of(rest) >= height:
                wrong.append(f"{where} is not on a floor below {module}")
        elif item.inside(NEVER.get(module, set())):
            wrong.append(f"{where}: {module} knows no {top}")
        elif module in ONLY:
            lazily = ONLY_LAZILY.get(module, set()) if item.lazy else set()
            if not item.inside(sys.stdlib_module_names | ONLY[module] | lazily):
                wrong.append(f"{where}: {module} may not import it")
    return wrong


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@pytest.mark.parametrize("module", FILES)
def test_module_keeps_to_its_floor(module):
    path = FILES[module]
    is_folder = path.name == "__init__.py" and module != "__init__"
    assert not faults(module, path.read_text(encoding="utf-8"), is_folder)


@pytest.mark.parametrize("module", FILES)
def test_module_is_not_too_long(module):
    length = len(FILES[module].read_text(encoding="utf-8").splitlines())
    assert length <= MAX_LINES, f"{module} has {length} lines, {MAX_LINES} are allowed: split it"


def test_files_were_found():
    assert {"__init__", "__main__", "cli", "errors", "plan"} <= set(FILES)


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("plan", "from abreast.cli import main", "not on a floor below plan"),
        ("plan", "from abreast.data import load_tokens", "not on a floor below plan"),
        ("fold", "def f():\n    from abreast.convert import convert", "line 2: abreast.convert"),
        ("fold", "from abreast import load", "not on a floor below fold"),
        ("fold", "import abreast.grouped as g", "not on a floor below fold"),
        ("fold", "from . import bench", "not on a floor below fold"),
        ("fold", "from .optimize import run", "not on a floor below fold"),
        ("engines.vllm", "from ..load import load", "not on a floor below engines.vllm"),
        ("engines.vllm", "from . import gguf", "not on a floor below engines.vllm"),
        ("fold", "import_module('abreast.load')", "not on a floor below fold"),
        ("fold", "importlib.import_module('.load', 'abreast')", "not on a floor below fold"),
        ("fold", "if TYPE_CHECKING:\n    from abreast.load import load", "not on a floor"),
        ("convert", "from abreast import Plan", "import it from the module it lives in"),
        ("convert", "import abreast", "import it from the module it lives in"),
        ("helpers", "", "helpers is on no floor"),
        ("errors", "import click", "errors may not import it"),
        ("plan", "def f():\n    import torch", "plan may not import it"),
        ("data", "import datasets", "data may not import it"),
        ("data", "def f():\n    import torch", "data may not import it"),
        ("modeling", "from abreast.errors import AbreastError", "must stand alone"),
        ("modeling", "from .errors import AbreastError", "must stand alone"),
        ("modeling", "import numpy", "modeling may not import it"),
        ("modeling", "from huggingface_hub import hf_hub_download", "modeling may not import it"),
        ("search", "def f():\n    import torch.nn", "search knows no torch"),
        ("report", "from transformers import AutoConfig", "report knows no transformers"),
        ("__init__", "from .plan import Plan", "must stay lazy"),
        ("__init__", "import torch", "must stay lazy"),
        ("__main__", "import torch", "only calls the command line"),
    ],
)
def test_checker_finds(module, source, fault):
    found = faults(module, source)
    assert len(found) == 1
    assert fault in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("plan", "import re\nimport yaml\nfrom pydantic import BaseModel\nimport abreast.errors"),
        ("fold", "from abreast import plan\nfrom abreast.families import Family\nimport torch"),
        ("data", "import numpy.random\ndef f():\n    from datasets import load_dataset"),
        ("modeling", "import torch.nn\nfrom huggingface_hub.dataclasses import strict"),
        ("engines.vllm", "from ..modeling import config_class\nimport vllm"),
        ("convert", "from abreast import __version__\nimport_module(name)"),
        ("cli", "def f():\n    from .optimize import run"),
        ("__init__", "if TYPE_CHECKING:\n    from abreast.plan import Plan\nimport sys"),
        ("__init__", "def __getattr__(name):\n    from abreast import plan"),
        ("__main__", "from abreast.cli import main"),
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
    "arguments", [("-c", "import abreast, abreast.cli"), ("-m", "abreast", "--help")], ids=str
)
def test_command_line_starts_without_torch(arguments):
    loaded = loaded_by(*arguments)
    assert {"abreast", "abreast.cli"} <= loaded  # the account is complete
    assert not loaded & {"torch", "transformers"}


def test_missing_laziness_would_be_seen():
    assert "torch" in loaded_by("-c", "import torch")
