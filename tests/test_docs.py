"""What the documents say exists: commands, options, scripts, links, pictures, names."""

from __future__ import annotations

import ast
import os
import re
import subprocess

import click
import pytest
from documents import (
    BEFORE,
    ELSEWHERE,
    FOREIGN_OPTIONS,
    LAYERS,
    LINKED,
    PAGES,
    PLANS,
    PROGRAMS_ELSEWHERE,
    ROOT,
    SHELL,
    SHORTER,
    SHOWN,
    SMALLER,
    all_commands,
    assigned,
    blocks,
    commands,
    has_rule,
    normal,
    prose,
    read,
    words_of,
)

import abreast
from abreast.cli.main import cli
from abreast.families import FAMILIES


def test_pages_and_commands_were_found():
    assert len(PAGES) >= 8 and {"sh", "python"} <= {b.language for p in PAGES for b in blocks(p)}
    assert len(all_commands()) >= 60
    assert commands("# no\nabreast a \\\n  b # c\n\n") == ["abreast a    b # c"]
    assert normal("abreast a    b # c") == "abreast a b"
    assert assigned("MODEL=$(abreast demo --path)  # or yours") == "abreast demo --path"


def test_every_block_has_a_known_language():
    known = SHELL | SHOWN | {"python"}
    strange = [f"{b.location}: {b.language!r}" for p in PAGES for b in blocks(p)]
    assert [entry for entry in strange if ast.literal_eval(entry.split(": ")[1]) not in known] == []


@pytest.mark.parametrize("page", PAGES)
def test_no_command_hides_in_an_indented_block(page):
    starts = r"^    (abreast|python|pip|make|vllm|torchrun|accelerate|curl|import|from) "
    assert re.findall(starts, prose(page), re.MULTILINE) == []


def test_every_command_has_a_rule():
    missing = [f"{block.location}: {c}" for block, c in all_commands() if not has_rule(c)]
    assert missing == [], "add them to ELSEWHERE with the reason why they cannot run here"
    assert not has_rule("docker run abreast") and not has_rule("X=$(whoami)")
    assert not has_rule("vllm serve OUT --new-option")


def test_no_entry_is_stale():
    seen = {normal(command) for _, command in all_commands()}
    assert sorted(set(ELSEWHERE) - seen) == []
    programs = {b.text.splitlines()[0] for p in PAGES for b in blocks(p) if b.language == "python"}
    assert sorted(set(PROGRAMS_ELSEWHERE) - programs) == []
    everything = "".join(read(page) for page in PAGES)
    assert [text for text in SMALLER if text not in everything] == []
    assert [option for option in FOREIGN_OPTIONS if option not in everything] == []
    ours = [set(words_of(c)) for _, c in all_commands() if words_of(c)[0] == "abreast"]
    assert [key for key in SHORTER if not any(set(key.split()) <= words for words in ours)] == []
    for table in (BEFORE, PLANS, LAYERS):
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
        if "abreast" in words[:-1]:
            try:
                parse(words[words.index("abreast") :])
            except click.UsageError as error:
                pytest.fail(f"{block.location}: {command}: {error.format_message()}")
            count += 1
    assert count >= 40


@pytest.mark.parametrize(
    "command", ["abreast convert M", "abreast eval M --agianst M", "abreast fly", "abreast heal"]
)
def test_parsing_finds(command):
    with pytest.raises(click.UsageError):
        parse(words_of(command))


def options_of(verb: str) -> set[str]:
    command = cli.commands[verb]
    parameters = command.get_params(click.Context(command))
    return {option for p in parameters for option in (*p.opts, *p.secondary_opts)}


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


@pytest.mark.parametrize("page", LINKED)
def test_files_in_the_text_exist(page):
    paths = r"(?<![\w/])(?:src/abreast|tests|benchmarks|scripts|examples)/[\w/.-]*\w"
    named = [path for path in re.findall(paths, read(page)) if "NAME" not in path]
    missing = [path for path in named if not (ROOT / path).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES)
def test_extras_in_the_text_exist(page):
    table = read("pyproject.toml").split("[project.optional-dependencies]\n")[1].split("\n[")[0]
    extras = set(re.findall(r"^(\w+) = \[", table, re.MULTILINE))
    assert set(re.findall(r"abreast\[(\w+)\]", read(page))) <= extras


@pytest.mark.parametrize("target", sorted(c for c in ELSEWHERE if c.startswith("make ")))
def test_make_knows(target):
    done = subprocess.run(
        ["make", "-n", *target.split()[1:]], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def anchors(page: str) -> set[str]:
    """Of the headings, as GitHub and the site make them."""
    anchors_of_page: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", text).strip().replace(" ", "-")
        count = sum(
            1 for known in anchors_of_page if re.fullmatch(rf"{re.escape(slug)}(-\d+)?", known)
        )
        anchors_of_page.add(f"{slug}-{count}" if count else slug)
    return anchors_of_page


def test_anchors_are_those_of_github():
    assert {"compute-abreast-estimate", "on-an-accelerator"} <= anchors("docs/speed.md")
    assert "exact-prefill-abreast-decode" in anchors("benchmarks/RESULTS.md")
    assert "not-there" not in anchors("docs/speed.md")


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
    for drawing in ("docs/idea.svg", "docs/architecture.svg"):
        assert "<title " in read(drawing) and "<desc " in read(drawing)


def test_reference_has_every_public_name():
    text = read("docs/api.md")
    listed = set(re.findall(r"^\| `abreast\.(\w+)` \|", text, re.MULTILINE))
    assert listed == set(abreast.__all__)
    directives = set(re.findall(r"^<!-- ::: abreast\.(?:\w+\.)+(\w+) -->$", text, re.MULTILINE))
    assert directives == set(abreast.__all__) - {"__version__"}


def test_every_chapter_is_in_the_tree_and_in_the_architecture():
    package = ROOT / "src/abreast"
    chapters = {init.parent.name for init in package.glob("*/__init__.py")}
    tree = set(re.findall(r"^      (\w+)/ ", read("README.md"), re.MULTILINE))
    assert tree == chapters
    assert chapters <= set(re.findall(r"\*\*(\w+)\*\*", read("docs/architecture.md")))


def test_the_table_of_limits_has_every_family_where_it_belongs() -> None:
    readme = read("README.md")
    table = readme.split("| families | `lp` group")[1].split("\n\n")[0].splitlines()[2:]
    first = [re.sub(r"\(.*?\)", "", row.split("|")[1]) for row in table]
    named = [re.findall(r"\w+", cell) for cell in first]
    only = [{"in memory only"} == {c.strip() for c in row.split("|")[2:4]} for row in table]
    for in_memory in (False, True):
        listed = [n for names, o in zip(named, only, strict=True) if o == in_memory for n in names]
        rows = (row for row in FAMILIES.values() if row.alone)
        assert sorted(listed) == sorted(
            row.model_type for row in rows if bool(row.matrices) != in_memory
        )
    mixed = re.findall(r"^\|(.+)\|-\|-\|members\|", read("docs/models.md"), re.MULTILINE)
    mixed = re.findall(r"`(\w+)`", " ".join(mixed))
    assert f"{' and '.join(mixed)} alternate two kinds" in readme


def test_readme_names_every_verb():
    words = set(re.findall(r"abreast ([\w-]+)", read("README.md")))
    assert set(cli.commands) - {"measure"} <= words


def test_table_of_the_demo_is_what_the_demo_prints(capsys):
    """Row by row; the numbers are those of another machine."""
    table = read("README.md").split("<!-- demo-table -->")[1].split("(2026")[0]
    rows = [line.split("|")[1].strip() for line in table.strip().splitlines()[2:]]
    source = read("src/abreast/cli/show.py").split("def print_demo")[1].split("\n\n\n")[0]
    shown = re.findall(r'\(\s*"([^"]+)"', source)
    assert rows == shown
