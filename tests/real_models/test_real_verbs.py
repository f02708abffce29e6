"""Both real models through every verb, at the smallest settings that still mean something."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from processes import served_until_interrupted

from abreast.cli.main import cli
from abreast.errors import AbreastError

TEXT = (
    "--data",
    "stdlib",
    "--max-tokens",
    "512",
    "--window",
    "256",
    "--stride",
    "128",
    "--dtype",
    "float32",
)
SEARCH = (
    "--data",
    "stdlib-train",
    "--windows",
    "8",
    "--window",
    "32",
    "--batch-size",
    "8",
    "--max-group",
    "2",
    "--dtype",
    "float32",
)
NO_GGUF = "it norms the output of its attention and FFN"


@dataclass(frozen=True)
class Model:
    name: str
    folder: Path
    family: str
    layers: int
    plan: str
    exports: bool
    undivided: str  # why two processes of torch_tp cannot share the conversion

    @property
    def depth(self) -> int:
        return self.layers - 2


@pytest.fixture(
    scope="module",
    params=[pytest.param(n, marks=pytest.mark.xdist_group(n)) for n in ("smollm2", "gemma3")],
)
def model(request: pytest.FixtureRequest) -> Model:
    folder = request.getfixturevalue(request.param)
    if request.param == "smollm2":
        undivided = "2 processes cannot share 3 (num_key_value_heads) evenly"
        return Model("smollm2", folder, "llama", 30, "17+18 20+21", True, undivided)
    undivided = "2 processes cannot share 1 (num_key_value_heads) evenly"
    return Model("gemma3", folder, "gemma3_text", 18, "7+8 13|14:1", False, undivided)


@pytest.fixture(scope="module")
def work(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp(model.name)


def run(*arguments: Any) -> str:
    done = CliRunner().invoke(cli, [*map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def run_json(*arguments: Any) -> Any:
    return json.loads(run(*arguments, "--json"))


def refused(*arguments: Any) -> str:
    """The one line that a verb refuses with."""
    with pytest.raises(AbreastError) as caught:
        run(*arguments)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.fixture(scope="module")
def converted(model: Model, work: Path) -> Path:
    run("convert", model.folder, "--plan", model.plan, "-o", work / "converted")
    return work / "converted"


@pytest.fixture(scope="module")
def searched(model: Model, work: Path) -> Path:
    """A run folder with a search."""
    folder = work / "run"
    run("measure", model.folder, "-o", folder, *SEARCH)
    options = ("--depth", model.depth, "--per-group", "1", "--no-plots")
    run("plan", model.folder, "-o", folder, *SEARCH, *options)
    return folder


@pytest.fixture(scope="module")
def run_folder(model: Model, searched: Path) -> Path:
    """What optimize adds to a search, with the report."""
    options = (
        "--depth",
        model.depth,
        "--per-group",
        "1",
        "--no-plots",
        "--rounds",
        "2",
        "--new-tokens",
        "4",
    )
    checks = ("--eval-data", "stdlib", "--max-tokens", "1024")
    options += ("--hardware", "A100", "--for", "transformers")  # nothing more to time or measure
    run("optimize", model.folder, "-o", searched, *SEARCH, *options, *checks)
    return searched


def test_import(model, gguf_files, work):
    record = run_json("import", gguf_files[model.name], "-o", work / "imported", "--dry-run")
    assert (record["family"], record["layers"]) == (model.family, model.layers)
    assert record["quantized"] and record["dtype"] == "bfloat16"
    assert refused("import", gguf_files[model.name], "-o", model.folder).count("exists") == 1


def test_inspect(model):
    facts = run_json("inspect", model.folder)
    assert (facts["model_type"], facts["num_layers"]) == (model.family, model.layers)
    assert facts["fusable"] and facts["tied"]
    assert (facts["stretches"] == [[0, 29]]) == (model.name == "smollm2")


def test_convert_and_verify(model, converted):
    assert "layers" in run("convert", model.folder, "--plan", model.plan, "-o", "no", "--dry-run")
    result = run_json("verify", converted, "--against", model.folder, "--tokens", 32)
    assert result["ok"] and result["kl"] < 1e-3
    inspected = run_json("inspect", converted)
    assert inspected["num_layers"] == model.depth and inspected["plan"] == model.plan


def test_eval_on_text(model, converted):
    result = run_json("eval", converted, "--against", model.folder, *TEXT)["result"]
    assert 1 < result["reference"]["perplexity"] < 60
    assert 0 < result["kl"] < 2 and 0.5 < result["top1_agreement"] < 1


def test_eval_on_tasks(model, converted, work):
    options = ("--tasks", "offline", "--limit", 2, "-o", work / "answers", "--dtype", "float32")
    result = run_json("eval", converted, "--against", model.folder, *options)
    assert result


def test_measure_and_plan(model, searched):
    for name in ("plan.yaml", "why.md", "front.json"):
        assert (searched / name).is_file()
    plan = ("--plan", searched / "plan.yaml")
    run("eval", model.folder, *plan, "--data", "stdlib", "--max-tokens", 64)


def test_optimize_report_and_push(model, run_folder):
    page = (run_folder / "report" / "report.html").read_text()
    assert str(model.depth) in page
    run("report", run_folder, "-o", run_folder / "again")
    results = json.loads((run_folder / "again" / "results.json").read_text())
    assert results
    best = next(path.parent for path in run_folder.rglob("abreast.json"))
    upload = run_json("push", best, "ORG/NAME", "--dry-run")
    assert "model.safetensors" in json.dumps(upload) and "README.md" in json.dumps(upload)


def test_study(model, work):
    options = (
        "--data",
        "stdlib",
        "--windows",
        1,
        "--window",
        32,
        "--max-length",
        2,
        "--permutations",
        1,
    )
    run("study", model.folder, "-o", work / "study", *options, "--dtype", "float32", "--no-plots")
    assert any((work / "study").iterdir())


@pytest.mark.parametrize("method", ["refit", "distill"])
def test_heal(model, work, method):
    size = ("--data", "stdlib-train", "--tokens", 2048, "--window", 128, "--no-plots")
    if method == "distill":
        size = (
            "--data",
            "stdlib-train",
            "--steps",
            2,
            "--batch-size",
            2,
            "--window",
            64,
            "--no-plots",
            "--no-bf16",
        )
    out = work / method
    run("heal", model.folder, "--plan", model.plan, "-o", out, "--method", method, *size)
    healed = json.loads((out / "abreast.json").read_text())["healed"]
    assert healed["method"] == method
    if method == "refit":
        assert healed["kl_after"] < healed["kl_before"]


def test_bench_and_estimate(model, converted):
    size = ("--context", 32, "--rounds", 2, "--steps", 2, "--warmup", 1, "--dtype", "float32")
    result = run_json("bench", model.folder, converted, "--task", "decode", *size)
    assert result
    assert run_json("estimate", model.folder, "--plan", model.plan, "--hardware", "2xA100-NVLink")


def test_two_processes_refuse(model, converted):
    assert model.undivided in refused("bench", converted, "--backend", "tp", "--ranks", 2)


def test_export(model, converted, work):
    for number, source in enumerate((model.folder, converted)):
        file = work / f"{number}.gguf"
        if not model.exports:
            assert NO_GGUF in refused("export", source, "--gguf", file)
            assert not file.exists()
            continue
        record = run_json("export", source, "--gguf", file)
        assert record["layers"] == (model.layers, model.depth)[number] and record["chat_template"]
        assert "architecture deci" in refused("import", file, "-o", work / "deci")


def test_play(model, converted):
    """Both models load and the page is served."""
    options = ("--against", str(model.folder), "--dtype", "float32")
    assert served_until_interrupted(str(converted), *options)[0] == 0
