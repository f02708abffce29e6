"""The study against naive runs of models that were changed as a whole, and what it promises."""

from __future__ import annotations

import copy
import csv
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from abreast.data import TokenStream
from abreast.errors import AbreastError
from abreast.model.grouping import decoder_layers, grouped
from abreast.model.programs import (
    IN_GROUPS,
    Merged,
    cases,
    cost_of,
    name_of,
    planned,
    programs_under,
    run_programs,
    shared_steps,
    split,
)
from abreast.plan import Group
from abreast.rivals.measured import METHODS
from abreast.runs.folder import to_csv
from abreast.study.interventions import CSV, RECORD, StudyRow, best_by_depth, study, wins
from abreast.study.running import StudyRun, _run_shares, _Share
from abreast.study.settings import PAPERS, Changes, StudySettings
from abreast.study.sweep import study_cost

LAYERS, VOCABULARY, WINDOW = 5, 64, 12
# Both sides are float32; the same sums in another order differ by a few units in the last place of
# a loss near 4, which is 5e-7.
TOLERANCE = 1e-5

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
SLIDING = {"head_dim": 8, "num_key_value_heads": 2, "sliding_window": 4}
MODELS = {
    "llama": ("LlamaConfig", {"num_key_value_heads": 2}),
    "gemma2": ("Gemma2Config", {**SLIDING, "query_pre_attn_scalar": 8}),
    "gpt_neox": ("GPTNeoXConfig", {}),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a random checkpoint of a family, gains and biases far from 1 and 0."""
    made: dict[tuple[str, int], Path] = {}

    def make(family: str = "llama", seed: int = 0) -> Path:
        if (family, seed) not in made:
            name, extra = {**MODELS, "mixtral": ("MixtralConfig", {"num_local_experts": 2})}[family]
            config = getattr(transformers, name)(**COMMON, **extra)
            torch.manual_seed(seed)
            model = transformers.AutoModelForCausalLM.from_config(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    matrix = parameter.dim() == 2
                    noise = torch.randn_like(parameter)
                    parameter.copy_(noise * 0.15 if matrix else parameter + noise * 0.2)
            made[family, seed] = tmp_path_factory.mktemp(family)
            model.save_pretrained(made[family, seed])
        return made[family, seed]

    return make


def stream(windows: int = 3, seed: int = 0) -> TokenStream:
    tokens = np.random.default_rng(seed).integers(VOCABULARY, size=windows * WINDOW)
    return TokenStream(tokens, source="random", num_documents=1, num_bytes=len(tokens))


def run(model: Path, out: Path, **changes):
    """A study by the names of its settings."""
    values = {"interventions": PAPERS, "permutations": 2, "window": WINDOW} | changes
    data, progress = values.pop("data", stream()), values.pop("progress", None)
    kinds = [{f.name for f in fields(kind)} & values.keys() for kind in (Changes, StudySettings)]
    assert set.union(*kinds) == values.keys()
    what, options = ({name: values[name] for name in names} for names in kinds)
    if isinstance(data, str):
        data, options["data"] = None, data
    return study(
        *(model, out, Changes(**what), StudySettings(**options)), stream=data, progress=progress
    )


def load(folder: Path) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def loss_of(model: nn.Module) -> float:
    ids = torch.from_numpy(stream().tokens).view(-1, WINDOW)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    logp = logits[:, :-1].double().log_softmax(-1)
    return -logp.gather(-1, ids[:, 1:, None]).mean().item()


def with_layers(model: nn.Module, order: list[int], layers: list[nn.Module]) -> nn.Module:
    """The model with other layers; layer i of the new ones has the attention of order[i]."""
    changed = copy.deepcopy(model)
    kinds = getattr(model.config, "layer_types", None)
    changed.base_model.layers = nn.ModuleList(layers)
    changed.config.num_hidden_layers = len(layers)
    if kinds is not None:
        changed.config.layer_types = [kinds[layer] for layer in order]
    return changed


def naive_loss(model: nn.Module, intervention: str, start: int, end: int) -> float:
    """By surgery on a copy of the model, and a plain forward of all of it."""
    inside = list(range(start, end + 1))
    before, after = list(range(start)), list(range(end + 1, LAYERS))
    layers = list(decoder_layers(model))
    if intervention == "shuffle":
        losses = []
        for program in programs_under("shuffle", start, end, LAYERS, permutations=2, seed=0):
            assert sorted(program) == list(range(LAYERS))
            assert list(program) != list(range(LAYERS))
            changed = with_layers(model, list(program), [layers[i] for i in program])
            losses.append(loss_of(changed))
        return float(np.mean(losses))
    if intervention == "prune":
        left = before + after
        return loss_of(with_layers(model, left, [layers[i] for i in left]))
    if intervention == "merge":
        mean = copy.deepcopy(layers[start])
        weights = {
            name: torch.stack([layers[i].state_dict()[name] for i in inside]).mean(0)
            for name in mean.state_dict()
        }
        mean.load_state_dict(weights)
        order = [*before, start, *after]
        left = [*(layers[i] for i in before), mean, *(layers[i] for i in after)]
        return loss_of(with_layers(model, order, left))
    width = int(intervention[0]) if intervention[0].isdigit() else LAYERS
    parts = [inside[at : at + width] for at in range(0, len(inside), width)]
    sign = "|" if "cqil" in intervention else "~" if "ff" in intervention else "+"
    plan = " ".join(
        sign.join(map(str, part)) + (f":{len(part) - 1}" if "full" in intervention else "")
        for part in parts
        if len(part) > 1
    )
    with grouped(model, plan):
        return loss_of(model)


@pytest.mark.parametrize("family", MODELS)
def test_every_intervention_equals_a_naive_run(folder, tmp_path, family):
    result = run(folder(family), tmp_path / "out", batch_size=2, interventions=PAPERS)
    model = load(folder(family))
    if family == "gemma2":
        assert set(model.config.layer_types) == {"sliding_attention", "full_attention"}
    original = loss_of(model)
    assert result.loss == pytest.approx(original, abs=TOLERANCE)
    assert len(result.rows) == len(PAPERS) * LAYERS * (LAYERS - 1) // 2
    for row in result.rows:
        expected = naive_loss(model, row.intervention, row.start, row.end)
        assert row.loss == pytest.approx(expected, abs=TOLERANCE), row
        assert row.loss_increase == pytest.approx(expected - original, abs=2 * TOLERANCE), row
        assert row.perplexity == pytest.approx(np.exp(expected), rel=2 * TOLERANCE), row
    # The interventions are not one and the same on these models.
    at = {row.intervention: row.loss for row in result.rows if (row.start, row.end) == (1, 4)}
    coinciding = {"cqil", "cqil-full", "2-parallel-cqil-full"} if family == "gpt_neox" else set()
    losses = sorted(at[name] for name in {*PAPERS} - coinciding)
    assert np.diff(losses).min() > 3 * TOLERANCE


@pytest.mark.parametrize("start", [0, 1])
def test_groups_of_every_size_and_wiring_equal_a_naive_run(folder, start):
    model = load(folder())
    ids = torch.from_numpy(stream().tokens).view(-1, WINDOW)
    named = {name: programs_under(name, start, LAYERS - 1, LAYERS)[0] for name in IN_GROUPS}
    sums = {p: scores for p, scores, _ in run_programs(model, ids, named.values())}
    for name, program in named.items():
        expected = naive_loss(model, name, start, LAYERS - 1)
        assert sums[program].mean() / (WINDOW - 1) == pytest.approx(expected, abs=TOLERANCE), name


def test_a_layer_takes_its_own_mask_along(folder):
    """In Gemma 2 a shuffled layer keeps its kind of attention: this would notice if not."""
    model = load(folder("gemma2"))
    order = [1, 0, 2, 3, 4]
    moved = with_layers(model, order, [decoder_layers(model)[layer] for layer in order])
    right = loss_of(moved)
    moved.config.layer_types = model.config.layer_types
    assert abs(loss_of(moved) - right) > 1e-4


def test_programs_by_hand():
    def name(intervention: str, start: int, end: int) -> str:
        return name_of(programs_under(intervention, start, end, 7)[0])

    assert name("prune", 1, 3) == "0 4 5 6"
    assert name("prune", 0, 6) == ""
    assert name("merge", 1, 3) == "0 1=2=3 4 5 6"
    assert name("parallel", 1, 4) == "0 1+2+3+4 5 6"
    assert name("2-parallel", 1, 5) == "0 1+2 3+4 5 6"
    assert name("3-parallel", 0, 6) == "0+1+2 3+4+5 6"
    assert name("3-parallel", 1, 5) == "0 1+2+3 4+5 6"
    assert name("cqil", 1, 3) == "0 1|2|3 4 5 6"
    assert name("cqil-full", 1, 3) == "0 1|2|3:2 4 5 6"
    assert name("ff", 1, 3) == "0 1~2~3 4 5 6"
    assert name("5-parallel", 0, 6) == "0+1+2+3+4 5+6"
    assert name("2-parallel-cqil", 1, 5) == "0 1|2 3|4 5 6"
    assert name("4-parallel-cqil-full", 1, 6) == "0 1|2|3|4:3 5|6:1"
    assert name("6-parallel-ff", 0, 6) == "0~1~2~3~4~5 6"


def test_shuffles_are_seeded_distinct_and_as_many_as_there_are():
    assert programs_under("shuffle", 2, 3, 6, permutations=3) == ((0, 1, 3, 2, 4, 5),)
    assert len(programs_under("shuffle", 0, 2, 6, permutations=99)) == 5
    programs = programs_under("shuffle", 0, 5, 6, permutations=3, seed=1)
    assert len(set(programs)) == 3
    assert programs == programs_under("shuffle", 0, 5, 6, permutations=3, seed=1)
    assert programs != programs_under("shuffle", 0, 5, 6, permutations=3, seed=2)


def test_costs():
    pair, triple = Group(layers=(1, 2)), Group(layers=(1, 2, 3))
    assert cost_of((0, pair, 3)) == 4
    assert cost_of((0, Merged((1, 2, 3)), 4)) == 3
    assert shared_steps((0, pair, 3), (0, pair, 4)) == 2
    assert shared_steps((0, pair, 3), (0, triple)) == 1
    assert shared_steps((0, 1), (0, 1, 2)) == 2
    # 0 1 2 3, then 1+2 3 after 0, then 4 after 0 1+2
    assert planned([(0, 1, 2, 3), (0, pair, 3), (0, pair, 4)]) == 4 + 3 + 1


def test_layers_really_run_are_as_many_as_counted(folder):
    """Counted at the feed-forward networks, which every way of running a layer calls once."""
    model = load(folder())
    calls = 0

    def count(*_) -> None:
        nonlocal calls
        calls += 1

    for layer in decoder_layers(model):
        layer.mlp.register_forward_hook(count)
    programs = {program for group in cases(LAYERS).values() for program in group}
    ids = torch.from_numpy(stream().tokens).view(-1, WINDOW)
    scores = list(run_programs(model, ids, programs))
    assert {program for program, _, _ in scores} == programs
    assert len(scores) == len(programs)
    assert calls == sum(evaluated for *_, evaluated in scores) == planned(programs)


def test_counts_of_evaluations(folder, tmp_path):
    result = run(folder(), tmp_path / "out", interventions=["prune", "parallel"], batch_size=2)
    stretches = [(s, e) for s in range(LAYERS) for e in range(s + 1, LAYERS)]
    count = sum(LAYERS - (e - s + 1) for s, e in stretches)
    suffix = sum(LAYERS - 1 - e for _, e in stretches)
    counts, batches = result.evaluations, 2
    assert counts.without_reuse == batches * (LAYERS + count + LAYERS * len(stretches))
    parallel = sum(LAYERS - s for s, _ in stretches)
    assert counts.prefix_only == batches * (LAYERS + suffix + parallel)
    # Nothing but prefixes is shared here.
    assert counts.spent == counts.prefix_only
    longer = run(folder(), tmp_path / "all", batch_size=2).evaluations
    assert longer.spent < longer.prefix_only < longer.without_reuse


class Stop(Exception):
    pass


def test_interrupted_study_goes_on_to_the_same_bytes(folder, tmp_path):
    whole = run(folder(), tmp_path / "whole", batch_size=2)
    last = 0

    def stop_at(limit: int) -> Callable[[int, int], None]:
        def progress(done: int, total: int) -> None:
            nonlocal last
            assert done == last + 1 <= total
            last = done
            if done >= limit:
                raise Stop

        return progress

    for limit in (30, 60):
        with pytest.raises(Stop):
            run(folder(), tmp_path / "cut", batch_size=2, progress=stop_at(limit))
        assert not (tmp_path / "cut" / CSV).exists()
        with open(tmp_path / "cut" / "journal-0.jsonl", "a") as journal:
            journal.write('{"program": "0 1 2", "batch": 0, "nll": [1.')  # a power cut
    resumed = run(folder(), tmp_path / "cut", batch_size=2, progress=stop_at(10**6))
    assert (tmp_path / "cut" / CSV).read_bytes() == (tmp_path / "whole" / CSV).read_bytes()
    assert resumed.rows == whole.rows
    # Each start begins again at the embeddings, and pays at most one model's depth for it.
    spent = resumed.evaluations.spent - whole.evaluations.spent
    assert 0 <= spent <= 2 * 2 * LAYERS
    again = run(folder(), tmp_path / "cut", batch_size=2, progress=stop_at(0))
    assert again == resumed


def test_more_interventions_can_be_added(folder, tmp_path):
    run(folder(), tmp_path / "out", interventions=["prune"], max_length=2)
    run(folder(), tmp_path / "out")
    run(folder(), tmp_path / "other")
    assert (tmp_path / "out" / CSV).read_bytes() == (tmp_path / "other" / CSV).read_bytes()


def test_files(folder, tmp_path):
    result = run(folder(), tmp_path / "out", interventions=["merge"], max_length=3)
    with open(tmp_path / "out" / CSV, newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == [
        *("intervention", "start", "end", "depth", "cqil"),
        *("loss", "loss_increase", "stderr", "perplexity"),
    ]
    assert [(int(x["start"]), int(x["end"]), int(x["depth"])) for x in lines] == [
        (start, end, LAYERS - (end - start))
        for start in range(LAYERS)
        for end in range(start + 1, min(start + 3, LAYERS))
    ]
    assert float(lines[0]["loss"]) == pytest.approx(result.rows[0].loss, rel=1e-7)
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["identity"] == result.identity
    assert record["evaluations"]["spent"] == result.evaluations.spent
    assert json.dumps(result.to_dict(), allow_nan=False)


def test_standard_error_is_paired_over_windows(folder, tmp_path):
    row = run(folder(), tmp_path / "out", interventions=["prune"], max_length=2).rows[1]
    ids = torch.from_numpy(stream().tokens).view(-1, WINDOW)
    original = tuple(range(LAYERS))
    sums = {
        p: scores[:, 0] for p, scores, _ in run_programs(load(folder()), ids, [original, (0, 3, 4)])
    }
    differences = (sums[0, 3, 4] - sums[original]) / (WINDOW - 1)
    assert row.stderr == pytest.approx(np.std(differences, ddof=1) / len(differences) ** 0.5)
    single = run(folder(), tmp_path / "one", num_windows=1, max_length=2)
    assert all(np.isnan(row.stderr) for row in single.rows)


def test_hidden_states_stay_within_the_limit(folder, tmp_path):
    window = (LAYERS + 1) * WINDOW * 32 * 4
    small = run(folder(), tmp_path / "small", max_cache_bytes=window, max_length=2)
    assert small.identity["batch"] == 1
    large = run(folder(), tmp_path / "large", max_length=2)
    assert large.identity["batch"] == 3
    for one, other in zip(small.rows, large.rows, strict=True):
        assert one.loss == pytest.approx(other.loss, abs=TOLERANCE)
    with pytest.raises(AbreastError, match="what is kept of one window needs"):
        run(folder(), tmp_path / "none", max_cache_bytes=window - 1)


@pytest.mark.parametrize(
    ("changes", "differing"),
    [
        ({"data": stream(seed=1)}, "tokens"),
        ({"seed": 5}, "seed"),
        ({"window": WINDOW - 1}, "tokens, window"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"batch_size": 1}, "batch"),
    ],
)
def test_folder_of_another_study_is_refused(folder, tmp_path, changes, differing):
    run(folder(), tmp_path, max_length=2, interventions=["prune"])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(AbreastError, match=f"other {differing}; choose a new folder"):
        run(folder(), tmp_path, max_length=2, interventions=["prune"], **changes)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_folder_of_another_model_is_refused(folder, tmp_path):
    run(folder(), tmp_path, max_length=2, interventions=["prune"])
    with pytest.raises(AbreastError, match="other model; choose"):
        run(folder(seed=1), tmp_path, max_length=2, interventions=["prune"])
    (tmp_path / RECORD).write_text("{")
    with pytest.raises(AbreastError, match="damaged"):
        run(folder(), tmp_path)


def test_folder_of_an_older_version_is_refused(folder, tmp_path):
    """Its journal calls merged layers 1~2, which is the wiring ff now."""
    run(folder(), tmp_path, max_length=2, interventions=["merge"])
    record = json.loads((tmp_path / RECORD).read_text())
    del record["identity"]["format"]
    (tmp_path / RECORD).write_text(json.dumps(record))
    journal = tmp_path / "journal-0.jsonl"
    journal.write_text(journal.read_text().replace("=", "~"))
    with pytest.raises(AbreastError, match="a study with other format; choose a new folder"):
        run(folder(), tmp_path, max_length=2, interventions=["ff"])


def test_folder_of_something_else_is_refused(folder, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(AbreastError, match="is not a study"):
        run(folder(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"interventions": ["prine"]}, "'prine' is unknown; choose from shuffle"),
        ({"interventions": []}, "no intervention is named"),
        ({"interventions": ["prune", "prune"]}, "named twice"),
        ({"max_length": 1}, "longest stretch is 1; give at least 2"),
        ({"num_windows": 0}, "number of windows is 0"),
        ({"window": 1}, "window is 1; give at least 2"),
        ({"window": 65}, "the model holds 64 tokens"),
        ({"window": 40}, "less than one window"),
        ({"norms": "split"}, "that of a mixtral is not known"),
        ({"permutations": 0}, "number of permutations is 0"),
        ({"batch_size": 0}, "batch size is 0"),
        ({"devices": []}, "no device"),
        ({"devices": ["gpu"]}, "device 'gpu' is unknown"),
        ({"devices": ["cuda:97"]}, "no device 'cuda:97' here"),
        ({"data": "stdlib"}, "has no tokenizer"),
        ({"data": TokenStream(np.full(36, VOCABULARY), "", 1, 1)}, "outside the model's vocab"),
    ],
)
def test_mistakes_are_named_and_nothing_is_made(folder, tmp_path, changes, message):
    family = "mixtral" if "norms" in changes else "llama"
    with pytest.raises(AbreastError, match=message):
        run(folder(family), tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_layers_of_unlike_shape_do_not_merge(folder):
    model = load(folder())
    mlp = decoder_layers(model)[3].mlp
    mlp.up_proj, mlp.gate_proj = nn.Linear(32, 8, bias=False), nn.Linear(32, 8, bias=False)
    mlp.down_proj = nn.Linear(8, 32, bias=False)
    ids = torch.zeros(1, WINDOW, dtype=torch.long)
    with pytest.raises(AbreastError, match="layers 2 and 3 have weights of different shape"):
        list(run_programs(model, ids, programs_under("merge", 2, 3, LAYERS)))
    assert list(run_programs(model, ids, programs_under("parallel", 2, 3, LAYERS)))


def test_grouped_model_is_refused_and_the_model_left_as_it_was(folder):
    model = load(folder())
    before = loss_of(model)
    ids = torch.zeros(1, WINDOW, dtype=torch.long)
    with grouped(model, "1+2"), pytest.raises(AbreastError, match="run under a plan"):
        list(run_programs(model, ids, [(0, 1)]))
    list(run_programs(model, ids, [p for group in cases(LAYERS).values() for p in group]))
    assert loss_of(model) == before
    assert not any("forward" in vars(layer) for layer in decoder_layers(model))


def test_split_keeps_starts_together_and_loses_nothing():
    programs = {program for group in cases(8).values() for program in group}
    original = tuple(range(8))
    parts = split(programs, original, 3)
    assert set.union(*parts) == programs
    assert sum(map(len, parts)) == len(programs)
    starts = [{shared_steps(program, original) for program in part} for part in parts]
    assert not (starts[0] & starts[1] or starts[0] & starts[2] or starts[1] & starts[2])
    loads = [planned(part) for part in parts]
    assert max(loads) < 1.4 * min(loads)


@pytest.mark.slow
def test_two_workers_find_what_one_finds(folder, tmp_path):
    calls = []
    one = run(folder(), tmp_path / "one")
    two = run(
        *(folder(), tmp_path / "two"),
        devices=["cpu", "cpu"],
        progress=lambda *counts: calls.append(counts),
    )
    assert (tmp_path / "two" / CSV).read_bytes() == (tmp_path / "one" / CSV).read_bytes()
    assert calls[-1][0] == calls[-1][1]
    assert calls == sorted(calls)
    assert [path.name for path in (tmp_path / "two").glob("*.jsonl")] == ["journal-0.jsonl"]
    # Each worker runs the layers before its stretches for itself.
    spent = two.evaluations.spent - one.evaluations.spent
    assert 0 <= spent <= LAYERS
    assert two.evaluations.without_reuse == one.evaluations.without_reuse


@pytest.mark.slow
def test_worker_that_dies_is_reported(folder, tmp_path, capfd):
    tokens = stream().tokens.reshape(-1, WINDOW)
    model, identity = load(folder()), {"num_layers": LAYERS}
    whole = StudyRun(tmp_path, folder(), model, tokens, 3, False, identity, StudySettings())
    idle = _Share(whole, (), tmp_path / "journal-0.jsonl", "cpu", 1)
    work = ((0, (tuple(range(LAYERS)),)),)
    lost = replace(whole, model=None, folder=tmp_path)
    doomed = _Share(lost, work, tmp_path / "journal-1.jsonl", "cpu", 1)
    with pytest.raises(AbreastError, match=r"worker on cpu ended with status 1 .* run again"):
        _run_shares([idle, doomed], None, 0, 1)
    assert "CheckpointError" in capfd.readouterr().err


def rows_of(**losses: list[float]) -> list[StudyRow]:
    return [
        StudyRow(name.replace("_", "-"), start, start + 1, 5, None, loss, loss - 1, 0.1, 2.0)
        for name, values in losses.items()
        for start, loss in enumerate(values)
    ]


def test_wins_and_best():
    rows = rows_of(prune=[3.0, 2.0, 2.5], merge=[4.0, 2.0, 2.0])
    assert wins(rows, "prune", "merge") == (1, 1, 1)
    assert wins(rows, "prune", "shuffle") == (0, 0, 0)
    assert best_by_depth(rows, lambda row: row.intervention)["prune"][5].start == 1
    assert to_csv([asdict(rows[0])]).splitlines()[1] == "prune,0,1,5,,3,2,0.1,2"


def test_cqil_names_of_stretches(folder, tmp_path):
    rows = run(folder(), tmp_path, interventions=["2-parallel*", "cqil"], max_length=4).rows
    assert {row.intervention for row in rows} == {
        *("2-parallel", "2-parallel-cqil", "2-parallel-cqil-full", "2-parallel-ff", "cqil")
    }
    names = {(row.intervention, row.start, row.end): row.cqil for row in rows}
    assert names["cqil", 1, 3] == "P3 D0 S1 E4"
    assert names["2-parallel-cqil", 1, 4] == "P2 D0 S1 E5"
    assert names["2-parallel-cqil-full", 1, 3] == "P2 D1 S1 E3"  # the last layer stays as it was
    assert names["2-parallel", 1, 4] is None and names["2-parallel-ff", 1, 4] is None


def test_what_it_takes_is_said_before_and_is_what_it_takes(folder, tmp_path):
    said: list[str] = []
    settings = StudySettings(num_windows=3, window=WINDOW, batch_size=2)
    what = Changes(("2-parallel", "prune"))
    expected = study_cost(folder(), what, settings)
    result = study(folder(), tmp_path / "out", what, settings, stream=stream(), step=said.append)
    (words,) = said
    assert re.fullmatch(rf"{expected.text}, (about \d+|less than a) minutes? here", words)
    assert expected.full_forwards == result.evaluations.spent / LAYERS / 2
    assert f"{expected.full_forwards:.1f} full forward passes over 3 windows" in expected.text
    study(folder(), tmp_path / "out", what, settings, stream=stream(), step=said.append)
    assert len(said) == 1  # nothing is left to do


def test_norms_are_another_study(folder, tmp_path):
    own = run(folder(), tmp_path / "own", interventions=["parallel"], max_length=2)
    split = run(folder(), tmp_path / "a", interventions=["parallel"], max_length=2, norms="split")
    model = load(folder())
    with grouped(model, "1+2", norms="split"):
        assert split.rows[1].loss == pytest.approx(loss_of(model), abs=TOLERANCE)
    assert abs(split.rows[1].loss - own.rows[1].loss) > 3 * TOLERANCE
    with pytest.raises(AbreastError, match="other norms; choose a new folder"):
        run(folder(), tmp_path / "own", interventions=["parallel"], norms="shared")


def test_published_methods_are_measured_beside_the_interventions(
    tiny_checkpoint, tmp_path, request
):
    invoke = request.getfixturevalue("run")  # `run` here is the study
    model, out = tiny_checkpoint(tokenizer=True), tmp_path / "out"
    options = ("--data", "stdlib", "--windows", 8, "--window", 16, "--interventions", "prune")
    command = ("study", model, "-o", out, *options, "--max-length", 2, "--no-plots")
    status, _, err = invoke(*command, "--baselines", "4,6")
    assert status == 2 and "--baselines 4,6: give depths from 1 to 5" in err and not out.exists()
    status, printed, err = invoke(*command, "--baselines", "4", "--json")
    assert status == 0, err
    rows = json.loads(printed)["baselines"]
    assert {row["method"] for row in rows} == {*METHODS} - {"planner"}
    assert {row["depth"] for row in rows} == {4} and any(row["refit"] for row in rows)
    assert all(math.isfinite(row["kl"]) for row in rows)


def test_what_is_wrong_with_the_text_of_rivals_comes_first(tiny_checkpoint, tmp_path, run):
    """A study takes what there is; published methods need eight windows."""
    (tmp_path / "text.txt").write_text("layers abreast " * 10)
    command = ("study", tiny_checkpoint(tokenizer=True), "-o", tmp_path / "out", "--no-plots")
    command += ("--data", tmp_path / "text.txt", "--window", 16, "--windows", 9)
    status, _, err = run(*command, "--baselines", "4")
    assert status == 2 and "9 were asked for" in err and len(err.strip().splitlines()) == 1
    assert not [*(tmp_path / "out").rglob("journal*")]
    status, _, err = run(*command, "--interventions", "prune")
    assert status == 0, err
    assert re.search(r"full forward passes over [1-8] windows of 16 tokens, ", err)
    assert run(*command, "--interventions", "prune")[0] == 0  # nothing is left to do


def test_a_study_with_rivals_in_a_new_folder_and_again(tiny_checkpoint, tmp_path, run):
    (tmp_path / "text.txt").write_text("layers abreast " * 40)
    command = ("study", tiny_checkpoint(tokenizer=True), "-o", tmp_path / "out", "--no-plots")
    command += ("--data", tmp_path / "text.txt", "--window", 16, "--windows", 8, "--json")
    command += ("--interventions", "prune", "--max-length", 2, "--baselines", "5")
    status, first, err = run(*command)
    assert status == 0 and "rivals: at most" in err, err
    status, again, err = run(*command)
    assert status == 0 and json.loads(again)["baselines"] == json.loads(first)["baselines"], err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("")
    command = (*command[:3], tmp_path / "other", *command[4:])
    status, _, err = run(*command)
    assert status == 2 and "is not a study" in err
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["mine.txt"]
