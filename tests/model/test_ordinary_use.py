"""What people do with any model: copy and pickle it, adapt it, offload and quantise its weights."""

from __future__ import annotations

import copy
import io
import json
import shutil
from typing import Any

import pytest
import torch
from torch import nn

from abreast.convert.rewrite import convert
from abreast.errors import AbreastError
from abreast.model import grouping
from abreast.model.grouping import apply, decoder_layers, load, remove

PLANS = {"llama": "1|2:1 3+4", "gemma3_text": "1|2:1 3+4 5~6", "phi3": "1+2 3|4:1"}
ONE_KIND = {"gemma3_text": {"layer_types": ["full_attention"] * 8, "num_layers": 8}}
IDS = torch.arange(3, 19)[None]


@pytest.fixture(scope="module")
def folder(tiny_checkpoint, tmp_path_factory):
    """The folder of a converted checkpoint: family, and whether it prefills sequentially."""
    made: dict[Any, Any] = {}

    def convert_once(family: str, prefill: str = "grouped") -> Any:
        if (family, prefill) not in made:
            out = tmp_path_factory.mktemp("converted") / "out"
            original = tiny_checkpoint(family, **ONE_KIND.get(family, {}))
            convert(original, PLANS[family], out, prefill=prefill)
            made[family, prefill] = out
        return made[family, prefill]

    return convert_once


def generated(model: Any) -> list[int]:
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **options)[0].tolist()


def pickled(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "torch.save": pickled}
EITHER = pytest.mark.parametrize("prefill", ["grouped", "sequential"])


@EITHER
@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_copy_of_a_converted_model_is_one(folder, family, prefill, way):
    model = load(folder(family, prefill))[0]
    again = COPIES[way](model)
    want = generated(model)
    assert generated(again) == want
    _wipe(model)
    assert generated(again) == want, "the copy runs the original's weights"


@EITHER
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_of_a_grouped_model_is_one(tiny_checkpoint, prefill, way):
    model = load(tiny_checkpoint("llama"))[0]
    alone = generated(model)
    apply(model, PLANS["llama"], prefill=prefill)
    want = generated(model)
    again = COPIES[way](model)
    _wipe(model)
    assert generated(again) == want != alone
    remove(again)
    assert generated(again) == alone


def _wipe(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()


@EITHER
@pytest.mark.parametrize(
    "targets", ["all-linear", ["down_proj"], ["o_proj", "gate_up_proj"]], ids=str
)
@pytest.mark.parametrize("family", list(PLANS))
def test_lora(folder, family, prefill, targets):
    """An adapter acts in every pass and trains, and merged it gives the same."""
    peft = pytest.importorskip("peft")
    plain = load(folder(family, prefill))[0]
    if "gate_up_proj" in targets and family != "phi3":
        targets = ["o_proj", "gate_proj", "up_proj"]
    adapted = peft.get_peft_model(
        copy.deepcopy(plain), peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    )
    loss = adapted(input_ids=IDS, labels=IDS).loss
    loss.backward()
    idle = [n for n, p in adapted.named_parameters() if p.requires_grad and not p.grad.abs().max()]
    assert not idle
    names = {
        n.split(".lora_A")[0].rsplit(".", 1)[1]
        for n, _ in adapted.named_parameters()
        if "lora_A" in n
    }
    if targets == "all-linear":
        assert len(names) == (4 if family == "phi3" else 7)
    adapted.eval()
    with torch.inference_mode():
        logits, text = adapted(input_ids=IDS, use_cache=False).logits, generated(adapted)
        assert (logits - plain(IDS, use_cache=False).logits).abs().max() > 1e-2
        merged = adapted.merge_and_unload()
        assert torch.allclose(merged(IDS, use_cache=False).logits, logits, atol=1e-4)
        assert generated(merged) == text


@EITHER
def test_prefix_tuning(folder, prefill):
    peft = pytest.importorskip("peft")
    model = load(folder("llama", prefill))[0]
    plain = generated(model)
    settings = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    tuned = peft.get_peft_model(model, settings)
    tuned(input_ids=IDS, labels=IDS).loss.backward()
    assert tuned.prompt_encoder.default.embedding.weight.grad.abs().max() > 0
    with torch.no_grad():
        tuned.prompt_encoder.default.embedding.weight.normal_()
    assert generated(tuned.eval()) != plain


@EITHER
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offload(folder, tmp_path, family, prefill, where):
    accelerate = pytest.importorskip("accelerate")
    model = load(folder(family, prefill))[0]
    want, logits = generated(model), model(IDS, use_cache=False).logits
    if where == "cpu":
        accelerate.cpu_offload(model, torch.device("cpu"))
    else:
        accelerate.disk_offload(model, tmp_path / "weights", torch.device("cpu"))
    assert all(p.is_meta for layer in decoder_layers(model) for p in layer.parameters())
    assert generated(model) == want
    assert torch.allclose(model(IDS, use_cache=False).logits, logits, atol=1e-5)


class Halved(nn.Module):
    """Stands for a quantised linear map: one that is no nn.Linear and not its weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.inner = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) / 2


@pytest.mark.parametrize("family", list(PLANS))
def test_linear_maps_of_another_class(folder, family):
    """Halving through the modules is halving the weights."""
    models = [load(folder(family, "sequential"))[0] for _ in range(2)]
    for layer in decoder_layers(models[0]):
        for module in list(layer.modules()):
            for name, child in list(module.named_children()):
                if type(child) is nn.Linear and not isinstance(module, Halved):
                    setattr(module, name, Halved(child))
    with torch.no_grad():
        for layer in decoder_layers(models[1]):
            for module in layer.modules():
                if type(module) is nn.Linear:
                    module.weight.div_(2)
    assert torch.allclose(models[0](IDS).logits, models[1](IDS).logits, atol=1e-5)
    assert generated(models[0]) == generated(models[1])


@EITHER
def test_bitsandbytes(folder, prefill):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    out = folder("llama", prefill)
    model = AutoModelForCausalLM.from_pretrained(out, quantization_config=settings).eval()
    kinds = {type(m).__name__ for m in decoder_layers(model).modules() if hasattr(m, "in_features")}
    assert "Linear4bit" in kinds and "Linear" not in kinds
    with torch.inference_mode():
        got, want = model(IDS).logits, load(out)[0](IDS).logits
    correlation = torch.corrcoef(torch.stack([got.flatten(), want.flatten()]))[0, 1]
    assert correlation > 0.8
    assert len(generated(model)) == IDS.shape[1] + 6


def test_continuous_batching_is_refused_by_name(folder):
    with pytest.raises(ValueError, match="sequential prefill cannot run in continuous batches"):
        load(folder("llama", "sequential"))[0].generate_batch([IDS[0].tolist()])


def test_a_quantised_cache_is_refused_where_it_would_have_to_be_read(folder):
    from transformers import QuantizedCache

    pytest.importorskip("optimum.quanto")
    model = load(folder("llama", "sequential"))[0]
    cache = QuantizedCache(backend="quanto", config=model.config)
    with pytest.raises(ValueError, match="sequential prefill"):
        model.generate(IDS, max_new_tokens=4, prefill_chunk_size=4, past_key_values=cache)


def test_attentions_are_refused_where_they_would_be_incomplete(folder):
    model = load(folder("llama", "sequential"))[0]
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="sequential prefill"):
        model(IDS, output_attentions=True)
    model.config.abreast_prefill = "grouped"
    assert len(model(IDS, output_attentions=True).attentions) == 4


def test_a_sentencepiece_file_asks_for_sentencepiece(tmp_path, monkeypatch):
    from abreast.errors import CheckpointError
    from abreast.model import grouping

    monkeypatch.setattr(grouping, "find_spec", lambda name: None)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(CheckpointError, match="pip install sentencepiece"):
        grouping.load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json"])
def test_numbers_of_tokens_that_would_take_all_memory_are_refused(tiny_checkpoint, tmp_path, name):
    shutil.copytree(tiny_checkpoint(tokenizer=True), tmp_path, dirs_exist_ok=True)
    assert grouping.load_tokenizer(tmp_path) is not None
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["far away"] = 1 << 31
    damaged = tokenizer if name == "tokenizer.json" else tokenizer["model"]["vocab"]
    (tmp_path / name).write_text(json.dumps(damaged))
    with pytest.raises(AbreastError, match=f"{name}' numbers tokens up to {1 << 31}"):
        grouping.load_tokenizer(tmp_path)


def test_a_panic_in_a_tokenizer_is_one_line(tiny_checkpoint, monkeypatch):
    panic = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})

    def panics(*_, **__):
        raise panic("range end index 2 out of range")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", panics)
    with pytest.raises(AbreastError, match="cannot be loaded: range end index 2"):
        grouping.load_tokenizer(tiny_checkpoint(tokenizer=True))
