"""Hooks of mkdocs: the site is made of the files as they lie in the repository, links and all.

mkdocs reads one folder only, and links that leave it would break. Here every page keeps its path
from the root of the repository, so that a link which works there works on the site.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
BESIDE_DOCS = (
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "CHANGELOG.md",
    "LICENSE",
    "benchmarks/RESULTS.md",
    "benchmarks/LOG.md",
    "benchmarks/real_models/TEXTS.md",
    "src/abreast/demo_model/README.md",
    "src/abreast/demo_model/loss.png",
    "src/abreast/demo_model/training.log",
)


def on_files(files: Files, config: Any) -> Files:
    """Put the pages of docs/ where they lie below the root, and the other pages beside them."""
    inside = [file for file in files if file.src_dir == config.docs_dir]
    for file in inside:
        files.remove(file)
    for name in (*BESIDE_DOCS, *(f"docs/{file.src_uri}" for file in inside)):
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Let mkdocstrings see its directives, which hide in comments where nobody reads them."""
    return re.sub(r"^<!-- (::: \S+) -->$", r"\1", markdown, flags=re.MULTILINE)
