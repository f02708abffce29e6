"""Where tensors and config.json differ: what transformers does, or a refusal that names the tensor.

Never a tensor that matters dropped in silence; in convert, heal, export and inspect alike.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from abreast.checkpoint.tensors import INDEX, open_checkpoint
from abreast.convert.inspect import inspect_model
from abreast.convert.rewrite import convert, preview
from abreast.convert.verification import verify
from abreast.data import TokenStream
from abreast.engines.llamacpp.deci import lay_out_gguf
from abreast.errors import AbreastError
from abreast.heal.healing import heal
from abreast.model.grouping import load

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
Weights = dict[str, torch.Tensor]


@pytest.fixture
def changed(tiny_checkpoint, tmp_path) -> Callable[..., Path]:
    """A checkpoint whose tensors were replaced by what a function makes of them."""

    def factory(change: Callable[[Weights], Any] = lambda weights: None, **settings: Any) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(tiny_checkpoint(**settings), folder)
        weights = load_file(folder / "model.safetensors")
        weights = change(weights) or weights
        weights = {name: tensor.contiguous().clone() for name, tensor in weights.items()}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder

    return factory


def other_head(weights: Weights) -> None:
    weights[HEAD] = weights[EMBEDDING].flip(0)


def logits(folder: Path, plan: str | None = None) -> torch.Tensor:
    with torch.inference_mode():
        return load(folder, plan=plan)[0](torch.arange(20).view(1, -1)).logits


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return bool((ours - theirs).abs().max() < 1e-4 * (theirs.max() - theirs.min()))


def refusals(folder: Path, tmp_path: Path) -> set[str]:
    """What every verb that reads tensors says of a folder."""
    verbs: list[Callable[[], Any]] = [
        lambda: convert(folder, "1+2", tmp_path / "out"),
        lambda: preview(folder, "1+2"),
        lambda: heal(folder, "1+2", tmp_path / "out"),
        lambda: lay_out_gguf(open_checkpoint(folder)),
        lambda: inspect_model(folder),
    ]
    said = set()
    for verb in verbs:
        with pytest.raises(AbreastError) as caught:
            verb()
        said.add(str(caught.value))
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    return said


def test_a_head_of_its_own_in_a_tied_checkpoint(changed, tmp_path):
    folder = changed(other_head, tied=True)
    out = tmp_path / "out"
    manifest = convert(folder, "1+2", out)
    assert manifest["source"]["dropped_tensors"] == []
    assert HEAD in manifest["warnings"][0]
    assert close(logits(out), logits(folder, "1+2"))
    assert verify(out, folder, num_tokens=16, new_tokens=2).ok
    facts = inspect_model(folder)
    assert not facts.tied and HEAD in facts.warnings[0]
    layout = lay_out_gguf(open_checkpoint(folder))
    assert [p.source for p in layout.pieces if p.name == "output.weight"] == [HEAD]
    assert HEAD in layout.warnings[0]


def test_heal_keeps_a_head_of_its_own(changed, tmp_path):
    folder, healed = changed(other_head, tied=True), tmp_path / "kept"
    text = TokenStream(torch.arange(2048).numpy() * 7 % 128, "text", 1, 2048)
    heal(folder, "1+2", tmp_path / "out", method="refit", data=text, window=64, keep=healed)
    assert torch.equal(
        load_file(healed / "model.safetensors")[HEAD], load(folder)[0].lm_head.weight
    )
    assert verify(tmp_path / "out", healed, num_tokens=16, new_tokens=2).ok


def test_a_tied_checkpoint_that_stores_only_its_head(changed, tmp_path):
    folder = changed(lambda w: {HEAD: w.pop(EMBEDDING), **w}, tied=True)
    out = tmp_path / "out"
    convert(folder, "1+2", out)
    assert HEAD not in load_file(out / "model.safetensors")
    assert close(logits(out), logits(folder, "1+2"))
    assert verify(out, folder, num_tokens=16, new_tokens=2).ok
    assert inspect_model(folder).tied


@pytest.mark.parametrize("family", ["llama", "phi", "gemma3_text"])
@pytest.mark.parametrize("doubled", [False, True])
def test_names_without_the_prefix_of_the_model_or_with_two(changed, tmp_path, family, doubled):
    def rename(weights: Weights) -> Weights:
        names = {n: f"model.{n}" if doubled else n.removeprefix("model.") for n in weights}
        return {names[name]: tensor for name, tensor in weights.items()}

    kinds = {"layer_types": ["full_attention"] * 6} if family == "gemma3_text" else {}
    folder = changed(rename, family=family, **kinds)
    out = tmp_path / "out"
    convert(folder, "1+2", out)
    assert close(logits(out), logits(folder, "1+2"))
    assert verify(out, folder, num_tokens=16, new_tokens=2).ok
    assert inspect_model(folder).parameters == sum(
        t.numel() for t in load_file(folder / "model.safetensors").values()
    )


def test_export_of_names_without_the_prefix(changed, tmp_path):
    folder = changed(lambda w: {name.removeprefix("model."): t for name, t in w.items()})
    layout = lay_out_gguf(open_checkpoint(folder))
    assert {piece.source for piece in layout.pieces} == set(layout.checkpoint.tensors)


def test_a_tensor_under_two_names(changed, tmp_path):
    folder = changed(lambda w: w.update({"layers.0.mlp.up_proj.weight": torch.ones(96, 64)}))
    (said,) = refusals(folder, tmp_path)
    assert "'model.layers.0.mlp.up_proj.weight' twice" in said


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda w: w.pop("model.layers.2.mlp.up_proj.weight"), "'model.layers.2.mlp.up_proj.weigh"),
        (lambda w: w.pop(HEAD), f"'{HEAD}' is missing"),
        (
            lambda w: w.update({"model.layers.2.self_attn.q_proj.bias": torch.ones(64)}),
            "'model.layers.2.self_attn.q_proj.bias'",
        ),
        (lambda w: w.update({HEAD: torch.ones(130, 64)}), f"'{HEAD}' has shape"),
        (lambda w: w.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}), "dtype I8"),
        (lambda w: w.update({"score.weight": torch.ones(2, 64)}), "'score.weight'"),
    ],
    ids=["gone", "no-head", "a-bias", "vocabulary", "integers", "another-head"],
)
def test_what_config_does_not_describe_is_refused_by_name(changed, tmp_path, change, fault):
    def apply(weights: Weights) -> None:
        change(weights)

    (said,) = refusals(changed(apply), tmp_path)
    assert fault in said


def test_a_bias_that_config_promises(changed, tmp_path):
    folder = changed()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_bias": True}))
    (said,) = refusals(folder, tmp_path)
    assert "_proj.bias' is missing" in said and "config.json" in said


def test_an_adapter_that_transformers_would_add(changed, tmp_path):
    folder = changed()
    (folder / "adapter_config.json").write_text("{}")
    (said,) = refusals(folder, tmp_path)
    assert "holds an adapter" in said and "merge" in said


def test_an_adapter_alone(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(AbreastError, match="is an adapter without its model"):
        inspect_model(tmp_path)


@pytest.mark.parametrize("name", [HEAD, "model.layers.1.mlp.more.weight"])
@pytest.mark.parametrize("tied", [True, False])
def test_an_index_that_lists_what_no_shard_has(tiny_checkpoint, tmp_path, tied, name):
    """Old versions of transformers list the heads of tied models."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint(tied=tied, sharded=True), folder)
    index = json.loads((folder / INDEX).read_text())
    shard = index["weight_map"].setdefault(name, index["weight_map"]["model.norm.weight"])
    weights = load_file(folder / shard)
    weights.pop(name, None)
    save_file(weights, folder / shard, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps(index))
    if tied and name == HEAD:
        convert(folder, "1+2", tmp_path / "out")
        assert close(logits(tmp_path / "out"), logits(folder, "1+2"))
        assert inspect_model(folder).tied
    else:
        (said,) = refusals(folder, tmp_path)
        assert f"'{name}' is in {INDEX} but in no shard" in said
