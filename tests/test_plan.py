"""Plans: round trips, what stages and wirings mean, and one-line errors for everything else."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abreast.checkpoint import open_checkpoint, plan_for
from abreast.errors import AbreastError
from abreast.plan import FOLDER, WIRING_NAMES, Group, Plan, PlanError

TEXT = st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any plan: a random partition of the layers, every longer part a group of any wiring."""
    groups, layer = [], 0
    for size in draw(st.lists(st.integers(1, 5), min_size=1, max_size=10)):
        if size > 1:
            wiring = draw(st.sampled_from(["lp", "cqil", "ff"]))
            bypass = draw(st.integers(0, size - 1)) if wiring == "cqil" else 0
            layers = tuple(range(layer, layer + size))
            groups.append(Group(layers=layers, wiring=wiring, bypass=bypass))
        layer += size
    return Plan(num_layers=layer, groups=tuple(groups))


@given(plans())
def test_shorthand_round_trip(plan: Plan) -> None:
    assert Plan.parse(plan.shorthand, plan.num_layers) == plan
    assert Plan.parse(plan.shorthand.replace(" ", ", "), plan.num_layers) == plan
    assert Plan.read(plan.shorthand, plan.num_layers) == plan


@settings(deadline=None)
@given(plans(), TEXT, TEXT, TEXT)
def test_file_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    plan: Plan,
    source: str | None,
    revision: str | None,
    sha256: str | None,
) -> None:
    record = {"source": source, "revision": revision, "sha256": sha256}
    plan = plan.model_copy(update=record)
    path = tmp_path_factory.getbasetemp() / "plan.yaml"
    plan.save(path)
    assert Plan.load(path) == plan
    assert Plan.read(str(path), plan.num_layers) == plan


@given(plans())
def test_stages_are_an_ordered_partition(plan: Plan) -> None:
    assert [layer for stage in plan.stages for layer in stage] == list(range(plan.num_layers))
    assert plan.depth == len(plan.stages)
    assert plan.depth == plan.num_layers - sum(len(group.layers) - 1 for group in plan.groups)
    groups = [plan.group_of(stage) for stage in plan.stages]
    assert tuple(group for group in groups if group) == plan.groups
    assert all(group or len(stage) == 1 for group, stage in zip(groups, plan.stages, strict=True))


@given(plans())
def test_blocks_hold_every_attention_and_every_ffn_once(plan: Plan) -> None:
    blocks, layers = plan.blocks, list(range(plan.num_layers))
    assert [layer for block in blocks for layer in block.attentions] == layers
    assert [layer for block in blocks for layer in block.ffns] == layers
    in_order = sum(len(group.layers) - 1 for group in plan.groups if group.wiring == "ff")
    assert len(blocks) == plan.depth + in_order
    assert all(block.attentions for block in blocks)
    for attentions, ffns, group in blocks:
        if group is None or group.wiring != "ff":
            assert attentions == ffns == (group.layers if group else attentions[:1])
        else:  # every attention by itself, and the FFNs after all of them
            assert len(attentions) == 1
            assert ffns == (group.layers if attentions[0] == group.layers[-1] else ())
    own = plan.blocks_with(own_attentions=True)
    assert [block.attentions for block in own] == [(layer,) for layer in layers]
    assert [layer for block in own for layer in block.ffns] == layers
    lasts = {stage[-1] for stage in plan.stages}
    assert all(bool(block.ffns) == (block.attentions[0] in lasts) for block in own)


@given(st.integers(0, 20), st.integers(2, 7), st.data())
def test_who_sees_whom(first: int, size: int, data: st.DataObject) -> None:
    layers = tuple(range(first, first + size))
    square = [(j, k) for j in range(size) for k in range(size)]
    assert all(Group(layers=layers).ffn_sees[j][k] for j, k in square)
    bypass = data.draw(st.integers(0, size - 1))
    band = Group(layers=layers, wiring="cqil", bypass=bypass).ffn_sees
    assert all(band[j][k] == (0 <= j - k <= bypass) for j, k in square)
    causal = Group(layers=layers, wiring="cqil", bypass=size - 1).ffn_sees
    assert all(causal[j][k] == (k <= j) for j, k in square)
    in_order = Group(layers=layers, wiring="ff")
    assert all(in_order.ffn_sees[j][k] for j, k in square)
    assert all(in_order.attention_sees[j][k] == (k < j) for j, k in square)


def test_what_follows_from_the_matrices() -> None:
    layers = (3, 4, 5)
    groups = {name: Group.wired(layers, name) for name in WIRING_NAMES}
    assert [g.shorthand for g in groups.values()] == ["3+4+5", "3|4|5", "3|4|5:2", "3~4~5"]
    assert [g.kind for g in groups.values()] == ["lp", "cqil:0", "cqil:2", "ff"]
    assert [g.ffn_band for g in groups.values()] == [None, 0, 2, None]
    for name, group in groups.items():
        assert group.shares_ffn_input == (name in ("lp", "ff"))
        assert group.is_in_order == any(map(any, group.attention_sees)) == (name == "ff")
        assert group.description.startswith(group.wiring)


def test_known_plan() -> None:
    plan = Plan.parse("1+2,3|4|5:1", 8)
    assert plan.groups == (
        Group(layers=(1, 2)),
        Group(layers=(3, 4, 5), wiring="cqil", bypass=1),
    )
    assert plan.stages == ((0,), (1, 2), (3, 4, 5), (6,), (7,))
    assert plan.groups[1].ffn_sees == (
        (True, False, False),
        (True, True, False),
        (False, True, True),
    )
    assert plan.edge_groups() == ()
    assert [group.layers for group in Plan.parse("0+1 3+4 6+7", 8).edge_groups()] == [
        (0, 1),
        (6, 7),
    ]


@pytest.mark.parametrize(
    ("text", "shorthand", "name"),
    [
        ("P2 D1 S12 E16", "12|13:1 14|15:1", "P2 D1 S12 E16"),
        ("P4S14E30", "14|15|16|17 18|19|20|21 22|23|24|25 26|27|28|29", "P4 D0 S14 E30"),
        ("p3, s1, e7, d2", "1|2|3:2 4|5|6:2", "P3 D2 S1 E7"),
    ],
)
def test_cqil_names(text: str, shorthand: str, name: str) -> None:
    plan = Plan.read(text, 32)
    assert plan.shorthand == shorthand
    assert plan.cqil_name == name
    assert plan.label == f"{shorthand} ({name})"
    assert Plan.parse(name, 32) == plan


def test_cqil_figures() -> None:
    """E is the layer after the last: only so does the depth fall by what the latency fell."""
    assert Plan.parse("P2 D0 S12 E30", 32).depth == 23  # latency -26.2 %, 9 of 32 are 28.1 %
    assert Plan.parse("P4 S14 E30", 32).depth == 20  # latency -37.4 %, 12 of 32 are 37.5 %


@given(plans())
def test_only_a_stretch_of_equal_cqil_groups_has_a_cqil_name(plan: Plan) -> None:
    if plan.cqil_name is not None:
        assert Plan.parse(plan.cqil_name, plan.num_layers) == plan
    else:
        assert plan.label == plan.shorthand
    grouped = [layer for group in plan.groups for layer in group.layers]
    kinds = {(group.kind, len(group.layers)) for group in plan.groups}
    stretch = grouped == list(range(min(grouped, default=0), max(grouped, default=-1) + 1))
    named = len(kinds) == 1 and stretch and plan.groups[0].wiring == "cqil"
    assert named == (plan.cqil_name is not None)


def test_plan_without_groups() -> None:
    plan = Plan.parse("", 3)
    assert plan.stages == ((0,), (1,), (2,))
    assert plan.shorthand == ""


def one_line(caught: pytest.ExceptionInfo[PlanError]) -> str:
    message = str(caught.value)
    assert isinstance(caught.value, AbreastError)
    assert message.strip() and len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("1+2 2+3", "overlap in layer 2"),
        ("1+2+3 2+3", "overlap"),
        ("3+4 1+2", "not in ascending order"),
        ("2+1", "not in ascending order"),
        ("2+2", "not in ascending order"),
        ("1+3", "not consecutive"),
        ("1|2|4:1", "not consecutive"),
        ("4+5+6", "layer 6 does not exist"),
        ("7+8", "layer 7 does not exist"),
        ("3", "cannot read group '3'"),
        ("P2 D1 S1", "CQIL's names are P"),
        ("P2 P3 S1 E7", "each once"),
        ("P2 S1 E4", "P must be at least 2, and E - S a multiple of it"),
        ("P1 S1 E3", "P must be at least 2"),
        ("P2 S4 E2", "E - S a multiple"),
        ("P2 D2 S1 E3", "exceeds the group; at most 1 for 2"),
        ("P2 S0 E999999998", "the model has 6 layers, so E is at most that"),
        ("P2 S1 E3 1+2", "cannot read group 'P2'"),
        ("1+2 3", "cannot read group '3'"),
        ("1+2:1", "cannot read group"),
        ("1|2:2", "exceeds the group; at most 1 for 2"),
        ("1|2:-1", "cannot read group"),
        ("-1+0", "cannot read group"),
        ("1-2", "cannot read group"),
        ("1+2|3", "cannot read group"),
        ("1+2~3", "cannot read group"),
        ("1~2:1", "cannot read group"),
        ("1+", "cannot read group"),
        ("1.0+2.0", "cannot read group"),
        ("1..3", "cannot read group"),
        ("1++2", "cannot read group"),
        ("٢+٣", "cannot read group"),  # digits, but not ASCII ones
        ("1+" + "2" * 5000, "cannot read group"),
        ("1+2\x00", "cannot read group"),
        ("no such-plan", "cannot read group"),
        ("x" * 5000, "cannot read group"),
    ],
    ids=lambda value: value[:20].encode("unicode_escape").decode(),
)
def test_malformed_shorthand(text: str, fault: str) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.parse(text, 6)
    assert fault in one_line(caught)
    with pytest.raises(PlanError) as caught:
        Plan.read(text, 6)
    assert fault in one_line(caught)


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.yaml")), ids=lambda file: file.stem)
def test_plans_of_the_package(file: Path) -> None:
    """Each by its name, for one model, with the numbers that speak for it."""
    plan = Plan.load(file)
    assert Plan.read(file.stem, plan.num_layers) == plan
    assert file.stem.rpartition("-")[2] == str(plan.depth) and not plan.edge_groups()
    assert plan.source and re.fullmatch("[0-9a-f]{64}", str(plan.sha256))
    assert re.search(r"^# .* loss \+[\d.]+ ± [\d.]+, KL [\d.]+ ± ", file.read_text("utf-8"), re.M)


def test_a_plan_of_the_package_is_for_one_model_only() -> None:
    with pytest.raises(PlanError, match=r"no plan is named 'smollm2-7'; choose from .*smollm2-25"):
        Plan.read("smollm2-7", 30)
    with pytest.raises(PlanError, match="'smollm2-25' is for 30 layers, the model has 6"):
        Plan.read("smollm2-25", 6)
    plan = Plan.read("smollm2-25", 30)
    with pytest.raises(PlanError, match="made for another model") as caught:
        plan.check_model({"0" * 64}, "mine")
    assert f"--plan '{plan.shorthand}'" in one_line(caught)


@pytest.mark.parametrize("num_layers", [0, -1, True, 6.0, "6", None])
def test_malformed_number_of_layers(num_layers: object) -> None:
    with pytest.raises(PlanError, match="num_layers") as caught:
        Plan.parse("1+2", num_layers)  # type: ignore[arg-type]
    one_line(caught)


def group(text: str) -> str:
    return f"num_layers: 6\ngroups: [{{{text}}}]"


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (group("layers: [1, 2]") + "\nextra: 1", "unknown key 'extra'"),
        (group("layers: [1, 2], bypas: 0"), "unknown key 'groups.0.bypas'"),
        ("groups: []", "key 'num_layers' is missing"),
        (group("wiring: lp"), "key 'groups.0.layers' is missing"),
        (group("layers: [1, 2], wiring: both"), "groups.0.wiring"),
        (group("layers: [1, 2], wiring: LP"), "groups.0.wiring"),
        (group("layers: [1, 2], wiring: null"), "groups.0.wiring"),
        (group("layers: [1, 2], bypass: 1"), "bypass belongs to cqil"),
        (group("layers: [1, 2], wiring: lp, bypass: 1"), "bypass belongs to cqil"),
        (group("layers: [1, 2], wiring: ff, bypass: 1"), "bypass belongs to cqil"),
        (group("layers: [1, 2], wiring: cqil, bypass: 2"), "exceeds the group; at most 1 for 2"),
        (group("layers: [1, 2], wiring: cqil, bypass: -1"), "groups.0.bypass"),
        (group("layers: [1, 2], wiring: cqil, bypass: true"), "groups.0.bypass"),
        (group("layers: [1, 2], wiring: cqil, bypass: '1'"), "groups.0.bypass"),
        (group("layers: [1, 2], wiring: cqil, bypass: 1.0"), "groups.0.bypass"),
        (group("layers: []"), "fewer than 2 layers"),
        (group("layers: [3]"), "fewer than 2 layers"),
        (group("layers: [2, 1]"), "not in ascending order"),
        (group("layers: [1, 1]"), "not in ascending order"),
        (group("layers: [1, 3]"), "not consecutive"),
        (group("layers: [5, 6]"), "layer 6 does not exist; the model has layers 0 to 5"),
        (group("layers: [-1, 0]"), "groups.0.layers.0"),
        (group("layers: ['1', '2']"), "groups.0.layers.0"),
        (group("layers: [1.0, 2.0]"), "groups.0.layers.0"),
        (group("layers: [1, true]"), "groups.0.layers.1"),
        (group("layers: 1+2"), "groups.0.layers"),
        (group("layers: null"), "groups.0.layers"),
        ("num_layers: 6\ngroups: [1+2]", "groups.0"),
        ("num_layers: 6\ngroups: 1+2", "groups"),
        ("num_layers: 6\ngroups:", "groups"),
        ("num_layers: 6\ngroups: [{layers: [1, 2]}, {layers: [2, 3]}]", "overlap in layer 2"),
        ("num_layers: 6\ngroups: [{layers: [3, 4]}, {layers: [1, 2]}]", "not in ascending order"),
        ("num_layers: '6'", "num_layers"),
        ("num_layers: 6.0", "num_layers"),
        ("num_layers: true", "num_layers"),
        ("num_layers: null", "num_layers"),
        ("num_layers: 0", "num_layers"),
        ("num_layers: -6", "num_layers"),
        ("num_layers: 6\nsource: 1", "source"),
        ("num_layers: 6\n1: 2", "Keys should be strings"),
        ("- num_layers: 6", "must hold the keys"),
        ("6", "must hold the keys"),
        ("", "must hold the keys"),
        ("num_layers: [", "is not YAML"),
        ("num_layers: 6: 7", "line 1 is not YAML"),
        ("num_layers: 6\ngroups:\n\t- 1", "line 3 is not YAML"),
        ("a: \x01", "is not YAML"),
        ("!!python/object/apply:os.getcwd []", "is not YAML"),
        ("num_layers: 2020-13-45", "is not YAML"),  # a date that datetime refuses
        ("num_layers: " + "1" * 5000, "is not YAML"),
        ("num_layers: !!int ''", "is not YAML"),  # of which PyYAML takes the first character
        ("[" * 5000, "is not YAML"),
        (bytes(range(256)), "is not UTF-8 text"),
    ],
    ids=lambda value: repr(value)[:50],
)
def test_malformed_file(tmp_path: Path, content: str | bytes, fault: str) -> None:
    path = tmp_path / "plan.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(PlanError) as caught:
        Plan.load(path)
    message = one_line(caught)
    assert fault in message
    assert str(path) in message


def test_a_file_longer_than_a_plan_can_be_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    for more, fits in ((-1, True), (0, False)):
        path.write_text("num_layers: 6\n".ljust((1 << 20) + more))
        if fits:
            assert Plan.load(path) == Plan(num_layers=6)
        else:
            with pytest.raises(PlanError, match="must hold the keys"):
                Plan.load(path)


@pytest.mark.parametrize("name", ["absent.yaml", "."])
def test_file_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(PlanError, match="cannot be read") as caught:
        Plan.load(tmp_path / name)
    one_line(caught)


def test_file_for_another_model(tmp_path: Path) -> None:
    path = tmp_path / "a plan"  # recognised without a suffix, since it exists
    Plan.parse("1+2", 6).save(path)
    assert Plan.read(str(path), 6).shorthand == "1+2"
    with pytest.raises(PlanError, match="is for 6 layers, the model has 8") as caught:
        Plan.read(str(path), 8)
    assert str(path) in one_line(caught)


@given(st.text(max_size=40))
def test_any_text_is_a_plan_or_a_plan_error(text: str) -> None:
    try:
        plan = Plan.parse(text, 6)
    except PlanError:
        return
    assert Plan.parse(plan.shorthand, 6) == plan


@settings(deadline=None)
@given(st.binary(max_size=80))
def test_any_file_is_a_plan_or_a_plan_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(content)
    try:
        plan = Plan.load(path)
    except PlanError:
        return
    assert plan.num_layers >= 1


def test_plans_cannot_be_changed() -> None:
    plan = Plan.parse("1+2", 6)
    with pytest.raises(ValueError, match="frozen"):
        plan.num_layers = 7  # type: ignore[misc]


def test_saving_does_not_write_through_a_link(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    for name in ("plan.yaml", ".plan.yaml.new"):
        (tmp_path / name).symlink_to(outside)
    Plan.parse("1+2", 4).save(tmp_path / "plan.yaml")
    assert outside.read_text() == "mine"
    assert Plan.load(tmp_path / "plan.yaml") == Plan.parse("1+2", 4)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lp", "lp: every FFN sees the sum of all attentions"),
        ("ff", "ff: attentions in order, every FFN sees the sum of all attentions"),
        ("cqil", "cqil: every FFN sees its own attention"),
        ("cqil-full", "cqil with bypass 2: every FFN sees its own attention and those of up to 2"),
    ],
)
def test_wirings_in_words(name: str, words: str) -> None:
    assert Group.wired((3, 4, 5), name).description.startswith(words)
    assert ("with bypass" in words) == ("with bypass" in Group.wired((3, 4, 5), name).description)


def test_a_plan_for_weights_is_for_every_config_beside_them(
    tiny_checkpoint: Any, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_checkpoint(), tmp_path / "model")
    hashed = open_checkpoint(model)
    of_weights = Plan.parse("1+2", 6).made_for("mine", None, hashed.weights_sha256)
    of_all = of_weights.made_for("mine", None, hashed.sha256)
    assert plan_for(hashed, of_weights) == of_weights and plan_for(hashed, of_all) == of_all
    config = json.loads((model / "config.json").read_text("utf-8"))
    (model / "config.json").write_text(json.dumps({**config, "transformers_version": "5.17.0"}))
    assert plan_for(open_checkpoint(model), of_weights) == of_weights
    with pytest.raises(PlanError, match="made for another model"):
        plan_for(open_checkpoint(model), of_all)
    other = open_checkpoint(tiny_checkpoint(seed=1))
    with pytest.raises(PlanError, match="made for another model"):
        plan_for(other, of_weights)
