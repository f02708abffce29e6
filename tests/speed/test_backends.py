"""Bench jobs: what every back end is asked, what survives a failure, what is said at the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from abreast.cli.main import cli
from abreast.convert.rewrite import convert
from abreast.engines.vllm.bench import last_error
from abreast.errors import AbreastError
from abreast.plan import Plan
from abreast.speed import backends
from abreast.speed.backends import device_or_cpu, run
from abreast.speed.timing import (
    BenchResult,
    Case,
    Contender,
    Failure,
    Job,
    Measurement,
    Report,
    conclusion,
    timings,
)


def result(task: str, ratio: float, rounds: int = 8, context: int = 8) -> BenchResult:
    jitter = np.linspace(0.99, 1.01, rounds)
    seconds = {"original": ratio * jitter, "abreast": np.ones(rounds)}
    return BenchResult(
        task=task,
        original="original",
        batch_size=1,
        context=context,
        new_tokens=0 if task == "prefill" else 4,
        rounds=rounds,
        warmup=0,
        seed=0,
        device="cpu",
        dtype="float32",
        threads=1,
        timings=timings(Measurement(seconds, dict.fromkeys(seconds, 4))),
        seconds=seconds,
    )


def job_of(*models: Path, tasks: tuple[str, ...] = ("decode",), **options) -> Job:
    contenders = [
        Contender("original" if i == 0 else f"m{i}", str(m)) for i, m in enumerate(models)
    ]
    cases = tuple(Case(task, 2, 9, 3) for task in tasks)  # type: ignore[arg-type]
    return Job(tuple(contenders), cases, **{"rounds": 2, "warmup": 0, **options})


@pytest.fixture
def converted(tiny_checkpoint, tmp_path) -> tuple[Path, Path]:
    convert(tiny_checkpoint(), "1+2 3|4", tmp_path / "out")
    return tiny_checkpoint(), tmp_path / "out"


def test_eager_measures_three_tasks_and_memory(converted):
    job = job_of(*converted, tasks=("prefill", "decode", "generate"), dtype="float32")
    report = run(job)
    assert [r.task for r in report.results] == ["prefill", "decode", "generate"]
    assert [r.new_tokens for r in report.results] == [0, 3, 3]
    for r in report.results:
        # 6 layers of 2 KV heads of 16, keys and values, 2 rows, float32; grouping changes nothing.
        length = {"prefill": 9, "decode": 12, "generate": 11}[r.task]
        assert {m.kv_cache for m in r.memory.values()} == {6 * 2 * 2 * 16 * 2 * length * 4}
        assert all(m.device_peak is None and m.weights > 0 for m in r.memory.values())
    row = json.loads(json.dumps(report.to_dict()))
    assert row["results"][0]["timings"]["m1"]["ttft"] > 0
    tpot = row["results"][1]["timings"]["m1"]
    assert tpot["tpot"] == pytest.approx(tpot["median"] / 3)
    assert row["hardware"]["torch"] == torch.__version__


def test_grouped_contender_shares_the_weights_and_leaves_the_original_alone(
    tiny_checkpoint, tmp_path
):
    source = str(tiny_checkpoint())
    job = Job(
        (Contender("original", source), Contender("grouped", source, "1+2")),
        (Case("decode", 1, 4, 2),),
        dtype="float32",
    )
    models = backends._load_models(job)
    plan = tmp_path / "plan.yaml"
    Plan.parse("1+2", 6).save(plan)
    assert backends._load_models(replace(job, contenders=(Contender("file", source, str(plan)),)))
    pairs = zip(models["original"].parameters(), models["grouped"].parameters(), strict=True)
    assert all(a is b for a, b in pairs)
    ids = torch.arange(3, 12)[None]
    with torch.inference_mode():
        difference = models["original"](ids).logits - models["grouped"](ids).logits
    assert difference.abs().max() > 1e-3


def test_cuda_graphs_need_a_gpu(tiny_checkpoint):
    from abreast.errors import AbreastError

    job = job_of(tiny_checkpoint(), backend="cudagraphs", dtype="float32", tasks=("decode",))
    with pytest.raises(AbreastError, match="CUDA graphs need a CUDA device"):
        run(job)


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="replays CUDA graphs")
def test_replayed_steps_give_the_tokens_of_eager_ones(tiny_checkpoint, tmp_path):
    convert(tiny_checkpoint(num_layers=4), "1+2", tmp_path / "out")
    assert_same_tokens(tmp_path / "out", "cudagraphs", "cuda")


@pytest.mark.slow
def test_compiled_steps_give_the_tokens_of_eager_ones(tiny_checkpoint, tmp_path):
    convert(tiny_checkpoint(num_layers=4), "1+2", tmp_path / "out")
    assert_same_tokens(tmp_path / "out", "compile", "cpu")
    torch.compiler.reset()


def assert_same_tokens(folder, execution, device):
    from abreast.model.grouping import load
    from abreast.speed.benchmark import EXECUTIONS

    model, _ = load(folder, dtype="float32", device=device)
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(1)).to(device)
    written = []
    with torch.inference_mode():
        for make in (EXECUTIONS["eager"], EXECUTIONS[execution]):
            steps = make(model, 14, "decode")
            for _ in range(2):  # a second run starts from a clean cache
                steps.reset()
                token, cache = steps.prefill(ids)
                tokens = [token]
                for _ in range(4):
                    token = steps.step(token, cache)
                    tokens.append(token)
                written.append(torch.cat(tokens, 1))
    assert all(torch.equal(tokens, written[0]) for tokens in written)


@pytest.mark.slow
def test_tensor_parallel_job_comes_back_from_torchrun(converted):
    report = run(job_of(*converted, backend="tp", dtype="float32", tasks=("prefill", "decode")))
    assert [r.task for r in report.results] == ["prefill", "decode"]
    assert report.results[0].ranks == 2
    assert report.results[0].seconds["m1"].shape == (2,)
    # Each rank has half of the KV heads.
    assert report.results[0].memory["m1"].kv_cache == 6 * 2 * 1 * 16 * 2 * 9 * 4


@pytest.mark.slow
def test_slower_links_are_simulated_and_labelled(converted):
    job = job_of(*converted, backend="tp", dtype="float32", unpaired=("replicate", "shard"))
    result = run(replace(job, link_delay=500)).results[0]
    assert list(result.timings) == ["original", "on one device", "m1", "m1, replicate"]
    assert "simulated link" in result.name
    assert result.backend == "tp, simulated link of 500 us"
    # 3 tokens: the logits' exchange; 6 layers of 2; 2 layers of 2 and 2 + 1; the groups' 2 + 1
    exchanges = [result.memory[name].exchanges for name in result.timings]
    assert exchanges == [3 * 13, 0, 3 * 8, 3 * 3]
    for name, count in zip(result.timings, exchanges, strict=True):
        assert result.timings[name].min > count * 500e-6


def test_tensor_parallel_refusal_is_one_line(tiny_checkpoint, tmp_path):
    convert(tiny_checkpoint(), "1|2", tmp_path / "out")
    job = job_of(tiny_checkpoint(), tmp_path / "out", backend="tp", ranks=4)
    with pytest.raises(AbreastError, match=r"4 processes cannot share 2 .* --unpaired replicate$"):
        run(job)
    with pytest.raises(AbreastError, match="more than the 2 members of a group"):
        run(replace(job, unpaired=("replicate",)))
    with pytest.raises(AbreastError, match="--unpaired 'both' is not one of shard, replicate"):
        run(replace(job, unpaired=("both",)))
    with pytest.raises(AbreastError, match="--link-delay -1 makes no sense"):
        run(replace(job, link_delay=-1))
    with pytest.raises(AbreastError, match="belong to --backend tp"):
        run(replace(job, backend="eager", link_delay=300))
    with pytest.raises(AbreastError, match=r"vLLM on a simulated link: .*vllm_decode\.py .*waits"):
        run(replace(job, backend="vllm", link_delay=300))


def test_out_of_memory_keeps_what_is_there_and_names_the_knob(tiny_checkpoint, monkeypatch):
    def full(models, *, task, batch_size, context, **options):
        if batch_size * context > 64:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")
        return result(task, 1.2, context=context)

    monkeypatch.setattr(backends, "bench", full)
    cases = tuple(Case("decode", batch, context, 1) for batch in (1, 8) for context in (8, 16, 128))
    job = Job((Contender("original", str(tiny_checkpoint())),), cases)
    report = run(job)
    assert [r.context for r in report.results] == [8, 16, 8]
    assert [f.case for f in report.failures] == [
        "decode at batch 1, context 128",
        "decode at batch 8, context 16",
        "decode at batch 8, context 128",
    ]
    assert report.failures[0].reason == "out of memory; use --context below 128"
    assert report.failures[1].reason == "out of memory; use --batch below 8 or --context below 16"
    assert report.failures[2].reason.startswith("left out, larger than what ran out of memory")
    with pytest.raises(AbreastError, match="context 128: out of memory; use --context below 128"):
        run(Job(job.contenders, (Case("decode", 1, 128, 1),)))


def test_a_killed_rank_keeps_the_finished_cases(tiny_checkpoint, monkeypatch):
    def killed(command, **options):
        line = json.dumps(result("decode", 1.2).to_dict(seconds=True))
        Path(command[-1]).write_text(line + "\n")
        stderr = "exitcode  : -9 (pid: 1)\ntraceback : Signal 9 (SIGKILL) received by PID 1"
        return subprocess.CompletedProcess(command, 1, "", stderr)

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(backends.subprocess, "run", killed)
    report = run(job_of(tiny_checkpoint(), backend="tp", tasks=("decode", "generate")))
    assert [r.task for r in report.results] == ["decode"]
    assert report.failures == (
        Failure(
            "generate at batch 2, context 9",
            "out of memory; use --batch below 2 or --context below 9",
        ),
    )


def test_other_errors_are_not_taken_for_memory(tiny_checkpoint, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(backends, "bench", broken)
    with pytest.raises(RuntimeError, match="shapes cannot"):
        run(job_of(tiny_checkpoint()))


FAKE_VLLM = """
import json, sys
arguments = dict(zip(sys.argv[3::2], sys.argv[4::2]))
assert sys.argv[1:3] == ["bench", "latency"], sys.argv
batch, length, new = (int(arguments[k]) for k in ("--batch-size", "--input-len", "--output-len"))
with open(LOG, "a") as log:
    log.write(f"{arguments['--model']} {length} {new} {batch}\\n")
if batch > 4:
    sys.exit("torch.OutOfMemoryError: CUDA out of memory")
speed = 2 if arguments["--model"] == "fast" else 1
seconds = (length * 1e-3 + (new - 1) * 1e-2) / speed
found = {"avg_latency": 9.0, "latencies": [seconds, seconds, 5.0]}
json.dump(found, open(arguments["--output-json"], "w"))
"""


def test_simulated_links_in_vllm_are_labelled(monkeypatch):
    root = Path(__file__).resolve().parents[2]
    monkeypatch.syspath_prepend(root / "benchmarks")
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__="0"))
    with mock.patch.dict(os.environ):
        import vllm_decode
    times = {(wait, "original"): [{"token": 1e-3, "prefill": 1e-2}] for wait in (0.0, 25.0)}
    models = {"original": (root, 66)}
    row = vllm_decode.row(times, 25.0, "original", models, [25.0], 2, True, 1)
    assert row["simulated_link_us"] == 25
    assert "simulated link, µs" in vllm_decode.table([row])


def test_vllm_is_asked_in_turns_and_its_times_are_taken_apart(tmp_path):
    script, log = tmp_path / "vllm.py", tmp_path / "log"
    script.write_text(FAKE_VLLM.replace("LOG", repr(str(log))))
    job = Job(
        (Contender("original", "slow"), Contender("converted", "fast")),
        (Case("prefill", 2, 100, 5), Case("decode", 2, 100, 5), Case("generate", 8, 100, 5)),
        backend="vllm",
        rounds=2,
        vllm=(sys.executable, str(script)),
    )
    report = run(job)
    prefill, decode = report.results
    assert prefill.seconds["original"] == pytest.approx([0.1, 0.1])
    assert prefill.timings["converted"].ratio == pytest.approx(2)
    assert prefill.timings["converted"].tokens_per_second == pytest.approx(200 / 0.05)
    # 6 tokens less 1: five steps.
    assert decode.seconds["original"] == pytest.approx([0.05, 0.05])
    assert decode.timings["original"].tokens_per_second == pytest.approx(10 / 0.05)
    assert report.failures[0].reason == "out of memory; use --batch below 8 or --context below 100"
    turns = [line.split()[0] for line in log.read_text().splitlines()]
    assert turns[:4] == ["slow", "fast", "fast", "slow"]


def test_a_difference_below_zero_keeps_the_finished_cases(tmp_path):
    script = tmp_path / "vllm.py"
    noisy = FAKE_VLLM.replace("(new - 1) * 1e-2", "(1 - new) * 1e-4")
    script.write_text(noisy.replace("LOG", repr(str(tmp_path / "log"))))
    job = Job(
        (Contender("original", "slow"), Contender("converted", "fast")),
        (Case("prefill", 2, 100, 5), Case("decode", 2, 100, 5), Case("prefill", 1, 100, 5)),
        backend="vllm",
        rounds=2,
        vllm=(sys.executable, str(script)),
    )
    report = run(job)
    assert [result.batch_size for result in report.results] == [2, 1]
    assert report.failures == (
        Failure(
            "decode at batch 2, context 100",
            "noise hides what 5 tokens take 'original'; raise --steps",
        ),
    )


def test_a_case_that_a_model_cannot_hold_keeps_the_finished_ones(tiny_checkpoint):
    cases = (Case("prefill", 1, 4, 0), Case("prefill", 1, 600, 0), Case("prefill", 1, 8, 0))
    report = run(Job((Contender("original", str(tiny_checkpoint())),), cases, rounds=1))
    assert [result.context for result in report.results] == [4, 8]
    (failure,) = report.failures
    assert failure.case == "prefill at batch 1, context 600" and "512 tokens" in failure.reason


FAILING_VLLM = """
import sys
print("ModuleNotFoundError: No module named 'some.plugin'", file=sys.stderr)
print({line!r}, file=sys.stderr)
print("RuntimeError: Engine core initialization failed. See root cause above.", file=sys.stderr)
sys.exit(1)
"""


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (
            "ValueError: 6 heads are not divisible by 4",
            "ValueError: 6 heads are not divisible by 4",
        ),
        ("VLLMValidationError: Token id 9707 is out of vocabulary", "token ids up to 10,000"),
        ("ValueError: No available memory for the cache blocks", "use --context below 9"),
    ],
)
def test_vllm_failures_say_what_vllm_said(tmp_path, line, reason):
    script = tmp_path / "vllm.py"
    script.write_text(FAILING_VLLM.format(line=line))
    job = Job(
        (Contender("original", "m"),),
        (Case("prefill", 1, 9, 1),),
        backend="vllm",
        vllm=(sys.executable, str(script)),
    )
    with pytest.raises(AbreastError, match="prefill at batch 1, context 9: ") as caught:
        run(job)
    assert reason in str(caught.value)
    assert "Engine core" not in str(caught.value)


def test_missing_vllm_is_one_line(tiny_checkpoint):
    with pytest.raises(AbreastError, match="no command 'no-such-vllm' here; install vLLM"):
        run(job_of(tiny_checkpoint(), backend="vllm", vllm=("no-such-vllm",)))


def test_conclusion_says_where_it_helps_and_where_not():
    text = conclusion([result("decode", 1.2), result("decode", 1.3, context=16)]).splitlines()
    assert text[0].startswith("abreast: decode, batch 1, context 8: faster by 1.20x [1.1")
    assert text[-1] == "abreast: faster here in decode by 1.20x to 1.30x (2 of 2 cases)"
    mixed = conclusion([result("decode", 1.2), result("prefill", 0.8)]).splitlines()[-1]
    assert mixed == (
        "abreast: faster here in decode by 1.20x; slower, do not use it there: "
        "prefill, batch 1, context 8"
    )
    for ratio, word in ((1.0, "no faster"), (0.8, "slower")):
        last = conclusion([result("decode", ratio)]).splitlines()[-1]
        assert last == f"abreast: {word} in whatever was measured: do not use this here"
    assert conclusion([result("decode", 1.2, rounds=3)]).endswith("too few rounds for a verdict")
    assert conclusion([]) == "nothing to compare with"


def test_of_several_ways_to_hold_a_model_the_fastest_is_named():
    one, names = result("decode", 1.2), ("original", "on one device", "m1", "m1, replicate")
    jitter = np.linspace(0.99, 1.01, 8)
    for shard, words in (
        (1.2, "m1: faster by 1.20x [1.20, 1.20]"),
        (1.0, "m1, replicate: no difference measured here: 1.00x [1.00, 1.00]"),
    ):
        seconds = {n: t * jitter for n, t in zip(names, (3, 2, shard, 1), strict=True)}
        first = "m1, replicate" if shard > 1 else "m1"
        held = replace(
            one, seconds=seconds, timings=timings(Measurement(seconds, dict.fromkeys(seconds, 1)))
        )
        job = Job(unpaired=("shard", "replicate"))
        last = f"fastest in decode, batch 1, context 8: {first} (against {words})"
        assert Report(job, (held,), ()).to_dict()["verdict"][-1] == last
        assert "fastest" not in Report(Job(), (held,), ()).verdict


def test_device_falls_back_only_when_asked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said: list[str] = []
    assert device_or_cpu("cpu", False) == "cpu"
    assert device_or_cpu("cuda:1", True, said.append) == "cpu"
    assert "no CUDA device" in said[0]
    with pytest.raises(AbreastError, match="no CUDA device here; use --device cpu"):
        device_or_cpu("cuda", False)


def test_jobs_that_make_no_sense(tiny_checkpoint):
    with pytest.raises(AbreastError, match="unknown back end 'jax'"):
        run(job_of(tiny_checkpoint(), backend="jax"))
    with pytest.raises(AbreastError, match="nothing to time"):
        run(Job((), ()))
    grouped = Contender("grouped", str(tiny_checkpoint()), "1+2")
    with pytest.raises(AbreastError, match="only the eager back end"):
        run(Job((grouped,), (Case("decode", 1, 4, 1),), backend="compile"))


def test_results_survive_the_way_through_json():
    row = json.loads(json.dumps(result("decode", 1.2).to_dict(seconds=True)))
    assert backends._outcome(row) == result("decode", 1.2)
    assert backends._outcome({"case": "a", "reason": "b"}) == Failure("a", "b")
    job = Job((Contender("original", "m"),), (Case("decode", 1, 4, 2),), vllm=("uv", "run", "vllm"))
    assert Job.from_dict(json.loads(json.dumps(asdict(job)))) == job


def test_verb_prints_a_table_and_a_verdict_or_one_line_of_json(converted, tmp_path):
    original, out = (str(folder) for folder in converted)
    arguments = ["bench", original, out, "--plan", "1+2", "--task", "decode", "--rounds", "6"]
    arguments += ["--context", "4,8", "--steps", "2", "--dtype", "float32"]
    shown = CliRunner().invoke(cli, [*arguments, "-o", str(tmp_path / "plot.png")])
    assert shown.exit_code == 0, shown.output
    assert "TPOT" in shown.output
    assert "out: decode, batch 1, context 4:" in shown.output
    assert (tmp_path / "plot.png").is_file()
    dumped = CliRunner().invoke(cli, [*arguments, "--json"])
    (line,) = dumped.stdout.splitlines()
    row = json.loads(line)
    assert [r["context"] for r in row["results"]] == [4, 8]
    assert list(row["results"][0]["timings"]) == ["original", "out", "grouped 1+2"]
    assert row["verdict"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "train"], "unknown task 'train'"),
        (["--batch", "1,x"], "--batch '1,x' cannot be read"),
        (["--ranks", "0"], "--ranks 0 makes no sense"),
        (["--context", "0"], "--context '0' cannot be read"),
        (["--context", "100000"], "use a shorter context"),
        (["-o", "no/such/folder/a.png"], "does not exist; create it first"),
        (["--device", "cuda"], "allow it by --fallback-cpu"),
    ],
)
def test_bad_input_is_one_line(tiny_checkpoint, monkeypatch, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    outcome = CliRunner().invoke(cli, ["bench", str(tiny_checkpoint()), *arguments])
    assert isinstance(outcome.exception, AbreastError)
    assert message in str(outcome.exception)


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        (
            "[rank0]: abreast.errors.AbreastError: no such model\nChildFailedError: x",
            "no such model",
        ),
        ("[rank1]: RuntimeError: shapes differ\n", "RuntimeError: shapes differ"),
        (
            "torch.distributed.elastic.multiprocessing.errors.ChildFailedError:\n"
            "  exitcode  : -6 (pid: 12)\n  traceback : Signal 6 (SIGABRT) received by PID 12\n",
            "a process was ended by SIGABRT",
        ),
        ("", "it did not say why"),
    ],
)
def test_the_error_that_ended_torchrun_is_found(stderr, reason):
    assert backends._reason(stderr) == reason


def test_the_error_that_ended_vllm_is_found():
    stderr = (
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
        "  Value error, max_model_len (516) is greater than 512 [type=value_error, input_type=X]\n"
        "    For further information visit a page\n"
    )
    assert last_error(stderr).startswith("Value error, max_model_len (516) is greater")
    assert last_error("RuntimeError: shapes differ\nEngine core failed") == (
        "RuntimeError: shapes differ"
    )
