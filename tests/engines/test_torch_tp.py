"""Converted checkpoints over several processes: the same logits, and as few collectives as due.

The processes talk over gloo. One torchrun loads all checkpoints of a test, for the time it takes.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import abreast.modeling  # noqa: F401  registers the converted architectures
from abreast.checkpoint.tensors import open_checkpoint
from abreast.convert.rewrite import convert
from abreast.engines.torch_tp import ParallelError, blocks_of, check_degree, load_parallel
from abreast.errors import AbreastError
from abreast.model.grouping import load

WORKER = """
import json, sys
import torch
import torch.distributed as dist
from abreast.engines.torch_tp import load_parallel

job = json.loads(sys.argv[1])
torch.set_num_threads(1)
ids = torch.tensor(job["ids"])
calls = []
for name in ("all_reduce", "broadcast", "all_gather", "batch_isend_irecv"):
    def counted(*args, _real=getattr(dist, name), _name=name, **options):
        calls.append(_name)
        return _real(*args, **options)
    setattr(dist, name, counted)
results = {}
for key, (folder, options) in job["runs"].items():
    model = load_parallel(folder, dtype="float32", **options)
    with torch.inference_mode():
        logits = model(ids, use_cache=False).logits
        step = model(ids[:, :-1], use_cache=True)
        del calls[:]
        before = model.link.exchanges if dist.is_initialized() else 0
        last = model(ids[:, -1:], past_key_values=step.past_key_values, use_cache=True)
        counts = {name: calls.count(name) for name in set(calls)}
        assert not counts or model.link.exchanges - before == sum(counts.values())
        text = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=job["tokens"], do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )
    results[key] = {
        "logits": logits, "cached": last.logits, "text": text, "counts": counts,
        "numel": sum(p.numel() for p in model.base_model.layers.parameters()),
    }
torch.save(results, job["results"] + "." + str(dist.get_rank()))
dist.barrier()
dist.destroy_process_group()
"""

Runs = dict[str, tuple[Path, dict[str, Any]]]  # by name: folder and options of `load_parallel`


@contextmanager
def started(*commands: Sequence[Any], **environment: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Programs that run side by side, with output to read; none outlives the test."""
    own = {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    running: list[subprocess.Popen[str]] = []
    try:
        for rank, command in enumerate(commands):
            running.append(
                subprocess.Popen(
                    [*map(str, command)],
                    env={**os.environ, **own, "RANK": str(rank), **environment},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    start_new_session=True,
                )
            )
        yield running
    finally:
        for one in running:
            one.terminate()  # torchrun ends its ranks, which are in sessions of their own
        for one in running:
            with suppress(subprocess.TimeoutExpired):
                one.communicate(timeout=60)
            with suppress(ProcessLookupError):
                os.killpg(one.pid, signal.SIGKILL)
            one.wait()


def torchrun(world: int) -> list[Any]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    return [sys.executable, *launcher]


def results_of(
    runs: Runs,
    ids: torch.Tensor,
    folder: Path,
    *launchers: Sequence[Any],
    tokens: int = 64,
    **environment: str,
) -> list[dict[str, Any]]:
    """Run `ids` on checkpoints on the ranks that the launchers start; every rank's results.

    tokens: that are generated, greedily.
    """
    worker, results = folder / "worker.py", folder / "results"
    worker.write_text(WORKER)
    job = {
        "runs": {name: (str(path), options) for name, (path, options) in runs.items()},
        "ids": ids.tolist(),
        "tokens": tokens,
        "results": str(results),
    }
    commands = [[*launcher, worker, json.dumps(job)] for launcher in launchers]
    with started(*commands, **environment) as running:
        for one in running:
            _, errors = one.communicate(timeout=300)
            assert one.returncode == 0, errors[-6000:]
    return [torch.load(path) for path in sorted(folder.glob("results.*"))]


@pytest.fixture
def on_ranks(tmp_path) -> Callable[..., list[dict[str, Any]]]:
    """Load checkpoints on `world` ranks and run `ids`; every rank's results, by run."""
    return lambda runs, ids, world, **options: results_of(
        runs, ids, tmp_path, torchrun(world), **options
    )


def expected(folder: Path, ids: torch.Tensor, tokens: int = 64) -> dict[str, torch.Tensor]:
    """What transformers makes of `ids`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        step = model(ids[:, :-1], use_cache=True)
        return {
            "logits": model(ids, use_cache=False).logits,
            "cached": model(ids[:, -1:], past_key_values=step.past_key_values).logits,
            "text": model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            ),
        }


def check(runs: Runs, ranks: list[dict[str, Any]], ids: torch.Tensor) -> None:
    for name, (folder, _) in runs.items():
        want = expected(folder, ids, ranks[0][name]["text"].shape[1] - ids.shape[1])
        extent = want["logits"].max() - want["logits"].min()
        last = want["cached"]
        for rank in ranks:
            got = rank[name]
            assert (got["logits"] - want["logits"]).abs().max() <= 1e-5 * extent, name
            assert (got["cached"] - last).abs().max() <= 1e-5 * extent, name
            assert torch.equal(got["text"], want["text"]), name


IDS = torch.randint(3, 128, (2, 11), generator=torch.Generator().manual_seed(0))
REPLICATE = {"unpaired": "replicate"}


def exchanges(rank: dict[str, Any], runs: Runs) -> dict[str, int]:
    """Exchanges per token, but for the one that puts the logits together."""
    counts = {name: rank[name]["counts"] for name in runs}
    return {
        name: sum(n for kind, n in c.items() if kind != "all_gather") for name, c in counts.items()
    }


@pytest.mark.slow
def test_two_ranks(tiny_checkpoint, tmp_path, on_ranks):
    original = tiny_checkpoint()
    biased = tiny_checkpoint(biases=True)
    odd = tiny_checkpoint(hidden_size=48, num_attention_heads=3, num_key_value_heads=3, tied=True)
    plans = {  # exchanges per token: of single layers, when sharded, and of the groups
        "lp": (original, "1+2 3+4", {}, 4 + 2 * 2),
        "cqil": (original, "1|2 3|4", {}, 4 + 2 * 1),
        "sends": (original, "1|2:1 3|4", {"neighbours": "exchange"}, 4 + 2 + 1),
        "repeats": (original, "1|2:1 3|4", {"neighbours": "repeat"}, 4 + 1 + 1),
        "three": (original, "1|2|3", {}, 6 + 2),  # 2 ranks have half of each of 3 members
        "ff": (biased, "1~2 3|4", {}, 4 + 3 + 1),
        "replicate": (original, "1+2 3|4", REPLICATE, 0 + 2 + 1),
        "uneven": (biased, "1+2+3 4|5", REPLICATE, 0 + 2 + 1),
        "sends whole": (original, "1|2|3:1", REPLICATE | {"neighbours": "exchange"}, 0 + 2),
        "repeats whole": (original, "1|2|3:2", REPLICATE | {"neighbours": "repeat"}, 0 + 1),
        "attentions whole": (biased, "1~2~3", REPLICATE, 0 + 1),
        "first": (original, "0+1", REPLICATE, 0 + 2),
        "odd heads": (odd, "1+2 3|4:1", REPLICATE | {"neighbours": "repeat"}, 0 + 2 + 1),
    }
    runs: dict[str, tuple[Path, dict[str, Any]]] = {"original": (original, {})}
    for name, (source, plan, options, _) in plans.items():
        convert(source, plan, tmp_path / name, force=True)
        runs[name] = tmp_path / name, options
    ranks = on_ranks(runs, IDS, 2)
    check(runs, ranks, IDS)
    expectation = {"original": 6 * 2} | {name: row[3] for name, row in plans.items()}
    assert [exchanges(rank, runs) for rank in ranks] == [expectation] * 2
    for name, (folder, options) in runs.items():
        whole = sum(p.numel() for p in load(folder)[0].model.layers.parameters())
        for rank in ranks:
            assert ("all_gather" in rank[name]["counts"]) == ("unpaired" not in options)
            if "unpaired" not in options and name != "repeats":  # half of the matrices, the norms
                assert 0.5 <= rank[name]["numel"] / whole < 0.53, name
    # 2 layers whole and a half of the other 4 are 4 of 6.
    whole = sum(p.numel() for p in load(tmp_path / "replicate")[0].model.layers.parameters())
    assert 4 / 6 <= ranks[0]["replicate"]["numel"] / whole < 0.69


@pytest.mark.slow
def test_two_ranks_run_prompts_in_order(tiny_checkpoint, tmp_path, on_ranks):
    original, runs = tiny_checkpoint(), {}
    for name, plan, options in (
        ("lp", "1+2 3+4+5", {}),
        ("cqil", "1|2 3|4:1", {}),
        ("ff", "1~2", {}),
        ("replicate", "1+2 3|4|5:1", REPLICATE | {"neighbours": "repeat"}),
        ("ff whole", "1~2 3+4", REPLICATE),
    ):
        convert(original, plan, tmp_path / name, prefill="sequential", force=True)
        runs[name] = tmp_path / name, options
    ranks = on_ranks(runs, IDS, 2, tokens=16)
    check(runs, ranks, IDS)
    for name in runs:  # the prompt's logits are the original's
        want = expected(original, IDS)["logits"]
        assert (ranks[0][name]["logits"] - want).abs().max() <= 1e-4 * want.abs().max(), name


FAMILIES = {
    "qwen3": {"head_dim": 16},
    "granite": {},
    "gemma3_text": {"head_dim": 16, "layer_types": ["full_attention"] * 6},
    "olmo2": {},
    "phi3": {},
    "phi": {"num_key_value_heads": 4},
    "starcoder2": {"biases": True},
    "glm": {"head_dim": 16},
    "cohere": {"use_qk_norm": True},
    "nemotron": {},
}


@pytest.mark.slow
def test_two_ranks_run_other_families(tiny_checkpoint, tmp_path, on_ranks):
    runs: dict[str, tuple[Path, dict[str, Any]]] = {}
    for family, settings in FAMILIES.items():
        source = tiny_checkpoint(family, **settings)
        convert(source, "1+2 3|4:1", tmp_path / family)
        runs |= {
            family: (source, {}),
            f"{family} converted": (tmp_path / family, {}),
            f"{family} replicated": (tmp_path / family, REPLICATE | {"neighbours": "repeat"}),
        }
    ranks = on_ranks(runs, IDS, 2, tokens=6)
    check(runs, ranks, IDS)


FAILING = """
import os, sys, torch
import torch.distributed as dist
from abreast.engines.torch_tp import load_parallel
from abreast.errors import AbreastError

rank, folders = int(os.environ["RANK"]), sys.argv[1:]
try:
    model = load_parallel(folders[rank % len(folders)], dtype="float32")
    if rank == 1:
        os._exit(9)
    while True:
        model(torch.tensor([[3]]))
except AbreastError as error:
    print(f"rank {rank}: {error}", file=sys.stderr, flush=True)
    dist.barrier() if len(folders) > 1 else None
    sys.exit(2)
"""


@pytest.fixture
def failing(tmp_path) -> Path:
    (tmp_path / "failing.py").write_text(FAILING)
    return tmp_path / "failing.py"


@pytest.mark.slow
def test_ranks_with_different_checkpoints_are_refused(tiny_checkpoint, failing):
    folders = tiny_checkpoint(), tiny_checkpoint(seed=1)
    with started([*torchrun(2), failing, *folders]) as [one]:
        _, shown = one.communicate(timeout=120)
    assert one.returncode != 0 and shown.count("rank 1 has another checkpoint as") == 2
    assert "copy the same one to every machine" in shown


@pytest.fixture
def machines() -> Iterator[list[list[str]]]:
    """What runs a command on each of two hosts with a cable between them, both on this one."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the command ip")
    names = [f"abreast-{os.getpid()}-{host}" for host in (1, 2)]
    setup = [f"netns add {name}" for name in names]
    setup.append(f"-n {names[0]} link add cable type veth peer name cable netns {names[1]}")
    for host, name in enumerate(names, start=1):
        setup.append(f"-n {name} addr add 10.98.7.{host}/24 dev cable")
        setup += [f"-n {name} link set {device} up" for device in ("cable", "lo")]
    try:
        for words in setup:
            done = subprocess.run(["ip", *words.split()], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"no network namespaces here: {done.stderr.strip()}")
        yield [["ip", "netns", "exec", name] for name in names]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


# As torchrun and as users by hand start one process on each of two machines.
BETWEEN = {
    "GLOO_SOCKET_IFNAME": "cable",
    "WORLD_SIZE": "2",
    "MASTER_ADDR": "10.98.7.1",
    "MASTER_PORT": "29500",
}


def launchers(machines: list[list[str]]) -> list[list[str]]:
    address = ["--master-addr", "10.98.7.1", "--master-port", "29500"]
    run = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    return [
        [*machine, *run, "--node-rank", str(rank), *address]
        for rank, machine in enumerate(machines)
    ]


@pytest.mark.slow
def test_two_machines_give_the_logits_of_one(tiny_checkpoint, tmp_path, machines):
    original = tiny_checkpoint()
    convert(original, "1+2 3|4:1", tmp_path / "out")
    ways = {"shard": {}, "replicate": REPLICATE}
    runs: Runs = {name: (tmp_path / "out", options) for name, options in ways.items()}
    ranks = results_of(runs, IDS, tmp_path, *launchers(machines), GLOO_SOCKET_IFNAME="cable")
    assert len(ranks) == 2
    check(runs, ranks, IDS)


@pytest.mark.slow
@pytest.mark.parametrize("by_hand", [False, True])
def test_two_machines_time_a_conversion(tiny_checkpoint, tmp_path, machines, by_hand):
    """The commands of docs/two-machines.md, on CPUs."""
    original = tiny_checkpoint()
    convert(original, "1+2 3|4:1", tmp_path / "out")
    starts = [[*machine, sys.executable] for machine in machines] if by_hand else None
    words = ["-m", "abreast", "bench", original, tmp_path / "out", "--backend", "tp"]
    words += ["--unpaired", "shard,replicate", "--dtype", "float32", "--rounds", 2]
    words += ["--task", "decode", "--context", 8, "--steps", 2, "--json"]
    commands = [[*start, *words] for start in starts or launchers(machines)]
    with started(*commands, **BETWEEN) as running:
        shown = [one.communicate(timeout=300) for one in running]
    assert [one.returncode for one in running] == [0, 0], shown
    assert '"out, replicate"' in shown[0][0] and shown[1][0] == ""


@pytest.mark.slow
@pytest.mark.parametrize("by_hand", [False, True])
def test_where_a_rank_dies_all_end(tiny_checkpoint, failing, machines, by_hand):
    starts = [[*machine, sys.executable] for machine in machines] if by_hand else None
    commands = [[*start, failing, tiny_checkpoint()] for start in starts or launchers(machines)]
    quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # torch warns of addresses without names
    with started(*commands, **BETWEEN, **quiet) as (first, second):
        assert second.wait(timeout=120) == (9 if by_hand else 1)
        out, shown = first.communicate(timeout=10)
    assert (first.returncode, out) == (2 if by_hand else 1, "")
    lines = [line for line in shown.splitlines() if "rank 0: " in line]
    assert len(lines) == 1 and "rank 0 lost the connection to the other processes" in lines[0]
    if by_hand:  # torchrun adds a report of its own
        assert shown.splitlines() == lines


BENCH = """
import os, sys
import torch.distributed as dist
from abreast.cli.main import main

if os.environ["RANK"] == "1":
    dist.barrier = lambda: os._exit(9)
main()
"""


@pytest.mark.slow
def test_a_rank_that_dies_in_a_bench_is_one_line(tiny_checkpoint, tmp_path):
    """Where all wait for each other before something is timed."""
    (tmp_path / "bench.py").write_text(BENCH)
    words = ("bench", tiny_checkpoint(), "--backend", "tp", "--task", "decode", "--context", 8)
    here = BETWEEN | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    here["GLOO_SOCKET_IFNAME"] = "lo"
    commands = [[sys.executable, tmp_path / "bench.py", *words]] * 2
    with started(*commands, **here) as (first, second):
        assert second.wait(timeout=120) == 9
        out, shown = first.communicate(timeout=10)
    assert (first.returncode, out, shown.count("\n")) == (2, "", 1)
    assert "rank 0 lost the connection to the other processes" in shown


def test_missing_peers_and_a_port_that_is_taken_are_one_line(tiny_checkpoint, monkeypatch, run):
    for name, value in (BETWEEN | {"RANK": "0", "MASTER_ADDR": "127.0.0.1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setattr("abreast.engines.ranks.MINUTES", 0.02)
    command = ("bench", tiny_checkpoint(), "--backend", "tp", "--task", "decode", "--context", 8)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for port, reason in ((taken.getsockname()[1], "EADDRINUSE"), (free_port(), "1/2 clients")):
            monkeypatch.setenv("MASTER_PORT", str(port))
            status, out, err = run(*command)
            assert (status, out, err.count("\n")) == (2, "", 1)
            assert f"did not meet at 127.0.0.1:{port}" in err and reason in err


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])


@pytest.mark.slow
def test_four_ranks(tiny_checkpoint, tmp_path, on_ranks):
    """As many ranks as members, and twice as many, which share a member two by two."""
    original = tiny_checkpoint(num_attention_heads=8, num_key_value_heads=4, biases=True)
    plans = {
        "lp": ("1+2+3+4", {}, 4 + 2),
        "four": ("1|2|3|4:2", {"neighbours": "exchange"}, 4 + 2),
        "four repeated": ("1|2|3|4:2", {"neighbours": "repeat"}, 4 + 1),
        # Those that share a member reduce its attention among themselves: a second one, of two.
        "pairs": ("1|2 3|4", {}, 4 + 2 * 2),
        "ff": ("1~2~3~4", {}, 4 + 4 + 1),
        "bypass": ("1|2:1 3|4:1", {"neighbours": "exchange"}, 4 + 2 * 3),
        "replicate": ("1|2|3|4:2", REPLICATE | {"neighbours": "repeat"}, 0 + 1),
        "sums whole": ("1+2+3+4", REPLICATE, 0 + 2),
        "attentions whole": ("1~2~3~4", REPLICATE, 0 + 1),
    }
    runs: dict[str, tuple[Path, dict[str, Any]]] = {"original": (original, {})}
    for name, (plan, options, _) in plans.items():
        convert(original, plan, tmp_path / name)
        runs[name] = tmp_path / name, options
    ranks = on_ranks(runs, IDS, 4)
    check(runs, ranks, IDS)
    expectation = {"original": 6 * 2} | {name: row[2] for name, row in plans.items()}
    assert exchanges(ranks[1], runs) == expectation


@pytest.mark.parametrize(
    ("plan", "world", "unpaired", "message"),
    [
        ("1|2", 3, "shard", "3 processes cannot share 2 .* evenly; .* or --unpaired replicate"),
        ("1+2", 8, "shard", "8 processes cannot share 2"),
        ("1+2 3|4|5", 3, "replicate", "3 processes are more than the 2 members of a group"),
    ],
)
def test_other_degrees_are_refused(
    tiny_checkpoint, tiny_conversion, plan, world, unpaired, message
):
    config = open_checkpoint(tiny_conversion(tiny_checkpoint(), plan, force=True)).config
    with pytest.raises(ParallelError, match=message):
        check_degree(config, world, unpaired)
    check_degree(config, 1, unpaired)


def test_unknown_plans_formats_and_families_are_refused(tiny_checkpoint):
    config = open_checkpoint(tiny_checkpoint()).config
    for record in ({}, [], {"plan": 7, "num_layers": 6}):
        with pytest.raises(AbreastError, match="does not say under which plan"):
            check_degree({**config, "abreast": record}, 2)
    with pytest.raises(ParallelError, match="does not record its plan"):
        blocks_of({**config, "abreast": {"plan": "1+2", "num_layers": 6}})
    with pytest.raises(ParallelError, match="it loads no deci"):
        check_degree({**config, "abreast": {"format": "deci"}}, 2)
    with pytest.raises(ParallelError, match="a bloom runs on 1 process only"):
        check_degree({**config, "model_type": "bloom"}, 2)


def test_unknown_dtype_and_missing_gpu_are_one_line(tiny_checkpoint, monkeypatch):
    with pytest.raises(AbreastError, match="dtype 'int7' is not one of float32"):
        load_parallel(tiny_checkpoint(), dtype="int7")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(AbreastError, match="no device 'cuda:0' here"):
        load_parallel(tiny_checkpoint(), device="cuda")


@pytest.mark.parametrize("unpaired", ["shard", "replicate"])
def test_one_process_writes_what_transformers_does(
    tiny_checkpoint, tmp_path, monkeypatch, unpaired
):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    original, ids = tiny_checkpoint(), IDS
    convert(original, "1+2 3|4:1", tmp_path / "out")
    for folder in (original, tmp_path / "out"):
        model, want = (
            load_parallel(folder, dtype="float32", unpaired=unpaired),
            expected(folder, ids),
        )
        with torch.inference_mode():
            assert torch.equal(model(ids, use_cache=False).logits, want["logits"])
        text = model.generate(
            ids, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert torch.equal(text, want["text"])
