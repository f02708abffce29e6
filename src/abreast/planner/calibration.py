"""One calibration run: the cost of every candidate group alone, and how the layers depend.

The run's folder has measure.json (model, text and settings), the journal (every plan measured on
every batch of windows, those of later searches included), geometry.safetensors (similarities) and
stats.safetensors (the result). Nothing on disk is measured again.

All candidates are measured on a part of the text (`screen`), only the better ones (`keep`) on all
of it: the others would be in no good plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from abreast.checkpoint import Checkpoint, open_checkpoint
from abreast.convert import obstacle
from abreast.data import AUTO, OWN, TokenStream
from abreast.errors import AbreastError
from abreast.families import FAMILIES, num_layers_of, positive
from abreast.model import fitting_dtype, load, load_tokenizer, loaded_dtype
from abreast.plan import WIRING_NAMES, Group
from abreast.planner.engines import loaded_by
from abreast.planner.objective import Objective
from abreast.planner.scoring import (
    MIN_CALIBRATION_WINDOWS,
    Sample,
    Source,
    of_answers,
    of_tasks,
    of_text,
)
from abreast.planner.settings import WIRINGS, CalibrationSettings
from abreast.runs import (
    Author,
    Journal,
    Role,
    check_least,
    check_run,
    check_tokens,
    check_window,
    identity_of,
    open_run,
    read_journal,
    recorded_dtype,
    window_bytes,
    windows_at_once,
)
from abreast.targets import Unpaired

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KIND = "measure"
PLAN_SCREEN = 0.25  # share of the calibration text that every plan is measured on
QUESTION_TOKENS = 256  # that a question may have, however short the windows of text
DEPENDENCY_SHARE = 8  # the dependency matrix is taken on one window in so many


@dataclass(frozen=True)
class Calibration:
    """A model and the windows that its plans are measured on; made by `calibrate`.

    folder: of the run; checkpoint: of the model, named `source` by the user, of this revision where
    it comes from the Hub. sample: what is scored. size: items at once, windows of text or all
    windows of a question. candidates: the groups to measure.
    """

    folder: Path
    checkpoint: Path
    source: str
    sample: Sample
    size: int
    candidates: tuple[Group, ...]
    identity: dict[str, Any]
    settings: CalibrationSettings
    load: Author
    revision: str | None = None

    @property
    def model(self) -> PreTrainedModel:
        return self.load()

    @property
    def tokens(self) -> np.ndarray:
        """Int64 [num_windows, window]."""
        return self.sample.tokens

    @property
    def prefix(self) -> int:
        """How many tokens at the beginning of every window are there before the text."""
        return len(self.identity.get("prefix", ()))

    @property
    def objective(self) -> Objective:
        """What plans are ranked by, unless told otherwise."""
        return self.settings.scoring.objective

    def windows_of(self, batches: Iterable[int]) -> np.ndarray:
        """The numbers of the windows in these batches."""
        items = self.sample.items
        bounds = [np.searchsorted(items, (b * self.size, (b + 1) * self.size)) for b in batches]
        return np.concatenate([np.arange(begin, end) for begin, end in bounds])

    def journal(self) -> Journal:
        """What was measured, by program and batch."""
        return read_journal(self.folder, lambda batch: len(self.windows_of([batch])))

    @property
    def num_layers(self) -> int:
        return int(self.identity["num_layers"])

    @property
    def batches(self) -> range:
        return range(math.ceil(self.sample.num_items / self.size))


def candidates(
    config: dict[str, Any],
    *,
    max_group: int = 2,
    wirings: Sequence[str] = ("lp",),
    engines: Sequence[str] = (),
    degree: int = 1,
    unpaired: Unpaired = "shard",
    force: bool = False,
    in_memory: bool = False,
) -> tuple[Group, ...]:
    """Every group of 2 to max_group layers that could be formed, in each of the wirings.

    Left out: groups with the first or last layer unless force is set, groups that cannot be fused
    (see `obstacle`; with in_memory, those that cannot even run), groups that one of the engines
    does not load (degree, unpaired: see `refusals`), and, in families whose FFN reads the layer's
    input, wirings other than lp, which are the same there. Raises AbreastError for unknown wirings
    and engines and when none is left.
    """
    unknown = [wiring for wiring in wirings if wiring not in WIRING_NAMES]
    if unknown or not wirings:
        wrong = f"wiring '{unknown[0]}' is unknown" if unknown else "no wiring is named"
        raise AbreastError(f"{wrong}; choose from {', '.join(WIRING_NAMES)}")
    num_layers = num_layers_of(config)
    if not 2 <= max_group <= num_layers:
        raise AbreastError(f"groups of up to {max_group} layers: choose from 2 to {num_layers}")
    family = FAMILIES.get(str(config.get("model_type")))
    if family is not None and family.reads_one_input(config):
        wirings = ("lp",)
    edge = 0 if force else 1
    groups = []
    for size in range(2, max_group + 1):
        for first in range(edge, num_layers - size + 1 - edge):
            formed = (Group.wired(range(first, first + size), name) for name in wirings)
            groups += [
                group
                for group in formed
                if not obstacle(
                    config, group.layers, in_order=group.is_in_order, in_memory=in_memory
                )
            ]
    if not groups:
        raise AbreastError("no group of this model can be formed; see `abreast inspect`")
    return tuple(loaded_by(engines, groups, config, degree, unpaired))


def calibrate(
    model: str | Path,
    out: str | Path,
    settings: CalibrationSettings,
    *,
    stream: TokenStream | None = None,
    part: tuple[int, int] = (0, 1),
    text: Path | None = None,
    role: Role = "calibrate",
    author: Author | None = None,
    option: str = "--data",
    step: Callable[[str], None] = lambda message: None,
) -> Calibration:
    """Read a model's headers and its calibration text, and open folder `out` for a run on them.

    model: folder or Hugging Face id of an original of any family that can run grouped. stream:
    measure on this instead of the source in the settings. part: which one of how many parts of the
    text, each as long as the settings say; no two have a window in common. text: the folder that
    keeps what the model writes for it, `out` by default. role, option, step: see `token_stream`.
    author: gives the loaded model, where another calibration of it has it.

    Raises AbreastError for fewer than MIN_CALIBRATION_WINDOWS windows of text, a folder with a run
    on another model, other text or sizes, or anything else in it, and as `load` and `load_tokens`.
    """
    window = settings.window
    check_least(
        {
            "the number of windows": (settings.num_windows, MIN_CALIBRATION_WINDOWS),
            "the window": (window, 2),
            "the batch size": (settings.batch_size, 1),
        }
    )
    checkpoint = open_checkpoint(model, revision=settings.revision)
    config, run = checkpoint.config, Path(out)
    recorded = recorded_dtype(run, KIND)
    fitting = fitting_dtype(
        checkpoint, settings.dtype, settings.device, recorded=recorded, step=step
    )
    settings = replace(settings, dtype=fitting)
    groups = candidates_of(config, settings)
    at_once = windows_at_once(window_cache(checkpoint, settings), settings.max_cache_bytes)
    check_window(window, config.get("max_position_embeddings"))
    check_run(run, KIND)
    options: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code}
    tokenizer = load_tokenizer(checkpoint.folder, **options) if stream is None else None
    options |= {"dtype": settings.dtype, "device": settings.device}
    loaded = author or cache(lambda: load(checkpoint.folder, **options)[0])
    source = Source(tokenizer, checkpoint.folder, loaded, text or run, option, role, step)
    scoring = settings.scoring
    if stream is not None or scoring.score == "kl":
        sample = of_text(source, settings, stream, part, config)
    elif scoring.score == "answers":
        sample = of_answers(source, settings, part)
    else:
        sample = of_tasks(source, settings, part)
    check_tokens(sample.tokens, positive(config, "vocab_size"))
    size = max(1, min(len(sample.tokens), settings.batch_size, at_once) // sample.per_item)
    identity = identity_of(
        checkpoint.folder,
        sample.tokens,
        sample.prefix,
        num_layers=num_layers_of(config),
        batch=size,
        seed=settings.seed,
        dtype=settings.dtype,
    )
    identity |= sample.identity
    return Calibration(
        folder=open_run(run, KIND, identity),
        checkpoint=checkpoint.folder,
        source=str(model),
        sample=sample,
        size=size,
        candidates=groups,
        identity=identity,
        settings=settings,
        load=loaded,
        revision=checkpoint.revision,
    )


def search_texts(
    model: str | Path,
    out: str | Path,
    settings: CalibrationSettings,
    held_out_data: str | None = None,
    *,
    repeat: int = 1,
    number: int = 0,
    author: Author | None = None,
    step: Callable[[str], None] = lambda message: None,
) -> tuple[Calibration, Calibration]:
    """The text of one of `repeat` searches, and that which plans are judged on; none is in both.

    held_out_data: names the latter, which is then opened first, for the model may write the other;
    without it, a text that has none of its own for judging gives a part of itself. out: the run
    folder. author: gives the loaded model, None to load it here. Raises as `calibrate`.
    """
    out, other = Path(out), held_out_data or settings.data
    by_role = settings.scoring.score == "kl" and other in (AUTO, OWN)
    another = other != settings.data or by_role
    parts, first = repeat + (not another), out / "calibration"

    def searched(author: Author | None) -> Calibration:
        return calibrate(
            model,
            out / f"repeat-{number + 1}" / "calibration" if number else first,
            settings,
            part=(number, parts),
            text=first,
            author=author,
            step=step,
        )

    def judged(author: Author | None) -> Calibration:
        return calibrate(
            model,
            out / "judge",
            replace(settings, data=other),
            part=(0, 1) if another else (repeat, parts),
            role="judge",
            author=author,
            option="--held-out-data",
            step=step,
        )

    if held_out_data is not None:
        held_out = judged(author)
        return searched(held_out.load), held_out
    calibration = searched(author)
    return calibration, judged(calibration.load)


def task_questions(
    model: str | Path, out: str | Path, settings: CalibrationSettings, count: int, author: Author
) -> Calibration:
    """So many questions with choices, of --score-tasks, to judge plans on. Raises as `calibrate`.

    out: the run folder. author: gives the loaded model.
    """
    scoring = replace(settings.scoring, score="tasks", texts="mean")
    size = max(settings.window, QUESTION_TOKENS)
    settings = replace(settings, data=AUTO, scoring=scoring, num_windows=count, window=size)
    return calibrate(model, Path(out) / "questions", settings, role="judge", author=author)


def window_cache(checkpoint: Checkpoint, settings: CalibrationSettings) -> int:
    """Bytes of the states and logits kept of one window."""
    config, itemsize = checkpoint.config, loaded_dtype(checkpoint, settings.dtype).itemsize
    hidden, vocabulary = positive(config, "hidden_size"), positive(config, "vocab_size")
    states = num_layers_of(config)
    if settings.scoring.prefill == "sequential":  # the inputs of its attentions as well
        states *= 2
    return window_bytes(settings.window, states, hidden, itemsize, vocabulary)


def candidates_of(
    config: dict[str, Any], settings: CalibrationSettings, *, in_memory: bool = False
) -> tuple[Group, ...]:
    """The candidates that the settings ask for.

    in_memory: also those that mix kinds of attention, which no checkpoint could hold.
    """
    return candidates(
        config,
        max_group=settings.max_group,
        wirings=settings.wirings or WIRINGS,
        engines=settings.engines,
        degree=settings.degree,
        unpaired=settings.unpaired,
        force=settings.force,
        in_memory=in_memory,
    )


def share_of(batches: Sequence[int], share: float) -> int:
    """How many batches are such a share of the text, at least one."""
    return max(1, math.ceil(len(batches) * share))
