"""Original, grouped or converted model in memory: one way in."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from abreast.checkpoint import open_checkpoint, resolve
from abreast.errors import CheckpointError, first_line
from abreast.model.grouping import apply, decoder_layers
from abreast.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(
    model: str | Path,
    *,
    plan: Plan | str | None = None,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, Any]:
    """Load a model and its tokenizer; return (model, tokenizer), the tokenizer None if it has none.

    model: folder or Hugging Face id of an original or a converted checkpoint. plan: run it grouped
    under this plan, which may also be the path of a plan file. dtype: "auto" keeps that of the
    checkpoint. Code inside the checkpoint never runs unless trust_remote_code is set; converted
    checkpoints need none of it here.
    Raises AbreastError for whatever the user can mend.
    """
    import transformers

    import abreast.modeling  # noqa: F401  registers the converted architectures

    folder, _ = resolve(model, revision=revision)
    open_checkpoint(folder)
    try:
        target = torch.device(device)
    except RuntimeError:
        raise CheckpointError(f"device '{device}' is unknown; use cpu, cuda or cuda:1") from None
    if target.type == "cuda" and not torch.cuda.is_available():
        raise CheckpointError("no CUDA device here; use --device cpu")
    if isinstance(dtype, str) and dtype != "auto":
        dtype = named_dtype(dtype)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    # Left alone, transformers fills what is missing or does not fit with random numbers.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    _complain(folder, report)
    loaded = loaded.to(target).eval()
    if plan is not None:
        read = Plan.read(plan, len(decoder_layers(loaded))) if isinstance(plan, str) else plan
        apply(loaded, read)
    return loaded, load_tokenizer(folder, trust_remote_code=trust_remote_code)


def named_dtype(name: str) -> torch.dtype:
    """The floating-point dtype of this name. Raises AbreastError for any other name."""
    named = getattr(torch, name, None)
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise CheckpointError(f"dtype '{name}' is not one of float32, bfloat16, float16")
    return named


def _complain(folder: Path, report: dict[str, Any]) -> None:
    for name in sorted(report["missing_keys"]):
        raise CheckpointError(f"tensor '{name}' is missing from '{folder}'; download it again")
    for name, found, expected in sorted(report["mismatched_keys"]):
        raise CheckpointError(
            f"tensor '{name}' in '{folder}' has shape {list(found)}, config.json says "
            f"{list(expected)}; weights and config do not belong together"
        )


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a folder, or None. Raises AbreastError for one that cannot be loaded."""
    import transformers

    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    if not any((folder / name).is_file() for name in names):
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(
            f"the tokenizer in '{folder}' cannot be loaded: {first_line(error)}"
        ) from None


@contextmanager
def inference(*models: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every submodule is as it was."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        with torch.inference_mode():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def keeps_last(model: PreTrainedModel, count: int) -> dict[str, int]:
    """Arguments of a forward pass that make it compute logits of the last `count` positions only.

    Empty for a model class that knows no `logits_to_keep`.
    """
    known = inspect.signature(model.forward).parameters
    return {"logits_to_keep": count} if "logits_to_keep" in known else {}
