"""Healing as a whole: from an original and a plan to a converted checkpoint, or to an error."""

import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import abreast.heal
from abreast.cli.quality import heal as heal_verb
from abreast.convert.rewrite import convert
from abreast.convert.verification import verify
from abreast.data import TokenStream
from abreast.errors import AbreastError, CheckpointError
from abreast.heal.healing import heal
from abreast.heal.recipe import RECIPES, Recipe
from abreast.model.grouping import load
from abreast.plan import Plan
from abreast.report.drawings import draw_healing

pytest.importorskip("peft")

PLAN = "1+2 3|4"
SHORT = Recipe(steps=4, batch_size=4, micro_batch=4, evaluate_every=2, save_every=2)


def text(tokens: int = 1600, seed: int = 0, vocabulary: int = 128) -> TokenStream:
    ids = np.random.default_rng(seed).integers(0, vocabulary, tokens)
    return TokenStream(ids, source="words", num_documents=1, num_bytes=tokens)


def quick(model, out, **options):
    """`heal` with settings that suit tiny models."""
    defaults = {"data": text(), "window": 32, "recipe": SHORT}
    return heal(model, options.pop("plan", PLAN), out, **{**defaults, **options})


def manifest_of(out) -> dict:
    return json.loads((out / "abreast.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("family", "method", "dtype"),
    [
        ("llama", "both", "bfloat16"),
        pytest.param("llama", "refit", "float32", marks=pytest.mark.slow),
        pytest.param("qwen3", "distill", "float32", marks=pytest.mark.slow),
        pytest.param("olmo2", "both", "float32", marks=pytest.mark.slow),
    ],
)
def test_a_healed_model_is_an_ordinary_converted_one(
    tiny_checkpoint, tmp_path, family, method, dtype
):
    source = tiny_checkpoint(family, dtype=dtype)
    out, repaired = tmp_path / "out", tmp_path / "kept"
    report = quick(source, out, method=method, keep=repaired, draw=draw_healing)
    assert report.kl_after < report.kl_before
    assert (report.refit is not None) == (method != "distill")
    assert (report.distilled is not None) == (method != "refit")
    # Same names, shapes and dtypes as the conversion of the original.
    convert(source, PLAN, tmp_path / "plain")
    healed, plain = (load_file(f / "model.safetensors") for f in (out, tmp_path / "plain"))
    assert {n: (t.shape, t.dtype) for n, t in healed.items()} == {
        n: (t.shape, t.dtype) for n, t in plain.items()
    }
    assert any(not torch.equal(healed[name], plain[name]) for name in plain)
    assert json.loads((out / "config.json").read_text()) == json.loads(
        (tmp_path / "plain" / "config.json").read_text()
    )
    # Proven against the healed weights; against the original, files and source are.
    exact = verify(out, repaired, num_tokens=48, new_tokens=4)
    assert exact.ok and not exact.healed
    loose = verify(out, source, num_tokens=48, new_tokens=4)
    assert loose.ok and loose.healed and loose.kl > exact.kl
    record = manifest_of(out)
    assert record["source"]["name"] == str(source)
    assert record["healed"]["method"] == method
    assert record["healed"]["data"]["sha256"] == text().sha256
    assert (out / "heal.png").stat().st_size > 1000
    assert (out / "heal.csv").is_file() == (method != "refit")
    if method != "refit":
        rows = list(csv.DictReader((out / "heal.csv").open()))
        assert [int(row["step"]) for row in rows] == [0, 2, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "out", "plain"]


def test_verify_sees_a_damaged_or_foreign_healed_checkpoint(tiny_checkpoint, tmp_path):
    source, out, healed = tiny_checkpoint(), tmp_path / "out", tmp_path / "kept"
    quick(source, out, method="refit", keep=healed)
    with pytest.raises(CheckpointError, match="was not made from"):
        verify(out, tiny_checkpoint(seed=1))
    (healed / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="was not made from"):
        verify(out, healed)
    (out / "generation_config.json").write_text("{}")
    verification = verify(out, source)
    assert not verification.ok and "generation_config.json" in verification.faults[0]


@pytest.mark.slow
def test_adapters_after_refit_learn_from_the_original(tiny_checkpoint, tmp_path):
    """The refitted weights cannot teach: what the first look measures is the distance left."""
    recipe = Recipe(**{**SHORT.to_dict(), "train": "lora", "lora_rank": 4, "bf16": False})
    report = quick(tiny_checkpoint(), tmp_path / "out", recipe=recipe, data=text(4800))
    assert report.refit is not None and not report.refit.kept
    assert report.distilled is not None
    assert report.distilled.before > report.refit.kl_after / 2


def test_an_interrupted_call_goes_on_to_the_same_bits(tiny_checkpoint, tmp_path):
    source = tiny_checkpoint()
    quick(source, tmp_path / "whole", work=tmp_path / "a")

    class Stop(Exception):
        pass

    def stop_at(beginning: str):
        def step(message: str) -> None:
            if message.startswith(beginning):
                raise Stop

        return step

    for beginning in ("distil", "write"):
        with pytest.raises(Stop):
            quick(source, tmp_path / "cut", work=tmp_path / "b", step=stop_at(beginning))
        assert not (tmp_path / "cut").exists()
    quick(source, tmp_path / "cut", work=tmp_path / "b")
    whole, resumed = (load_file(tmp_path / n / "model.safetensors") for n in ("whole", "cut"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert (tmp_path / "b" / "heal.csv").is_file()


def test_work_of_another_job_is_refused(tiny_checkpoint, tmp_path):
    source = tiny_checkpoint()
    quick(source, tmp_path / "out", work=tmp_path / "w", method="refit")
    with pytest.raises(AbreastError, match="with other plan"):
        quick(source, tmp_path / "o", work=tmp_path / "w", method="refit", plan="1+2")
    with pytest.raises(AbreastError, match="with other model"):
        quick(tiny_checkpoint(seed=1), tmp_path / "o", work=tmp_path / "w", method="refit")


def test_divergence_leaves_a_checkpoint_no_worse_and_says_so(tiny_checkpoint, tmp_path):
    recipe = Recipe(
        **{**SHORT.to_dict(), "train": "all", "learning_rate": 1.0, "warmup": 0.0, "clip": 1e6}
    )
    report = quick(tiny_checkpoint(), tmp_path / "out", method="distill", recipe=recipe)
    assert report.distilled is not None and report.distilled.diverged
    assert any("diverged" in warning for warning in report.warnings)
    assert report.kl_after <= report.kl_before
    assert manifest_of(tmp_path / "out")["healed"]["distilled"]["diverged"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "prayer"}, "method 'prayer' is not one of refit, distill, both"),
        ({"plan": Plan(num_layers=6)}, "no group"),
        ({"plan": Plan.parse("1+2", 8)}, "the plan is for 8 layers, the model has 6"),
        ({"plan": Plan.parse("1+2", 6, source="x", sha256="0" * 64)}, "made for another model"),
        ({"plan": "0+1"}, "--force"),
        ({"data": text(300)}, "too little text"),
        ({"data": text(300), "method": "distill", "window": 256}, "too little text"),
        ({"data": text(1600, vocabulary=400)}, "outside the model's vocabulary"),
        ({"data": "stdlib-train"}, "no tokenizer"),
        ({"dtype": "int8"}, "dtype 'int8' is not one of"),
        ({"refit_steps": ("down",)}, "choose some of qkv, gate_up, out"),
        ({"recipe": Recipe(steps=0)}, "give at least 1"),
        (
            {"recipe": replace(SHORT, minutes=1e-6)},
            "give more --minutes, or a smaller --batch-size",
        ),
    ],
)
def test_bad_input_leaves_nothing_behind(tiny_checkpoint, tmp_path, options, message):
    with pytest.raises(AbreastError, match=message):
        quick(tiny_checkpoint(), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "recipe", "message"),
    [
        (0, replace(SHORT, minutes=1e-6), "give more --minutes"),
        (4000, replace(SHORT, minutes=1e-6), "give more --minutes"),
        (40, SHORT, "too little text"),
    ],
    ids=["before the model writes", "file", "short file"],
)
def test_what_cannot_be_healed_on_leaves_no_folder(
    tmp_path, tiny_checkpoint, words, recipe, message
):
    file, folder = tmp_path / "words.txt", tmp_path / "there"
    file.write_text("some words of prose " * (words // 4), "utf-8")
    folder.mkdir()
    data = str(file) if words else "self"
    with pytest.raises(AbreastError, match=message):
        quick(tiny_checkpoint(tokenizer=True), folder / "out", data=data, recipe=recipe)
    assert not any(folder.iterdir())


def test_a_recipe_that_a_family_cannot_take(tiny_checkpoint, tmp_path):
    with pytest.raises(AbreastError, match=r"'q_proj' is no matrix .*--lora-targets .*qkv_proj"):
        quick(tiny_checkpoint("phi3"), tmp_path / "out", recipe=replace(SHORT, **RECIPES["cqil"]))
    assert not any(tmp_path.iterdir())


def test_options_override_a_published_recipe(monkeypatch):
    recipes = []

    def note(*_, recipe: Recipe, **__) -> None:
        recipes.append(recipe)
        raise AbreastError("enough")

    monkeypatch.setattr(abreast.heal, "heal", note)
    arguments = ["model", "--plan", "1+2", "-o", "out", "--no-plots"]
    for more in (
        [],
        ["--recipe", "lp-paper"],
        ["--recipe", "cqil", "--steps", "400", "--clip", "2", "--lora-targets", "up_proj"],
    ):
        CliRunner().invoke(heal_verb, [*arguments, *more])
    ours, paper, cqil = recipes
    assert ours == Recipe()
    assert (paper.train, paper.objective, paper.group_share) == ("groups", "lm", 0.0)
    assert (cqil.train, cqil.lora_layers, cqil.lora_rank, cqil.lora_alpha) == (
        "lora",
        "all",
        32,
        32,
    )
    assert (cqil.schedule, cqil.weight_decay, cqil.batch_size) == ("linear", 0.1, 32)
    assert (cqil.steps, cqil.clip, cqil.lora_targets) == (400, 2.0, ("up_proj",))


def test_an_existing_folder_is_not_touched(tiny_checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(AbreastError, match="exists"):
        quick(tiny_checkpoint(), tmp_path / "out")
    with pytest.raises(AbreastError, match="exists"):
        quick(tiny_checkpoint(), tmp_path / "new", keep=tmp_path / "out")


def test_converted_and_broken_originals_are_refused(tiny_checkpoint, tmp_path):
    convert(tiny_checkpoint(), PLAN, tmp_path / "converted")
    with pytest.raises(AbreastError, match="converted already"):
        quick(tmp_path / "converted", tmp_path / "out")
    broken = tmp_path / "broken"
    shutil.copytree(tiny_checkpoint(), broken)
    state = load_file(broken / "model.safetensors")
    state["model.layers.2.mlp.down_proj.weight"][0, 0] = float("nan")
    from safetensors.torch import save_file

    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AbreastError, match="not finite"):
        quick(broken, tmp_path / "out")


def test_a_large_vocabulary_leaves_several_windows_to_judge_by(
    tiny_checkpoint, tmp_path, monkeypatch
):
    """A mean over one window has no error bar, and chance decides whether healing won."""
    monkeypatch.setattr("abreast.model.scores.KEPT_VALUES", 40 * 128)
    healed = quick(tiny_checkpoint(), tmp_path / "out", method="refit")
    for text in healed.judged:
        assert text.tokens <= 40 and text.kl_after_stderr > 0
    assert healed.data["held_out_tokens"] >= 2 * healed.data["window"]


def test_command_line(tiny_checkpoint, tmp_path):
    out = tmp_path / "out"
    model = tiny_checkpoint(tokenizer=True)
    arguments = [str(model), "--plan", "2+3", "-o", str(out), "--json", "--data", "stdlib-train"]
    arguments += ["--tokens", "2600", "--window", "128", "--steps", "2", "--batch-size", "2"]
    arguments += ["--optimizer", "muon", "--hidden-weight", "5", "--lm-weight", "0.1"]
    done = CliRunner().invoke(heal_verb, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    printed = json.loads(done.stdout)
    assert printed["plan"] == "2+3" and printed["kl_after"] < printed["kl_before"]
    assert printed["data"]["source"] == "stdlib-train"
    known, other = printed["judged"]
    assert (known["text"], known["known"]) == ("stdlib-train", True)
    assert (other["text"], other["known"]) == ("pydoc", False)
    assert known["kl_before"] == printed["kl_before"] and known["kl_after"] == printed["kl_after"]
    assert 0 < other["kl_after_stderr"] < other["kl_before"]
    assert manifest_of(out)["healed"]["judged"] == printed["judged"]
    recipe = manifest_of(out)["healed"]["recipe"]
    assert [recipe[key] for key in ("optimizer", "hidden_weight", "lm_weight")] == ["muon", 5, 0.1]
    model, tokenizer = load(out)
    assert tokenizer is not None and model.config.num_hidden_layers == 5
