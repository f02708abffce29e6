"""Original x plan -> healed checkpoint: refit, distil, convert; resumable, written whole.

What is healed is the original's own weights, run grouped in memory; every member of a group keeps
its position, its norms and its shapes. The healed weights are therefore an ordinary checkpoint of
the original's architecture, and conversion under the plan treats them as any other: both wirings,
fused or kept apart, and every runtime work as they do without healing.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from abreast.checkpoint import (
    DTYPES,
    MAX_SHARD_BYTES,
    NewTensor,
    check_free,
    copy_companions,
    finite,
    lay_out,
    plan_for,
    publish,
    replacing,
    write,
    write_shards,
)
from abreast.convert import convert, hash_inputs, preview
from abreast.data import AUTO, HELD_OUT, TokenStream
from abreast.errors import AbreastError
from abreast.families import all_tensors, family_of
from abreast.heal.judging import Judge, Judged
from abreast.heal.least_squares import STEPS, Fit, Refit, refit
from abreast.heal.losses import computes_bf16
from abreast.heal.recipe import Recipe, is_main_process, processes
from abreast.heal.setup import HealingText, Setup, check_weights, healable, healing_text
from abreast.heal.student import full
from abreast.heal.train import Distilled, Point, distill, step_seconds
from abreast.model import decoder_layers, load
from abreast.plan import Plan
from abreast.runs import check_run, open_run, to_csv

Method = Literal["refit", "distill", "both"]
CURVE, FIGURE = "heal.csv", "heal.png"
Draw = Callable[[Refit | None, Distilled | None, Path], None]


@dataclass(frozen=True)
class Healed:
    """What `heal` did. judged: on parts of the healing text that neither regression nor training
    saw, then on a kind of text that healing did not see at all, if there is one; before rounding to
    the checkpoint's dtype. kl_before, kl_after: those of the first. data: source, hash and number
    of tokens. kept: folder of the healed weights in the original's shape, if they were kept.
    """

    out: str
    plan: str
    depth: int
    method: str
    seed: int
    data: dict[str, Any]
    kl_before: float
    kl_after: float
    judged: tuple[Judged, ...]
    refit: Refit | None
    distilled: Distilled | None
    kept: str | None
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON-ready values (NaN and infinity become None)."""
        return finite(asdict(self))


def heal(
    model: str | Path,
    plan: Plan | str,
    out: str | Path,
    *,
    method: str = "both",
    data: str | TokenStream = AUTO,
    add_bos: bool | None = None,
    tokens: int | None = None,
    window: int = 1024,
    recipe: Recipe | None = None,
    refit_steps: Sequence[str] = STEPS,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "float32",
    work: str | Path | None = None,
    texts: str | Path | None = None,
    keep: str | Path | None = None,
    out_dtype: str | None = None,
    prefill: str = "grouped",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    force: bool = False,
    draw: Draw | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    step: Callable[[str], None] = lambda message: None,
    progress: Callable[[int, int], None] | None = None,
) -> Healed:
    """Heal a model for running under a plan, and write the converted checkpoint `out`.

    model: the original, folder or Hugging Face id, of a family that can be converted. method:
    "refit" (closed form, see least_squares.py), "distill" (training, see train.py), or "both" in
    that order. data: text to heal on, never the text to evaluate on, see `token_stream`; add_bos:
    see `prefix_of`. tokens: most to read; None: what the recipe's steps need, or 65,536 for
    refit alone. Refit takes the first 65,536.
    window: tokens the model sees at once, clipped to what it can hold, and to an eighth of a short
    text. dtype: in which the model is healed; float32 is right for training weights themselves.
    work: folder of intermediate state, OUT.work beside `out` by default; an interrupted call goes
    on with what is there, and the default folder is removed at the end. texts: folder that keeps
    what the model writes, `work` by default. keep: also leave the healed
    weights in this new folder, in float32 and the original's shape, against which `verify` can
    prove `out`. out_dtype, prefill, max_shard_bytes, force: as for `convert`. draw: leaves
    heal.png beside the weights, see `report.draw_healing`. step(message) announces each step.

    `out` also holds heal.csv, the curve. Its manifest names the true original as source and says
    under "healed" how it was healed. Where nothing was won on held-out text, the weights are the
    original's. Raises AbreastError for whatever the user can mend; `out` is then absent, and the
    state in `work` stays, except that a new folder goes where the text or the minutes will not do.
    """
    if method not in get_args(Method):
        raise AbreastError(f"method '{method}' is not one of {', '.join(get_args(Method))}")
    recipe = (recipe or Recipe()).suited(device)
    recipe.check()
    target = Path(out)
    check_free(target)
    if keep is not None:
        check_free(Path(keep))
    planned = preview(model, plan, revision=revision, force=force, prefill=prefill)
    source = healable(model, revision)
    family = family_of(source.config)
    if method != "refit":
        recipe.check_targets({matrix.name.rpartition(".")[2] for matrix in family.matrices})
    plan = plan_for(source, plan)
    plan = plan.made_for(source.source, source.revision, source.sha256)
    device = _device_of_rank(device, recipe)
    load_original = partial(load, source.folder, dtype=dtype, trust_remote_code=trust_remote_code)
    student, tokenizer = load_original(device=device)
    tensors = all_tensors(family, source.config)
    check_weights(student, tensors, model, source.source)
    folder = Path(work) if work is not None else target.with_name(f"{target.name}.work")
    check_run(folder, "heal")
    setup = Setup(
        source=source,
        tensors=tensors,
        load=load_original,
        model=student,
        plan=plan,
        recipe=recipe,
        work=folder,
        seed=seed,
        step=step,
        progress=progress,
    )
    trains = method != "refit" and processes() == 1
    check_pace = cache(partial(_check_pace, setup)) if trains else lambda _: None
    is_new, texts = not folder.exists(), Path(texts or folder)
    try:
        text = healing_text(
            setup, data, tokenizer, method, tokens, window, add_bos, texts, check_pace
        )
        check_pace(text.train.shape[1])
    except AbreastError:
        if is_new:  # it holds what is known of a text that will not do
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if is_main_process():
        identity = {**_identity(setup, text, method, refit_steps), "dtype": dtype}
        open_run(folder, "heal", json.loads(json.dumps(identity)))

    judge = Judge(student, plan, text.judged, len(text.prefix), recipe.micro_batch)
    before = judge.scores()
    solved = _refit(setup, text, refit_steps) if method != "distill" else None
    trained = _distil(setup, text, solved) if method != "refit" else None
    judged = judge.judged(before, judge.scores())
    healed = Healed(
        out=str(target),
        plan=plan.shorthand,
        depth=plan.depth,
        method=method,
        seed=seed,
        data=text.about,
        kl_before=judged[0].kl_before,
        kl_after=judged[0].kl_after,
        judged=judged,
        refit=solved,
        distilled=trained,
        kept=str(keep) if keep is not None else None,
        warnings=(*planned.warnings, *_warnings(text, trained)),
    )
    if not is_main_process():
        deque(_whole_tensors(setup), maxlen=0)  # what is sharded, all processes gather together
        return healed
    step("write the converted checkpoint")
    weights = folder / "weights"
    shutil.rmtree(weights, ignore_errors=True)
    stored = _write_weights(setup, weights, healed, draw)
    convert(
        weights,
        plan,
        target,
        force=force,
        prefill=prefill,
        dtype=out_dtype or stored,
        max_shard_bytes=max_shard_bytes,
        healed=_manifest_entry(setup, healed),
    )
    if keep is not None:
        shutil.move(weights, keep)
    shutil.rmtree(weights if work is not None else folder, ignore_errors=True)
    return healed


def _check_pace(setup: Setup, window: int) -> None:
    """Say how fast training is on windows of so many tokens.

    Raises AbreastError for too small a budget of minutes.
    """
    recipe, model = setup.recipe, setup.model
    size = (10 + recipe.micro_batch, window)
    ids = np.random.default_rng(0).integers(model.get_input_embeddings().weight.shape[0], size=size)
    times = step_seconds(model, setup.plan, ids, recipe)
    products = "bfloat16" if computes_bf16(recipe, model.device) else "float32"
    setup.step(f"training in {products}: {recipe.pace(times, window)}")


def _device_of_rank(device: str, recipe: Recipe) -> str:
    """The device that this process heals on."""
    if device == "auto" and (recipe.shard or processes() > 1):
        raise AbreastError("--device auto is for one process without --shard; name a device")
    if device == "cuda" and processes() > 1:
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return device


def _identity(
    setup: Setup, text: HealingText, method: str, refit_steps: Sequence[str]
) -> dict[str, Any]:
    """What a later call must agree in to go on with the same work."""
    return {
        "model": setup.source.sha256,
        "plan": setup.plan.shorthand,
        "method": method,
        "data": {key: value for key, value in text.about.items() if key != "parts"},
        "recipe": setup.recipe.to_dict() if method != "refit" else None,
        "refit_steps": list(refit_steps) if method != "distill" else None,
        "seed": setup.seed,
        **({"prefix": text.prefix} if text.prefix else {}),
    }


def _refit(setup: Setup, text: HealingText, steps: Sequence[str]) -> Refit:
    """Refit, or take the matrices that an interrupted run left."""
    setup.step("refit: solve the grouped layers' matrices on calibration text")
    result, weights = setup.work / "refit.json", setup.work / "refit.safetensors"
    layers = decoder_layers(setup.model)
    members = {
        f"{member}.{name}": parameter.detach()
        for group in setup.plan.groups
        for member in group.layers
        for name, parameter in layers[member].named_parameters()
    }
    if result.is_file():
        stored = load_file(weights)
        for name, parameter in members.items():
            parameter.copy_(stored[name])
        saved = json.loads(result.read_text(encoding="utf-8"))
        fits = (Fit(**{**fit, "layers": tuple(fit["layers"])}) for fit in saved["fits"])
        return Refit(**{**saved, "fits": tuple(fits)})
    solved = refit(
        setup.model,
        setup.plan,
        text.refit,
        prefix=len(text.prefix),
        steps=steps,
        batch_size=setup.recipe.micro_batch,
        progress=setup.progress,
    )
    if is_main_process():
        with replacing(weights) as staging:
            save_file({n: p.cpu().contiguous() for n, p in members.items()}, staging)
        write(result, json.dumps(asdict(solved)))
    return solved


def _distil(setup: Setup, text: HealingText, solved: Refit | None) -> Distilled:
    """Distil, and write the curve as it grows, to TensorBoard as well where that is installed."""
    setup.step("distil")
    is_changed = solved is not None and not solved.kept
    teacher = None
    if setup.recipe.is_taught and (is_changed or setup.recipe.train != "lora"):
        # Sharding moves it to the device piece by piece: there is no room for all of it there.
        spread = hasattr(setup.model, "_hf_hook")
        device = "auto" if spread else setup.model.device
        teacher, _ = setup.load(device="cpu" if setup.recipe.shard else device)
    board: Any = None
    if is_main_process():
        with suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            board = SummaryWriter(str(setup.work / "tensorboard"))

    def write_curve(points: Sequence[Point]) -> None:
        write(setup.work / CURVE, to_csv([asdict(point) for point in points]))
        if board is not None:
            last = points[-1]
            for name in ("loss", "held_out", "learning_rate"):
                board.add_scalar(name, getattr(last, name), last.step)
            board.flush()

    return distill(
        setup.model,
        setup.plan,
        text.train,
        setup.work / "distill",
        prefix=len(text.prefix),
        recipe=setup.recipe,
        teacher=teacher,
        seed=setup.seed,
        progress=setup.progress,
        on_point=write_curve if is_main_process() else None,
    )


def _whole_tensors(setup: Setup) -> Iterator[torch.Tensor]:
    """The weights as the original names them, one at a time, wherever they are."""
    state = setup.model.state_dict()
    for name in setup.tensors:
        yield full(state[name].detach())


def _write_weights(setup: Setup, folder: Path, healed: Healed, draw: Draw | None) -> str | None:
    """The healed weights as a checkpoint like the original; returns the dtype to convert it with.

    float32, so that what conversion folds is rounded once; where the original mixes dtypes, each
    tensor keeps its own. Sharded weights never lie whole in memory, as for save_pretrained.
    """
    source = setup.source
    dtypes = {source.tensors[name].dtype for name in setup.tensors}
    uniform = len(dtypes) == 1 and dtypes <= {"F32", "BF16", "F16"}
    layout = [
        NewTensor(name, "F32" if uniform else source.tensors[name].dtype, shape)
        for name, shape in setup.tensors.items()
    ]
    with publish(folder, needed_bytes=sum(tensor.nbytes for tensor in layout)) as staging:
        pairs = zip(layout, _whole_tensors(setup), strict=True)
        stream = ((new.name, tensor.to("cpu", DTYPES[new.dtype])) for new, tensor in pairs)
        write_shards(staging, lay_out(layout), stream)
        copy_companions(source.folder, staging)
        write(staging / "config.json", json.dumps(source.config, indent=2) + "\n")
        if healed.distilled is not None:
            write(staging / CURVE, to_csv([*map(asdict, healed.distilled.points)]))
        if draw is not None:
            draw(healed.refit, healed.distilled, staging / FIGURE)
    return str(DTYPES[dtypes.pop()]).removeprefix("torch.") if uniform else None


def _manifest_entry(setup: Setup, healed: Healed) -> dict[str, Any]:
    """The manifest's entry "healed", and the source that the manifest names."""
    keys = ("method", "seed", "data", "kl_before", "kl_after", "judged", "refit", "distilled")
    return {
        "source": {
            "name": setup.source.source,
            "revision": setup.source.revision,
            "files": hash_inputs(setup.source),
            "dropped_tensors": list(setup.source.dropped),
        },
        **{key: value for key, value in healed.to_dict().items() if key in keys},
        "recipe": finite(setup.recipe.to_dict()) if healed.distilled else None,
    }


def _warnings(text: HealingText, trained: Distilled | None) -> Iterator[str]:
    if HELD_OUT in text.about["source"].split(","):
        yield f"healed on '{HELD_OUT}', which eval may take by default; evaluate on other text"
    if trained is not None and trained.diverged:
        yield f"training {trained.reason}; the weights are those of step {trained.best_step}"
    elif trained is not None and trained.best_step == 0:
        yield "training won nothing on held-out text; the weights are those before it"
