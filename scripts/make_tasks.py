"""Make the items of the offline tasks in src/abreast/tasks from held-out standard-library modules.

    python scripts/make_tasks.py

Only modules that `abreast.data` holds out are read, so the bundled model was not trained on them.
The same Python version and seed give the same files, byte by byte; other versions have other
modules. Nothing here knows a tokenizer: the items are cut by characters, short enough for a context
of 256 tokens.
"""

from __future__ import annotations

import argparse
import io
import json
import keyword
import re
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from abreast.data import HELD_OUT, documents

FOLDER = Path(__file__).resolve().parents[1] / "src" / "abreast" / "tasks"
CONTEXT = 260  # characters
PER_MODULE = 12  # items; one long module with much repetition would fill a task otherwise
NAME = re.compile(r"[A-Za-z_][A-Za-z_0-9]{3,}")
CLOSERS = re.compile(r"(?<=[A-Za-z0-9])[)\]}]+[:,]?$")
ENDINGS = (")", "))", "):", ")):", "),", ")]", "])", "]", "]:", "],", "}", "},", "})")
AGAIN = re.compile(r"^(\s*(?:self\.)?(?P<name>[a-z_]{4,}) =)(?P<end> (?P=name))$")
CLOSED = re.compile(r"^(.{20,}?[(\[{][^()\[\]{}]*[A-Za-z0-9])(?P<end>[)\]}]+[:,]?)$")
Item = dict[str, object]
Sources = dict[str, list[str]]
Rng = np.random.Generator


def modules() -> Sources:
    """Lines of every held-out module that is code rather than a table."""
    sources = {}
    for name, text in documents(HELD_OUT):
        if not name.startswith("encodings/") and len(text) > 1500 and "\t" not in text:
            sources[name] = code_lines(text)
    return sources


def code_lines(text: str) -> list[str]:
    """The module's lines, those that belong to a docstring or comment replaced by ''."""
    lines = text.splitlines()
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            long = token.type == tokenize.STRING and token.end[0] > token.start[0]
            if long or token.type == tokenize.COMMENT:
                for number in range(token.start[0], token.end[0] + 1):
                    lines[number - 1] = ""
    except (tokenize.TokenError, SyntaxError, IndentationError):
        return []
    return [line.rstrip() for line in lines]


def contexts(lines: list[str]) -> Iterator[tuple[str, str]]:
    """(what comes before, line) for every line of code that has enough unbroken code before it."""
    for number, line in enumerate(lines):
        before = ""
        for earlier in reversed(lines[max(0, number - 14) : number]):
            if (not earlier and lines[number - 1] == "") or len(earlier) + len(before) > CONTEXT:
                break
            before = f"{earlier}\n{before}"
        if line and before.count("\n") >= 4 and "\n\n\n" not in before:
            yield before.lstrip("\n"), line


def indent_of(line: str) -> str:
    return line[: len(line) - len(line.lstrip())]


def choice(text: str, right: str, wrong: list[str], rng: Rng, end: str = "\n") -> Item:
    answer = int(rng.integers(len(wrong) + 1))
    options = [*wrong[:answer], right, *wrong[answer:]]
    return {"text": text, "choices": [option + end for option in options], "answer": answer}


def next_line(sources: Sources, rng: Rng) -> Iterator[tuple[str, Item]]:
    """Which of four lines comes next? The others are from other modules, indented alike."""
    plain = {
        name: sorted({line.strip() for line in lines if 16 <= len(line.strip()) <= 60})
        for name, lines in sources.items()
    }
    for name, lines in sources.items():
        others = [line for other, of_module in plain.items() if other != name for line in of_module]
        for before, line in contexts(lines):
            if 16 <= len(line.strip()) <= 60:
                drawn = [others[i] for i in rng.choice(len(others), 3, replace=False)]
                if line.strip() not in drawn:
                    wrong = [indent_of(line) + other_line for other_line in drawn]
                    yield name, choice(before, line, wrong, rng)


def last_name(sources: Sources, rng: Rng) -> Iterator[tuple[str, Item]]:
    """The last name of a line, which occurs in the lines before it but not in the very last one."""
    for module, lines in sources.items():
        for before, line in contexts(lines):
            names = [m for m in NAME.finditer(line) if line[m.start() - 1] == " "]
            if not names or names[-1].start() == len(indent_of(line)):
                continue
            name, start = names[-1].group(), names[-1].start() - 1
            last = before.rstrip("\n").rpartition("\n")[2]
            fresh = name not in line[:start] and name not in last
            if name in NAME.findall(before) and fresh and not keyword.iskeyword(name):
                yield module, {"text": before + line[:start], "target": f" {name}"}


def brackets(sources: Sources, rng: Rng) -> Iterator[tuple[str, Item]]:
    """How does the line end? Brackets closed in the right order and number, with or without ':'."""
    for module, lines in sources.items():
        for before, line in contexts(lines):
            end = CLOSERS.search(line)  # after a letter or digit: no token spans the cut
            if end and end.group() in ENDINGS and len(line.strip()) > 16:
                near = [e for e in ENDINGS if e != end.group()]
                drawn = [near[i] for i in rng.choice(len(near), 3, replace=False)]
                yield module, choice(before + line[: end.start()], end.group(), drawn, rng)


def line_end(sources: Sources, rng: Rng) -> Iterator[tuple[str, Item]]:
    """Write the rest of the line: the name in `self.size = size`, or what closes its brackets."""
    for module, lines in sources.items():
        for before, line in contexts(lines):
            for pattern in (AGAIN, CLOSED):
                if match := pattern.match(line):
                    yield module, {"text": before + match[1], "target": match["end"]}
                    break


def words_of(sources: Sources) -> list[str]:
    """Lower-case words that names in the modules consist of, the common ones."""
    counts = Counter(
        word
        for lines in sources.values()
        for name in NAME.findall("\n".join(lines))
        for word in name.split("_")
        if word.islower() and word.isalpha() and 4 <= len(word) <= 9
    )
    return sorted(w for w, n in counts.items() if n >= 8 and not keyword.iskeyword(w))


def attribute(sources: Sources, rng: Rng) -> Iterator[tuple[str, Item]]:
    """In context: every line before says self.A = A; write the end of another."""
    for word in rng.permutation(words_of(sources)).tolist():
        yield "", {"text": f"        self.{word} =", "target": f" {word}"}


def entry(sources: Sources, rng: Rng) -> Iterator[tuple[str, Item]]:
    """In context: every line before says "A_B": A_B; choose the end of another."""
    words = words_of(sources)
    while True:
        a, b, c, d = (words[i] for i in rng.choice(len(words), 4, replace=False))
        wrong = [f" {b}_{a},", f" {a}_{c},", f" {d}_{b},"]
        yield "", choice(f'    "{a}_{b}":', f" {a}_{b},", wrong, rng, end="")


TASKS: dict[str, Callable[[Sources, Rng], Iterator[tuple[str, Item]]]] = {
    "next_line": next_line,
    "last_name": last_name,
    "brackets": brackets,
    "line_end": line_end,
    "attribute": attribute,
    "entry": entry,
}
IN_CONTEXT = ("attribute", "entry")
EXAMPLES, SHORT = 40, 200  # of in-context tasks: rows that examples come from, and items


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, default=FOLDER)
    parser.add_argument("--items", type=int, default=160, help="Of tasks on snippets.")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sources = modules()
    for name, make in TASKS.items():
        rng = np.random.default_rng([options.seed, *name.encode()])
        count = EXAMPLES + SHORT if name in IN_CONTEXT else options.items
        by_module: dict[str, dict[str, Item]] = {}
        for module, item in make(sources, rng):
            by_module.setdefault(module, {}).setdefault(str(item["text"]), item)
            if name in IN_CONTEXT and len(by_module[module]) == count:
                break
        pool = []
        for items in (list(module_items.values()) for module_items in by_module.values()):
            most = count if name in IN_CONTEXT else PER_MODULE
            pool += [items[i] for i in sorted(rng.permutation(len(items))[:most].tolist())]
        chosen = [pool[i] for i in sorted(rng.permutation(len(pool))[:count].tolist())]
        path = options.out / f"{name}.jsonl"
        text = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in chosen)
        path.write_text(text, encoding="utf-8")
        print(f"{name}: {len(chosen)} of {len(pool)} items, {len(text.encode())} bytes")


if __name__ == "__main__":
    main()
