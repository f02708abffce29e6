"""GGUF files run in stock llama.cpp and say what transformers says.

llama.cpp runs here with float32 keys and values and without flash attention, whose kernel rounds to
float16 (2e-3 in logprobs), and without repacked weights, which crash on CPUs with AMX.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import statistics
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xllamacpp
from click.testing import CliRunner
from llamacpp_server import post, serve
from made_tokenizers import KINDS, TEMPLATE, WORDS, chats, save
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from tokenizers.processors import TemplateProcessing

from abreast.cli.main import cli
from abreast.convert.rewrite import convert
from abreast.data import HELD_OUT, documents, tricky_texts
from abreast.demo import model_folder
from abreast.engines.llamacpp import vocabulary
from abreast.engines.llamacpp.vocabulary import BY_STEPS
from abreast.engines.llamacpp.writer import export
from abreast.errors import AbreastError
from abreast.model.grouping import load, load_tokenizer

PLANS = ("2+3 4+5 6+7 10+11", "2+3+4 6+7 9+10+11")


def ask(server: xllamacpp.Server, prompt: list[int], tokens: int, best: int) -> list[Any]:
    """Greedy tokens with the `best` candidates of each."""
    request = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "logprobs": best}
    options = {"cache_prompt": False, "ignore_eos": True}
    return server.handle_completions({**request, **options})["choices"][0]["logprobs"]["content"]


def compared(model: Any, server: xllamacpp.Server, prompt: list[int], tokens: int) -> float:
    """Asserts equal greedy tokens; returns the largest difference of a top-5 logprob."""
    answer = ask(server, prompt, tokens, 5)
    ids = [entry["id"] for entry in answer]
    with torch.inference_mode():
        inputs, longest = torch.tensor([prompt]), len(prompt) + tokens
        model.generation_config.eos_token_id = None
        own = model.generate(inputs, max_length=longest, do_sample=False)
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    assert len(ids) == tokens
    assert own[0, len(prompt) :].tolist() == ids
    logprobs = torch.log_softmax(logits.float(), -1)
    return max(
        abs(logprobs[position, candidate["id"]].item() - candidate["logprob"])
        for position, entry in enumerate(answer)
        for candidate in entry["top_logprobs"]
    )


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    _, tokenizer = load(model_folder())
    texts = [text for _, text in documents(HELD_OUT)][:24]
    return [tokenizer(text)["input_ids"][: 16 + 4 * i] for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The bundled model under a plan, in float32; without one, as it is."""
    folder = tmp_path_factory.mktemp("converted")

    def make(plan: str) -> Path:
        out = folder / (plan.replace(" ", "_") or "original")
        if not plan:
            return model_folder()
        if not out.exists():
            convert(model_folder(), plan, out, dtype="float32")
        return out

    return make


@pytest.mark.parametrize("plan", ["", *PLANS])
def test_bundled_model_says_what_transformers_says(converted, prompts, tmp_path, plan):
    source, file = converted(plan), tmp_path / "model.gguf"
    export(source, file, dtype="float32")
    model, _ = load(source, dtype="float32")
    server = serve(file)
    assert max(compared(model, server, prompt, 64) for prompt in prompts[:4]) < 1e-3


@pytest.mark.parametrize("plan", ["", PLANS[0]])
def test_bundled_tokenizer_gives_the_same_ids(converted, corpus, tmp_path, plan):
    assert_same_ids(converted(plan), tmp_path, corpus)


def assert_same_ids(folder: Path, tmp_path: Path, texts: list[str]) -> None:
    """On these texts, tricky ones, and conversations."""
    export(folder, tmp_path / "model.gguf")
    tokenizer, server = load_tokenizer(folder), serve(tmp_path / "model.gguf")
    composed = "NFC" in (folder / "tokenizer.json").read_text()  # llama.cpp takes text as it is
    for text in (*tricky_texts(tokenizer), *texts):
        text = unicodedata.normalize("NFC", text) if composed else text
        ids = tokenizer(text)["input_ids"]
        options = {"content": text, "add_special": True, "parse_special": True}
        assert post(server, "/tokenize", options)["tokens"] == ids, text
    for text in chats(tokenizer) if tokenizer.chat_template else ():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        options = {"content": text, "add_special": False, "parse_special": True}
        assert post(server, "/tokenize", options)["tokens"] == ids, text


@pytest.mark.parametrize(("kind", "limit"), [("Q8_0", 1e-3), ("Q4_K_M", 0.1)])
def test_quantised_files_run_and_stay_near(converted, prompts, tmp_path, kind, limit):
    source = converted(PLANS[1])
    plain, small = tmp_path / "plain.gguf", tmp_path / "small.gguf"
    export(source, plain, dtype="float32")
    made = export(source, small, quantization=kind)
    assert made["quantization"] == kind
    assert small.stat().st_size < plain.stat().st_size * {"Q8_0": 0.3, "Q4_K_M": 0.21}[kind]
    first, second = serve(plain), serve(small)
    divergences = [kl(ask(first, p, 1, 4096), ask(second, p, 1, 4096)) for p in prompts]
    assert 0 < statistics.mean(divergences) < limit


def kl(reference: list[Any], model: list[Any]) -> float:
    p, q = (
        {candidate["id"]: candidate["logprob"] for candidate in entry[0]["top_logprobs"]}
        for entry in (reference, model)
    )
    assert len(p) == len(q) == 4096
    return sum(math.exp(p[index]) * (p[index] - q[index]) for index in p)


FAMILIES = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tied": True}),
    "llama wide heads": ("llama", {"head_dim": 24}),
    "llama biases": ("llama", {"biases": True}),
    "llama no sharing of heads": ("llama", {"num_key_value_heads": 4}),
    "llama bfloat16": ("llama", {"dtype": "bfloat16"}),
    "llama3 rope": (
        "llama",
        {
            "head_dim": 32,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "linear rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}},
    ),
    "yarn": (
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            }
        },
    ),
    "yarn with its own attention factor": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "attention_factor": 1.4,
                "original_max_position_embeddings": 128,
            }
        },
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral that slides": ("mistral", {"sliding_window": 128}),
    "qwen2": ("qwen2", {"tied": True}),
    "seed_oss": ("seed_oss", {"biases": True, "head_dim": 24}),
    "phi3": ("phi3", {"sliding_window": None}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.125,
            "logits_scaling": 4.0,
            "biases": True,
        },
    ),
    "granite tied": (
        "granite",
        {"tied": True, "embedding_multiplier": 3.0, "logits_scaling": 2.0, "dtype": "bfloat16"},
    ),
}


@pytest.mark.parametrize("plan", ["", "1+2 3+4+5", "0+1 2+3 4+5 6+7"])
@pytest.mark.parametrize("case", FAMILIES)
def test_families_say_what_transformers_says(tiny_checkpoint, words, tmp_path, case, plan):
    family, options = FAMILIES[case]
    source = tiny_checkpoint(family, num_layers=8, vocab_size=WORDS, **options)
    folder = tmp_path / "source"
    if plan:
        convert(source, plan, folder, force=True, dtype="float32")
    else:
        shutil.copytree(source, folder)
    save_tokenizer(words, folder)
    export(folder, tmp_path / "model.gguf", dtype="float32")
    model, _ = load(folder, dtype="float32")
    prompt = torch.randint(3, WORDS, (60,), generator=torch.manual_seed(1)).tolist()
    difference = compared(model, serve(tmp_path / "model.gguf"), prompt, 24)
    assert difference < 1e-4


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return [text for _, text in documents(HELD_OUT)][:12]


@pytest.fixture(scope="module")
def words(corpus) -> Tokenizer:
    """Of ASCII only: llama.cpp's server gives no logprobs for tokens that are no whole letters."""
    plain = [text for text in corpus if text.isascii()]
    return byte_level([pre_tokenizers.ByteLevel(add_prefix_space=False)], False, plain, [])


def byte_level(
    steps: list[Any], ignore_merges: bool, corpus: list[str], alphabet: list[str] | None = None
) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS - 3,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if alphabet is None else alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, **settings: Any) -> None:
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names, **settings})
    )


def step(kind: str, value: Any) -> Any:
    if kind == "ByteLevel":
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=value)
    if kind == "Digits":
        return pre_tokenizers.Digits(individual_digits=value)
    return pre_tokenizers.Split(Regex(value), "isolated")


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("pre", BY_STEPS.values())
def test_byte_level_tokenizers_give_the_same_ids(tiny_checkpoint, corpus, tmp_path, pre, bos):
    steps, ignore_merges = next(known for known, name in BY_STEPS.items() if name == pre)
    tokenizer = byte_level([step(*one) for one in steps], ignore_merges, corpus)
    tokenizer.add_tokens(["<tool>"])
    if bos:
        tokenizer.post_processor = TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    folder = shutil.copytree(tiny_checkpoint(vocab_size=WORDS), tmp_path / "source")
    save_tokenizer(tokenizer, folder, chat_template=TEMPLATE)
    assert_same_ids(folder, tmp_path, [text[:400] for text in corpus])


def metaspace(scheme: str) -> Callable[[Tokenizer], None]:
    def change(tokenizer: Tokenizer) -> None:
        tokenizer.normalizer = normalizers.Sequence([])
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)

    return change


def add(*tokens: AddedToken) -> Callable[[Tokenizer], None]:
    return lambda tokenizer: tokenizer.add_tokens(list(tokens))


def special(name: str, **marks: bool) -> AddedToken:
    return AddedToken(name, special=True, normalized=False, **marks)


PHI3 = [
    *(special(name) for name in ("<unk>", "<s>", "<|endoftext|>")),
    *(special(name, rstrip=True) for name in ("</s>", "<|user|>", "<|im_start|>", "<|end|>")),
]
DUPLICATES = [special("the"), special("[PAD598]"), special("  "), special("<a>b")]
READ = {  # what llama.cpp reads as transformers does
    **{kind: (kind, None) for kind in KINDS if kind != "unigram"},
    **{f"{kind} converted": (kind, None) for kind in ("gpt-2", "prepended space")},
    "no space by Metaspace": ("prepended space", metaspace("never")),
    "phi 3": ("prepended space", add(*PHI3)),
    "added tokens, gpt-2": ("gpt-2", add(special("<|tool|>"), AddedToken("<a>"), *DUPLICATES)),
    "added tokens, pieces": ("no prepended space", add(special("<|tool|>"), *DUPLICATES)),
    "code llama": ("prepended space", add(special("▁<PRE>"), special("▁<EOT>"))),
    "looks like control": ("qwen", add(AddedToken("<|eot_id|>"), AddedToken("<|fim_pad|>"))),
}
REFUSED = {  # kind, change, what the one line names
    "unigram": ("unigram", None, "is of kind Unigram"),
    "space once": ("prepended space", metaspace("first"), "would read"),
    "space unless there": ("prepended space", metaspace("always"), "would read"),
    "lstrip": ("qwen", add(special("<m>", lstrip=True)), "token '<m>' (lstrip)"),
    "rstrip": ("gpt-2", add(special("<m>", rstrip=True)), "token '<m>' (rstrip)"),
    "one of phi 3's does not": (
        "prepended space",
        add(*PHI3, special("<m>")),
        "token '</s>' (rstrip)",
    ),
    "single word": ("llama 3", add(AddedToken("<m>", single_word=True)), "'<m>' (single_word"),
    "normalized": ("prepended space", add(AddedToken("<m>")), "token '<m>' (normalized)"),
}


@pytest.mark.parametrize("case", READ)
def test_tokenizers_give_the_same_ids(tiny_checkpoint, corpus, tmp_path, case):
    kind, change = READ[case]
    folder = shutil.copytree(tiny_checkpoint(vocab_size=WORDS), tmp_path / "source")
    save(kind, folder, change)
    if "converted" in case:
        convert(folder, "1+2 3+4", tmp_path / "out")
        folder = tmp_path / "out"
    assert_same_ids(folder, tmp_path, [text[:400] for text in corpus])


@pytest.mark.parametrize("case", REFUSED)
def test_tokenizers_that_llama_cpp_reads_differently_are_refused(tiny_checkpoint, tmp_path, case):
    kind, change, named = REFUSED[case]
    folder = shutil.copytree(tiny_checkpoint(vocab_size=WORDS), tmp_path / "source")
    save(kind, folder, change)
    with pytest.raises(AbreastError, match=re.escape(named)) as caught:
        export(folder, tmp_path / "model.gguf")
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == [folder]
    # and rightly: written all the same, llama.cpp reads another thing
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(vocabulary, "_check_ids", lambda *_: None)
        if kind != "unigram":
            with pytest.raises(AssertionError):
                assert_same_ids(folder, tmp_path, [])


def test_server_answers_a_client(tiny_checkpoint, words, tmp_path):
    from openai import OpenAI

    source, folder = tiny_checkpoint(num_layers=8, vocab_size=WORDS), tmp_path / "out"
    convert(source, "1+2 3+4+5", folder)
    save_tokenizer(words, folder, chat_template=TEMPLATE)
    export(folder, tmp_path / "model.gguf")
    _, tokenizer = load(folder)
    server = serve(tmp_path / "model.gguf", use_jinja=True)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi, you"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert post(server, "/apply-template", {"messages": messages})["prompt"] == prompt
    client = OpenAI(base_url=f"{server.listening_address}/v1", api_key="none", max_retries=0)
    chat = client.chat.completions.create(
        model="any", messages=messages, max_tokens=8, temperature=0
    )
    assert chat.usage.completion_tokens == 8
    assert chat.usage.prompt_tokens == len(tokenizer(prompt)["input_ids"])
    text = client.completions.create(model="any", prompt="def f(", max_tokens=8, temperature=0)
    pieces = client.completions.create(
        model="any", prompt="def f(", max_tokens=8, temperature=0, stream=True
    )
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == (
        text.choices[0].text
    )


def test_the_page_about_llama_cpp(tmp_path, monkeypatch, capsys):
    """Its commands for abreast, and its program in Python."""
    page = Path(__file__).parents[2] / "docs" / "serving-llamacpp.md"
    blocks = re.findall(r"```(\w+)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    lines = [line for line in blocks[0][1].splitlines() if line.startswith("abreast")]
    assert len(lines) == 3
    for line in lines:
        words = shlex.split(line.replace("MODEL", str(model_folder())), comments=True)
        done = CliRunner().invoke(cli, words[1:])
        assert done.exit_code == 0, done.output
    (program,) = (text for language, text in blocks if language == "python")
    exec(program, {})
    assert len(capsys.readouterr().out.strip()) > 10
