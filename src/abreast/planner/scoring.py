"""What plans are scored on: windows of text, the original's own answers, or choices of tasks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from abreast.checkpoint import open_checkpoint, write
from abreast.data import AUTO, CHAT, Part, TokenStream, beginning, prefix_of
from abreast.errors import AbreastError, first_line
from abreast.evaluate import find_tasks, ratio_of_means
from abreast.families import positive
from abreast.model import cache_name, cache_of, device_of, inference, keeps
from abreast.planner.objective import Cost
from abreast.planner.settings import CalibrationSettings
from abreast.runs import (
    TEXT_FOLDER,
    Author,
    Role,
    check_tokens,
    conversations,
    save_texts,
    saved_texts,
    token_stream,
    tokens_hash,
    whole_windows,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MIN_CALIBRATION_WINDOWS = 8
ANSWER_TOKENS = 64  # of an answer at most, and no more than a quarter of the window
_VERSION = 1  # of the file of answers
_PROMPTS = """What is the capital of Australia? | Explain photosynthesis in two sentences.
Write a short poem about autumn. | How do I boil an egg? | Name three uses for baking soda.
What is the difference between a virus and a bacterium? | Translate "good morning" into French.
Give me a recipe for a simple tomato soup. | Why is the sky blue? | Who wrote Hamlet?
Write a Python function that reverses a string. | What is 17 times 6?
Summarize the plot of Cinderella. | How does a bicycle stay upright?
List five animals that live in the desert.
What should I pack for a weekend in the mountains? | Explain what inflation is to a child.
Write an email that asks for a day off. | What is the boiling point of water in Fahrenheit?
How can I fall asleep faster? | Describe the taste of an orange. | What does DNA stand for?
Write the first line of a detective story. | How far away is the Moon? | What is a prime number?
Give three tips for a job interview. | Why do leaves change color? | What is a haiku?
Explain how a refrigerator works. | Suggest a name for a small coffee shop. | What is gravity?
Name the planets in order from the Sun. | How do I remove a coffee stain from a shirt?
What is the past tense of "to swim"? | Write a thank-you note to a teacher. | What is jazz?
How many days are there in a leap year? | Explain the rules of chess briefly. | What is an atom?
What are the primary colors? | Tell me a fact about penguins. | How do vaccines work?
Write a SQL query that counts the rows of a table. | What is the largest ocean on Earth?
Give an example of a metaphor. | How do I change a bicycle tire? | What causes thunder?
Compare cats and dogs as pets. | What is the square root of 144? | Why is exercise healthy?
Write a slogan for a bakery. | Who painted the Mona Lisa? | What is the purpose of a budget?
How do bees make honey? | Explain what a loop is in programming. | What is the Great Wall of China?
Give me a riddle and its answer. | How is glass made? | What is a balanced breakfast?
Describe a rainy day in one paragraph. | What language is spoken in Brazil? | What is an eclipse?
How do I start a vegetable garden? | What is the opposite of generous? | Why do we have time zones?
Write two sentences about the sea."""
Item = Sequence[tuple[list[int], int, bool]]  # its windows: ids, of which so many are not scored


@dataclass(frozen=True)
class Sample:
    """Windows, and which of their tokens are scored.

    tokens: int64 [windows, window], of which each begins with `prefix`. texts: int64 [windows], the
    number of the text that a window is of, 0 where that does not matter. scored: bool
    [windows, window]; None: all of the text. items: int64 [windows], from 0 on, not decreasing: the
    windows of one item are its choices. right: bool [windows], the right ones; None: no choices.
    sequential: prompts run in the original order. score: of `Scoring`; None, as long as it is kl.
    """

    tokens: np.ndarray
    prefix: tuple[int, ...]
    texts: np.ndarray
    items: np.ndarray
    scored: np.ndarray | None = None
    right: np.ndarray | None = None
    sequential: bool = False
    score: str | None = None

    @property
    def num_items(self) -> int:
        return int(self.items[-1]) + 1

    @property
    def per_item(self) -> int:
        """The most windows of an item."""
        return int(np.bincount(self.items).max())

    @cached_property
    def counts(self) -> np.ndarray:
        """Scored tokens of every window."""
        if self.scored is not None:
            return np.asarray(self.scored.sum(1))
        return np.full(len(self.tokens), self.tokens.shape[1] - max(len(self.prefix), 1))

    @property
    def identity(self) -> dict[str, Any]:
        """What numbers depend on beside the tokens."""
        if self.scored is None:
            return {"score": None}
        masks = [self.scored, self.items, *([] if self.right is None else [self.right])]
        hashes = [tokens_hash(mask) for mask in masks]
        return {"score": self.score, "scored": hashes, "sequential": self.sequential}

    def cost(self, sums: np.ndarray, windows: np.ndarray) -> Cost:
        """From the sums of these windows, whole items: columns nll, the original's nll, KL."""
        counts, items = self.counts[windows], self.items[windows]
        starts = np.flatnonzero(np.diff(items, prepend=-1))
        by_item, tokens = np.add.reduceat(sums, starts), np.add.reduceat(counts, starts)
        kl, kl_stderr = ratio_of_means(by_item[:, 2], tokens)
        loss, loss_stderr = ratio_of_means(by_item[:, 0] - by_item[:, 1], tokens)
        of_tasks: dict[str, float] = {}
        if self.right is not None:
            of_tasks = _choices(-sums[:, 0], -sums[:, 1], self.right[windows], starts)
        return Cost(kl, kl_stderr, loss, loss_stderr, int(tokens.sum()), **of_tasks)


def _choices(
    ours: np.ndarray, theirs: np.ndarray, right: np.ndarray, starts: np.ndarray
) -> dict[str, float]:
    """`OF_TASKS` of a cost, from the log probabilities of all choices and where items start."""
    lost = _margins(theirs, right, starts) - _margins(ours, right, starts)
    margin_loss, margin_stderr = ratio_of_means(lost, np.ones(len(starts)))
    chance = np.add.reduceat(right, starts, dtype=float) / np.diff(starts, append=len(right))

    def above_chance(logp: np.ndarray) -> np.ndarray:
        best = logp == np.repeat(
            np.maximum.reduceat(logp, starts), np.diff(starts, append=len(logp))
        )
        return np.logical_or.reduceat(best & right, starts) - chance

    cost = {"margin_loss": margin_loss, "margin_stderr": margin_stderr}
    if above_chance(theirs).sum() > 0:
        share, stderr = ratio_of_means(above_chance(ours), above_chance(theirs))
        cost |= {"accuracy_kept": share, "kept_stderr": stderr}
    return cost


def _margins(logp: np.ndarray, right: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Of every item the log of the mean p of the right choices less that of the others."""

    def log_mean(mine: np.ndarray) -> np.ndarray:
        most = np.maximum.reduceat(np.where(mine, logp, -np.inf), starts)
        shifted = np.exp(logp - np.repeat(most, np.diff(starts, append=len(logp))))
        total = np.add.reduceat(np.where(mine, shifted, 0.0), starts)
        return np.asarray(most + np.log(total / np.add.reduceat(mine.astype(float), starts)))

    return log_mean(right) - log_mean(~right)


@dataclass(frozen=True)
class Source:
    """Where windows come from: see `calibrate` and `token_stream` for what these are."""

    tokenizer: Any
    checkpoint: Path
    author: Author
    folder: Path
    option: str
    role: Role
    step: Callable[[str], None]


def of_text(
    source: Source,
    settings: CalibrationSettings,
    stream: TokenStream | None,
    part: tuple[int, int],
    config: dict[str, Any],
) -> Sample:
    """Windows of a text, or of several in turn. Raises AbreastError where there are too few."""
    window, before = settings.window, part[0] * settings.num_windows
    stream = token_stream(
        settings.data if stream is None else stream,
        source.tokenizer,
        source.checkpoint,
        max_tokens=part[1] * settings.num_windows * window,
        window=window,
        seed=settings.seed,
        add_bos=settings.add_bos,
        role=source.role,
        author=source.author,
        folder=source.folder,
        option=source.option,
        step=source.step,
    )
    tokens = whole_windows(
        stream,
        before + settings.num_windows,
        window,
        longest=config.get("max_position_embeddings"),
        vocabulary=positive(config, "vocab_size"),
    )[before:]
    if len(tokens) < settings.num_windows:
        least = (before + settings.num_windows) * window
        behind = f" behind the {before} that were searched on" if before else ""
        fewer = f", or ask for fewer --windows ({MIN_CALIBRATION_WINDOWS} at least)"
        raise AbreastError(
            f"the data gives {len(tokens)} windows of {window} tokens{behind}, and "
            f"{settings.num_windows} were asked for; name a text of at least {least} tokens{fewer}"
        )
    texts = np.zeros(len(tokens), dtype=np.int64)
    if settings.scoring.texts == "worst" and len(stream.parts) > 1:
        numbers = np.arange(before + len(tokens)) % len(stream.parts)
        needed = np.bincount(numbers) * (window - len(stream.prefix))
        for read, least in zip(stream.parts, needed, strict=True):
            if read.tokens < least:
                raise AbreastError(
                    f"'{read.source}' has {read.tokens} tokens of the {least} that its share of "
                    "the windows takes; name a longer text, or ask for fewer --windows"
                )
        texts = numbers[before:]
    return Sample(tokens, stream.prefix, texts, np.arange(len(tokens)))


def of_answers(source: Source, settings: CalibrationSettings, part: tuple[int, int]) -> Sample:
    """The original's own greedy answers to prompts, written once and kept in the folder.

    Raises AbreastError for a tokenizer without a chat template, text instead of chats, and too few
    prompts that fit the window, before anything is computed.
    """
    most = min(ANSWER_TOKENS, settings.window // 4)
    prompts, longer = [], 0
    for prompt in dict.fromkeys(_prompts(source, settings)):
        longer += len(prompt) + most > settings.window
        if prompt and len(prompt) + most <= settings.window:
            prompts.append(prompt)
    what = "prompts" if settings.data != AUTO else "prompts of its own"
    prompts = _part(prompts, settings, part, what, longer, "name more with --chat FILE")
    answers = _answers(source, settings, prompts, most, part[0])
    items = [[([*p, *a], len(p), True)] for p, a in zip(prompts, answers, strict=True)]
    about = "answers" if settings.data == AUTO else f"answers to {settings.data}"
    return _sample(source, settings, items, "answers", about, [0] * len(items))


def of_tasks(source: Source, settings: CalibrationSettings, part: tuple[int, int]) -> Sample:
    """Questions with choices, of each task in turn; needs the extra `eval`.

    Raises AbreastError as `find_tasks`, and for tasks without choices and too few items that fit
    the window, before anything is computed.
    """
    if settings.data != AUTO:
        raise AbreastError(
            f"--score tasks reads no text; leave out {source.option}, and name --score-tasks"
        )
    if source.tokenizer is None:
        raise AbreastError(f"'{source.checkpoint}' has no tokenizer; give a folder with its files")
    names = settings.scoring.score_tasks
    tasks = find_tasks(names, limit=part[1] * settings.num_windows, seed=settings.seed)
    prefix = prefix_of(source.tokenizer, settings.add_bos)
    chosen = [
        [(number, item) for item in _questions(task, source.tokenizer, prefix)]
        for number, task in enumerate(tasks.loaded.values())
        if task.OUTPUT_TYPE == "multiple_choice"
    ]
    every = [entry for turn in zip_longest(*chosen) for entry in turn if entry is not None]
    fit = [(n, item) for n, item in every if max(len(c[0]) for c in item) <= settings.window]
    more = "name more --score-tasks, with choices"
    pairs = _part(fit, settings, part, "questions with choices", len(every) - len(fit), more)
    worst = settings.scoring.texts == "worst"
    numbers = [number if worst else 0 for number, _ in pairs]
    items = [item for _, item in pairs]
    return _sample(source, settings, items, "tasks", f"tasks {','.join(names)}", numbers)


def _part(
    every: list[Any],
    settings: CalibrationSettings,
    part: tuple[int, int],
    what: str,
    longer: int,
    remedy: str,
) -> list[Any]:
    """One of the disjoint parts of a list, in an order of the seed."""
    order = np.random.default_rng(settings.seed).permutation(len(every))
    begin = part[0] * settings.num_windows
    chosen = [every[index] for index in order[begin : begin + settings.num_windows]]
    if len(chosen) < settings.num_windows:
        behind = f" behind the {begin} that were searched on" if begin else ""
        left_out = f" ({longer} do not fit --window {settings.window})" if longer else ""
        raise AbreastError(
            f"there are {len(chosen)} {what}{behind}{left_out}, and {settings.num_windows} were "
            f"asked for; {remedy}, or ask for fewer --windows ({MIN_CALIBRATION_WINDOWS} at least)"
        )
    return chosen


def _prompts(source: Source, settings: CalibrationSettings) -> Iterator[tuple[int, ...]]:
    """Token ids of the chats up to their first answer, as the template renders them."""
    tokenizer = source.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        raise AbreastError(
            "the model's tokenizer has no chat template to ask for answers with; use --score kl"
        )
    names = [] if settings.data == AUTO else settings.data.split(f",{CHAT}")
    chats: list[tuple[int | None, list[dict[str, Any]], Any]]
    chats = [(None, [{"role": "user", "content": text}], None) for text in _neutral()]
    if names:
        if not names[0].startswith(CHAT):
            raise AbreastError("--score answers reads chats; give them with --chat FILE alone")
        files = [Path(name.removeprefix(CHAT)).expanduser() for name in names]
        chats = [chat for file in files for chat in conversations(file)]
    for number, messages, tools in chats:
        roles = [message["role"] for message in messages]
        prompt = messages[: roles.index("assistant")] if "assistant" in roles else messages
        if "user" not in roles[: len(prompt)]:
            continue
        try:
            text = tokenizer.apply_chat_template(
                prompt, tools=tools, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template raises what its author chose
            where = "the neutral prompts" if number is None else f"line {number} of the chats"
            raise AbreastError(
                f"the chat template refuses {where} ({first_line(error)}); mend the line, or "
                "use --score kl"
            ) from None
        yield tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _neutral() -> list[str]:
    parts = (part for line in _PROMPTS.split("|") for part in line.splitlines())
    return [" ".join(text.split()) for text in parts if text.strip()]


def _answers(
    source: Source,
    settings: CalibrationSettings,
    prompts: Sequence[tuple[int, ...]],
    most: int,
    number: int,
) -> list[np.ndarray]:
    """The greedy answer to each prompt; what a file has of them is not computed again."""
    identity = {
        "version": _VERSION,
        "model": open_checkpoint(source.checkpoint).sha256,
        "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        "tokens": most,
        "dtype": settings.dtype,
    }
    path = source.folder / TEXT_FOLDER / f"answers-{source.role}-{number}.safetensors"
    answers = saved_texts(path, identity)
    if (missing := len(prompts) - len(answers)) > 0:
        source.step(f"the original answers {missing} prompts")
    for begin in range(len(answers), len(prompts), 8):
        model, some = source.author(), prompts[begin : begin + 8]
        answers += [_answer(model, source.tokenizer, prompt, most) for prompt in some]
        save_texts(path, identity, answers, source.tokenizer)
    return answers


def _answer(model: PreTrainedModel, tokenizer: Any, prompt: Sequence[int], most: int) -> np.ndarray:
    """What the model says, the likeliest token each time, up to the one that ends its turn."""
    check_tokens(np.array(prompt), model.get_input_embeddings().weight.shape[0])
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id}
    inputs, cache = torch.tensor([prompt], device=device_of(model)), None
    options, name = {"use_cache": True, **keeps(model, 1)}, cache_name(model)
    answer: list[int] = []
    with inference(model):
        while len(answer) < most and not ends.intersection(answer[-1:]):
            out = model(input_ids=inputs, **{name: cache}, **options)
            cache, logits = cache_of(out), out.logits[0, -1]
            if not logits.max().isfinite():
                raise AbreastError(
                    "the model gives logits that are not finite; use --dtype bfloat16 or float32, "
                    "or check its weights"
                )
            answer.append(int(logits.argmax()))
            inputs = torch.tensor([answer[-1:]], device=inputs.device)
    return np.array(answer)


def _questions(task: Any, tokenizer: Any, prefix: tuple[int, ...]) -> Iterator[Item]:
    """The choices of every item of a task that has right and wrong ones, as the harness has it."""
    by_doc: dict[int, list[Any]] = {}
    for instance in task.instances:
        by_doc.setdefault(instance.doc_id, []).append(instance)
    for instances in by_doc.values():
        doc = instances[0].doc
        choices = task.doc_to_choice(doc)
        gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
        golds = gold if isinstance(gold, list) else [gold]
        right = {choices.index(g) if isinstance(g, str) and g in choices else g for g in golds}
        item = []
        # Behind the choices there may be some without the question.
        for index, instance in enumerate(instances[: len(choices)]):
            context, choice = instance.args
            bare = context.rstrip()
            before, whole = (
                list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
                for text in (bare, context + choice)
            )
            ids, begin = [*prefix, *whole], len(prefix) + len(before)
            if 0 < begin < len(ids):
                item.append((ids, begin, index in right))
        if {is_right for *_, is_right in item} == {True, False} and len(item) == len(choices):
            yield item


def _sample(
    source: Source,
    settings: CalibrationSettings,
    items: Sequence[Item],
    score: str,
    about: str,
    texts: Sequence[int],
) -> Sample:
    """Items as windows of equal length, each filled up with its own tokens from the beginning."""
    rows = [(number, *choice) for number, item in enumerate(items) for choice in item]
    prefix = prefix_of(source.tokenizer, settings.add_bos)
    if any(tuple(ids[: len(prefix)]) != prefix for _, ids, *_ in rows):
        prefix = ()  # a chat template need not begin as a text does
    width = max(len(ids) for _, ids, *_ in rows)
    tokens = np.array(
        [[*prefix, *np.resize(ids[len(prefix) :], width - len(prefix))] for _, ids, *_ in rows]
    )
    places = np.arange(width)
    scored = np.array([(places >= begin) & (places < len(ids)) for _, ids, begin, _ in rows])
    numbers = np.array([number for number, *_ in rows])
    ids = np.concatenate([np.array(ids) for _, ids, *_ in rows])
    shown = [source.tokenizer.decode(ids[:64], skip_special_tokens=True) for _, ids, *_ in rows[:3]]
    words = tuple(map(beginning, shown))
    read = Part(about, len(ids), len(items), 4 * len(ids), words)
    stream = TokenStream(ids, about, len(items), read.num_bytes, prefix, (read,))
    record = {"role": source.role, "default": False, **stream.about()}
    folder = source.folder / TEXT_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / f"{source.role}.json", json.dumps(record, indent=1) + "\n")
    return Sample(
        tokens,
        prefix,
        np.asarray(texts)[numbers],
        numbers,
        scored,
        np.array([right for *_, right in rows]) if score == "tasks" else None,
        score == "answers" and settings.scoring.prefill == "sequential",
        score,
    )
