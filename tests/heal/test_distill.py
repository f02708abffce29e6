"""Training the grouped model: what it learns, exact resume, and when it must stop."""

import copy
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from abreast.errors import AbreastError
from abreast.heal import losses, train
from abreast.heal.losses import computes_bf16
from abreast.heal.recipe import RECIPES, Recipe
from abreast.heal.student import optimizers_of
from abreast.heal.train import distill, step_seconds, windows_of
from abreast.model.grouping import decoder_layers, grouped, load
from abreast.model.scores import divergence, next_token_loss
from abreast.plan import Plan

pytest.importorskip("peft")

PLAN = Plan.parse("1+2 3|4:1", 6)
QUICK = {"batch_size": 4, "micro_batch": 4, "evaluate_every": 4, "save_every": 3, "steps": 12}
QUICK["group_share"] = 0.0


def words(windows: int = 44, window: int = 24, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 128, (windows, window))


def recipe(**changes) -> Recipe:
    return Recipe(**{**QUICK, "learning_rate": 1e-3, **changes})


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    assert one.keys() == other.keys()
    return {name for name in one if not torch.equal(one[name], other[name])}


@pytest.fixture
def pair(tiny_checkpoint):
    """A model to train, and its teacher."""
    model, _ = load(tiny_checkpoint())
    return model, copy.deepcopy(model)


@pytest.mark.parametrize(
    ("train", "optimizer"),
    [
        ("lora", "adamw"),
        ("groups", "muon"),
        *(
            pytest.param(train, optimizer, marks=pytest.mark.slow)
            for train, optimizer in (
                ("lora", "muon"),
                ("groups", "adamw"),
                ("all", "adamw"),
                ("all", "muon"),
            )
        ),
    ],
)
def test_training_brings_the_grouped_model_nearer(pair, tmp_path, train, optimizer):
    model, teacher = pair
    before = weights_of(model)
    result = distill(
        model,
        PLAN,
        words(),
        tmp_path,
        recipe=recipe(train=train, optimizer=optimizer),
        teacher=None if train == "lora" else teacher,
    )
    assert result.after < result.before and result.best_step == 12
    assert result.reason == "all steps done" and not result.diverged
    assert [point.step for point in result.points] == [0, 4, 8, 12]
    members = {f"layers.{layer}." for group in PLAN.groups for layer in group.layers}
    moved = changed(before, weights_of(model))
    for name in before:
        inside = any(member in name for member in members)
        matrix = before[name].dim() == 2
        assert (name in moved) == (train == "all" or (inside and (train == "groups" or matrix))), (
            name
        )
    # The curve's last point is what the trained model really does.
    ids = torch.from_numpy(words()[-4:])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = teacher(ids).logits
        with grouped(model, PLAN):
            got = model(ids).logits
    assert float(divergence(got, expected)) == pytest.approx(result.after, rel=0.02)
    assert not model.training and all(p.requires_grad for p in model.parameters())


def ends_of(model, plan: Plan, ids: torch.Tensor, layer: int) -> torch.Tensor:
    """The residual stream after a layer."""
    states: list[torch.Tensor] = []
    hook = decoder_layers(model)[layer].register_forward_hook(lambda _, __, x: states.append(x))
    with torch.no_grad(), grouped(model, plan), hook:
        model(ids)
    return states[0]


@pytest.mark.parametrize("changes", [{"train": "groups"}, {"train": "lora", "lora_layers": "all"}])
def test_each_group_learns_alone_from_the_states_of_the_original(pair, tmp_path, changes):
    """With the layers of one group only, all that comes before it is the original's."""
    model, teacher = pair
    ids = torch.from_numpy(words()[windows_of(0, 40, 4, seed=0)])
    alone = [(Plan(num_layers=6, groups=(g,)), g.layers[-1]) for g in PLAN.groups]

    def gaps() -> list[float]:
        parts = []
        for plan, last in alone:
            mixed = copy.deepcopy(teacher)
            for layer in plan.groups[0].layers:
                state = decoder_layers(model)[layer].state_dict()
                decoder_layers(mixed)[layer].load_state_dict(state)
            ours = ends_of(mixed, plan, ids, last)
            theirs = ends_of(teacher, Plan(num_layers=6), ids, last)
            parts.append(((ours - theirs).square().sum(-1) / theirs.square().sum(-1)).mean())
        return [float(part) for part in parts]

    before, weights = gaps(), weights_of(model)
    settings = recipe(group_share=1.0, group_learning_rate=1e-3, bf16=False, **changes)
    result = distill(model, PLAN, words(), tmp_path, recipe=settings, teacher=teacher)
    assert result.points[-1].phase == "groups" and result.best_step == 12
    assert result.after < result.before
    after = gaps()
    assert all(now < then for now, then in zip(after, before, strict=True))
    assert all(
        f"layers.{n}." not in name for n in (0, 5) for name in changed(weights, weights_of(model))
    )
    first = distill(
        copy.deepcopy(teacher),
        PLAN,
        words(),
        tmp_path / "first",
        recipe=Recipe(**{**settings.to_dict(), "steps": 1}),
        teacher=teacher,
    )
    assert first.points[1].loss == pytest.approx(sum(before) / 2, rel=1e-4)


def test_groups_that_learn_alone_do_not_know_of_each_other(pair, tmp_path):
    model, teacher = pair
    other = copy.deepcopy(teacher)
    settings = recipe(group_share=1.0, bf16=False, clip=0.0)
    for student, plan in ((model, PLAN), (other, Plan.parse("3|4:1", 6))):
        distill(student, plan, words(), tmp_path / plan.shorthand, recipe=settings, teacher=teacher)
    together, alone, start = map(weights_of, (model, other, teacher))
    moved = {name for name in changed(alone, start) if name.endswith("proj.weight")}
    assert len(moved) == 14
    for name in moved:
        distance = (together[name] - alone[name]).norm() / (alone[name] - start[name]).norm()
        assert float(distance) < 0.02, name


def test_layers_before_the_first_group_run_once_per_step(pair, tmp_path):
    model, teacher = pair
    calls: list[int] = []
    first = decoder_layers(model)[0].self_attn
    first.register_forward_hook(lambda *_: calls.append(1))
    plan, options = Plan.parse("2+3", 6), {"teacher": teacher}
    for number, (changes, count) in enumerate([({}, 0), ({"train": "all"}, 2)]):
        calls.clear()
        settings = recipe(steps=2, evaluate_every=9, **changes)
        distill(model, plan, words(), tmp_path / str(number), recipe=settings, **options)
        assert len(calls) - 2 == count  # held-out windows before and after


def test_the_whole_model_goes_on_with_the_best_that_the_groups_reached(pair, tmp_path):
    model, teacher = pair
    settings = recipe(group_share=0.5, evaluate_every=1, learning_rate=1e-30)
    result = distill(model, PLAN, words(), tmp_path, recipe=settings, teacher=teacher)
    best = min(point.held_out for point in result.points if point.phase == "groups")
    last = [point for point in result.points if point.phase == "model"]
    assert [point.step for point in last] == [7, 8, 9, 10, 11, 12]
    assert all(point.held_out == pytest.approx(best) for point in last)


class Clock:
    """Every look at it takes a second."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 1.0
        return self.now

    process_time = monotonic


def test_a_budget_of_time_is_kept_over_calls(pair, tmp_path, monkeypatch):
    model, teacher = pair
    monkeypatch.setattr(train, "time", Clock())
    settings = recipe(minutes=1.0, group_share=0.5, warmup=0.2, save_every=1, evaluate_every=4)
    options = {"recipe": settings, "teacher": teacher}
    seen: list[int] = []

    def die(done: int, total: int) -> None:
        seen.append(done)
        if done > 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(model, PLAN, words(), tmp_path, progress=die, **options)
    again = copy.deepcopy(teacher)
    result = distill(
        again, PLAN, words(), tmp_path, progress=lambda done, total: seen.append(done), **options
    )
    assert seen == sorted(seen) and seen[-1] == 60
    assert result.reason == "time is up" and 60 <= result.seconds < 75
    rates = [point.learning_rate for point in result.points if point.step]
    assert 0 < rates[-1] < max(rates) / 4  # fell to the end, whatever a step took
    assert {p.phase for p in result.points} == {"groups", "model"}


def test_slow_checkpoints_are_rare(pair, tmp_path, monkeypatch):
    model, teacher = pair
    clock, saved, save = Clock(), [], train.Checkpoints.save

    def slow(self, step, *state):
        clock.now += 1000
        saved.append(step)
        save(self, step, *state)

    monkeypatch.setattr(train, "time", clock)
    monkeypatch.setattr(train.Checkpoints, "save", slow)
    settings = recipe(group_share=0.0, save_every=1)
    distill(model, PLAN, words(), tmp_path, teacher=teacher, recipe=settings)
    assert saved == [0, 1, 12]  # at the start, when none was timed yet, and at the end


def test_how_long_a_step_takes_is_found_without_changing_anything(pair):
    model, _ = pair
    before = weights_of(model)
    for changes in ({"group_share": 0.5}, {"train": "lora", "group_share": 1.0}):
        alone, whole = step_seconds(model, PLAN, words(), recipe(**changes))
        assert alone > 0 and (whole > 0) == (changes["group_share"] < 1)
        assert not changed(before, weights_of(model))


def test_bfloat16_is_the_default_only_where_it_is_native(monkeypatch):
    cpu = torch.device("cpu")
    for native in (False, True):
        monkeypatch.setattr(losses, "is_native", lambda *_, native=native: native)
        assert computes_bf16(Recipe(), cpu) == native
        assert computes_bf16(Recipe(bf16=True), cpu) and not computes_bf16(Recipe(bf16=False), cpu)


def test_learning_rates():
    """Up over the warm-up of each phase, and down to zero, straight or as a half cosine."""
    halves = Recipe(group_share=0.5, group_learning_rate=1.0, learning_rate=2.0, warmup=0.2)
    rates = [halves.rate_at(step / 20, (step + 1) / 20) for step in range(20)]
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.0, 0.5 + 0.5 * math.cos(math.pi / 8)])
    assert rates[10:] == pytest.approx([2 * rate for rate in rates[:10]])
    straight = Recipe(**{**RECIPES["cqil"], "learning_rate": 1.0})
    assert [straight.rate_at(n / 4, (n + 1) / 4) for n in range(4)] == [1.0, 0.75, 0.5, 0.25]


def test_rates_are_shares_of_the_weights_sizes():
    """A step that is right for large weights would destroy small ones; adapters begin at zero."""
    ours = Recipe(group_share=0.0, warmup=0.0)
    assert ours.is_relative and ours.rate_at(0, 0) == ours.relative_rate
    for same_for_all in (Recipe(learning_rate=1e-4), Recipe(train="lora")):
        assert not same_for_all.is_relative
        assert same_for_all.rate_at(0, 1) == pytest.approx(1e-4)
    with pytest.raises(AbreastError, match="group_learning_rate is for all weights"):
        Recipe(group_learning_rate=1e-4).check()
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, bias=False))
    for parameter, size in zip(model.parameters(), (0.19, 0.0, 0.02), strict=True):
        nn.init.constant_(parameter, size)
    (optimizer,) = optimizers_of(model, ours)
    scales = [group["scale"] for group in optimizer.param_groups]
    assert scales == pytest.approx([2**-2.5, 1e-3, 2**-5.5], rel=0.03)


def test_training_does_not_depend_on_how_a_product_is_split(pair, tmp_path):
    """v eight times as large and o an eighth is the same model, and learns the same."""
    model, teacher = pair
    other = copy.deepcopy(model)
    for layer in decoder_layers(other):
        with torch.no_grad():
            layer.self_attn.v_proj.weight.mul_(8)
            layer.self_attn.o_proj.weight.div_(8)
    settings = recipe(learning_rate=None, relative_rate=0.02, clip=0.0, bf16=False)
    curves = [
        [point.held_out for point in result.points]
        for name, student in (("as it is", model), ("split", other))
        for result in [
            distill(student, PLAN, words(), tmp_path / name, recipe=settings, teacher=teacher)
        ]
    ]
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)
    assert curves[0][-1] < 0.9 * curves[0][0]


def test_no_clipping(pair, tmp_path):
    """A gradient that is cut to almost nothing still moves the weights as far: AdamW's steps."""
    model, teacher = pair
    settings = recipe(steps=1, clip=0.0, bf16=False, hidden_weight=1e6)
    result = distill(model, PLAN, words(), tmp_path, recipe=settings, teacher=teacher)
    assert not result.diverged and changed(weights_of(model), weights_of(teacher))


@pytest.mark.slow
def test_the_language_model_loss_needs_no_teacher(pair, tmp_path):
    model, _ = pair
    ids = np.tile(np.arange(24), (44, 1))
    result = distill(model, PLAN, ids, tmp_path, recipe=recipe(objective="lm"))
    assert result.after < result.before - 0.1


def test_the_loss_is_made_of_what_the_recipe_says(pair, tmp_path):
    """KL, the states after every stage from the first group on, and the text, each weighted."""
    model, teacher = pair
    plan = Plan.parse("2+3", 6)
    ids = torch.from_numpy(words(40)[windows_of(0, 36, 4, seed=0)])
    states: dict[str, list[torch.Tensor]] = {"theirs": [], "ours": []}

    def collector(states: list[torch.Tensor]):
        return lambda _, __, output: states.append(
            output[0] if isinstance(output, tuple) else output
        )

    logits = {}
    with torch.no_grad():
        for name, student, run in (
            ("theirs", teacher, Plan(num_layers=6)),
            ("ours", model, plan),
        ):
            layers = decoder_layers(student)
            hooks = [
                layers[end].register_forward_hook(collector(states[name])) for end in (3, 4, 5)
            ]
            with grouped(student, run):
                logits[name] = student(ids).logits
            for hook in hooks:
                hook.remove()
    gaps = [
        float(((our - their).square().sum(-1) / their.square().sum(-1)).mean())
        for our, their in zip(states["ours"], states["theirs"], strict=True)
    ]
    kl = float(divergence(logits["ours"], logits["theirs"]))
    text = float(next_token_loss(logits["ours"], ids))
    assert min(*gaps, kl, text) > 1e-6
    for number, (hidden, lm) in enumerate([(0.0, 0.0), (1.0, 0.0), (20.0, 0.5)]):
        result = distill(
            copy.deepcopy(teacher),
            plan,
            words(40),
            tmp_path / str(number),
            recipe=recipe(steps=1, hidden_weight=hidden, lm_weight=lm, bf16=False),
            teacher=teacher,
        )
        expected = kl + hidden * sum(gaps) / 3 + lm * text
        assert result.points[1].loss == pytest.approx(expected, rel=1e-4)


def test_muon_trains_the_matrices_of_layers_only(pair):
    model, _ = pair
    adamw, muon = optimizers_of(model, recipe(optimizer="muon"))
    names = {id(p): name for name, p in model.named_parameters()}
    mine = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    rest = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert mine | rest == set(names.values()) and not mine & rest
    assert mine == {n for n in names.values() if "_proj" in n and ".layers." in n}
    assert len(optimizers_of(model, recipe())) == 1


@pytest.mark.parametrize(
    ("train", "optimizer", "dies_after", "group_share"),
    [
        ("groups", "adamw", 7, 0.5),  # after the phases changed
        pytest.param("groups", "adamw", 1, 0.0, marks=pytest.mark.slow),
        pytest.param("groups", "muon", 4, 0.7, marks=pytest.mark.slow),
        pytest.param("all", "adamw", 7, 0.0, marks=pytest.mark.slow),
        pytest.param("lora", "adamw", 11, 0.5, marks=pytest.mark.slow),
        pytest.param("all", "muon", 8, 0.0, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_ends_with_the_same_bits(
    tiny_checkpoint, tmp_path, train, optimizer, dies_after, group_share
):
    def start():
        model, _ = load(tiny_checkpoint())
        return model, None if train == "lora" else copy.deepcopy(model)

    changes = {"train": train, "optimizer": optimizer, "group_share": group_share}
    options = {"recipe": recipe(**changes), "seed": 5}
    whole, teacher = start()
    first = distill(whole, PLAN, words(), tmp_path / "whole", teacher=teacher, **options)

    def die(done: int, total: int) -> None:
        if done == dies_after:
            raise KeyboardInterrupt

    killed, teacher = start()
    with pytest.raises(KeyboardInterrupt):
        distill(killed, PLAN, words(), tmp_path / "cut", teacher=teacher, progress=die, **options)
    torch.rand(7)  # whatever happens in between must not matter
    again, teacher = start()
    second = distill(again, PLAN, words(), tmp_path / "cut", teacher=teacher, **options)
    assert not changed(weights_of(whole), weights_of(again))
    lines = [
        [(p.step, p.tokens, p.learning_rate, p.held_out) for p in result.points]
        for result in (first, second)
    ]
    assert lines[0] == lines[1]
    assert first.points[-1].loss == second.points[-1].loss


@pytest.mark.slow
def test_a_half_written_checkpoint_is_not_used(pair, tmp_path):
    model, teacher = pair
    fresh = copy.deepcopy(teacher)
    options = {"recipe": recipe(steps=6), "teacher": teacher}
    distill(model, PLAN, words(), tmp_path / "whole", **options)

    def die(done: int, total: int) -> None:
        if done == 4:
            (tmp_path / "cut" / ".partial").mkdir(parents=True)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(fresh, PLAN, words(), tmp_path / "cut", progress=die, **options)
    again = copy.deepcopy(teacher)
    distill(again, PLAN, words(), tmp_path / "cut", **options)
    assert not changed(weights_of(model), weights_of(again))


@pytest.mark.slow
def test_only_the_last_two_checkpoints_stay(pair, tmp_path):
    model, teacher = pair
    distill(model, PLAN, words(), tmp_path, recipe=recipe(), teacher=teacher)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [
        "step-00000009",
        "step-00000012",
    ]
    names = {path.name for path in (tmp_path / "step-00000012").iterdir()}
    tensors = {f"{part}.safetensors" for part in ("weights", "best", "optimizer")}
    assert names == {"state.json", *tensors}


def test_checkpoints_of_an_earlier_format_are_refused(pair, tmp_path):
    model, teacher = pair
    options = {"recipe": recipe(steps=1), "teacher": teacher}
    distill(model, PLAN, words(), tmp_path, **options)
    record = json.loads((tmp_path / "training.json").read_text())
    del record["identity"]["state format"]
    (tmp_path / "training.json").write_text(json.dumps(record))
    with pytest.raises(AbreastError, match="with other state format; choose a new folder"):
        distill(copy.deepcopy(teacher), PLAN, words(), tmp_path, **options)


def test_a_gathered_batch_is_a_whole_one(pair, tmp_path):
    model, teacher = pair
    other = copy.deepcopy(teacher)
    for name, student, micro in (("whole", model, 4), ("parts", other, 1)):
        distill(
            student,
            PLAN,
            words(),
            tmp_path / name,
            recipe=recipe(micro_batch=micro, bf16=False, steps=3),
            teacher=teacher,
        )
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(one, two, atol=1e-4)


@pytest.mark.slow
def test_recomputing_activations_changes_nothing(pair, tmp_path):
    model, teacher = pair
    other = copy.deepcopy(teacher)
    for name, student, on in (("kept", model, False), ("recomputed", other, True)):
        distill(
            student,
            PLAN,
            words(),
            tmp_path / name,
            recipe=recipe(checkpointing=on, bf16=False, steps=3),
            teacher=teacher,
        )
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(one, two, atol=1e-5)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in other.modules())


@pytest.mark.parametrize(
    ("given", "device", "windows"),
    [
        ({"minutes": 60}, "cpu", 2),  # few steps fit: small ones
        ({"minutes": 60}, "cuda", 8),
        ({}, "cpu", 8),
        ({"minutes": 60, "batch_size": 4}, "cpu", 4),
    ],
)
def test_windows_per_step(given, device, windows, monkeypatch):
    assert Recipe(**given).suited(device).windows == windows
    monkeypatch.setenv("WORLD_SIZE", "4")  # which share a batch
    assert Recipe(**given).suited(device).windows == (8 if windows == 2 else windows)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++")
def test_compiled_branches_learn_the_same(pair, tmp_path):
    model, teacher = pair
    plain = copy.deepcopy(model)
    settings = {"train": "all", "group_share": 0.5, "steps": 4, "bf16": False}
    ends = [
        distill(
            student,
            PLAN,
            words(),
            tmp_path / f"run-{compiles}",
            recipe=recipe(compile=compiles, **settings),
            teacher=teacher,
        )
        for student, compiles in ((plain, False), (model, True))
    ]
    torch.compiler.reset()
    assert ends[1].after == pytest.approx(ends[0].after, rel=1e-3) != ends[0].before
    assert ends[1].points[-1].loss == pytest.approx(ends[0].points[-1].loss, rel=1e-3)
    assert not any(part._compiled_call_impl for m in pair for part in m.modules())


def test_compiling_without_a_compiler(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AbreastError, match=r"needs a C\+\+ compiler; install g\+\+"):
        distill(*pair[:1], PLAN, words(), tmp_path / "run", recipe=recipe(compile=True))
    assert not (tmp_path / "run").exists()


def test_nan_stops_the_run_and_keeps_the_last_good_weights(pair, tmp_path):
    model, teacher = pair

    def poison(done: int, total: int) -> None:
        if done == 9:
            with torch.no_grad():
                decoder_layers(model)[1].mlp.up_proj.weight[0, 0] = math.nan

    options = {"recipe": recipe(), "teacher": teacher}
    result = distill(model, PLAN, words(), tmp_path, progress=poison, **options)
    assert result.diverged and "nan" in result.reason and "step 10" in result.reason
    assert result.best_step == 8
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert (tmp_path / "step-00000009").is_dir()


def test_a_model_that_is_broken_already(pair, tmp_path):
    model, teacher = pair
    with torch.no_grad():
        decoder_layers(model)[2].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(AbreastError, match="not finite before any training"):
        distill(model, PLAN, words(), tmp_path, recipe=recipe(), teacher=teacher)


def test_a_rising_loss_stops_the_run(pair, tmp_path):
    model, teacher = pair
    before = weights_of(model)
    wild = recipe(train="all", learning_rate=1.0, warmup=0.0, clip=1e6)
    options = {"recipe": wild, "teacher": teacher}
    result = distill(model, PLAN, words(), tmp_path, **options)
    assert result.diverged and "rose from" in result.reason
    assert result.best_step == 0 and result.after == result.before
    assert not changed(before, weights_of(model))


def test_patience_ends_a_run_that_wins_nothing(pair, tmp_path):
    model, teacher = pair
    options = {
        "recipe": recipe(learning_rate=1e-30, patience=2, evaluate_every=1),
        "teacher": teacher,
    }
    result = distill(model, PLAN, words(), tmp_path, **options)
    assert result.reason == "no better in 2 evaluations on held-out text"
    assert result.points[-1].step == 2 and not result.diverged


def test_every_window_once_before_any_twice():
    rows = np.concatenate([windows_of(step, 10, 4, seed=1) for step in range(5)])
    assert sorted(rows[:10]) == list(range(10)) == sorted(rows[10:])
    assert rows[:10].tolist() != rows[10:].tolist()


def test_a_run_of_other_settings_is_refused(pair, tmp_path):
    model, teacher = pair
    distill(model, PLAN, words(), tmp_path, recipe=recipe(steps=1), teacher=teacher)
    fresh = copy.deepcopy(teacher)
    with pytest.raises(AbreastError, match="with other recipe"):
        distill(fresh, PLAN, words(), tmp_path, recipe=recipe(steps=2), teacher=teacher)
    with pytest.raises(AbreastError, match="with other tokens"):
        distill(fresh, PLAN, words(seed=1), tmp_path, recipe=recipe(steps=1), teacher=teacher)
    assert not hasattr(fresh, "_abreast_replaced")


@pytest.mark.parametrize(
    ("plan", "tokens", "changes", "message"),
    [
        (Plan.parse("1+2", 8), words(), {}, "the plan is for 8 layers, the model has 6"),
        (Plan(num_layers=6), words(), {}, "no groups"),
        (PLAN, words(5), {}, "too little text"),
        (PLAN, words() + 100, {}, "outside the model's vocabulary"),
        (PLAN, words(), {"train": "some"}, "train 'some' is not one of lora, groups, all"),
        (PLAN, words(), {"objective": "mse"}, "objective 'mse' is not one of kl, lm"),
        (PLAN, words(), {"optimizer": "sgd"}, "optimizer 'sgd' is not one of adamw, muon"),
        (PLAN, words(), {"steps": 0}, "steps is 0; give at least 1"),
        (PLAN, words(), {"hidden_weight": -1.0}, "hidden_weight is -1.0; give 0 or more"),
        (PLAN, words(), {"lm_weight": math.inf}, "lm_weight is inf"),
        (PLAN, words(), {"learning_rate": math.nan}, "learning_rate is nan"),
        (PLAN, words(), {"temperature": 0.0}, "temperature is 0.0"),
        (PLAN, words(), {"warmup": 2.0}, "warmup is 2.0"),
        (PLAN, words(), {"group_share": -0.1}, "group_share is -0.1"),
        (PLAN, words(), {"minutes": 0.0}, "minutes is 0.0; give a positive number"),
        (PLAN, words(), {"betas": (0.9, 1.0)}, "betas are"),
        (PLAN, words(), {"schedule": "step"}, "schedule 'step' is not one of cosine, linear"),
        (PLAN, words(), {"train": "lora", "lora_targets": ("wq",)}, "target 'wq' is no matrix"),
    ],
)
def test_bad_input(pair, tmp_path, plan, tokens, changes, message):
    model, teacher = pair
    before = weights_of(model)
    with pytest.raises(AbreastError, match=message):
        distill(model, plan, tokens, tmp_path / "w", recipe=recipe(**changes), teacher=teacher)
    assert not changed(before, weights_of(model))
    assert not (tmp_path / "w").exists()


def test_teacher_of_another_model(pair, tiny_checkpoint, tmp_path):
    model, _ = pair
    for other in ({"num_layers": 8}, {"vocab_size": 100}):
        teacher, _ = load(tiny_checkpoint(**other))
        with pytest.raises(AbreastError, match="must be the plan's original"):
            distill(model, PLAN, words(), tmp_path, recipe=recipe(), teacher=teacher)


def test_half_precision_weights_are_not_trained(tiny_checkpoint, tmp_path):
    model, _ = load(tiny_checkpoint(dtype="bfloat16"))
    with pytest.raises(AbreastError, match="the weights are bfloat16"):
        distill(model, PLAN, words(), tmp_path, recipe=recipe(), teacher=copy.deepcopy(model))


def test_weights_that_change_cannot_teach(pair, tmp_path):
    model, _ = pair
    with pytest.raises(AbreastError, match="the teacher must be a second model"):
        distill(model, PLAN, words(), tmp_path, recipe=recipe(train="groups"))


WORKER = """
import json, os, sys
import numpy as np
import torch
from abreast.heal.recipe import Recipe
from abreast.heal.train import distill
from abreast.model import load
from abreast.plan import Plan

job = json.loads(sys.argv[1])
torch.set_num_threads(1)
model, _ = load(job["folder"])
teacher, _ = load(job["folder"])
tokens = np.random.default_rng(0).integers(0, 128, (44, 24))
recipe = Recipe(**job["recipe"])
result = distill(model, Plan.parse("1+2 3|4:1", 6), tokens, job["work"], recipe=recipe,
                teacher=teacher)
if os.environ.get("RANK", "0") == "0":
    torch.save(model.state_dict(), job["out"])
    print(json.dumps([result.before, result.after]))
"""


@pytest.mark.slow
def test_two_processes_share_each_batch(tiny_checkpoint, tmp_path):
    """Two processes on half a batch each do what one does on the whole."""
    (tmp_path / "worker.py").write_text(WORKER, encoding="utf-8")
    source = Path(__file__).resolve().parents[2] / "src"
    states = []
    for count in (1, 2):
        job = {
            "folder": str(tiny_checkpoint()),
            "work": str(tmp_path / f"work-{count}"),
            "out": str(tmp_path / f"{count}.pt"),
            "recipe": recipe(bf16=False, steps=4).to_dict(),
        }
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launch += [f"--nproc-per-node={count}", str(tmp_path / "worker.py"), json.dumps(job)]
        done = subprocess.run(
            launch,
            env={**os.environ, "PYTHONPATH": str(source), "ACCELERATE_USE_CPU": "true"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        states.append(torch.load(tmp_path / f"{count}.pt"))
    for name in states[0]:
        assert torch.allclose(states[0][name], states[1][name], atol=1e-4), name
