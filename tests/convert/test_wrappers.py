"""Decoders within models that also read images: converted where they are, the rest as it was."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

import abreast.modeling  # noqa: F401  # makes converted models known to transformers
from abreast.checkpoint import open_checkpoint
from abreast.convert import convert, convert_adapter, inspect_model, verify
from abreast.errors import AbreastError
from abreast.heal import heal
from abreast.model import grouped, load

IMAGE, SIDE, LAYERS = 5, 28, 7
TEXT = {
    **{"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4},
    **{"num_hidden_layers": LAYERS, "num_key_value_heads": 2, "head_dim": 16},
    **{"max_position_embeddings": 512, "pad_token_id": 0, "eos_token_id": None},
}
VISION = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "image_size": SIDE, "patch_size": 14},
}
QWEN_VISION = {
    **{"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2},
    **{"out_hidden_size": 64, "patch_size": 14, "spatial_merge_size": 2},
}
QWEN_TOKENS = {
    **{"image_token_id": IMAGE, "video_token_id": 6},
    **{"vision_start_token_id": 7, "vision_end_token_id": 8},
}
MROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}
# model_type -> (config, tokens of an image, plan)
MODELS: dict[str, tuple[dict[str, Any], int, str]] = {
    "gemma3": (
        {
            "text_config": {**TEXT, "layer_types": ["sliding_attention"] * 6 + ["full_attention"]},
            "vision_config": {
                **{"model_type": "siglip_vision_model", "vision_use_head": False},
                **VISION,
            },
            **{"mm_tokens_per_image": 4, "image_token_index": IMAGE},
        },
        4,
        "1+2 3|4",
    ),
    "mistral3": (
        {
            "text_config": {"model_type": "mistral", **TEXT},
            "vision_config": {"model_type": "pixtral", "head_dim": 16, **VISION, "image_size": 56},
            **{"image_token_index": IMAGE, "tie_word_embeddings": False},
        },
        2,
        "1+2 3|4",
    ),
    "qwen2_5_vl": (
        {
            "text_config": {**TEXT, "rope_parameters": MROPE},
            "vision_config": {**QWEN_VISION, "window_size": 56, "fullatt_block_indexes": [1]},
            **QWEN_TOKENS,
        },
        1,
        "1+2+3 4|5",
    ),
    "qwen3_vl": (
        {
            "text_config": {**TEXT, "rope_parameters": MROPE},
            "vision_config": {
                **QWEN_VISION,
                **{"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
            },
            **QWEN_TOKENS,
        },
        1,
        "2+3 4~5",
    ),
    "internvl": (
        {
            "text_config": {"model_type": "qwen2", **TEXT},
            "vision_config": {
                **VISION,
                **{"model_type": "internvl_vision", "image_size": [SIDE] * 2},
                "patch_size": [14] * 2,
            },
            **{"image_token_id": IMAGE, "image_seq_length": 1},
        },
        1,
        "1+2+3",
    ),
    "llava": (
        {
            "text_config": {"model_type": "llama", **TEXT},
            "vision_config": {"model_type": "clip_vision_model", **VISION},
            "image_token_index": IMAGE,
        },
        4,
        "1+2 3|4:1",
    ),
}


@pytest.fixture(scope="session")
def wrapper(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A random tiny checkpoint of a model_type in MODELS; copy it before changing it."""
    made: dict[str, Path] = {}

    def factory(model_type: str) -> Path:
        if model_type not in made:
            folder = tmp_path_factory.mktemp(model_type)
            config = transformers.AutoConfig.for_model(model_type, **MODELS[model_type][0])
            torch.manual_seed(0)
            model = transformers.AutoModelForImageTextToText.from_config(config)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    noise = torch.randn(parameter.shape)
                    if parameter.dim() >= 2:
                        parameter.copy_(noise * parameter[0].numel() ** -0.5)
                    else:
                        parameter.copy_(noise * 0.3 + (not name.endswith("bias")))
            model.save_pretrained(folder)
            made[model_type] = folder
        return made[model_type]

    return factory


def prompt(model_type: str) -> dict[str, torch.Tensor]:
    """What a processor makes of a text with an image in it."""
    count = MODELS[model_type][1]
    ids = torch.tensor([[9, 10, 7, *[IMAGE] * count, 8, 11, 12, 13, 14]])
    pixels = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    types = (ids == IMAGE).long()
    if model_type == "gemma3":
        inputs["token_type_ids"] = types
    if model_type == "mistral3":
        inputs["pixel_values"] = torch.cat([pixels, pixels.flip(2)], 2)
        inputs["image_sizes"] = torch.tensor([[2 * SIDE, SIDE]])
    if model_type.startswith("qwen"):
        patches = torch.randn(4, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(1))
        inputs |= {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 2, 2]])}
        inputs["mm_token_type_ids"] = types
    return inputs


def answers(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, list[int]]:
    """The logits of a prompt with an image, and what is generated after it."""
    with torch.inference_mode():
        logits = model(**inputs).logits[0]
        text = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None)
    return logits, text[0].tolist()


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return bool((ours - theirs).abs().max() <= 1e-4 * (theirs.max() - theirs.min()))


@pytest.mark.parametrize("model_type", MODELS)
def test_an_image_gets_the_answer_of_the_grouped_original(
    wrapper: Callable[[str], Path], model_type: str, tmp_path: Path
) -> None:
    original, (_, _, plan), inputs = wrapper(model_type), MODELS[model_type], prompt(model_type)
    convert(original, plan, tmp_path / "out")
    model, reference = load(tmp_path / "out")[0], load(original)[0]
    logits, text = answers(model, inputs)
    alone, _ = answers(reference, inputs)
    with grouped(reference, plan):
        theirs, expected = answers(reference, inputs)
        other = inputs | {"pixel_values": -inputs["pixel_values"]}
        assert not close(answers(reference, other)[0], theirs), "the image makes no difference"
    assert close(logits, theirs) and text == expected
    assert not close(alone, theirs)
    result = verify(tmp_path / "out", original, num_tokens=24, new_tokens=4)
    assert result.ok, result.faults
    assert inspect_model(tmp_path / "out").plan == plan


@pytest.mark.parametrize("model_type", MODELS)
def test_text_alone_is_evaluated(
    wrapper: Callable[[str], Path],
    tiny_checkpoint: Callable[..., Path],
    model_type: str,
    tmp_path: Path,
    run: Any,
) -> None:
    """`eval` of the conversion says what it says of the grouped original."""
    original, plan = tmp_path / "original", MODELS[model_type][2]
    shutil.copytree(wrapper(model_type), original)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_checkpoint(tokenizer=True) / name, original)
    convert(original, plan, tmp_path / "out")
    (tmp_path / "text.txt").write_text("what is in this picture, and who took it? " * 30)
    options = ("--against", original, "--data", tmp_path / "text.txt", "--window", 64)
    evaluations = []
    for model in ((tmp_path / "out",), (original, "--plan", plan)):
        status, out, said = run("eval", *model, *options, "--stride", 32, "--json")
        assert status == 0, said
        evaluations.append(json.loads(out))
    ours, theirs = (f["result"] for f in evaluations)
    for key in ("kl", "nll_difference"):
        assert ours[key] == pytest.approx(theirs[key], rel=1e-3) and abs(theirs[key]) > 1e-3


def test_the_rest_is_copied(wrapper: Callable[[str], Path], tmp_path: Path) -> None:
    original = tmp_path / "original"
    shutil.copytree(wrapper("gemma3"), original)
    for name in ("processor_config.json", "preprocessor_config.json"):
        (original / name).write_text('{"image_processor_type": "Gemma3ImageProcessor"}')
    convert(original, "1+2", tmp_path / "out")
    before, after = open_checkpoint(original), open_checkpoint(tmp_path / "out")
    assert before.others.keys() == after.others.keys() and len(before.others) > 9
    ours, theirs = (load_file(c.folder / "model.safetensors") for c in (after, before))
    for name, tensor in before.others.items():
        assert ours[name].equal(theirs[tensor.name])
    for name in ("processor_config.json", "preprocessor_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (original / name).read_bytes()
    facts = inspect_model(original)
    assert (facts.model_type, facts.num_layers, facts.fusable) == ("gemma3", LAYERS, True)
    assert facts.architecture == "Gemma3ForConditionalGeneration"


def processor(model_type: str) -> Any:
    """A real processor of small images, with a tokenizer of twelve words."""
    tokens = ("<pad>", "<eos>", "<start>", "<end>", "<unk>", "<image>")  # IMAGE is the last
    words = (*tokens, "what", "is", "in", "this", "picture", "?")
    whole = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    whole.pre_tokenizer = pre_tokenizers.Whitespace()
    own = {"image_token": "<image>", "boi_token": "<start>", "eoi_token": "<end>"}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=whole,
        **{"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"},
        extra_special_tokens=own,
    )
    square = {"height": SIDE, "width": SIDE}
    if model_type == "gemma3":
        images = transformers.Gemma3ImageProcessor(size=square)
        return transformers.Gemma3Processor(images, tokenizer, image_seq_length=4)
    return transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=square),
        tokenizer,
        **{"patch_size": 14, "num_additional_image_tokens": 1, "image_token": "<image>"},
        vision_feature_select_strategy="default",
    )


@pytest.mark.parametrize(
    ("model_type", "text"),
    [("gemma3", "what is in <start> ?"), ("llava", "what is in <image> ?")],
)
def test_the_processor_travels(
    wrapper: Callable[[str], Path], model_type: str, text: str, tmp_path: Path
) -> None:
    """Through transformers alone: what it makes of a picture, and what is answered."""
    pillow = pytest.importorskip("PIL.Image")
    original, plan = tmp_path / "original", MODELS[model_type][2]
    shutil.copytree(wrapper(model_type), original)
    processor(model_type).save_pretrained(original)
    convert(original, plan, tmp_path / "out")
    noise = torch.randint(0, 256, (56, 40, 3), generator=torch.Generator().manual_seed(0))
    picture = pillow.fromarray(noise.to(torch.uint8).numpy())
    inputs, outputs = [], []
    for folder in (original, tmp_path / "out"):
        own = transformers.AutoProcessor.from_pretrained(folder)
        model = transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()
        inputs.append(own(text=text, images=picture, return_tensors="pt"))
        if folder == original:
            alone, _ = answers(model, inputs[0])
            with grouped(model, plan):
                logits, ids = answers(model, inputs[0])
        else:
            logits, ids = answers(model, inputs[1])
        outputs.append((logits, ids))
    assert inputs[0].keys() == inputs[1].keys() >= {"input_ids", "pixel_values"}
    assert all(torch.equal(inputs[0][name], inputs[1][name]) for name in inputs[0])
    assert (inputs[0]["input_ids"] == IMAGE).sum() == MODELS[model_type][1]
    assert close(outputs[1][0], outputs[0][0]) and not close(alone, outputs[0][0])
    assert outputs[0][1] == outputs[1][1]


@pytest.mark.slow
def test_transformers_loads_it_without_the_package(
    wrapper: Callable[[str], Path], tmp_path: Path
) -> None:
    convert(wrapper("gemma3"), "1+2 3|4", tmp_path / "out")
    torch.save(prompt("gemma3"), tmp_path / "prompt.pt")
    code = (
        "import sys, torch\n"
        "sys.modules['abreast'] = None\n"
        "from transformers import AutoModelForImageTextToText as Auto\n"
        f"model = Auto.from_pretrained({str(tmp_path / 'out')!r}, trust_remote_code=True).eval()\n"
        f"logits = model(**torch.load({str(tmp_path / 'prompt.pt')!r})).logits[0]\n"
        f"torch.save(logits.detach(), {str(tmp_path / 'logits.pt')!r})\n"
        f"model.save_pretrained({str(tmp_path / 'again')!r})\n"
    )
    home = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run([sys.executable, "-c", code], check=True, env=home)
    logits, _ = answers(load(tmp_path / "out")[0], prompt("gemma3"))
    again, _ = answers(load(tmp_path / "again")[0], prompt("gemma3"))
    assert close(torch.load(tmp_path / "logits.pt"), logits) and close(again, logits)


@pytest.mark.parametrize(
    ("model_type", "change", "said"),
    [
        ("gemma3", {"text_config": None}, "text_config of this gemma3 describes no text decoder"),
        ("mistral3", {"text_config": {"model_type": "bert"}}, "model_type 'bert'"),
        ("gemma3", {"quantization_config": {"quant_method": "awq"}}, "is quantised"),
    ],
)
def test_bad_wrappers_are_refused(
    wrapper: Callable[[str], Path],
    model_type: str,
    change: dict[str, Any],
    said: str,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(wrapper(model_type), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(AbreastError) as caught:
        convert(folder, "1+2", tmp_path / "out")
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"form": "deci"}, "vision encoder"),
        ({"prefill": "sequential"}, "for text alone"),
    ],
)
def test_what_a_wrapper_cannot_have(
    wrapper: Callable[[str], Path], options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(AbreastError, match=said):
        convert(wrapper("llava"), "1+2", tmp_path / "out", **options)


def test_it_is_neither_healed_nor_given_adapters(
    wrapper: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(AbreastError, match="within a llava, which cannot be healed"):
        heal(wrapper("llava"), "1+2", tmp_path / "healed")
    convert(wrapper("llava"), "1+2", tmp_path / "out")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    save_file(
        {"base_model.model.x.lora_A.weight": torch.ones(1, 1)},
        adapter / "adapter_model.safetensors",
    )
    with pytest.raises(AbreastError, match="within a llava, whose adapters"):
        convert_adapter(adapter, tmp_path / "out", tmp_path / "folded")


def test_layers_that_take_features_of_images_stay_alone(
    wrapper: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(AbreastError, match=r"1\+2 cannot be fused: .* after layer 1 .*deepstack"):
        convert(wrapper("qwen3_vl"), "1+2", tmp_path / "out")


def test_a_tensor_of_the_rest_that_is_stored_twice(
    wrapper: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(wrapper("llava"), folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    name = next(name for name in weights if name.startswith("vision_tower."))
    weights[f"model.{name}"] = weights[name].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(AbreastError, match="twice"):
        convert(folder, "1+2", tmp_path / "out")
