"""Original x plan -> healed checkpoint: refit, distil, convert; resumable, written whole.

What is healed is the original's own weights, run grouped in memory; every member of a group keeps
its place, its norms and its shapes. The healed weights are therefore an ordinary checkpoint of the
original's architecture, and conversion under the plan treats them as any other: both wirings, fused
or kept apart, and every runtime work as they do without healing.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from abreast.checkpoint import (
    DTYPES,
    MAX_SHARD_BYTES,
    Checkpoint,
    NewTensor,
    check_free,
    companions,
    finite,
    lay_out,
    open_checkpoint,
    publish,
    write,
    write_shards,
)
from abreast.convert import convert, hash_inputs, preview
from abreast.data import CALIBRATION, HELD_OUT, TokenStream
from abreast.errors import AbreastError, CheckpointError
from abreast.families import all_tensors, complete, family_of
from abreast.heal.least_squares import STEPS, Fit, Refit, memory_needed, refit
from abreast.heal.recipe import Recipe, processes
from abreast.heal.shard import full
from abreast.heal.train import Distilled, Point, distill
from abreast.model import decoder_layers, kl_under, load, logits_of
from abreast.plan import Plan
from abreast.runs import model_hash, open_run, to_csv, token_stream, whole_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Method = Literal["refit", "distill", "both"]
REFIT_TOKENS = 65_536
CURVE, FIGURE = "heal.csv", "heal.png"
_HELD_LOGITS = 2**28  # values kept of the original's predictions: 1 GiB in float32
_HELD_TOKENS = 8192
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
Step = Callable[[str], None]
Draw = Callable[[Refit | None, Distilled | None, Path], None]  # such as report.draw_healing
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Healed:
    """What `heal` did. kl_before, kl_after: mean KL(original || grouped) in nats per token, on the
    same windows of the healing text, which neither regression nor training saw; before rounding to
    the checkpoint's dtype. data: source, hash and number of tokens. kept: folder of the healed
    weights in the original's shape, if they were kept.
    """

    out: str
    plan: str
    depth: int
    method: str
    seed: int
    data: dict[str, Any]
    kl_before: float
    kl_after: float
    refit: Refit | None
    distilled: Distilled | None
    kept: str | None
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON-ready values (NaN and infinity become None)."""
        return finite(asdict(self))


@dataclass(frozen=True)
class _Text:
    """The healing text as windows [n, window]: for the regression, for training, for neither."""

    refit: np.ndarray
    train: np.ndarray
    held: np.ndarray
    about: dict[str, Any]


def heal(
    model: str | Path,
    plan: Plan | str,
    out: str | Path,
    *,
    method: str = "both",
    data: str | TokenStream = CALIBRATION,
    tokens: int | None = None,
    window: int = 1024,
    recipe: Recipe | None = None,
    refit_steps: Sequence[str] = STEPS,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "float32",
    work: str | Path | None = None,
    keep: str | Path | None = None,
    out_dtype: str | None = None,
    prefill: str = "grouped",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    force: bool = False,
    draw: Draw | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    step: Step = lambda message: None,
    progress: Progress | None = None,
) -> Healed:
    """Heal a model for running under a plan, and write the converted checkpoint `out`.

    model: the original, folder or Hugging Face id, of a family that can be converted. method:
    "refit" (closed form, see refit.py), "distill" (training, see distill.py), or "both" in that
    order. data: text to heal on, never the text to evaluate on. tokens: read at most so many; None:
    what the recipe's steps need, or 65,536 for refit alone. Refit takes the first 65,536 of them.
    window: tokens the model sees at once, clipped to what it can hold, and to an eighth of a short
    text. dtype: in which the model is healed; float32 is right for training weights themselves.
    work: folder of intermediate state, OUT.work beside `out` unless given; an interrupted call goes
    on with what is there, and a folder that was not given is removed at the end. keep: also leave
    the healed weights in this new folder, in float32 and the original's shape, against which
    `verify` can prove `out`. out_dtype, prefill, max_shard_bytes, force: as for `convert`.
    draw: called to leave heal.png beside the weights. step(message) announces each step.

    `out` also holds heal.csv, the curve. Its manifest names the true original as source and says
    under "healed" how it was healed. Where nothing was won on text that was held out, the weights
    are the original's. Raises AbreastError for whatever the user can mend; `out` is then absent,
    and the state in `work` stays.
    """
    if method not in get_args(Method):
        raise AbreastError(f"method '{method}' is not one of {', '.join(get_args(Method))}")
    recipe = recipe or Recipe()
    recipe.check()
    target = Path(out)
    check_free(target)
    if keep is not None:
        check_free(Path(keep))
    options: dict[str, Any] = {"force": force, "prefill": prefill}
    planned = preview(model, plan, revision=revision, **options)
    source = open_checkpoint(model, revision=revision)
    if isinstance(plan, str):
        plan = Plan.read(plan, planned.num_layers)
    sha256 = model_hash(source.folder)
    if plan.sha256 not in (None, sha256):
        raise AbreastError(
            f"the plan was made for another model ({plan.source}) than '{model}'; "
            "make one for this model"
        )
    if device == "cuda" and processes() > 1:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    options_of_load: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    student, tokenizer = load(source.folder, device=device, **options_of_load)
    _check_names(student, source)
    if method != "distill":
        _check_memory(student, source, plan, refit_steps)
    text = _text(data, tokenizer, student, method, tokens, window, recipe, seed, str(model))
    folder = Path(work) if work is not None else target.with_name(f"{target.name}.work")
    identity = {
        "model": sha256,
        "plan": plan.shorthand,
        "method": method,
        "data": text.about,
        "recipe": recipe.to_dict() if method != "refit" else None,
        "refit_steps": list(refit_steps) if method != "distill" else None,
        "seed": seed,
        "dtype": dtype,
    }
    if _is_main():
        open_run(folder, "heal", json.loads(json.dumps(identity)))

    held = torch.from_numpy(text.held)
    wanted = logits_of(student, held, recipe.micro_batch)
    before = kl_under(student, plan, held, wanted)
    solved = trained = None
    if method != "distill":
        step("refit: solve the grouped layers' matrices on calibration text")
        solved = _refit(student, plan, text.refit, refit_steps, folder, recipe, progress)
    if method != "refit":
        untouched = solved is None or solved.kept
        teacher = None
        if recipe.objective == "kl" and not (untouched and recipe.train == "lora"):
            # Sharding moves it to the device piece by piece: there is no room for all of it there.
            home = "cpu" if recipe.shard else device
            teacher, _ = load(source.folder, device=home, **options_of_load)
        step(f"distil: {recipe.steps} steps")
        trained = distill(
            *(student, plan, text.train, folder / "distill"),
            recipe=recipe,
            teacher=teacher,
            seed=seed,
            progress=progress,
            report=_reporter(folder) if _is_main() else None,
        )
        del teacher
    after = kl_under(student, plan, held, wanted)
    record = {
        "method": method,
        "seed": seed,
        "data": text.about,
        "kl_before": before,
        "kl_after": after,
        "refit": solved.to_dict() if solved else None,
        "recipe": recipe.to_dict() if trained else None,
        "distilled": trained.to_dict() if trained else None,
    }
    found = Healed(
        out=str(target),
        plan=plan.shorthand,
        depth=plan.depth,
        method=method,
        seed=seed,
        data=text.about,
        kl_before=before,
        kl_after=after,
        refit=solved,
        distilled=trained,
        kept=str(keep) if keep is not None else None,
        warnings=(*planned.warnings, *_doubts(text, trained)),
    )
    if not _is_main():
        for _ in _whole(student, source):  # what is sharded, all processes gather together
            pass
        return found
    step("write the converted checkpoint")
    weights = folder / "weights"
    shutil.rmtree(weights, ignore_errors=True)
    cast = _write_weights(student, source, weights, solved, trained, draw)
    true_source: dict[str, Any] = {
        "name": source.source,
        "revision": source.revision,
        "files": hash_inputs(source),
        "dropped_tensors": [],
    }
    convert(
        *(weights, plan, target),
        **options,
        dtype=out_dtype or cast,
        max_shard_bytes=max_shard_bytes,
        healed={"source": true_source, **finite(record)},
    )
    if keep is not None:
        shutil.move(weights, keep)
    shutil.rmtree(weights, ignore_errors=True)
    if work is None:
        shutil.rmtree(folder, ignore_errors=True)
    return found


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _text(
    data: str | TokenStream,
    tokenizer: Any,
    model: PreTrainedModel,
    method: str,
    tokens: int | None,
    window: int,
    recipe: Recipe,
    seed: int,
    name: str,
) -> _Text:
    config = model.config.get_text_config(decoder=True)
    longest = getattr(config, "max_position_embeddings", None)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    window = min(window, longest or window)
    if tokens is None:
        tokens = 0 if method == "distill" else REFIT_TOKENS
        if method != "refit":
            tokens = max(tokens, recipe.steps * recipe.batch_size * window)
        tokens += _HELD_TOKENS
    data = token_stream(data, tokenizer, name, max_tokens=tokens, seed=seed)
    size = min(len(data), tokens)
    window = min(window, max(2, size // 8))
    windows = whole_windows(data, size // window, window, longest=longest, vocabulary=vocabulary)
    most = max(1, min(_HELD_TOKENS, _HELD_LOGITS // vocabulary) // window)
    held = max(1, min(most, len(windows) // 10))
    about = {
        "source": data.source,
        "sha256": data.sha256,
        "tokens": int(windows.size),
        "window": window,
        "held_out_tokens": held * window,
    }
    rest = windows[:-held]
    return _Text(rest[: max(1, REFIT_TOKENS // window)], rest, windows[-held:], about)


def _refit(
    model: PreTrainedModel,
    plan: Plan,
    tokens: np.ndarray,
    steps: Sequence[str],
    folder: Path,
    recipe: Recipe,
    progress: Progress | None,
) -> Refit:
    """Refit, or take the matrices that an interrupted run left."""
    record, weights = folder / "refit.json", folder / "refit.safetensors"
    layers = decoder_layers(model)
    members = {
        f"{member}.{name}": parameter
        for group in plan.groups
        for member in group.layers
        for name, parameter in layers[member].named_parameters()
    }
    if record.is_file():
        known = json.loads(record.read_text(encoding="utf-8"))
        fits = tuple(Fit(**{**fit, "layers": tuple(fit["layers"])}) for fit in known.pop("fits"))
        stored = load_file(weights)
        with torch.no_grad():
            for name, parameter in members.items():
                parameter.copy_(stored[name])
        return Refit(fits=fits, **known)
    found = refit(
        *(model, plan, tokens), steps=steps, batch_size=recipe.micro_batch, progress=progress
    )
    if _is_main():
        save_file({n: p.detach().cpu().contiguous() for n, p in members.items()}, weights)
        write(record, json.dumps(found.to_dict()))
    return found


def _check_names(model: PreTrainedModel, source: Checkpoint) -> None:
    state = model.state_dict()
    for name in _tensors(source):
        if name not in state:
            raise CheckpointError(
                f"tensor '{name}' of '{source.source}' has another name in the loaded model; "
                "this architecture cannot be healed with this version of transformers"
            )


def _tensors(source: Checkpoint) -> dict[str, tuple[int, ...]]:
    config = complete(source.config)
    return all_tensors(family_of(config), config)


def _whole(model: PreTrainedModel, source: Checkpoint) -> Iterator[torch.Tensor]:
    """The weights as `source` names them, one at a time, wherever they are."""
    state = model.state_dict()
    for name in _tensors(source):
        yield full(state[name].detach())


def _check_memory(
    model: PreTrainedModel, source: Checkpoint, plan: Plan, steps: Sequence[str]
) -> None:
    if model.device.type != "cuda" or "out" not in steps:
        return
    needs = memory_needed(
        source.config, largest_group=max(len(group.layers) for group in plan.groups)
    )
    free, _ = torch.cuda.mem_get_info(model.device)
    more = needs["total"] - needs["weights"]
    if more > free:
        raise AbreastError(
            f"refit needs {more / 1e9:.0f} GB beside the model, {free / 1e9:.0f} GB are free on "
            f"{model.device}; use --refit-steps qkv,gate_up, smaller groups, or --device cpu"
        )


def _write_weights(
    model: PreTrainedModel,
    source: Checkpoint,
    folder: Path,
    solved: Refit | None,
    trained: Distilled | None,
    draw: Draw | None,
) -> str | None:
    """The healed weights as a checkpoint like `source`; returns the dtype to convert it with.

    float32, so that what conversion folds is rounded once; where the source mixes dtypes, each
    tensor keeps its own.
    """
    expected = _tensors(source)
    kinds = {source.tensors[name].dtype for name in expected}
    alike = kinds <= {"F32", "BF16", "F16"} and len(kinds) == 1
    new = [
        NewTensor(name, "F32" if alike else source.tensors[name].dtype, shape)
        for name, shape in expected.items()
    ]
    with publish(folder, needed_bytes=sum(tensor.nbytes for tensor in new)) as staging:
        write_shards(
            staging,
            lay_out(new),
            (
                (t.name, whole.to("cpu", DTYPES[t.dtype]))
                for t, whole in zip(new, _whole(model, source), strict=True)
            ),
        )
        shutil.copyfile(source.folder / "config.json", staging / "config.json")
        for path in companions(source.folder):
            if path.is_dir():
                shutil.copytree(path, staging / path.name)
            else:
                shutil.copyfile(path, staging / path.name)
        if trained is not None:
            (staging / CURVE).write_text(to_csv(trained.points, Point), encoding="utf-8")
        if draw is not None:
            draw(solved, trained, staging / FIGURE)
    return str(DTYPES[kinds.pop()]).removeprefix("torch.") if alike else None


def _doubts(text: _Text, trained: Distilled | None) -> tuple[str, ...]:
    found = []
    if text.about["source"] == HELD_OUT:
        found.append(
            f"healed on '{HELD_OUT}', the text that eval uses unless told otherwise; "
            "evaluate on other text"
        )
    if trained is not None and trained.diverged:
        found.append(
            f"training {trained.reason}; the weights are those of step {trained.best_step}"
        )
    elif trained is not None and trained.best_step == 0:
        found.append("training won nothing on held-out text; the weights are those before it")
    return tuple(found)


def _reporter(folder: Path) -> Callable[[tuple[Point, ...]], None]:
    """Writes the curve as it grows, to TensorBoard as well where that is installed."""
    board: Any = None
    with suppress(ImportError):
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(str(folder / "tensorboard"))

    def report(points: tuple[Point, ...]) -> None:
        write(folder / CURVE, to_csv(points, Point))
        if board is not None:
            last = points[-1]
            for name in ("loss", "held_out", "learning_rate"):
                board.add_scalar(name, getattr(last, name), last.step)
            board.flush()

    return report
