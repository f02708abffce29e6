"""Training spread over processes: the same weights as without, a share of the memory, exact resume.

Two real processes (gloo, CPU) each; what one launch can try, it tries, because starting costs most.
"""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import distributed
from torch.distributed.tensor import DTensor

from abreast.cli.quality import heal as heal_verb
from abreast.convert.verification import verify
from abreast.demo import model_folder
from abreast.errors import AbreastError
from abreast.heal.recipe import Recipe
from abreast.heal.student import full, local, shard
from abreast.model.grouping import grouped, load

pytest.importorskip("peft")

SOURCE = Path(__file__).resolve().parents[2] / "src"
QUICK = {
    "group_share": 0.0,
    "batch_size": 4,
    "micro_batch": 1,
    "evaluate_every": 2,
    "save_every": 2,
    "steps": 4,
}
# One process starts out elsewhere, as after a refit of other bits: the main one's weights count.
WORKER = """
import gc, json, os, sys
import numpy as np
import torch
from abreast.heal.recipe import Recipe
from abreast.heal.train import distill
from abreast.model import load
from abreast.plan import Plan
from abreast.heal.student import full

RANK = int(os.environ["RANK"])
torch.set_num_threads(1)
tokens = np.random.default_rng(0).integers(0, 128, (44, 24))

def held():
    "Bytes of every tensor that is alive here."
    gc.collect()
    alive = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    stores = [o.untyped_storage() for o in alive if type(o) in (torch.Tensor, torch.nn.Parameter)]
    return sum({store.data_ptr(): store.nbytes() for store in stores}.values())

for job in json.loads(sys.argv[1]):
    model, _ = load(job["folder"])
    if RANK:
        model.load_state_dict({n: t + 0.1 for n, t in model.state_dict().items()})
    taught = job["recipe"].get("train") != "lora" and job["recipe"].get("objective") != "lm"
    teacher = load(job["folder"])[0] if taught else None
    bytes_held = 0

    def progress(done, steps):
        global bytes_held
        if job.get("weighed"):
            bytes_held = max(bytes_held, held())
        if job.get("stops_after") == done:
            raise KeyboardInterrupt
        if job.get("dies_after") == done and RANK:
            os._exit(9)

    adapts = job["recipe"].get("train") == "lora"
    rate = {"learning_rate": 1e-3} if adapts else {"relative_rate": 0.01}
    recipe = Recipe(**{**rate, **job["recipe"]})
    try:
        found = distill(model, Plan.parse(job["plan"], 6), tokens, job["out"] + ".work",
                        recipe=recipe, teacher=teacher, progress=progress)
    except KeyboardInterrupt:
        continue
    whole = {name: full(tensor) for name, tensor in model.state_dict().items()}
    points = [(p.step, p.loss, p.held_out) for p in found.points[1:]]
    torch.save({"whole": whole, "points": points, "held": bytes_held}, f"{job['out']}.{RANK}")
    del model, teacher, found, whole
"""


def launch(*command: str) -> subprocess.CompletedProcess:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    paths = {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*run, *command], env={**os.environ, **paths}, capture_output=True, text=True, timeout=1200
    )


def train(folder: Path, jobs: list[dict]) -> subprocess.CompletedProcess:
    (folder / "worker.py").write_text(WORKER, encoding="utf-8")
    return launch(str(folder / "worker.py"), json.dumps(jobs))


def results(job: dict) -> list[dict]:
    return [torch.load(f"{job['out']}.{rank}") for rank in (0, 1)]


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


CASES = {  # family, config, plan, recipe; odd sizes and ranks share out unevenly
    "groups": ("llama", {}, "1+2 3|4:1", {}),
    "all, tied": ("llama", {"tied": True}, "1+2+3", {"train": "all"}),
    "lora": ("llama", {}, "1+2 3|4", {"train": "lora", "lora_rank": 3}),
    "language model": (
        "llama",
        {},
        "1|2 3|4|5:1",
        {"objective": "lm", "micro_batch": 2},
    ),
    "recomputed": ("llama", {}, "1+2 3|4:1", {"checkpointing": True}),
    "recomputed, norms after": ("olmo2", {}, "1+2", {"checkpointing": True}),
    "recomputed lora": ("llama", {}, "1+2", {"checkpointing": True, "train": "lora"}),
}


@pytest.mark.slow
def test_the_weights_are_those_of_a_run_that_is_not_sharded(tiny_checkpoint, tmp_path):
    jobs = {}
    for number, (name, (family, config, plan, changes)) in enumerate(CASES.items()):
        folder = tiny_checkpoint(family, intermediate_size=97, **config)
        for sharded in (False, True):
            jobs[name, sharded] = {
                "folder": str(folder),
                "plan": plan,
                "recipe": {**QUICK, "bf16": False, **changes, "shard": sharded},
                "out": str(tmp_path / f"{number}-{sharded}"),
                "weighed": name == "all, tied",
            }
    done = train(tmp_path, list(jobs.values()))
    assert done.returncode == 0, done.stderr[-3000:]
    for name, (family, config, _, _) in CASES.items():
        plain, sharded = results(jobs[name, False]), results(jobs[name, True])
        before = load(tiny_checkpoint(family, intermediate_size=97, **config))[0].state_dict()
        after = plain[0]["whole"]
        assert max(float((after[n] - before[n]).abs().max()) for n in before) > 1e-4, name
        for n in after:
            assert torch.allclose(sharded[0]["whole"][n], after[n], rtol=0, atol=1e-5), (name, n)
        assert same(sharded[0]["whole"], sharded[1]["whole"]), name
        assert sharded[0]["points"] == sharded[1]["points"], name
        for one, two in zip(sharded[0]["points"], plain[0]["points"], strict=True):
            assert one == pytest.approx(two, rel=1e-4), name
    for rank in (0, 1):
        # Model, teacher, the best weights and both moments of all of them.
        parts = [
            results(jobs["all, tied", is_sharded])[rank]["held"] for is_sharded in (True, False)
        ]
        model = sum(p.nbytes for p in load(jobs["all, tied", True]["folder"])[0].parameters())
        assert parts[1] > 5 * model
        assert parts[0] < 0.53 * parts[1], parts


@pytest.mark.slow
def test_a_sharded_run_that_died_ends_with_the_same_bits(tiny_checkpoint, tmp_path):
    def job(name: str, train: str, **more) -> dict:
        return {
            "folder": str(tiny_checkpoint(intermediate_size=97)),
            "plan": "1+2 3|4:1",
            "recipe": {**QUICK, "steps": 7, "train": train, "shard": True},
            "out": str(tmp_path / name),
            **more,
        }

    whole = [job("whole-lora", "lora"), job("whole-all", "all")]
    interrupted = [job("cut-lora", "lora", stops_after=5), job("cut-all", "all", dies_after=3)]
    assert train(tmp_path, [*whole, *interrupted]).returncode != 0
    left = [
        sorted(path.name for path in Path(f"{j['out']}.work").glob("step-*")) for j in interrupted
    ]
    assert left == [["step-00000002", "step-00000004"], ["step-00000000", "step-00000002"]]
    again = [{k: j[k] for k in ("folder", "plan", "recipe", "out")} for j in interrupted]
    done = train(tmp_path, again)
    assert done.returncode == 0, done.stderr[-3000:]
    for one, two in zip(whole, again, strict=True):
        for first, second in zip(results(one), results(two), strict=True):
            assert same(first["whole"], second["whole"])
            assert first["points"] == second["points"]


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--train", "lora", "--method", "distill"], []])
def test_heal_writes_the_checkpoint_that_it_writes_without(tmp_path, options):
    arguments = ["--plan", "7+8", "--json", "--data", "stdlib-train", "--tokens", "2600"]
    arguments += ["--window", "128", "--steps", "2"]
    arguments += ["--batch-size", "2", "--micro-batch", "1", "--no-bf16"]
    arguments += ["--group-share", "0"]  # as sharded models are trained
    arguments += ["--learning-rate", "1e-3", "--out-dtype", "float32", *options]
    out, healed = tmp_path / "out", tmp_path / "kept"
    files = ["-o", str(out), "--keep-weights", str(healed)]
    done = launch(
        *("--module", "abreast", "heal", str(model_folder()), *arguments, *files, "--shard")
    )
    assert done.returncode == 0, done.stderr[-3000:]
    printed = json.loads(done.stdout)
    plain = tmp_path / "plain"
    alone = [str(model_folder()), *arguments, "-o", str(plain)]
    other = json.loads(CliRunner().invoke(heal_verb, alone, catch_exceptions=False).stdout)
    assert printed["kl_after"] < printed["kl_before"]
    assert printed["kl_after"] == pytest.approx(other["kl_after"], rel=1e-4)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, plain))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-5), name
    assert verify(out, healed, num_tokens=48, new_tokens=4).ok
    assert verify(out, model_folder(), num_tokens=48, new_tokens=4).ok
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "out", "plain"]


@pytest.fixture
def alone(tmp_path):
    """A process group of this process."""
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize(
    "family", ["llama", "gemma2", "olmo2", "cohere", "phi3", "gpt_neox", "stablelm", "qwen3_moe"]
)
def test_families_run_grouped_when_sharded(tiny_checkpoint, alone, family):
    model, _ = load(tiny_checkpoint(family))
    sharded = copy.deepcopy(model)
    shard(sharded, torch.device("cpu"))
    assert all(isinstance(p, DTensor) for p in sharded.parameters())
    ids = torch.arange(48).view(2, 24)
    for plan in ("1+2+3", "1|2 3|4:1"):
        for m in (model, sharded):
            with grouped(m, plan):
                m(ids, use_cache=False).logits.square().mean().backward()
        ours = dict(sharded.named_parameters())
        for name, parameter in model.named_parameters():
            got = full(ours[name].grad)
            scale = float(parameter.grad.abs().max())
            assert torch.allclose(got, parameter.grad, rtol=0, atol=1e-5 * scale), name
        model.zero_grad()
        sharded.zero_grad()
    with pytest.raises(AbreastError, match="sharded over the processes already"):
        shard(sharded, torch.device("cpu"))


def test_a_share_and_the_whole_of_what_is_not_sharded():
    tensor = torch.arange(3.0)
    assert local(tensor) is tensor and full(tensor) is tensor


def test_one_process_cannot_shard(tmp_path):
    arguments = [str(model_folder()), "--plan", "7+8", "-o", str(tmp_path / "o"), "--shard"]
    with pytest.raises(AbreastError, match="this is the only one"):
        CliRunner().invoke(heal_verb, arguments, catch_exceptions=False)
    assert not list(tmp_path.iterdir())


def test_processes_share_batches_evenly(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    Recipe(batch_size=6, shard=True).check()
    with pytest.raises(AbreastError, match="cannot be sharded; use the optimizer 'adamw'"):
        Recipe(batch_size=6, shard=True, optimizer="muon").check()
    with pytest.raises(AbreastError, match="8 windows cannot be split evenly over 3 processes"):
        Recipe(batch_size=8).check()
