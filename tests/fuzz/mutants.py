"""Mutation testing: change one place of the code and see whether a test notices; `make mutants`.

The mutants are drawn by seed from all changes of one operator, constant, condition, returned value
or statement in the modules below. Each is tried in a fork of a process that has imported torch,
transformers and pytest, but nothing of this package: the fork imports the changed module in place
of the true one and runs the quick tests that cover it, up to the first that fails. A hang counts as
noticed. What was tried is kept in build/, so the next call goes on; `--again` tries the survivors
anew, after a change of the tests.
"""

from __future__ import annotations

import argparse
import ast
import gc
import hashlib
import importlib
import importlib.util
import json
import math
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any

from ledger import add

ROOT = Path(__file__).parents[2]
COVERED_BY = {  # module -> its quick tests, those first that notice most per second
    "abreast.plan": ("test_plan.py", "convert/test_fold.py"),
    "abreast.convert.fold": ("convert/test_fold.py", "convert/test_refold.py"),
    "abreast.convert.rules": (
        "convert/test_fold.py",
        "families/test_families.py",
        "convert/test_known.py",
        "convert/test_formats.py",
        "convert/test_experts.py",
        "convert/test_convert.py",
    ),
    "abreast.planner.search": ("planner/test_search.py",),
    "abreast.heal.least_squares": ("heal/test_refit.py",),
    "abreast.heal.ridge": ("heal/test_refit.py",),
    "abreast.evaluate.statistics": ("evaluate/test_evaluate.py", "evaluate/test_harness.py"),
}
SPARE_SECONDS = 20  # of CPU beyond three times what the tests take with the true module
SPARE_BYTES = 4 << 30
_OPERATORS: dict[type[ast.AST], tuple[type[ast.AST], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,),
    ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Mult,),
    ast.Mod: (ast.Mult,),
    ast.Pow: (ast.Mult,),
    ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,),
    ast.And: (ast.Or,),
    ast.Or: (ast.And,),
    ast.USub: (ast.UAdd,),
}
Change = tuple[str, Callable[[], None]]  # what it is, and what makes it


@dataclass(frozen=True)
class Mutant:
    """One change. number: of the change among all of the module."""

    module: str
    number: int
    line: int
    change: str


def changes(node: ast.AST) -> Iterator[Change]:
    """What may be changed at a node, the nodes inside it left out."""
    if isinstance(node, ast.Compare):
        for index, old in enumerate(node.ops):
            for new in _OPERATORS[type(old)]:
                yield _named(old, new), lambda p=index, n=new: node.ops.__setitem__(p, n())
    elif isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp | ast.UnaryOp):
        for new in _OPERATORS.get(type(node.op), ()):
            yield _named(node.op, new), lambda n=new: setattr(node, "op", n())
    elif isinstance(node, ast.Constant):
        value = node.value
        others = (value + 1, value - 1) if isinstance(value, int | float) else ()
        for other in (not value,) if isinstance(value, bool) else others:
            yield f"{value} -> {other}", lambda o=other: setattr(node, "value", o)
    elif isinstance(node, ast.Return) and not _is_none(node.value):
        yield "return None", lambda: setattr(node, "value", ast.Constant(None))
    if isinstance(node, ast.If | ast.IfExp | ast.While | ast.Assert):
        yield "condition negated", lambda: setattr(node, "test", _negated(node.test))
    if isinstance(node, ast.comprehension):
        for index, condition in enumerate(node.ifs):
            other = _negated(condition)
            yield "condition negated", lambda p=index, o=other: node.ifs.__setitem__(p, o)
    for name in ("body", "orelse", "finalbody"):
        block = getattr(node, name, None)
        for index, statement in enumerate(block if isinstance(block, list) else ()):
            if _can_go(statement):
                what = f"dropped: {ast.unparse(statement).splitlines()[0][:60]}"
                yield what, lambda b=block, p=index: b.__setitem__(p, ast.Pass())


def _named(old: ast.AST, new: type[ast.AST]) -> str:
    return f"{type(old).__name__} -> {new.__name__}"


def _is_none(value: ast.expr | None) -> bool:
    return value is None or (isinstance(value, ast.Constant) and value.value is None)


def _negated(test: ast.expr) -> ast.expr:
    return test.operand if _is_not(test) else ast.UnaryOp(ast.Not(), test)  # type: ignore[attr-defined]


def _is_not(test: ast.expr) -> bool:
    return isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)


def _can_go(statement: ast.stmt) -> bool:
    """Calls and changes of what is there already; without a first assignment any run fails."""
    if isinstance(statement, ast.Expr):
        return not isinstance(statement.value, ast.Constant)
    if isinstance(statement, ast.Assign):
        return not any(isinstance(target, ast.Name | ast.Tuple) for target in statement.targets)
    return isinstance(statement, ast.AugAssign | ast.Raise | ast.Continue | ast.Break)


def nodes(tree: ast.Module) -> Iterator[ast.AST]:
    """What runs: all but annotations and what only type checkers read, in the order of the text."""
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        children = [
            child
            for name, value in ast.iter_fields(node)
            if name not in ("annotation", "returns")
            for child in (value if isinstance(value, list) else [value])
            if isinstance(child, ast.AST)
        ]
        todo += reversed(children)


def every_change(tree: ast.Module) -> Iterator[tuple[ast.AST, Change]]:
    for node in nodes(tree):
        for change in changes(node):
            yield node, change


def path_of(module: str) -> Path:
    return ROOT / "src" / Path(*module.split(".")).with_suffix(".py")


def source_of(module: str) -> str:
    """Hash of a module: numbers of mutants mean the same as long as it is the same."""
    return hashlib.sha256(path_of(module).read_bytes()).hexdigest()[:12]


def mutants_of(module: str) -> list[Mutant]:
    mutants, line = [], 0
    for number, (node, (what, _)) in enumerate(
        every_change(ast.parse(path_of(module).read_text()))
    ):
        line = getattr(node, "lineno", line)
        mutants.append(Mutant(module, number, line, what))
    return mutants


def compiled(mutant: Mutant | None, module: str) -> CodeType:
    path = path_of(module)
    tree = ast.parse(path.read_text())
    if mutant is not None:
        list(every_change(tree))[mutant.number][1][1]()
    return compile(ast.fix_missing_locations(tree), str(path), "exec")


class _Finder:
    """Imports one module from code that is given."""

    def __init__(self, module: str, code: CodeType) -> None:
        self.module, self.code = module, code

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != self.module:
            return None
        loader = SourceFileLoader(name, str(path_of(name)))
        loader.get_code = lambda fullname: self.code  # type: ignore[method-assign, assignment]
        return importlib.util.spec_from_file_location(name, path_of(name), loader=loader)


class _Watch:
    """Plugin of pytest: quick tests first; which failed first, and how long each took."""

    def __init__(self, lasting: dict[str, float]) -> None:
        self.lasting, self.failed = lasting, ""
        self.seconds: dict[str, float] = {}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items.sort(key=lambda item: self.lasting.get(item.nodeid, 0.0))

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            self.failed = self.failed or report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.failed = self.failed or f"{report.nodeid} cannot be imported"


@dataclass(frozen=True)
class Tried:
    """A run of the tests of a module. noticed: the first that failed, or what else went wrong.

    seconds: of CPU. lasting: seconds of each test. imported: modules there at the end.
    """

    noticed: str | None
    seconds: float
    lasting: dict[str, float]
    imported: list[str]


def attempt(
    module: str,
    mutant: Mutant | None,
    lasting: dict[str, float],
    cpu_seconds: float = math.inf,
) -> Tried:
    """Run the tests of a module in a fork, those that last the shortest first."""
    code = compiled(mutant, module)
    with tempfile.TemporaryDirectory() as folder:
        child = os.fork()
        if child == 0:
            _child(module, code, Path(folder), cpu_seconds, _Watch(lasting))
        watch = os.pidfd_open(child)
        patience = None if math.isinf(cpu_seconds) else 10 * cpu_seconds  # for busy machines
        if not select.select([watch], [], [], patience)[0]:
            os.kill(child, signal.SIGKILL)
        os.close(watch)
        _, status, usage = os.wait4(child, 0)
        shutil.rmtree(Path(folder, "made"), ignore_errors=True)
        said = Path(folder, "said.json")
        report = json.loads(said.read_text()) if said.exists() else ["", {}, []]
    ended = os.waitstatus_to_exitcode(status)
    if ended < 0:
        name = signal.Signals(-ended).name
        noticed: str | None = "too slow" if name in ("SIGXCPU", "SIGKILL") else name
    else:
        noticed = report[0] or f"status {ended}" if ended else None
    return Tried(noticed, usage.ru_utime + usage.ru_stime, report[1], report[2])


def _child(module: str, code: CodeType, folder: Path, cpu_seconds: float, watch: _Watch) -> None:
    status = 1
    try:
        os.chdir(ROOT)
        if not math.isinf(cpu_seconds):
            most = int(time.process_time() + cpu_seconds) + 1
            resource.setrlimit(resource.RLIMIT_CPU, (most, most + 5))
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        size = pages * resource.getpagesize() + SPARE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        null = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(null, number)
        sys.meta_path.insert(0, _Finder(module, code))  # type: ignore[arg-type]
        import pytest

        tests = [str(ROOT / "tests" / name) for name in COVERED_BY[module]]
        words = ["-q", "-x", "-m", "not slow", "-p", "no:cacheprovider"]
        status = int(pytest.main([*words, f"--basetemp={folder}/made", *tests], [watch]))
    except BaseException as error:
        watch.failed = watch.failed or repr(error)[:100].replace("\n", " ")
    finally:
        said = [watch.failed, watch.seconds, sorted(sys.modules)]
        Path(folder, "said.json").write_text(json.dumps(said))
        os._exit(status)


def warm_up(modules: list[str]) -> dict[str, tuple[float, dict[str, float]]]:
    """Import what tests import of other packages; how long each module's tests last."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= {"HYPOTHESIS_PROFILE": "mutants", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    sys.path.insert(0, str(ROOT / "src"))
    import pytest  # noqa: F401
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    known, state = ROOT / "build" / "mutants-warm.json", _state()
    tried: dict[str, Any] = json.loads(known.read_text()) if known.exists() else {}
    tried = tried if tried.get("state") == state else {"state": state}
    for module in modules:
        if module not in tried:
            true = attempt(module, None, {})
            if true.noticed:
                raise SystemExit(f"the tests of {module} fail without a change: {true.noticed}")
            print(f"{module}: {true.seconds:.1f} s", flush=True)
            imported = [name for name in true.imported if _is_other(name)]
            tried[module] = [true.seconds, true.lasting, imported]
            known.write_text(json.dumps(tried))
        for name in tried[module][2]:
            with suppress(Exception):  # what a test makes itself
                importlib.import_module(name)
        gc.collect()
        gc.freeze()
    return {module: tuple(tried[module][:2]) for module in modules}


def _state() -> str:
    """Hash of all that the tests run: where it is the same, they need not be tried unchanged."""
    digest = hashlib.sha256(sys.version.encode())
    for path in sorted((*ROOT.glob("src/**/*.py"), *ROOT.glob("tests/**/*.py"))):
        if path.parent != Path(__file__).parent:
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _is_other(name: str) -> bool:
    """Whether a module is of another package, judged by where it lies."""
    if name.split(".")[0] == "abreast":
        return False
    with suppress(Exception):
        spec = importlib.util.find_spec(name)
        return spec is not None and not (spec.origin or "").startswith(str(ROOT / "tests"))
    return False


def drawn(count: int, seed: int, modules: list[str]) -> list[Mutant]:
    every = [mutant for module in modules for mutant in mutants_of(module)]
    return random.Random(seed).sample(every, min(count, len(every)))


def wilson(hits: int, count: int) -> tuple[float, float]:
    """95 % interval of a share (E. B. Wilson, J. Am. Stat. Assoc. 22, 1927)."""
    z = 1.959964
    share, scale = hits / count, 1 + z * z / count
    middle = (share + z * z / (2 * count)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return middle - half, middle + half


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no mutant after so many")
    parser.add_argument("--modules", default=",".join(COVERED_BY), help="drawn from")
    parser.add_argument("--again", action="store_true", help="try those that survived anew")
    parser.add_argument("--record", action="store_true", help="add the counts to the ledger")
    options = parser.parse_args()
    modules = options.modules.split(",")
    chosen = drawn(options.n, options.seed, modules)
    results = ROOT / "build" / f"mutants-{options.seed}.jsonl"
    results.parent.mkdir(exist_ok=True)
    known, sources = {}, {module: source_of(module) for module in COVERED_BY}
    for line in results.read_text().splitlines() if results.exists() else ():
        entry = json.loads(line)
        if entry["source"] == sources[entry["module"]]:
            known[entry["module"], entry["number"]] = entry["noticed"]
    left = [m for m in chosen if (m.module, m.number) not in known]
    if options.again:
        left += [m for m in chosen if known.get((m.module, m.number), "") is None]
    if left:
        run(left, options.minutes, results, known)
    return conclude(chosen, known, options)


def run(
    left: list[Mutant], minutes: float, results: Path, known: dict[tuple[str, int], str | None]
) -> None:
    """Try mutants, the latest result last in the file, until the time is over."""
    if shutil.disk_usage("/dev/shm").free > 2 << 30:
        tempfile.tempdir = "/dev/shm"
    lasting = warm_up(sorted({mutant.module for mutant in left}))
    end = time.monotonic() + 60 * minutes
    with results.open("a", encoding="utf-8") as file:
        for mutant in left:
            if time.monotonic() > end:
                break
            whole, longest = lasting[mutant.module]
            tried = attempt(mutant.module, mutant, longest, 3 * whole + SPARE_SECONDS)
            known[mutant.module, mutant.number] = tried.noticed
            result = {"noticed": tried.noticed, "seconds": round(tried.seconds, 1)}
            result |= {"source": source_of(mutant.module)}
            entry = {**asdict(mutant), **result}
            file.write(json.dumps(entry) + "\n")
            file.flush()


def conclude(
    chosen: list[Mutant], known: dict[tuple[str, int], str | None], options: argparse.Namespace
) -> int:
    """Say how many were noticed, and list the others; 1 where some of those drawn are not tried."""
    tried = [m for m in chosen if (m.module, m.number) in known]
    survivors = []
    for mutant in sorted(tried, key=lambda m: (m.module, m.line)):
        if known[mutant.module, mutant.number] is None:
            path = path_of(mutant.module)
            text = path.read_text().splitlines()[max(0, mutant.line - 1)].strip()
            name = path.relative_to(ROOT / "src" / "abreast")
            survivors.append(f"{name}:{mutant.line}: {mutant.change}: {text}")
    print(*(f"survived: {line}" for line in survivors), sep="\n")
    killed = len(tried) - len(survivors)
    if not tried:
        return 1
    low, high = wilson(killed, len(tried))
    share = f"{killed / len(tried):.1%} [{low:.1%}, {high:.1%}]"
    print(
        f"seed {options.seed}: {killed} of {len(tried)} mutants noticed, {share}; "
        f"{len(chosen) - len(tried)} to go"
    )
    if len(tried) < len(chosen):
        return 1
    if options.record:
        counts = Counter(
            f"{m.module.removeprefix('abreast.')} "
            f"{'survived' if known[m.module, m.number] is None else 'killed'}"
            for m in tried
        )
        add(
            "mutants",
            options.seed,
            dict(sorted(counts.items())),
            0,
            killed=share,
            survivors=survivors,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
