"""Token streams: disjoint halves, reproducible order, cuts, and errors that say what to do."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from abreast.data import (
    CALIBRATION,
    HELD_OUT,
    DataError,
    TokenStream,
    documents,
    hub_in_reach,
    is_held_out,
    load_tokens,
    prefix_of,
    stdlib_files,
)
from abreast.demo import model_folder
from abreast.errors import AbreastError
from abreast.model import load_tokenizer


class ByteTokenizer:
    """One token per UTF-8 byte, end of text 256 (or none); it counts what it reads."""

    bos_token_id = None

    def __init__(self, eos_token_id: int | None = 256) -> None:
        self.eos_token_id = eos_token_id
        self.bytes_read = 0

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> dict[str, list]:
        ids = list(text.encode())
        self.bytes_read += len(ids)
        return {"input_ids": ids}


TEXTS = ["Some words, and a few more.", "12 34", "  two spaces", "ünïcode 世界", "\n\n", "a"]
SPECIAL = {"<s>": 0, "</s>": 1, "<unk>": 2, "[G]": 3}
TEMPLATES = {  # before the text, after it
    "nothing": ((), ()),
    "bos": (("<s>",), ()),
    "eos": ((), ("</s>",)),
    "both": (("<s>",), ("</s>",)),
    "twice": (("<s>", "<s>"), ("</s>", "<s>")),
    "glm": (("[G]", "<s>"), ()),
}


def trained(kind: str, before: tuple[str, ...], after: tuple[str, ...]) -> Any:
    """A tokenizer trained on the spot that puts special tokens before and after a text."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = {"special_tokens": list(SPECIAL), "vocab_size": 300, "show_progress": False}
    if kind == "Unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **special)
    elif kind == "SentencePiece BPE":  # no pre-tokenizer: pieces may cross spaces
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        replace = normalizers.Replace(" ", "▁")
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
        trainer = trainers.BpeTrainer(**special)
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(initial_alphabet=alphabet, **special)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    template = processors.TemplateProcessing(
        single=[*before, "$A", *after], special_tokens=list(SPECIAL.items())
    )
    processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    tokenizer.post_processor = processor if kind == "byte-level BPE" else template
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", ["byte-level BPE", "SentencePiece BPE", "Unigram"])
def test_prefix_is_what_stands_before_any_text(kind: str, template: str) -> None:
    before, after = TEMPLATES[template]
    tokenizer = trained(kind, before, after)
    prefix = prefix_of(tokenizer)
    assert prefix == tuple(SPECIAL[token] for token in before)
    for text in TEXTS:
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer(text)["input_ids"] == [*prefix, *plain, *(SPECIAL[t] for t in after)]
    assert prefix_of(tokenizer, False) == ()
    assert prefix_of(tokenizer, True) == (prefix or (0,))


def test_an_unknown_word_does_not_hide_the_prefix() -> None:
    def unknown(text: str, *, add_special_tokens: bool, verbose: bool) -> dict[str, list]:
        ids = [2] * len(text.split())
        return {"input_ids": [0, *ids, 2] if add_special_tokens else ids}

    assert prefix_of(unknown) == (0,)


def test_prefixes_that_cannot_be_are_refused() -> None:
    with pytest.raises(DataError, match="no beginning-of-text token; leave out --add-bos"):
        prefix_of(ByteTokenizer(), True)

    def other(text: str, *, add_special_tokens: bool, verbose: bool) -> dict[str, list]:
        return {"input_ids": [1, 2, 3] if add_special_tokens else [2, 4]}

    with pytest.raises(DataError, match="use --no-add-bos"):
        prefix_of(other)
    assert prefix_of(other, False) == ()


def test_a_stream_carries_its_prefix_and_hashes_it(folder: Path) -> None:
    tokenizer = trained("byte-level BPE", ("<s>",), ("</s>",))
    natural, forced, without = (
        load_tokens(tokenizer, str(folder), add_bos=add) for add in (None, True, False)
    )
    assert (natural.prefix, without.prefix) == ((0,), ())
    assert natural.sha256 == forced.sha256
    assert (natural.tokens == without.tokens).all()
    assert natural.sha256 != without.sha256
    assert 0 not in natural.tokens  # between documents there is the end of text only


def test_a_large_text_is_read_as_far_as_needed(tmp_path: Path) -> None:
    path = tmp_path / "large.txt"
    with path.open("wb") as file:
        file.write("ä and so on\n".encode() * 300_000)
        file.write(b"\xff")  # reading it would fail
    tokenizer = ByteTokenizer()
    stream = load_tokens(tokenizer, str(path), max_tokens=1000)
    assert bytes(stream.tokens.astype(np.uint8)) == ("ä and so on\n".encode() * 90)[:1000]
    assert abs(stream.num_bytes - 1000) <= 1
    assert tokenizer.bytes_read < 30_000
    with pytest.raises(DataError, match="not UTF-8"):
        load_tokens(tokenizer, str(path))


def test_documents_behind_the_cut_are_not_read(folder: Path) -> None:
    (folder / "sub" / "9.txt").write_bytes(b"x" * 20_000 + b"\xff")
    for seed in range(5):
        first = list(np.random.default_rng(seed).permutation(9))
        if first.index(8) > 1:
            assert len(load_tokens(ByteTokenizer(), str(folder), max_tokens=20, seed=seed)) == 20


def test_white_space_before_the_text_does_not_hide_it(tmp_path: Path) -> None:
    path = tmp_path / "late.txt"
    path.write_text(" " * 100_000 + "word")
    assert len(load_tokens(ByteTokenizer(None), str(path))) == 100_004


def test_what_is_read_in_part_gives_the_tokens_of_the_whole(tmp_path: Path) -> None:
    path, tokenizer = tmp_path / "long.txt", load_tokenizer(model_folder())
    path.write_text("".join(stdlib_files()[f"{n}.py"].read_text() for n in ("ast", "argparse")))
    whole = load_tokens(tokenizer, str(path)).tokens
    for most in (*range(2, 2000, 397), len(whole) - 1, len(whole), len(whole) + 1):
        part = load_tokens(tokenizer, str(path), max_tokens=most)
        assert (part.tokens == whole[:most]).all()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    for number in range(8):
        (tmp_path / "sub" / f"{number}.txt").write_text(str(number) * 10, encoding="utf-8")
    (tmp_path / "weights.bin").write_bytes(b"\xff\xfe")
    return tmp_path


def test_held_out_and_calibration_share_no_document() -> None:
    held_out, calibration = dict(documents(HELD_OUT)), dict(documents(CALIBRATION))
    assert held_out
    assert len(calibration) > 10 * len(held_out)
    assert not held_out.keys() & calibration.keys()
    assert held_out.keys() | calibration.keys() <= stdlib_files().keys()
    assert not any(name.startswith("pydoc_data") for name in (*held_out, *calibration))
    assert len(dict(documents("pydoc"))) > 50
    assert all(is_held_out(name) for name in held_out)


def test_stdlib_holds_no_tests_and_no_installed_packages() -> None:
    names = stdlib_files()
    assert {"argparse.py", "json/decoder.py"} <= names.keys()
    assert not any(name.startswith("test/") or "site-packages" in name for name in names)


def test_held_out_choice_does_not_depend_on_this_process() -> None:
    # The bundled model was trained without exactly these: the rule must never move.
    for name in ("argparse.py", "json/decoder.py", "ast.py", "abc.py"):
        assert is_held_out(name) == (int(hashlib.md5(name.encode()).hexdigest(), 16) % 20 == 0)


def test_same_seed_same_stream_other_seed_other_order(folder: Path) -> None:
    first, again, other = (
        load_tokens(ByteTokenizer(), str(folder), seed=seed) for seed in (3, 3, 4)
    )
    assert first.sha256 == again.sha256 != other.sha256
    assert sorted(first.tokens) == sorted(other.tokens)


def test_documents_end_with_end_of_text_and_count_bytes(folder: Path) -> None:
    stream = load_tokens(ByteTokenizer(), str(folder))
    assert (len(stream), stream.num_documents, stream.num_bytes) == (88, 8, 80)
    rows = stream.tokens.reshape(8, 11)
    assert (rows[:, -1] == 256).all()
    assert (rows[:, :-1] == rows[:, :1]).all()
    assert sorted(rows[:, 0]) == list(b"01234567")
    assert len(load_tokens(ByteTokenizer(None), str(folder))) == 80


def test_max_tokens_cuts_the_stream_and_its_bytes(folder: Path) -> None:
    whole = load_tokens(ByteTokenizer(), str(folder))
    shortened = load_tokens(ByteTokenizer(), str(folder), max_tokens=16)
    assert np.array_equal(shortened.tokens, whole.tokens[:16])
    assert shortened.num_documents == 2
    # 11 of the tokens are the first document with its 10 bytes, 5 are bytes of the second.
    assert abs(shortened.num_bytes - 15) <= 1
    assert len(load_tokens(ByteTokenizer(), str(folder), max_tokens=1000)) == 88


def test_hash_is_of_the_ids_whatever_the_memory_layout() -> None:
    ids = np.arange(20, dtype=np.int64)
    plain = TokenStream(ids[::2].copy(), "a", 1, 10)
    assert plain.sha256 == TokenStream(ids[::2], "b", 2, 9).sha256
    assert plain.sha256 == TokenStream(ids[::2].astype(np.int32), "b", 2, 9).sha256
    assert plain.sha256 != TokenStream(ids[::2][::-1], "a", 1, 10).sha256


def test_a_single_file_is_one_document(folder: Path) -> None:
    assert list(documents(str(folder / "sub" / "3.txt"))) == [("3.txt", "3" * 10)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not found; name a text file"),
        (b"", "holds no text"),
        (b" \n\t\n", "holds no text"),
        (b"caf\xe9", "not UTF-8"),
    ],
)
def test_unusable_file_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_tokens(ByteTokenizer(), str(path))
    assert isinstance(caught.value, AbreastError)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_folder_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"\x00")
    with pytest.raises(DataError, match="holds no text files"):
        load_tokens(ByteTokenizer(), str(tmp_path))


def test_too_short_a_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x", encoding="utf-8")
    with pytest.raises(DataError, match="gives 1 tokens"):
        load_tokens(ByteTokenizer(None), str(tmp_path))


def fake_datasets(
    monkeypatch: pytest.MonkeyPatch, load_dataset: object, offline: bool = True
) -> SimpleNamespace:
    module = ModuleType("datasets")
    config = SimpleNamespace(HF_HUB_OFFLINE=offline)
    vars(module).update(load_dataset=load_dataset, config=config)
    monkeypatch.setitem(sys.modules, "datasets", module)
    return config


def test_hub_data_set_is_read_by_split_and_column(monkeypatch: pytest.MonkeyPatch) -> None:
    request = SimpleNamespace()

    def load_dataset(
        name: str, config: str | None, *, split: str, streaming: bool
    ) -> list[dict[str, str]]:
        request.name, request.config, request.split = name, config, split
        return [{"body": "one"}, {"body": " "}, {"body": "two"}]

    fake_datasets(monkeypatch, load_dataset=load_dataset)
    assert [text for _, text in documents("hub:org/name:train:body")] == ["one", "two"]
    assert (request.name, request.config, request.split) == ("org/name", None, "train")
    list(documents("hub:org/name@large-v1:train:body"))
    assert (request.name, request.config, request.split) == ("org/name", "large-v1", "train")
    with pytest.raises(DataError, match="use hub:org/name@large-v1:test:COLUMN"):
        list(documents("hub:org/name@large-v1"))
    with pytest.raises(DataError, match="no column 'text'; it has body"):
        list(documents("hub:org/name"))
    assert request.split == "test"


def test_hub_failures_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[Exception] = [RuntimeError("odd\nlong trace")]

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> None:
        raise raised[-1]

    fake_datasets(monkeypatch, load_dataset=load_dataset)
    with pytest.raises(DataError, match=r"'x' cannot be read: odd$"):
        list(documents("hub:x"))
    missing = "Config name is missing.\nPlease pick one: ['a', 'b']\nExample of usage:\n\tx"
    raised.append(ValueError(missing))
    with pytest.raises(DataError, match=r"pick one: \['a', 'b'\]: use hub:x@CONFIG$"):
        list(documents("hub:x"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        list(documents("hub:x"))


@pytest.mark.parametrize("cached", [True, False])
def test_a_hub_that_does_not_answer_is_asked_once(
    monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    import huggingface_hub

    requests = []

    class Session:
        def head(self, address: str, *, timeout: float) -> None:
            requests.append(timeout)
            raise OSError("Name or service not known")

    def load_dataset(name: str, of: str | None, *, split: str, streaming: bool) -> list[dict]:
        assert config.HF_HUB_OFFLINE  # else it would retry for minutes
        if not cached:
            raise ConnectionError(f"Couldn't reach '{name}' on the Hub (OfflineModeIsEnabled)")
        return [{"text": "one"}]

    monkeypatch.setattr(huggingface_hub.utils, "get_session", Session)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    hub_in_reach.cache_clear()
    config = fake_datasets(monkeypatch, load_dataset, offline=False)
    for _ in range(2):
        if cached:
            assert list(documents("hub:x")) == [("0", "one")]
        else:
            with pytest.raises(
                DataError, match="not in the cache, and the Hugging Face Hub is out"
            ):
                list(documents("hub:x"))
    hub_in_reach.cache_clear()
    assert requests == [2]
    assert not config.HF_HUB_OFFLINE and not huggingface_hub.constants.HF_HUB_OFFLINE


def test_wikitext_is_read_by_articles(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        "",
        " = One = \n",
        "",
        " text \n",
        " = = Part = = \n",
        " more \n",
        "",
        " = Two = \n",
        " x \n",
    ]

    def load_dataset(name: str, of: str | None, *, split: str, streaming: bool) -> list[dict]:
        return [{"text": row} for row in rows]

    fake_datasets(monkeypatch, load_dataset)
    first, second = (text for _, text in documents("hub:Salesforce/wikitext@any:train"))
    assert first == " = One = \n text \n = = Part = = \n more \n" and second == " = Two = \n x \n"
    assert len(list(documents("hub:org/other"))) == 6
