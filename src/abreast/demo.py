"""The whole job on the bundled model: convert, verify, evaluate, time.

Everything is measured where it runs. Only the plan is fixed beforehand: its groups were chosen on
calibration text that the evaluation does not touch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abreast.convert import Verification, convert, verify
from abreast.data import HELD_OUT, load_tokens
from abreast.errors import AbreastError
from abreast.evaluate import Comparison, compare
from abreast.model import load
from abreast.plan import Plan
from abreast.speed import BenchResult, bench, verdict

Step = Callable[[str], None]


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


def run_demo(
    *,
    plan: Plan | str | None = None,
    out: str | Path | None = None,
    max_tokens: int = 100_000,
    rounds: int = 12,
    new_tokens: int = 64,
    context: int = 128,
    dtype: str = "float32",
    device: str = "cpu",
    seed: int = 0,
    step: Step = lambda message: None,
) -> Demo:
    """Convert the bundled model, verify the conversion, and measure its quality and speed.

    plan: use it instead of the bundled one. out: keep the converted checkpoint in this new folder.
    max_tokens: held-out tokens to score. rounds, new_tokens, context: of the timing. dtype: of
    both models in evaluation and timing. step(message) announces each step.
    Raises AbreastError, also when the verification fails.
    """
    source = model_folder()
    chosen = Plan.load(source / "plan.yaml")
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
    with tempfile.TemporaryDirectory(prefix="abreast-demo-") as folder:
        yield Path(folder) / "converted"
