"""Models spread over devices, memory and disk by transformers' device_map: the same numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from abreast.convert import convert
from abreast.data import TokenStream
from abreast.errors import AbreastError
from abreast.evaluate import perplexity
from abreast.heal import Recipe, heal
from abreast.heal.least_squares import refit
from abreast.model import (
    apply,
    cases,
    device_of,
    geometry,
    grouped,
    load,
    name_of,
    remove,
    run_programs,
)
from abreast.model.programs import Merged
from abreast.plan import Plan
from abreast.study import Changes, StudySettings, study

PLAN = "1+2 3|4:1"
TOKENS = np.random.default_rng(0).integers(128, size=(4, 16))
IDS = torch.from_numpy(TOKENS)
PARTS = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")


def on_disk(*layers: int) -> dict[str, str]:
    """A device_map that leaves these layers of six on the disk."""
    places = {f"model.layers.{i}": "disk" if i in layers else "cpu" for i in range(6)}
    return {**dict.fromkeys(PARTS, "cpu"), **places}


@pytest.fixture(params=["float32", "bfloat16"])
def pair(request, tiny_checkpoint):
    """A model in memory, and the same one with layers 2 and 3 on the disk, both in float32."""
    folder = tiny_checkpoint(dtype=request.param)
    whole, _ = load(folder, dtype="float32")
    spread, _ = load(folder, dtype="float32", device=on_disk(2, 3))
    assert [layer.self_attn.q_proj.weight.is_meta for layer in spread.model.layers] == [
        i in (2, 3) for i in range(6)
    ]
    return whole, spread


def logits(model, **options):
    with torch.inference_mode():
        return model(IDS, **options).logits


def test_a_group_runs_where_its_weights_wait_on_disk(pair):
    whole, spread = pair
    assert device_of(spread).type == "cpu"
    before = logits(spread)
    assert torch.equal(before, logits(whole))
    with grouped(whole, PLAN), grouped(spread, PLAN):
        under = logits(spread)
        assert torch.equal(under, logits(whole)) and not torch.equal(under, before)
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(spread.generate(IDS, **options), whole.generate(IDS, **options))
    assert torch.equal(logits(spread), before)
    apply(spread, PLAN)
    remove(spread)
    assert torch.equal(logits(spread), before)


def test_programs_and_geometry_are_those_of_the_whole_model(pair):
    whole, spread = pair
    kinds = ("shuffle", "prune", "parallel", "cqil")
    programs = [p for ps in cases(6, kinds, max_length=3, permutations=1).values() for p in ps]
    original = tuple(range(6))
    result, expected = (
        {name_of(p): sums for p, sums, _ in run_programs(m, IDS, programs, reference=original)}
        for m in (spread, whole)
    )
    assert result.keys() == expected.keys()
    assert all(np.array_equal(result[name], expected[name]) for name in result)
    result, expected = (geometry(model, TOKENS, 2, 2) for model in (spread, whole))
    assert all(np.array_equal(result[name], expected[name]) for name in result)
    assert torch.equal(logits(spread), logits(whole))


def test_layers_that_wait_elsewhere_are_not_merged(pair):
    with pytest.raises(AbreastError, match="cannot be merged; leave merge out of --interventions"):
        list(run_programs(pair[1], IDS, [(0, Merged((1, 2)), 3, 4, 5)]))
    list(run_programs(pair[1], IDS, [(Merged((0, 1)), 2, 3, 4, 5)]))


@pytest.mark.parametrize("plan", ["1+2", "1|2"])
def test_a_conversion_runs_from_the_disk(tiny_checkpoint, tmp_path, plan):
    convert(tiny_checkpoint(), plan, tmp_path / "out")
    whole, _ = load(tmp_path / "out")
    places = {key: device for key, device in on_disk(1, 3).items() if not key.endswith(".5")}
    spread, _ = load(tmp_path / "out", device=places)
    assert any(parameter.is_meta for parameter in spread.parameters())
    assert torch.equal(logits(spread), logits(whole))


def test_auto_spreads(tiny_checkpoint, tmp_path):
    folder, stream = tiny_checkpoint(), TokenStream(TOKENS.ravel(), "random", 1, 64)
    spread, whole = (load(folder, device=device)[0] for device in ("auto", "cpu"))
    result, expected = (perplexity(m, stream, window=16, stride=16) for m in (spread, whole))
    assert result.nll == expected.nll

    def merged(out: str, *devices: str):
        settings = StudySettings(num_windows=4, window=16, devices=devices)
        return study(folder, tmp_path / out, Changes(("merge",)), settings, stream=stream).rows

    assert merged("auto", "auto") == merged("cpu", "cpu")
    with pytest.raises(AbreastError, match="auto takes all devices for one worker"):
        merged("new", "auto", "cpu")


def test_healing_spreads_over_devices_and_not_over_the_disk(tiny_checkpoint, tmp_path):
    tokens = np.random.default_rng(1).integers(128, size=1024)
    recipe = Recipe(steps=1, batch_size=2, micro_batch=2)
    options = {"data": TokenStream(tokens, "random", 1, 1024), "window": 16, "recipe": recipe}
    kl = {
        heal(tiny_checkpoint(), "1+2", tmp_path / device, device=device, **options).kl_after
        for device in ("cpu", "auto")
    }
    assert len(kl) == 1
    with pytest.raises(AbreastError, match="larger than the devices here"):
        heal(tiny_checkpoint(), "1+2", tmp_path / "new", device=on_disk(2), **options)
    assert not (tmp_path / "new").exists()


def test_auto_without_accelerate_is_one_line(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr("abreast.model.grouping.find_spec", lambda name: None)
    with pytest.raises(AbreastError, match="needs accelerate: pip install accelerate"):
        load(tiny_checkpoint(), device="auto")


class Placed(torch.Tensor):
    """A tensor on a device that is made up; mixed with one from another it raises, as real ones do.

    Ordinary tensors, such as constants that a function makes, go with any.
    """

    own_device: torch.device

    @classmethod
    def on(cls, tensor: torch.Tensor, own_device: torch.device) -> Placed:
        placed = tensor.detach().as_subclass(torch.Tensor).as_subclass(cls)
        placed.own_device = own_device
        return placed

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function == torch.Tensor.device.__get__:
            return args[0].own_device
        if function == torch.Tensor.to:
            targets = [a for a in (*args[1:], kwargs.pop("device", None)) if a is not None]
            places = [torch.device(a) for a in targets if isinstance(a, torch.device | str)]
            rest = [a for a in targets if not isinstance(a, torch.device | str)]
            plain = args[0].as_subclass(torch.Tensor)
            moved = plain.to(*rest, **kwargs) if rest or kwargs else plain
            return cls.on(moved, places[0] if places else args[0].own_device)
        if function == torch.Tensor.copy_:  # goes from anywhere to anywhere
            args = (args[0], args[1].as_subclass(torch.Tensor))
        devices = {t.own_device for t in _placed((args, kwargs))}
        if len(devices) > 1:
            raise RuntimeError(f"{function} got tensors on {devices}")
        out = super().__torch_function__(function, types, args, kwargs)
        for tensor in _placed(out):
            tensor.own_device = next(iter(devices))
        return out


def _placed(value):
    if isinstance(value, Placed):
        yield value
    elif isinstance(value, dict):
        yield from _placed(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _placed(part)


@pytest.fixture
def apart(tiny_checkpoint):
    """A model whose layers 2 and 3 lie on another device than the rest, with accelerate's hooks."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model, _ = load(tiny_checkpoint())
    one, other = torch.device("cpu", 1), torch.device("cpu", 2)
    for name, module in model.named_modules():
        device = other if name.startswith(("model.layers.2", "model.layers.3")) else one
        for key, parameter in module.named_parameters(recurse=False):
            setattr(module, key, torch.nn.Parameter(Placed.on(parameter, device), False))
        for key, buffer in module.named_buffers(recurse=False):
            module._buffers[key] = Placed.on(buffer, device)
        if name != "model.layers" and name != "model":
            hook = AlignDevicesHook(io_same_device=not name)
            add_hook_to_module(module, hook)
            hook.execution_device = device
    return model


def test_members_on_two_devices_meet(apart, tiny_checkpoint):
    whole, _ = load(tiny_checkpoint())
    expected, result = logits(whole), logits(apart)
    assert torch.equal(result.as_subclass(torch.Tensor), expected)
    with grouped(whole, PLAN), grouped(apart, PLAN):
        assert torch.equal(logits(apart).as_subclass(torch.Tensor), logits(whole))
    programs = [(0, 1, 2, 3, 4, 5), (2, 1, 0, 3, 4, 5)]
    for one, other in zip(*(run_programs(m, IDS, programs) for m in (apart, whole)), strict=True):
        assert np.array_equal(one[1], other[1])


def test_a_refit_of_members_on_two_devices(apart, tiny_checkpoint):
    tokens = np.random.default_rng(1).integers(128, size=(64, 16))
    whole, _ = load(tiny_checkpoint())
    plan = Plan.parse("1+2 3+4", 6)
    result, expected = (refit(model, plan, tokens) for model in (apart, whole))
    assert result.kl_after == pytest.approx(expected.kl_after, rel=1e-6) and len(result.fits) == 10
