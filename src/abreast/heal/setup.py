"""What is healed, and on which text: the original in memory, its plan, its windows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from abreast.checkpoint import Checkpoint, as_loaded, open_checkpoint
from abreast.data import TokenStream
from abreast.errors import AbreastError, CheckpointError
from abreast.families import family_of
from abreast.heal.judging import other_kind
from abreast.heal.recipe import Recipe, check_enough, processes
from abreast.heal.train import HELD_OUT_TOKENS
from abreast.plan import Plan
from abreast.runs import token_stream, whole_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REFIT_TOKENS = 65_536


@dataclass(frozen=True)
class HealingText:
    """The healing text as windows [n, window]: for the regression, for training.

    judged: what neither saw, by source, and text of another kind. prefix: tokens before the text of
    every window.
    """

    refit: np.ndarray
    train: np.ndarray
    judged: dict[str, np.ndarray]
    prefix: tuple[int, ...]
    about: dict[str, Any]


@dataclass(frozen=True)
class Setup:
    """What is healed and how. load: the original into memory; model: what it gave.

    tensors: name -> shape of the original's.
    """

    source: Checkpoint
    tensors: Mapping[str, tuple[int, ...]]
    load: Callable[..., tuple[PreTrainedModel, Any]]
    model: PreTrainedModel
    plan: Plan
    recipe: Recipe
    work: Path
    seed: int
    step: Callable[[str], None]
    progress: Callable[[int, int], None] | None


def healable(model: str | Path, revision: str | None) -> Checkpoint:
    """The original, of a family that can be healed. Raises AbreastError for others."""
    source = open_checkpoint(model, revision=revision)
    family = family_of(source.config)
    if family.routes:
        raise AbreastError(
            f"a {family.model_type} has experts, which cannot be healed; convert it without healing"
        )
    if source.wrapper is not None:
        raise AbreastError(
            f"'{model}' is a decoder within a {source.config['within']}, which cannot be healed; "
            "convert it without healing"
        )
    return as_loaded(source, family)


def check_weights(
    student: PreTrainedModel, tensors: Iterable[str], model: str | Path, source: str
) -> None:
    """Raise AbreastError unless all weights are in memory, under the names in the checkpoint."""
    if any(parameter.is_meta for parameter in student.parameters()):
        raise AbreastError(
            f"'{model}' is larger than the devices here, and healing changes weights where they "
            "compute; use --device cpu, more devices, or several processes with --shard"
        )
    for name in sorted(set(tensors) - student.state_dict().keys()):
        raise CheckpointError(
            f"tensor '{name}' of '{source}' has another name in the loaded model; "
            "this architecture cannot be healed with this version of transformers"
        )


def healing_text(
    setup: Setup,
    data: str | TokenStream,
    tokenizer: Any,
    method: str,
    tokens: int | None,
    window: int,
    add_bos: bool | None,
    texts: Path,
    before_writing: Callable[[int], None],
) -> HealingText:
    """The text to heal on, cut into windows, and what is kept apart to judge by.

    before_writing: is told the tokens of a window before the model writes text, for minutes.
    """
    config = setup.model.config.get_text_config(decoder=True)
    longest = getattr(config, "max_position_embeddings", None)
    vocabulary = setup.model.get_input_embeddings().weight.shape[0]
    window = min(window, longest or window)
    if tokens is None:
        tokens = 0 if method == "distill" else REFIT_TOKENS
        if method != "refit":
            tokens = max(tokens, setup.recipe.steps * setup.recipe.windows * window)
        tokens += HELD_OUT_TOKENS

    def author() -> PreTrainedModel:
        before_writing(window)
        return setup.model

    stream = token_stream(
        data,
        tokenizer,
        setup.source.folder,
        max_tokens=tokens,
        window=window,
        seed=setup.seed,
        add_bos=add_bos,
        # what several processes write may differ in the last bit, and then in every word
        author=author if processes() == 1 else None,
        folder=texts,
        mixed=True,  # what is fitted on one kind of text helps another little
        step=setup.step,
    )
    size = min(len(stream), tokens)
    window = min(window, max(2, size // 8))
    windows = whole_windows(stream, size // window, window, longest=longest, vocabulary=vocabulary)
    num_held_out = max(1, min(HELD_OUT_TOKENS // window, len(windows) // 10))
    about = {
        "source": stream.source,
        "sha256": stream.sha256,
        "tokens": int(windows.size),
        "window": window,
        "held_out_tokens": num_held_out * window,
        "parts": stream.about()["parts"],
        **({"prefix": list(stream.prefix)} if stream.prefix else {}),
    }
    train, held_out = windows[:-num_held_out], windows[-num_held_out:]
    few = train[: max(1, REFIT_TOKENS // window)]
    if method != "distill":
        check_enough(few, "refit")
    if method != "refit":
        check_enough(train, "train")
    judged = {stream.source: held_out}
    if (other := other_kind(stream, tokenizer, num_held_out * window)) is not None:
        size = min(num_held_out, len(other) // window)
        judged[other.source] = whole_windows(
            other, size, window, longest=longest, vocabulary=vocabulary
        )
    return HealingText(few, train, judged, stream.prefix, about)
