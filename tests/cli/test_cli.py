"""The command as its user meets it: output, exit status, and one line for every mistake."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import start

from abreast import plan
from abreast.checkpoint import held, open_checkpoint
from abreast.checkpoint.files import sha256_of
from abreast.demo import model_folder
from abreast.plan import Plan

README = Path(__file__).resolve().parents[2] / "README.md"


@pytest.fixture(scope="module")
def demo() -> Path:
    return model_folder()


@pytest.mark.slow
def test_the_whole_way_through(run, demo, tmp_path):
    out = tmp_path / "out"
    status, text, _ = run("inspect", demo)
    assert status == 0 and "llama" in text and "0..15" in text
    status, text, _ = run("convert", demo, "--plan", "2+3 4|5:1", "-o", out, "--dry-run", "--json")
    assert status == 0 and json.loads(text)["depth"] == 14 and not out.exists()
    status, text, _ = run("convert", demo, "--plan", "2+3 4|5:1", "-o", out, "--json")
    assert status == 0 and json.loads(text) == json.loads((out / "abreast.json").read_text())
    status, text, _ = run("inspect", out, "--json")
    printed = json.loads(text)
    assert (printed["plan"], printed["original_layers"], printed["num_layers"]) == (
        "2+3 4|5:1",
        16,
        14,
    )
    status, text, _ = run("verify", out, "--against", demo, "--tokens", 32, "--json")
    assert status == 0 and json.loads(text)["ok"] is True
    few = (
        "--data",
        "stdlib",
        "--max-tokens",
        600,
        "--window",
        128,
        "--stride",
        128,
        "--dtype",
        "float32",
    )
    status, text, _ = run("eval", out, "--against", demo, *few, "--json")
    compared = json.loads(text)["result"]
    assert status == 0 and compared["kl"] > 0 and compared["kl_stderr"] > 0
    status, text, _ = run("eval", demo, "--plan", "2+3 4|5:1", *few, "--json")
    grouped = json.loads(text)["result"]
    assert grouped["nll"] == pytest.approx(compared["model"]["nll"], abs=1e-3)
    status, text, _ = run("eval", demo, *few)
    assert status == 0 and "±" in text


def test_verify_says_no_by_its_exit_status(run, demo, tmp_path):
    out = tmp_path / "out"
    assert run("convert", demo, "--plan", "2+3", "-o", out)[0] == 0
    config = json.loads((out / "config.json").read_text())
    config["rms_norm_eps"] = 0.5
    (out / "config.json").write_text(json.dumps(config))
    status, text, _ = run("verify", out, "--against", demo, "--tokens", 16)
    assert status == 1 and "WRONG" in text and "config.json" in text
    manifest = json.loads((out / "abreast.json").read_text())
    manifest["files"]["config.json"]["sha256"] = sha256_of(out / "config.json")
    (out / "abreast.json").write_text(json.dumps(manifest))
    status, text, _ = run("verify", out, "--against", demo, "--tokens", 16)
    assert status == 1 and "logits" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("inspect", "/nowhere"), "no model at"),
        (("convert", "DEMO", "--plan", "3+5", "-o", "OUT"), "not consecutive"),
        (("convert", "DEMO", "--plan", "0+1", "-o", "OUT"), "--force"),
        (("convert", "DEMO", "--plan", "3+4", "-o", "TMP"), "exists"),
        (("convert", "DEMO", "--plan", "missing.yaml", "-o", "OUT"), "cannot be read"),
        (("convert", "DEMO", "--plan", "3+4", "-o", "OUT", "--dtype", "int8"), "dtype"),
        (("convert", "DEMO", "--plan", "3+4", "-o", "OUT", "--max-shard-size", "5XB"), "size"),
        (("verify", "DEMO", "--against", "DEMO"), "abreast.json"),
        (("verify", "DEMO", "--against", "DEMO", "--tokens", "1"), "too few"),
        (("eval", "DEMO", "--data", "/nowhere"), "not found"),
        (("eval", "DEMO", "--data", "stdlib", "--max-tokens", "1"), "too few"),
        (("eval", "DEMO", "--device", "warp"), "unknown"),
        (("eval", "DEMO", "--dtype", "float8"), "dtype"),
        (("eval", "DEMO", "--plan", "3+99"), "plan"),
        (("eval", "DEMO", "--norms", "split"), "goes with --plan"),
        (("convert", "DEMO", "--plan", "P2 S4 E7", "-o", "OUT"), "E - S a multiple"),
        (("study", "DEMO", "-o", "OUT", "--interventions", "melt"), "unknown"),
    ],
    ids=lambda value: " ".join(value[:1] + value[2:4]) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_line_and_status_2(run, demo, tmp_path, arguments, said):
    places = {"DEMO": demo, "OUT": tmp_path / "out", "TMP": tmp_path}
    status, out, err = run(*(places.get(word, word) for word in arguments))
    assert status == 2 and out == ""
    assert len(err.splitlines()) == 1 and err.startswith("abreast: ") and said in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"auto_map": {"AutoConfig": "own.Own"}, "model_type": "own"}, "--trust-remote-code"),
        ({"attn_implementation": "org/kernel"}, "code from the Hub"),
        ({"text_config": {"_experts_implementation": "org/kernel@main"}}, "code from the Hub"),
        ({"model_type": "unheard-of"}, "cannot be loaded"),
        ({"hidden_act": "unheard-of"}, "cannot be loaded"),
        ({"rope_parameters": {"rope_type": "unheard-of"}}, "cannot be loaded"),
        ({"num_attention_heads": "four"}, "cannot be loaded"),
    ],
    ids=str,
)
def test_checkpoints_that_transformers_refuses(run, tiny_checkpoint, tmp_path, changes, said):
    model = shutil.copytree(tiny_checkpoint(tokenizer=True), tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))
    (model / "own.py").write_text("raise SystemExit('code ran')")
    few = ("--data", "stdlib", "--windows", 8, "--window", 16)
    for command in (("eval", model), ("measure", model, *few, "-o", tmp_path / "run")):
        status, out, err = run(*command)
        assert (status, out) == (2, "") and said in err and len(err.splitlines()) == 1


def test_verify_without_the_original_checks_the_files(run, tiny_checkpoint, tmp_path):
    out = tmp_path / "out"
    assert run("convert", tiny_checkpoint(tokenizer=True), "--plan", "1+2", "-o", out)[0] == 0
    (out / "README.md").write_text("a card")
    status, text, _ = run("verify", out, "--json")
    record = json.loads((out / "abreast.json").read_text())
    assert status == 0 and json.loads(text)["files"].keys() == record["files"].keys()
    (out / "tokenizer.json").write_text("{}")
    (out / "chat_template.jinja").write_text("{{ messages }}")
    status, text, _ = run("verify", out)
    assert status == 1 and "tokenizer.json is not the one recorded" in text
    assert "chat_template.jinja is not recorded" in text


def test_cqil_names_are_read_and_shown(run, demo, tmp_path):
    assert run("convert", demo, "--plan", "p2 s4 e8", "-o", tmp_path / "out")[0] == 0
    status, text, _ = run("inspect", tmp_path / "out")
    assert status == 0 and "from 16 layers under plan 4|5 6|7 (P2 D0 S4 E8)" in text


def test_eval_runs_groups_with_other_norms(run, demo):
    few = ("--data", "stdlib", "--max-tokens", 300, "--window", 64, "--stride", 64, "--json")
    losses = {}
    for norms in ("own", "split", "shared"):
        status, text, _ = run("eval", demo, "--plan", "3+4", "--norms", norms, *few)
        assert status == 0
        losses[norms] = json.loads(text)["result"]["nll"]
    assert len(set(losses.values())) == 3


def test_forced_edges_are_warned_about(run, demo, tmp_path):
    status, _, err = run("convert", demo, "--plan", "0+1", "-o", tmp_path / "out", "--force")
    assert status == 0 and "warning" in err and (tmp_path / "out").is_dir()


@pytest.mark.parametrize(
    ("verb", "record", "option"),
    [
        ("measure", "calibration/measure.json", "--max-group"),
        ("study", "study.json", "--max-length"),
    ],
)
def test_a_run_is_held_and_goes_on_after_a_kill(
    run, tiny_checkpoint, tmp_path, verb, record, option
):
    text, out = tmp_path / "text", tmp_path / "run"
    text.write_text("some words. " * 40)
    half = (out / record).with_name(f".{(out / record).name}.new")
    half.parent.mkdir(parents=True)
    half.write_text("{")
    few = ("--data", text, "--windows", 8, "--window", 16, option, 2)
    command = (verb, tiny_checkpoint(tokenizer=True), "-o", out, *few)
    with held(out):
        status, _, err = run(*command)
        assert status == 2 and f"process {os.getpid()} is working in '{out}'" in err
    half.write_text("{")  # killed at its first write
    status, _, err = run(*command)
    assert status == 0, err
    assert (out / record).is_file() and not [*out.rglob(".*")]


@pytest.mark.parametrize("work", ["out.work", "./out.work", "elsewhere"])
def test_a_folder_that_two_options_name_is_held_once(
    run, tiny_checkpoint, tmp_path, monkeypatch, work
):
    monkeypatch.chdir(tmp_path)
    model, text = tiny_checkpoint(tokenizer=True), tmp_path / "text"
    text.write_text("some words. " * 4000)
    few = ("--method", "refit", "--data", text, "--tokens", 9216, "--window", 64, "--no-plots")
    status, _, err = run("heal", model, "--plan", "2+3", "-o", "out", "--work", work, *few)
    assert status == 0, err
    assert (tmp_path / "out").is_dir()


@pytest.mark.slow
def test_interrupted_conversion_leaves_nothing(demo, tmp_path):
    code = (
        "import importlib, time; c = importlib.import_module('abreast.convert.stream');"
        "spans = c._spans; c._spans = lambda *a: (time.sleep(0.2), spans(*a))[1];"
        "print('ready', flush=True); from abreast.cli.main import main; main()"
    )
    command = [sys.executable, "-c", code, "convert", str(demo), "--plan", "2+3", "-o"]
    for stop, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        child = start([*command, str(tmp_path / "out")], stdout=subprocess.PIPE)
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        deadline = time.monotonic() + 120
        while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert list(tmp_path.iterdir()), "the staging folder never appeared"
        child.send_signal(stop)
        assert child.wait(120) == status
        child.stdout.close()
        assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_demo(run, tmp_path):
    status, text, _ = run("demo", "--max-tokens", 2000, "--rounds", 2, "-o", tmp_path / "out")
    assert status == 0 and "perplexity" in text and (tmp_path / "out" / "abreast.json").is_file()


def test_demo_path(run, demo):
    assert run("demo", "--path") == (0, f"{demo}\n", "")


def test_env_says_what_a_bug_report_needs(run):
    status, out, _ = run("env", "--json")
    facts = json.loads(out)
    assert status == 0 and {"python", "torch", "transformers"} <= {*facts["versions"]}
    assert facts["bfloat16"] in ("native", "emulated") and facts["cores"].isdigit()
    status, out, _ = run("env")
    assert status == 0 and re.search(r"^torch +\d", out, re.M)


def test_a_known_plan_is_taken_by_hash(run, demo, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "FOLDER", tmp_path)
    sha256 = open_checkpoint(demo).weights_sha256
    for depth, groups in ((14, "2+3 4+5"), (15, "2+3")):
        made = Plan.parse(groups, 16, source="demo", sha256=sha256)
        (tmp_path / f"demo-{depth}.yaml").write_text(made.to_yaml())
    status, _, err = run("plan", demo, "-o", tmp_path / "out", "--known")
    assert status == 2 and "plans of 15, 14 stages for it; choose by --depth" in err
    status, _, _ = run("plan", demo, "-o", tmp_path / "out", "--known", "--depth", 14)
    assert status == 0 and Plan.load(tmp_path / "out" / "plan.yaml").depth == 14
    (tmp_path / "demo-15.yaml").unlink()
    (tmp_path / "demo-14.yaml").unlink()
    status, _, err = run("plan", demo, "-o", tmp_path / "other", "--known", "--depth", 14)
    assert status == 2 and "no plan for" in err and not (tmp_path / "other").exists()


def test_verbose_lets_libraries_log(run, demo, monkeypatch):
    monkeypatch.setenv("HF_HUB_VERBOSITY", "error")
    assert run("inspect", demo, "--verbose")[0] == 0
    assert os.environ["TRANSFORMERS_VERBOSITY"] == os.environ["HF_HUB_VERBOSITY"] == "info"


def test_the_shell_completes_verbs(run, monkeypatch):
    for name, value in (
        ("COMP_WORDS", "abreast es"),
        ("COMP_CWORD", "1"),
        ("_ABREAST_COMPLETE", "bash_complete"),
    ):
        monkeypatch.setenv(name, value)
    assert run()[:2] == (0, "plain,estimate\n")
