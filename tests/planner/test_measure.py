"""Calibration runs: the numbers against plain forward passes, planted truths, interruptions."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from dataclasses import fields

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from abreast.data import TokenStream
from abreast.errors import AbreastError
from abreast.evaluate.text import compare
from abreast.model.grouping import load
from abreast.plan import Group, Plan
from abreast.planner import measuring
from abreast.planner.calibration import calibrate, candidates
from abreast.planner.engines import ENGINES
from abreast.planner.expected import expect
from abreast.planner.front import Stats
from abreast.planner.measuring import candidate_costs, full_forwards, measure, score
from abreast.planner.settings import CalibrationSettings

WINDOW, WINDOWS, LAYERS = 32, 8, 6


def text(seed: int = 0, windows: int = WINDOWS) -> TokenStream:
    tokens = np.random.default_rng(seed).integers(128, size=windows * WINDOW)
    return TokenStream(tokens, "random", 1, windows * WINDOW)


def run(model, out, **options):
    stream = options.pop("stream", None) or (None if "data" in options else text())
    part = options.pop("part", (0, 1))
    settings = {"num_windows": WINDOWS, "window": WINDOW, "batch_size": 2}
    settings |= {"max_group": 2, "wirings": ("lp",), "keep": 0.6, **options}
    return calibrate(model, out, CalibrationSettings(**settings), stream=stream, part=part)


def test_costs_are_those_of_the_grouped_model(tiny_checkpoint, tmp_path):
    folder = tiny_checkpoint()
    calibration = run(folder, tmp_path / "run", max_group=3, wirings=["lp", "cqil", "cqil-full"])
    plans = [Plan.parse(p, LAYERS) for p in ("1+2", "1|2:1 3+4", "2|3|4", "2|3|4:2")]
    original, _ = load(folder)
    for plan, cost in zip(plans, score(calibration, plans), strict=True):
        grouped, _ = load(folder, plan=plan)
        comparison = compare(grouped, original, text(), window=WINDOW, stride=WINDOW)
        assert cost.kl == pytest.approx(comparison.kl, rel=1e-4, abs=1e-7)
        assert cost.kl_stderr == pytest.approx(comparison.kl_stderr, rel=1e-3, abs=1e-7)
        assert cost.loss_increase == pytest.approx(comparison.nll_difference, rel=1e-3, abs=1e-6)
        assert cost.tokens == comparison.num_tokens


def test_geometry_is_that_of_the_hidden_states(tiny_checkpoint, tmp_path):
    folder = tiny_checkpoint()
    stats = measure(run(folder, tmp_path / "run"))
    model, _ = load(folder)
    ids = torch.from_numpy(text().tokens).view(-1, WINDOW)
    # transformers gives the last state after the final norm; the states before it are enough
    with torch.inference_mode():
        states = model(ids, output_hidden_states=True).hidden_states[:-1]
    for first in range(LAYERS):
        for second in range(first, LAYERS):
            cosine = torch.cosine_similarity(states[first], states[second], dim=-1).clamp(-1, 1)
            assert stats.similarity[first, second] == pytest.approx(cosine.mean().item(), abs=1e-5)
            turned = cosine.double().arccos().mean().item() / np.pi
            assert stats.angular[second, first] == pytest.approx(turned, abs=1e-3)
            if second == first + 1:
                assert stats.influence[first] == pytest.approx(1 - cosine.mean().item(), abs=1e-5)


def test_dependency_is_how_a_contribution_turns(tiny_checkpoint, tmp_path):
    folder = tiny_checkpoint()
    stats = measure(run(folder, tmp_path / "run"))
    model, _ = load(folder)
    few = torch.from_numpy(text().tokens).view(-1, WINDOW)[: WINDOWS // 8]
    with torch.inference_mode():
        states = model(few, output_hidden_states=True).hidden_states
    layers = list(model.model.layers)
    model.model.layers = torch.nn.ModuleList([*layers[:2], *layers[3:]])
    with torch.inference_mode():
        without = model(few, output_hidden_states=True).hidden_states
    whole, alone = states[4] - states[3], without[3] - without[2]  # what layer 3 adds
    expected = 1 - torch.cosine_similarity(whole, alone, dim=-1).mean().item()
    assert stats.dependency[2, 3] == pytest.approx(expected, abs=1e-5)
    assert not np.tril(stats.dependency).any()


def test_stats_file_holds_what_was_measured(tiny_checkpoint, tmp_path):
    stats = measure(run(tiny_checkpoint(), tmp_path / "run", wirings=["lp", "cqil-full"]))
    loaded = Stats.load(tmp_path / "run" / "stats.safetensors")
    assert dict(loaded.groups) == dict(stats.groups)
    assert loaded.identity == stats.identity and loaded.loss == stats.loss
    assert set(loaded.identity) >= {"model", "tokens", "seed", "num_windows", "window", "dtype"}
    for name in ("similarity", "angular", "influence", "dependency"):
        assert (getattr(loaded, name) == getattr(stats, name)).all()
    assert len(loaded.groups) == 2 * (LAYERS - 3)


def test_all_of_the_text_for_the_better_candidates_only(tiny_checkpoint, tmp_path):
    stats = measure(run(tiny_checkpoint(), tmp_path / "run", wirings=["lp", "cqil"], keep=0.5))
    scored = {group: cost.tokens for group, cost in stats.groups.items()}
    part, whole = 2 * (WINDOW - 1), WINDOWS * (WINDOW - 1)
    assert sorted(scored.values()) == [part] * 4 + [whole] * 2
    measured_fully = {group.layers for group, tokens in scored.items() if tokens == whole}
    assert len(measured_fully) == 2
    every = measure(run(tiny_checkpoint(), tmp_path / "all", screen=1, keep=1))
    assert {cost.tokens for cost in every.groups.values()} == {whole}


def test_interrupted_run_goes_on_and_gives_the_same(tiny_checkpoint, tmp_path, monkeypatch):
    folder = tiny_checkpoint()
    whole = measure(run(folder, tmp_path / "whole"))
    real, programs = measuring.run_programs, 0

    def breaking(*arguments, **options):
        nonlocal programs
        for scores in real(*arguments, **options):
            programs += 1
            if programs == 7:
                raise KeyboardInterrupt
            yield scores

    monkeypatch.setattr(measuring, "run_programs", breaking)
    with pytest.raises(KeyboardInterrupt):
        measure(run(folder, tmp_path / "broken"))
    journal = (tmp_path / "broken" / "journal-0.jsonl").read_text().splitlines()
    assert 0 < len(journal) < len(whole.groups) * WINDOWS / 2
    with open(tmp_path / "broken" / "journal-0.jsonl", "a") as file:
        file.write('{"program": "0 1+2')  # as a power cut would leave it
    ran = []
    monkeypatch.setattr(
        measuring,
        "run_programs",
        lambda *a, **k: ((ran.append(scores), scores)[1] for scores in real(*a, **k)),
    )
    again = measure(run(folder, tmp_path / "broken"))
    assert dict(again.groups) == dict(whole.groups)
    references = sum(program == tuple(range(LAYERS)) for program, *_ in ran)
    assert len(ran) - references == _lines(tmp_path / "whole") - len(journal)


def _lines(folder) -> int:
    return len((folder / "journal-0.jsonl").read_text().splitlines())


def test_what_it_takes_is_counted_and_foretold(tiny_checkpoint, tmp_path):
    folder = tiny_checkpoint(num_layers=10)
    calibration = run(folder, tmp_path / "run", batch_size=1)
    foretold = expect(folder, calibration.settings)
    stats = measure(calibration)
    assert 0.6 * foretold.full_forwards < stats.full_forwards <= foretold.full_forwards
    assert stats.full_forwards == pytest.approx(sum(full_forwards(calibration).values()))
    assert foretold.candidates == len(stats.groups) == 7
    lines = _lines(tmp_path / "run") / WINDOWS
    assert foretold.scored == pytest.approx(lines + 1, rel=0.05)  # and the original
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    fresh = run(folder, tmp_path / "counted", batch_size=1)
    for layer in fresh.model.model.layers:
        layer.mlp.register_forward_hook(count)
    assert measure(fresh).full_forwards == pytest.approx(calls / 10 / WINDOWS)


def test_measuring_32_layers_takes_at_most_20_forward_passes(tiny_checkpoint):
    folder = tiny_checkpoint(num_layers=32)
    assert expect(folder, CalibrationSettings(window=WINDOW)).full_forwards <= 20


def test_of_larger_groups_those_of_the_best_pairs_are_measured(tiny_checkpoint, tmp_path):
    folder = tiny_checkpoint(num_layers=8)
    calibration = run(folder, tmp_path / "run", max_group=3, wirings=["lp", "ff"], larger=0.5)
    stats = measure(calibration)
    pairs = {group: cost.kl for group, cost in stats.groups.items() if len(group.layers) == 2}
    assert len(pairs) == 2 * 5
    least = {
        first: min(cost for group, cost in pairs.items() if group.layers[0] == first)
        for first in range(1, 6)
    }
    ranked = sorted(range(1, 5), key=lambda first: least[first] + least[first + 1])
    triples = {group for group in stats.groups if len(group.layers) == 3}
    assert {group.layers[0] for group in triples} == set(ranked[:2]) and len(triples) == 4
    costs = candidate_costs(calibration)
    assert set(costs.groups) == set(stats.groups)
    [screened] = score(calibration, [Plan(num_layers=8, groups=costs.groups[:1])], batches=[0])
    assert costs.costs[0] == screened.kl and not costs.coupling.any()
    every = run(folder, tmp_path / "all", max_group=3, larger=0)
    assert len(measure(every).groups) == 5  # and where pairs do not reach far enough, all
    assert len(measure(every, depth=4).groups) == 9


def test_only_groups_that_an_engine_loads(tiny_checkpoint, tmp_path):
    config = json.loads((tiny_checkpoint() / "config.json").read_text())
    options = {"wirings": ["lp", "cqil-full"], "max_group": 3}
    every = candidates(config, **options)
    assert candidates(config, engines=["transformers"], **options) == every
    stock = {group for group in every if group.wiring == "lp"}
    assert set(candidates(config, engines=["vllm", "llama.cpp"], **options)) == stock
    with pytest.raises(AbreastError, match=r"llama.cpp loads no such group: cqil groups"):
        candidates(config, engines=["llama.cpp"], wirings=["cqil-full"])
    with pytest.raises(
        AbreastError, match="engine 'mxnet' is unknown; choose from transf"
    ) as refused:
        candidates(config, engines=["mxnet"])
    assert str(refused.value).endswith(", ".join(ENGINES))
    (option,) = [entry for entry in fields(CalibrationSettings) if entry.name == "engines"]
    assert all(name in option.metadata["help"] for name in ENGINES)


ALL = ("lp", "cqil", "cqil-full", "ff")
LP, FF, BOTH = ("lp",), ("ff",), ("lp", "ff")


@pytest.mark.parametrize(
    ("family", "loads"),
    [
        (
            "llama",
            {
                **dict.fromkeys(("vllm", "transformers", "sglang", "torch_tp", "mlx-lm:mlx"), ALL),
                **{"llama.cpp": LP, "vllm:deci": BOTH, "vllm:deci-ff": FF},
                **{"sglang:deci-ff": FF, "mlx-lm:openelm": LP, "mlx-lm:deci-ff": FF},
            },
        ),
        ("gemma2", dict.fromkeys(("vllm", "transformers", "torch_tp"), ALL)),
        ("mixtral", {"vllm": BOTH, "transformers": ALL, "torch_tp": ALL}),
        ("opt", {"transformers": ALL}),
    ],
)
def test_every_engine_and_format_is_a_name(family, loads):
    config = {
        "model_type": family,
        "num_hidden_layers": 6,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "layer_types": ["full_attention"] * 6,
    }
    config |= {"num_local_experts": 4, "num_experts_per_tok": 2} if family == "mixtral" else {}
    loadable = {}
    for name in ENGINES:
        with suppress(AbreastError):
            groups = candidates(config, wirings=ALL, engines=[name])
            left = {"cqil-full" if g.bypass else g.wiring for g in groups}
            loadable[name] = tuple(wiring for wiring in ALL if wiring in left)
    assert loadable == loads


def test_engines_of_several_devices_are_asked_for_them():
    config = {"model_type": "llama", "num_hidden_layers": 6, "hidden_size": 64}
    config |= {"num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 192}
    for degree, unpaired, loads in ((1, "shard", True), (2, "shard", False), (3, "shard", True)):
        options = {"engines": ["torch_tp"], "degree": degree, "unpaired": unpaired}
        if loads:
            assert candidates(config, **options)
        else:
            with pytest.raises(AbreastError, match="torch_tp loads no such group: 2 processes"):
                candidates(config, **options)
    assert candidates(config, engines=["torch_tp"], degree=2, unpaired="replicate")
    with pytest.raises(AbreastError, match="transformers loads no such group: it runs in one"):
        candidates(config, engines=["vllm", "transformers"], degree=3)


def test_parts_of_a_text_have_no_window_in_common(tiny_checkpoint, tmp_path):
    stream = text(windows=3 * WINDOWS + 1)
    parts = [
        run(tiny_checkpoint(), tmp_path / f"{n}", stream=stream, part=(n, 3)) for n in range(3)
    ]
    tokens = np.concatenate([part.tokens for part in parts])
    assert (tokens.reshape(-1) == stream.tokens[: tokens.size]).all()
    with pytest.raises(AbreastError, match="gives 1 windows of 32 tokens behind the 24 that were"):
        run(tiny_checkpoint(), tmp_path / "3", stream=stream, part=(3, 4))


def planted(folder, independent: list[tuple[int, int]]):
    """A checkpoint in which the layers of some pairs cannot see each other at all.

    They write to one half of the residual stream and their norms read the other half only; the
    norms' epsilon is so large that a norm is the same linear map whatever the stream holds.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.rms_norm_eps = 1e6
    half = model.config.hidden_size // 2
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.3)  # nothing else keeps the stream from growing
            layer.mlp.down_proj.weight.mul_(0.3)
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight.mul_(1e3)
        model.model.norm.weight.mul_(1e3)
        for layer in (model.model.layers[i] for pair in independent for i in pair):
            layer.self_attn.o_proj.weight[half:] = 0
            layer.mlp.down_proj.weight[half:] = 0
            layer.input_layernorm.weight[:half] = 0
            layer.post_attention_layernorm.weight[:half] = 0
    return model


@pytest.mark.slow
def test_planted_independent_pairs_are_found(tiny_checkpoint, tmp_path):
    from abreast.planner.find import find_plan
    from abreast.planner.front import Budget

    model = planted(tiny_checkpoint(num_layers=14), [(2, 3), (5, 6), (10, 11)])
    model.save_pretrained(tmp_path / "planted")
    calibration = run(tmp_path / "planted", tmp_path / "run" / "calibration")
    planned = find_plan(calibration, tmp_path / "run", Budget(depth=11))
    assert planned.plan.shorthand == "2+3 5+6 10+11"
    true = set(planned.plan.groups)
    wrong = [cost.kl for plan, cost in planned.front.plans.items() if not set(plan.groups) <= true]
    assert abs(planned.expected.kl) < min(wrong) / 20
    limit = Budget(max_kl=min(wrong) / 10)
    assert find_plan(calibration, tmp_path / "run", limit).plan == planned.plan


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wirings": ["sideways"]}, "wiring 'sideways' is unknown"),
        ({"max_group": 1}, "groups of up to 1 layers"),
        ({"max_group": 7}, "groups of up to 7 layers"),
        ({"num_windows": 7}, "the number of windows is 7; give at least 8"),
        ({"window": 1}, "the window is 1"),
        ({"batch_size": 0}, "the batch size is 0"),
        ({"stream": text(windows=10), "num_windows": 12}, "gives 10 windows .* 12 were asked for"),
        ({"dtype": "float13"}, "dtype 'float13' is not one of"),
        ({"max_cache_bytes": 1000}, "what is kept of one window needs"),
        ({"data": "stdlib"}, "has no tokenizer"),
    ],
)
def test_bad_input(tiny_checkpoint, tmp_path, options, message):
    with pytest.raises(AbreastError, match=message):
        run(tiny_checkpoint(), tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers"])
def test_a_config_without_sizes_is_refused_in_one_line(tiny_checkpoint, tmp_path, key):
    folder = shutil.copytree(tiny_checkpoint(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(AbreastError, match=key):
        run(folder, tmp_path / "run")


def test_statistics_of_something_else_are_refused(tiny_checkpoint, tmp_path):
    measure(run(tiny_checkpoint(), tmp_path / "run"))
    with pytest.raises(AbreastError, match="holds a measure with other model; choose a new"):
        run(tiny_checkpoint(seed=1), tmp_path / "run")
    with pytest.raises(AbreastError, match="with other tokens"):
        run(tiny_checkpoint(), tmp_path / "run", stream=text(1))
    with pytest.raises(AbreastError, match="with other seed"):
        run(tiny_checkpoint(), tmp_path / "run", seed=1)
    run(tiny_checkpoint(), tmp_path / "run")


@pytest.mark.parametrize("key", ["identity", "source", "num_layers", "loss", "groups", None])
def test_statistics_whose_header_lacks_something_are_refused(tmp_path, key):
    square, path = np.zeros((5, 5)), tmp_path / "stats.safetensors"
    Stats({}, "model", 4, 3.0, {}, square, square, square[0], square[:4, :4], 1.0).save(path)
    with safe_open(path, framework="np") as file:
        header = json.loads(file.metadata()["abreast"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header.pop(key, None)
    save_file(arrays, path, metadata={"abreast": json.dumps(header)} if key else None)
    with pytest.raises(AbreastError, match=r"is damaged .*; delete it and measure again"):
        Stats.load(path)


def test_statistics_that_are_not_numbers_are_refused(tiny_checkpoint, tmp_path):
    stats = measure(run(tiny_checkpoint(), tmp_path / "run"))
    path = tmp_path / "run" / "stats.safetensors"
    group = next(iter(stats.groups))
    broken = {**stats.groups, group: type(stats.groups[group])(float("nan"), 0, 0, 0, 1)}
    type(stats)(**{**stats.__dict__, "groups": broken}).save(path)
    with pytest.raises(AbreastError, match=r"cost of group 1\+2 is not finite; measure again"):
        Stats.load(path)
    for header in ({}, {"num_layers": 6, "groups": []}, [], "x"):
        arrays = load_file(path)
        save_file(arrays, path, metadata={"abreast": json.dumps(header)})
        with pytest.raises(AbreastError, match=r"is damaged .*; delete it and measure again"):
            Stats.load(path)
    save_file(arrays, path)
    with pytest.raises(AbreastError, match=r"is damaged .*; delete it and measure again"):
        Stats.load(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(AbreastError, match=r"is damaged .*; delete it and measure again"):
        Stats.load(path)
    with pytest.raises(AbreastError, match="no statistics at"):
        Stats.load(tmp_path / "none")


def test_a_model_whose_numbers_overflow_is_refused(tiny_checkpoint, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint())
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(AbreastError, match=r"not finite .*; use --dtype bfloat16 or float32"):
        measure(run(tmp_path / "nan", tmp_path / "run"))


def test_groups_that_cannot_be_fused_are_no_candidates(tiny_checkpoint):
    config = json.loads((tiny_checkpoint("gemma2") / "config.json").read_text())
    with pytest.raises(AbreastError, match="no group of this model can be formed"):
        candidates(config)  # its layers alternate between sliding and full attention
    across = candidates(config, wirings=["lp", "cqil-full", "ff"])
    assert {group.wiring for group in across} == {"ff"} and len(across) == LAYERS - 3
    plain = json.loads((tiny_checkpoint() / "config.json").read_text())
    assert {group.layers for group in candidates(plain)} == {(1, 2), (2, 3), (3, 4)}
    assert len(candidates(plain, force=True)) == 5
    parallel = json.loads((tiny_checkpoint("cohere") / "config.json").read_text())
    assert {group.wiring for group in candidates(parallel, wirings=["lp", "cqil"])} == {"lp"}
    both = candidates(plain, max_group=3, wirings=["lp", "cqil", "cqil-full"])
    assert Group(layers=(1, 2, 3), wiring="cqil", bypass=2) in both and len(both) == 15
