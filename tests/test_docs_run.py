"""Every command and every program in the documents runs; each page in a folder of its own."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from documents import (
    ASSIGNMENT,
    BEFORE,
    ELSEWHERE,
    LAYERS,
    PAGES,
    PLANS,
    PROGRAMS_ELSEWHERE,
    ROOT,
    SHELL,
    SMALLER,
    Block,
    blocks,
    commands,
    normal,
    shortened,
    words_of,
)

import abreast
from abreast.cli.main import main


@pytest.fixture(scope="session")
def models(tiny_checkpoint, tmp_path_factory) -> Callable[[int], Path]:
    """Random checkpoints with the bundled model's tokenizer, whose layers add little: 16 or 32."""
    from safetensors.torch import load_file, save_file

    from abreast.demo import model_folder

    made: dict[int, Path] = {}

    def model(layers: int) -> Path:
        if layers not in made:
            folder = tmp_path_factory.mktemp("docs") / f"model-{layers}"
            plain = tiny_checkpoint(num_layers=layers, vocab_size=4096, tied=True, hidden_size=32)
            shutil.copytree(plain, folder)
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(model_folder() / name, folder)
            weights = load_file(folder / "model.safetensors")
            for name in weights:
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    weights[name] *= 0.05
            save_file(weights, folder / "model.safetensors", {"format": "pt"})
            made[layers] = folder
        return made[layers]

    return model


class Runner:
    """Runs a page's blocks in order, in the current folder."""

    def __init__(self, model: Path, monkeypatch: Any, capsys: Any) -> None:
        self.model, self.monkeypatch, self.capsys = model, monkeypatch, capsys
        self.variables: dict[str, str] = {}
        self.names: dict[str, Any] = {"__name__": "docs"}
        self.ran = 0

    def run(self, block: Block, command: str) -> str:
        """One command; its standard output."""
        variable = ASSIGNMENT.match(command)
        if variable:
            self.variables[variable[1]] = self.run(block, variable[2]).strip()
            if variable[1] == "MODEL":  # the bundled model is slower than one made for this
                self.variables["MODEL"] = str(self.model)
            return ""
        if normal(command) in ELSEWHERE:
            return ""
        places = {"MODEL": str(self.model), "ORIGINAL": str(self.model)}
        places |= {f"${name}": value for name, value in self.variables.items()}
        words = [places.get(word, word) for word in words_of(command)][1:]
        self.monkeypatch.setattr(sys, "argv", ["abreast", *words, *shortened(words)])
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        out, err = self.capsys.readouterr()
        assert not left.value.code, f"{block.location}: {command}: {out}{err}"
        self.ran += 1
        return out

    def execute(self, block: Block) -> None:
        """One program, with the names of those before it on the page."""
        if block.text.splitlines()[0] in PROGRAMS_ELSEWHERE:
            return
        text = block.text.replace('"MODEL"', repr(str(self.model)))
        for page, smaller in SMALLER.items():
            text = text.replace(page, smaller)
        exec(compile("\n" * block.line + text, str(ROOT / block.page), "exec"), self.names)
        self.ran += 1


def labels(output: str) -> list[str]:
    """First column of a table in text."""
    return [re.split(r"\s{2,}", line)[0] for line in output.strip().splitlines()]


@pytest.fixture
def in_page(tmp_path, monkeypatch) -> Path:
    """The empty folder of a page, made the current one; main() as in a process of its own."""
    import transformers.dynamic_module_utils as remote

    for name, value in (("TRANSFORMERS_VERBOSITY", "error"), ("TQDM_DISABLE", "1")):
        monkeypatch.setenv(name, value)  # main sets them, and here they would stay
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(remote, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    (tmp_path / "page").mkdir()
    monkeypatch.chdir(tmp_path / "page")
    return tmp_path / "page"


def test_a_command_that_fails_is_noticed(in_page, monkeypatch, capsys):
    runner = Runner(in_page / "model", monkeypatch, capsys)
    block = Block("README.md", 1, "sh", "")
    with pytest.raises(AssertionError, match="line 1: abreast inspect MODEL"):
        runner.run(block, "abreast inspect MODEL")
    with pytest.raises(ZeroDivisionError):
        runner.execute(Block("README.md", 1, "python", "1 / 0\n"))
    assert labels("a b   1\nc  2\n") == ["a b", "c"]


NOTHING_RUNS_HERE = {"CONTRIBUTING.md"}  # its commands start these tests
QUICK = {"docs/faq.md"}
RUNNABLE = [page for page in PAGES if any(b.language in SHELL | {"python"} for b in blocks(page))]


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[] if page in QUICK else pytest.mark.slow)
        for page in RUNNABLE
        if page not in NOTHING_RUNS_HERE
    ],
)
def test_page_runs(page, models, in_page, monkeypatch, capsys):
    """Every command leaves with status 0; where a page shows an output, ours has the same rows."""
    model = models(LAYERS.get(page, 16))
    for name in PLANS.get(page, ()):
        abreast.Plan.parse("5+6 7|8", num_layers=16).save(name)
    runner = Runner(model, monkeypatch, capsys)
    for command in BEFORE.get(page, ()):
        runner.run(Block(page, 0, "sh", ""), command)
    runner.ran, output, expected = 0, "", 0
    for block in blocks(page):
        if block.language in SHELL:
            for command in commands(block.text):
                output = runner.run(block, command)
                expected += normal(command) not in ELSEWHERE
        elif block.language == "python":
            runner.execute(block)
            expected += block.text.splitlines()[0] not in PROGRAMS_ELSEWHERE
        elif block.language == "text":
            assert labels(output) == labels(block.text), block.location
    assert runner.ran == expected > 0


@pytest.mark.slow
def test_site_is_built(tmp_path):
    """Without a warning; and what it shows comes from nowhere else."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) >= len(PAGES)
    fetched = r'<(?:script|img|iframe|source)[^>]+src="?http|<link[^>]+href="?http[^>]+'
    for page in pages:
        addresses = re.findall(fetched, page.read_text(encoding="utf-8"))
        assert [tag for tag in addresses if 'rel="canonical"' not in tag] == [], page
    reference = (tmp_path / "site" / "docs" / "api.html").read_text(encoding="utf-8")
    for name in set(abreast.__all__) - {"__version__"}:
        assert f"{name}</code>" in reference or f".{name}" in reference, name
