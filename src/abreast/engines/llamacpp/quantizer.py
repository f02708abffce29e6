"""llama.cpp's own quantiser, wherever this machine has it: a program or the Python binding.

It runs in a process of its own: where llama.cpp does not like its input, it aborts the process.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

from abreast.errors import AbreastError

# Names that llama.cpp gives its mixtures of types, and their numbers (llama_ftype in llama.h). Left
# out are those that need an importance matrix.
KINDS = {
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q2_K": 10,
    "Q3_K_S": 11,
    "Q3_K_M": 12,
    "Q3_K_L": 13,
    "Q4_K_S": 14,
    "Q4_K_M": 15,
    "Q5_K_S": 16,
    "Q5_K_M": 17,
    "Q6_K": 18,
    "IQ4_NL": 25,
    "IQ4_XS": 30,
}

_WITH_BINDING = """
import ctypes, sys
import llama_cpp
options = llama_cpp.llama_model_quantize_default_params()
options.ftype = int(sys.argv[3])
source, target = sys.argv[1].encode(), sys.argv[2].encode()
sys.exit(llama_cpp.llama_model_quantize(source, target, ctypes.byref(options)) and 1)
"""


class QuantizerError(AbreastError):
    """No quantiser, no such kind, or one that failed."""


def check_quantizer(kind: str) -> None:
    """Raise QuantizerError unless `kind` is known and something here can quantise."""
    if kind not in KINDS:
        raise QuantizerError(f"quantisation '{kind}' is not one of {', '.join(KINDS)}")
    _command(Path(), Path(), kind)


def quantize(source: Path, target: Path, kind: str) -> None:
    """Write `source`, a GGUF file, to `target` in the mixture of types that `kind` names.

    Raises QuantizerError with the quantiser's last words when it fails.
    """
    done = subprocess.run(
        _command(source, target, kind), capture_output=True, text=True, errors="replace"
    )
    if done.returncode or not target.is_file():
        said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        reason = said[-1] if said else f"exit status {done.returncode}"
        raise QuantizerError(f"llama.cpp's quantiser failed: {reason}")


def _command(source: Path, target: Path, kind: str) -> list[str]:
    program = shutil.which("llama-quantize")
    if program is not None:
        return [program, str(source), str(target), kind]
    if importlib.util.find_spec("llama_cpp") is not None:
        return [sys.executable, "-c", _WITH_BINDING, str(source), str(target), str(KINDS[kind])]
    raise QuantizerError(
        "quantising needs llama.cpp: install it so that llama-quantize is on the PATH "
        "(brew install llama.cpp, or from its releases), or pip install llama-cpp-python"
    )
