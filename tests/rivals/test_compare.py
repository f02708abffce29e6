"""Rivals on tiny random models: what is chosen, fitted and scored, against plain computations."""

import copy
import json
import re
from importlib import import_module

import numpy as np
import pytest
import torch

from abreast.data import TokenStream
from abreast.errors import AbreastError
from abreast.model.grouping import grouped, load
from abreast.model.programs import (
    Mapped,
    advance,
    capture,
    cost_of,
    geometry,
    name_of,
    run_programs,
)
from abreast.model.scores import token_scores
from abreast.plan import Group, Plan
from abreast.planner.calibration import calibrate
from abreast.planner.front import Profile
from abreast.planner.settings import CalibrationSettings
from abreast.rivals.compare import compare_rivals, described, program_of
from abreast.rivals.repair import Streams, marked

module = import_module("abreast.rivals.compare")
LAYERS, WINDOWS, WINDOW = 6, 8, 96
GEMMA = {"layer_types": ["sliding_attention", "full_attention"] * 3, "sliding_window": 8}


def text(seed: int) -> TokenStream:
    tokens = np.random.default_rng(seed).integers(128, size=WINDOWS * WINDOW)
    return TokenStream(tokens, "random", 1, WINDOWS * WINDOW)


def tokens(seed: int = 0) -> np.ndarray:
    return text(seed).tokens.reshape(WINDOWS, WINDOW)


@pytest.fixture(params=["llama", "gemma3_text"])
def model(request, tiny_checkpoint):
    config = GEMMA if request.param == "gemma3_text" else {}
    return load(tiny_checkpoint(request.param, **config))[0]


def without(model, layers):
    """The model with these layers deleted."""
    left = copy.deepcopy(model)
    indices = [i for i in range(LAYERS) if i not in layers]
    left.base_model.layers = torch.nn.ModuleList(left.base_model.layers[i] for i in indices)
    left.config.num_hidden_layers = len(indices)
    if getattr(left.config, "layer_types", None):
        left.config.layer_types = [model.config.layer_types[i] for i in indices]
    return left


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def state_after(model, ids):
    """The residual stream after the last layer."""
    seen = []
    hook = model.base_model.layers[-1].register_forward_hook(
        lambda _module, _args, output: seen.append(
            output[0] if isinstance(output, tuple) else output
        )
    )
    logits(model, ids)
    hook.remove()
    return seen[0]


def scored(model, programs, ids):
    original = tuple(range(LAYERS))
    runs = run_programs(model, ids, programs, reference=original)
    return {program: sums for program, sums, _ in runs}


def test_layers_left_out_score_as_a_model_without_them(model):
    ids = torch.from_numpy(tokens()[:2])
    left_out = (1, 4)
    program = tuple(i for i in range(LAYERS) if i not in left_out)
    expected = token_scores(
        logits(without(model, left_out), ids)[:, :-1], ids[:, 1:], logits(model, ids)[:, :-1]
    )
    np.testing.assert_allclose(
        scored(model, [program], ids)[program], expected.sum(1), rtol=1e-4, atol=1e-4
    )


def test_mapped_steps_multiply_what_a_branch_returns(tiny_checkpoint):
    model, _ = load(tiny_checkpoint())
    ids = torch.from_numpy(tokens()[:1])
    weight = torch.randn(64, 64)
    step = Mapped(2, "test", {(2, "mlp"): weight})
    program = (0, 1, step, 4, 5)
    changed = without(model, [3])
    down = changed.base_model.layers[2].mlp.down_proj
    down.weight = torch.nn.Parameter(weight @ down.weight)
    expected = token_scores(logits(changed, ids)[:, :-1], ids[:, 1:], logits(model, ids)[:, :-1])
    sums = scored(model, [program], ids)[program]
    np.testing.assert_allclose(sums, expected.sum(1), rtol=1e-3)
    assert name_of(program) == "0 1 2@test 4 5" and cost_of(program) == 5
    group = (0, Mapped(Group(layers=(1, 2)), "test", {}), 3, 4, 5)
    assert name_of(group) == "0 1+2@test 3 4 5" and cost_of(group) == 6


def test_what_is_marked_to_be_fitted():
    plan = Plan.parse("1+2 4|5", 8)
    assert name_of(marked(program_of(plan), 8, "refit")) == "0 1+2@refit 3 4|5@refit 6 7"
    assert marked(program_of(plan), 8, "map") == program_of(plan)
    assert name_of(marked((0, 1, 4, 5), 7, "map")) == "0 1@map 4 5@map"
    assert marked((2, 3), 4, "refit") == (2, 3)  # no layer before the cut
    assert described((0, 1, 4, 5), 7) == "without 2 3 6"
    assert described(program_of(plan), 8) == "1+2 4|5"


def test_a_linear_map_is_recovered(tiny_checkpoint):
    """The layer left out only multiplies the FFN's output before it, so a map stands in for it."""
    model, _ = load(tiny_checkpoint(num_layers=LAYERS))
    layers = model.base_model.layers
    torch.manual_seed(0)
    linear = torch.eye(64) + 0.3 * torch.randn(64, 64) / 8
    streams = Streams(model, tokens(), 4)
    original = streams.original
    for number, batch in enumerate(streams.batches):  # the state after layer 3, as if it did that
        ffn = []
        hook = layers[2].mlp.register_forward_hook(lambda *args, ffn=ffn: ffn.append(args[-1]))
        logits(model, batch)
        hook.remove()
        original[number][4] = original[number][3] + ffn[0] @ (linear.T - torch.eye(64))
    fitted = streams.fitted(marked((0, 1, 2, 4, 5), LAYERS, "map"))
    (weight,) = fitted[2].maps.values()
    torch.testing.assert_close(weight, linear, rtol=0, atol=2e-3)


@pytest.mark.parametrize("plan", ["cut", "1+2 4~5", "2|3|4:1"])
def test_refit_never_raises_the_calibration_error(model, plan):
    """In each place the stream comes no further from the original's; more of it is then right."""
    program = (0, 1, 4, 5) if plan == "cut" else program_of(Plan.parse(plan, LAYERS))
    streams = Streams(model, tokens(), 4)
    fitted = streams.fitted(marked(program, LAYERS, "refit"))
    assert [step for step in fitted if isinstance(step, Mapped)]
    ids = torch.from_numpy(tokens())
    last = len(fitted) - 1 - next(i for i, s in enumerate(fitted[::-1]) if isinstance(s, Mapped))
    end = next((s if isinstance(s, int) else s.layers[0] for s in program[last + 1 :]), LAYERS)

    def error(steps):
        x, arguments = capture(model, model.base_model.layers, ids)
        for step in steps[: last + 1]:
            x = advance(model, model.base_model.layers, arguments, step, x)
        there = torch.cat([states[end] for states in streams.original])
        return float((x - there).square().sum())

    assert error(fitted) < error(program)


def test_refit_improves_only_what_is_changed_and_leaves_the_model_alone(model):
    ids = torch.from_numpy(tokens()[:2])
    before = logits(model, ids)
    Streams(model, tokens(), 4).fitted(marked((0, 1, 4, 5), LAYERS, "refit"))
    assert torch.equal(before, logits(model, ids))


@pytest.fixture
def run(request, tiny_checkpoint, tmp_path):
    """`compare` on a tiny model: our plans, its rows, and the two texts."""
    family = getattr(request, "param", "llama")
    config = GEMMA if family == "gemma3_text" else {"num_layers": LAYERS}
    folder = tiny_checkpoint(family, **config)
    settings = CalibrationSettings(
        num_windows=WINDOWS, window=WINDOW, batch_size=4, max_group=2, wirings=("lp", "ff")
    )
    texts = [
        calibrate(folder, tmp_path / name, settings, stream=text(seed))
        for seed, name in enumerate(("calibration", "held-out"))
    ]
    ours = {depth: Plan.parse(p, LAYERS) for depth, p in ((5, "2+3"), (4, "1+2 3~4"))}
    arrays = geometry(texts[0].model, texts[0].tokens, 4, 1)
    profile = Profile("made up", single=1.0, groups={"lp 2": 1.5, "ff 2": 1.6}, rest=2.0)

    def call(**options):
        return compare_rivals(ours, arrays, *texts, tmp_path, profile=profile, **options)

    return call, texts, arrays


def test_every_rival_is_measured_on_the_other_text(run, tmp_path):
    call, (_, held_out), arrays = run
    rows = call(refit=True)
    ways = {(row.method, row.depth) for row in rows if not row.refit}
    assert ways == {(method, depth) for method in module.METHODS for depth in (5, 4)}
    assert {row.method for row in rows if row.refit} == set(module.METHODS) - {"random"}
    record = json.loads((tmp_path / "baselines.json").read_text())
    assert record["rests_on"]["tokens"] == held_out.identity["tokens"]
    assert len(record["plans"]) == len(rows) and record["full_forwards"]["sleb"] > 1
    by_way = {(row.method, row.depth): row for row in rows if not row.refit}
    least = int(np.argmin(arrays["influence"]))
    assert by_way["shortgpt", 5].plan == f"without {least}"
    assert by_way["similarity", 4].plan.count("|") == 2
    assert by_way["planner", 4].seconds == pytest.approx(2 + 2 + 1.5 + 1.6)
    assert by_way["sleb", 4].speedup == pytest.approx(8 / 6)
    assert by_way["similarity", 5].seconds is None  # no such group was timed
    plan = Plan.parse("1+2 3~4", LAYERS)
    ids = torch.from_numpy(held_out.tokens)
    reference = logits(held_out.model, ids)[:, :-1]
    with grouped(held_out.model, plan):
        scores = token_scores(logits(held_out.model, ids)[:, :-1], ids[:, 1:], reference)
    expected = scores.mean((0, 1))
    row = by_way["planner", 4]
    assert row.cost.kl == pytest.approx(expected[2], rel=1e-3)
    assert row.agreement == pytest.approx(expected[3], abs=1e-3)


def test_sleb_leaves_out_greedily_what_costs_least(run, monkeypatch):
    call, (chosen_on, _), _ = run
    monkeypatch.setattr(module, "FINALISTS", LAYERS)  # all on all windows
    plans = {
        r.depth: r.plan
        for r in call(methods=("planner", "sleb"), refit=False)
        if r.method == "sleb"
    }
    ids = torch.from_numpy(chosen_on.tokens)
    left_out: tuple[int, ...] = ()
    for depth in (5, 4):
        losses = {}
        for layer in set(range(LAYERS)) - set(left_out):
            pruned = without(chosen_on.model, (*left_out, layer))
            losses[layer] = token_scores(logits(pruned, ids)[:, :-1], ids[:, 1:]).mean()
        left_out += (min(losses, key=losses.get),)
        assert plans[depth] == " ".join(["without", *map(str, sorted(left_out))])


@pytest.mark.parametrize("run", ["llama", "gemma3_text"], indirect=True)
def test_the_contiguous_stretch_is_chosen_on_the_calibration_text(run, monkeypatch, tmp_path):
    """Also where no checkpoint could hold it, for its members mix kinds of attention."""
    call, (chosen_on, _), _ = run
    monkeypatch.setattr(module, "FINALISTS", 99)
    rows = call(methods=("contiguous",), refit=False)
    best = next(row.plan for row in rows if row.method == "contiguous" and row.depth == 4)
    ids = torch.from_numpy(chosen_on.tokens)
    stretches = [f"{a}{w}{a + 1} {a + 2}{w}{a + 3}" for a in (1,) for w in "+~"]
    costs = {}
    for plan in stretches:
        program = program_of(Plan.parse(plan, LAYERS))
        costs[plan] = scored(chosen_on.model, [program], ids)[program][:, 2].mean()
    assert best == min(costs, key=costs.get)
    journal = (tmp_path / "rivals" / "calibration" / "journal-0.jsonl").read_text()
    names = [name_of(program_of(Plan.parse(plan, LAYERS))) for plan in stretches]
    assert all(f'"{name}"' in journal for name in names)


def test_an_interrupted_comparison_goes_on(run, monkeypatch, tmp_path):
    call, _, _ = run
    some = ("planner", "sleb", "replaceme")
    whole = call(methods=some)
    monkeypatch.setattr(module, "Streams", None)
    monkeypatch.setattr("abreast.planner.measuring.run_programs", None)
    assert call(methods=some) == whole
    journal = tmp_path / "rivals" / "held-out" / "journal-0.jsonl"
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join(line for line in lines if "@refit" not in line) + "\n")
    monkeypatch.undo()
    again = call(methods=some)
    assert [row.plan for row in again] == [row.plan for row in whole]
    assert [row.cost.kl for row in again] == pytest.approx([row.cost.kl for row in whole])


def test_the_work_is_said_first_and_unknown_rivals_are_refused(run):
    call, _, _ = run
    said = []
    with pytest.raises(AbreastError, match="unknown rivals pruner; of planner, contiguous"):
        call(methods=("pruner",), step=said.append)
    assert said == []
    call(methods=("shortgpt",), refit=False, step=said.append)
    assert re.fullmatch(
        "rivals: at most 0 full forward passes of 768 tokens to choose and refit, and 2 of "
        r"768 tokens to judge, (about \d+|less than a) minutes? here",
        said[0],
    )
    said.clear()
    call(methods=("shortgpt",), refit=False, step=said.append)
    assert said[0].endswith("to judge, less what earlier calls did")
