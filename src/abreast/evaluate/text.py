"""Quality on text: perplexity, KL divergence and agreement with another model, continuations.

Every number comes with a standard error. Tokens of one window share their context, so their errors
correlate, and taking them for independent would make the error bars too small. The windows are
therefore the clusters of a cluster-robust error (see `ratio_of_means`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby, takewhile
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from abreast.checkpoint import finite
from abreast.data import TokenStream
from abreast.errors import AbreastError
from abreast.evaluate.statistics import bootstrap, ratio_of_means
from abreast.model import device_of, inference, keeps, token_scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[int, int], None]
BUCKETS = 8


@dataclass(frozen=True)
class PositionKL:
    """Mean KL over the scored tokens from position `start` to position `end` of a window.

    A token's position is the number of tokens before it in its window. stderr: cluster-robust over
    windows, NaN where only one of them has such a token. In nats.
    """

    start: int
    end: int
    kl: float
    stderr: float


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a token stream.

    nll: mean negative log-likelihood per scored token, in nats; nll_stderr its cluster-robust
    standard error. perplexity: exp(nll); its error by the delta method, perplexity * nll_stderr.
    bits_per_byte: nll in bits times the stream's tokens per UTF-8 byte of text, comparable across
    tokenizers; NaN if the stream does not know its bytes. num_tokens: scored tokens. window and
    stride: as used, after clipping to what the model can hold. Errors are NaN where there is only
    one window. windows: sums per window, arrays of shape [num_windows]: 'tokens' (scored), 'nll'.
    """

    nll: float
    nll_stderr: float
    perplexity: float
    perplexity_stderr: float
    bits_per_byte: float
    num_tokens: int
    window: int
    stride: int
    windows: dict[str, np.ndarray] = field(repr=False, compare=False)

    def to_dict(self, *, windows: bool = False) -> dict[str, Any]:
        """The result as JSON-ready values (NaN and infinity become None); `windows` adds arrays."""
        return _to_dict(self, windows)


@dataclass(frozen=True)
class Comparison:
    """A model against a reference, both on the same windows of the same tokens.

    model, reference: the Perplexity of each. nll_difference: model minus reference, nats per token,
    positive where the model is worse; being paired, its error is far smaller than either model's
    own. kl: mean KL(reference || model) of the next-token distributions, in nats; kl_p50, kl_p95,
    kl_p99, kl_max: over the scored tokens. float32 rounding can make a KL near 0 negative, by about
    1e-7. top1_agreement: share of the scored tokens for which both models rank the same token
    first. Every *_stderr is cluster-robust over windows, NaN where there is only one.

    bootstrap: 95 % intervals (low, high) of nll_difference, kl, top1_agreement and perplexity_ratio
    (model / reference), over windows (see `statistics.bootstrap`); NaN where there is only one.
    kl_by_position: in at most BUCKETS buckets of equal width, those that hold scored tokens.
    windows_worse: share of the windows that the model predicts worse than the reference.
    windows: sums per window, arrays of shape [num_windows]: 'tokens', 'nll', 'reference_nll', 'kl',
    'top1_agreement'.
    """

    model: Perplexity
    reference: Perplexity
    nll_difference: float
    nll_difference_stderr: float
    kl: float
    kl_stderr: float
    kl_p50: float
    kl_p95: float
    kl_p99: float
    kl_max: float
    top1_agreement: float
    top1_agreement_stderr: float
    bootstrap: dict[str, tuple[float, float]]
    kl_by_position: tuple[PositionKL, ...]
    windows_worse: float
    num_tokens: int
    window: int
    stride: int
    windows: dict[str, np.ndarray] = field(repr=False, compare=False)

    def to_dict(self, *, windows: bool = False) -> dict[str, Any]:
        """The result as JSON-ready values (NaN and infinity become None); `windows` adds arrays."""
        return _to_dict(self, windows)


def perplexity(
    model: PreTrainedModel,
    stream: TokenStream,
    *,
    window: int = 1024,
    stride: int = 512,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity of a causal language model over a token stream, by a sliding window.

    The scheme of https://huggingface.co/docs/transformers/perplexity (see `sliding_windows`), with
    the mean weighted by tokens. window, the stream's prefix included, is clipped to the model's
    max_position_embeddings, and stride then in proportion. batch_size: full windows per forward
    pass. progress: called with (windows done, windows in all). The model runs where it lies and in
    its own dtype; softmax is float32, sums are float64. Its training mode is restored.

    Raises AbreastError for sizes that make no sense, a stream of fewer than 2 tokens, token ids
    outside the model's vocabulary, and logits that are not finite.
    """
    window, stride = _clip(window, stride, stream, model)
    scores, counts = _score([model], stream, window, stride, batch_size, progress)
    return _summarise(_window_sums(scores[:, 0], counts), counts, stream, window, stride)


def compare(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    stream: TokenStream,
    *,
    window: int = 1024,
    stride: int = 512,
    batch_size: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
) -> Comparison:
    """Compare a model with a reference on the same windows, in one pass over the stream.

    Arguments as for `perplexity`; the window is clipped to what both models can hold. seed: of the
    bootstrap. The two may differ in device and dtype, but must share the tokenizer, see
    `abreast.data.check_tokenizers`. Both logits of a batch are held at once, their float32
    log-softmax only a chunk at a time.

    Raises AbreastError as `perplexity` does, naming the model, and for unequal vocabularies.
    """
    window, stride = _clip(window, stride, stream, model, reference)
    scores, counts = _score([model, reference], stream, window, stride, batch_size, progress)
    nll, reference_nll, kl, agreement = (_window_sums(column, counts) for column in scores.T)
    difference, difference_stderr = ratio_of_means(nll - reference_nll, counts)
    mean_kl, kl_stderr = ratio_of_means(kl, counts)
    mean_agreement, agreement_stderr = ratio_of_means(agreement, counts)
    p50, p95, p99 = np.percentile(scores[:, 2], [50, 95, 99])
    sums = {"tokens": counts, "nll": nll - reference_nll, "kl": kl, "agreement": agreement}
    intervals = bootstrap(
        sums,
        {
            "nll_difference": lambda drawn: drawn["nll"] / drawn["tokens"],
            "kl": lambda drawn: drawn["kl"] / drawn["tokens"],
            "top1_agreement": lambda drawn: drawn["agreement"] / drawn["tokens"],
            "perplexity_ratio": lambda drawn: np.exp(drawn["nll"] / drawn["tokens"]),
        },
        seed=seed,
    )
    return Comparison(
        model=_summarise(nll, counts, stream, window, stride),
        reference=_summarise(reference_nll, counts, stream, window, stride),
        nll_difference=difference,
        nll_difference_stderr=difference_stderr,
        kl=mean_kl,
        kl_stderr=kl_stderr,
        kl_p50=float(p50),
        kl_p95=float(p95),
        kl_p99=float(p99),
        kl_max=float(scores[:, 2].max()),
        top1_agreement=mean_agreement,
        top1_agreement_stderr=agreement_stderr,
        bootstrap=intervals,
        kl_by_position=_by_position(scores[:, 2], counts, stream, window, stride),
        windows_worse=float((nll > reference_nll).mean()),
        num_tokens=int(counts.sum()),
        window=window,
        stride=stride,
        windows={
            "tokens": counts,
            "nll": nll,
            "reference_nll": reference_nll,
            "kl": kl,
            "top1_agreement": agreement,
        },
    )


def sample(
    original: PreTrainedModel,
    converted: PreTrainedModel,
    tokenizer: Any,
    stream: TokenStream,
    *,
    count: int = 5,
    prompt_tokens: int = 48,
    new_tokens: int = 64,
) -> list[dict[str, Any]]:
    """Let both models continue `count` prompts, taken from evenly spaced places in the stream.

    Prompts begin with the stream's prefix, and then at the beginning of a line where there is one
    near. Both models decode greedily
    and stop at the end of text. Per prompt: prompt, original, converted (text), new_tokens (how
    many each wrote), first_difference: the position, from 0, of the first token that differs, None
    where all agree; shared: how many characters of text both begin with up to there. Shorter where
    a model cannot hold that many tokens.
    """
    prefix = list(stream.prefix)
    room = _clip_to_context(len(prefix) + prompt_tokens + new_tokens, original, converted)
    room -= len(prefix)
    prompt_tokens = min(prompt_tokens, room // 2)
    new_tokens = min(new_tokens, room - prompt_tokens)
    count = min(count, len(stream) // max(1, prompt_tokens))
    if count < 1 or prompt_tokens < 1:
        raise AbreastError("the text is too short to cut prompts from; name a longer one")
    samples = []
    step = len(stream) // count
    with inference(original, converted):
        for start in range(0, count * step, step):
            ids = _prompt(tokenizer, stream.tokens[start:], prompt_tokens)
            ours, theirs = (_continue(m, prefix + ids, new_tokens) for m in (original, converted))
            texts = [tokenizer.decode(part, skip_special_tokens=True) for part in (ours, theirs)]
            first = first_difference(ours, theirs)
            agreed = tokenizer.decode(ours[:first], skip_special_tokens=True)
            samples.append(
                {
                    "prompt": tokenizer.decode(ids, skip_special_tokens=True),
                    "original": texts[0],
                    "converted": texts[1],
                    "new_tokens": [len(ours), len(theirs)],
                    "first_difference": first,
                    # a token may end within a character, so the agreed text need not be a prefix
                    "shared": shared(agreed, *texts),
                }
            )
    return samples


def first_difference(ours: Sequence[Any], theirs: Sequence[Any]) -> int | None:
    """Index at which two sequences first differ; None where they are equal.

    Where one begins with the other, that is the length of the shorter one.
    """
    return None if ours == theirs else shared(ours, theirs)


def shared(*sequences: Sequence[Any]) -> int:
    """How many items, or characters of text, all sequences begin with."""
    columns = zip(*sequences, strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def sliding_windows(
    num_tokens: int, window: int, stride: int, prefix: int = 0
) -> list[tuple[int, int, int]]:
    """Cut a stream into (begin, end, scored): of tokens[begin:end] the last `scored` count.

    Windows begin every `stride` tokens and each scores what no earlier one covered, so a token is
    scored once, with at least window - stride tokens before it except at the stream's beginning.
    Without a prefix the very first token is never scored, and neither is any window's first where
    stride == window: nothing in the window precedes it. All windows but the last have `window`
    tokens, the `prefix` that precedes the stream's own included.
    """
    window -= prefix
    spans = []
    covered = 0
    for begin in range(0, num_tokens, stride):
        end = min(begin + window, num_tokens)
        scored = end - max(covered, begin if prefix else begin + 1)
        if scored > 0:
            spans.append((begin, end, scored))
        covered = end
        if end == num_tokens:
            break
    return spans


def check_stride(window: int, stride: int) -> None:
    """Raise AbreastError for a stride that leaves out text, or none."""
    if not 1 <= stride <= window:
        raise AbreastError(f"stride is {stride}; choose one from 1 to the window, {window}")


def check_length(stream: TokenStream, window: int, *models: PreTrainedModel) -> None:
    """Raise AbreastError for a stream shorter than one window, as far as the models can hold it."""
    least = _clip_to_context(window, *models) - len(stream.prefix)
    if len(stream) < least:
        raise AbreastError(
            f"the data '{stream.source}' has {len(stream)} tokens, less than one window of "
            f"{least}; name a longer text or use a shorter window"
        )


def _to_dict(result: Perplexity | Comparison, windows: bool) -> dict[str, Any]:
    record: dict[str, Any] = finite(asdict(result))
    for part in (record, record.get("model"), record.get("reference")):
        if part is not None:
            arrays = part.pop("windows")
            if windows:
                part["windows"] = {name: array.tolist() for name, array in arrays.items()}
    return record


def _clip(
    window: int, stride: int, stream: TokenStream, *models: PreTrainedModel
) -> tuple[int, int]:
    """Window and stride that every model can hold, with the stream's prefix."""
    prefix = len(stream.prefix)
    clipped = _clip_to_context(window, *models)
    if clipped < max(2, prefix + 1):
        raise AbreastError(f"window is {clipped}; it needs at least {max(2, prefix + 1)} tokens")
    check_stride(window, stride)
    return clipped, max(1, min(stride * clipped // window, clipped - prefix))


def _clip_to_context(num_tokens: int, *models: PreTrainedModel) -> int:
    """num_tokens, or what the models can hold where that is less."""
    configs = [model.config.get_text_config() for model in models]
    limits = [getattr(config, "max_position_embeddings", None) for config in configs]
    return min([num_tokens, *filter(None, limits)])


def _window_sums(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    return np.asarray(np.add.reduceat(values, starts))


def _by_position(
    kl: np.ndarray, counts: np.ndarray, stream: TokenStream, window: int, stride: int
) -> tuple[PositionKL, ...]:
    """kl: of every scored token, in the order of `sliding_windows`; counts: how many in each."""
    prefix = len(stream.prefix)
    spans = sliding_windows(len(stream), window, stride, prefix)
    positions = prefix + np.concatenate([np.arange(e - b - n, e - b) for b, e, n in spans])
    clusters = np.repeat(np.arange(len(counts)), counts)
    width = -(-window // BUCKETS)
    buckets = []
    for start in range(0, window, width):
        inside = (positions >= start) & (positions < start + width)
        sums = np.bincount(clusters[inside], kl[inside], minlength=len(counts))
        sizes = np.bincount(clusters[inside], minlength=len(counts))
        if sizes.any():
            mean, stderr = ratio_of_means(sums[sizes > 0], sizes[sizes > 0])
            buckets.append(PositionKL(start, min(start + width, window) - 1, mean, stderr))
    return tuple(buckets)


def _summarise(
    nll: np.ndarray, counts: np.ndarray, stream: TokenStream, window: int, stride: int
) -> Perplexity:
    mean, stderr = ratio_of_means(nll, counts)
    # exp(709) is the last one a float holds.
    value = math.exp(mean) if mean < 709 else math.inf
    bits = mean / math.log(2) * len(stream)
    return Perplexity(
        nll=mean,
        nll_stderr=stderr,
        perplexity=value,
        perplexity_stderr=value * stderr,
        bits_per_byte=bits / stream.num_bytes if stream.num_bytes else math.nan,
        num_tokens=int(counts.sum()),
        window=window,
        stride=stride,
        windows={"tokens": counts, "nll": nll},
    )


def _score(
    models: list[PreTrainedModel],
    stream: TokenStream,
    window: int,
    stride: int,
    batch_size: int,
    progress: Progress | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores of every scored token, and how many tokens each window scored.

    The first has shape [num_tokens, 1] for one model, the nll, and [num_tokens, 4] for two: nll of
    the first, nll of the second, KL(second || first), whether both rank the same token first.
    """
    if batch_size < 1:
        raise AbreastError(f"batch size is {batch_size}; it needs at least 1")
    if len(stream) < 2:
        raise AbreastError(f"the data has {len(stream)} tokens; at least 2 are needed")
    names = ["the model", "the reference model"][: len(models)]
    for name, model in zip(names, models, strict=True):
        vocabulary = model.get_input_embeddings().weight.shape[0]
        if stream.tokens.min() < 0 or max(stream.tokens.max(), *stream.prefix, 0) >= vocabulary:
            raise AbreastError(
                f"the data has token ids outside the vocabulary of {name} ({vocabulary} tokens); "
                "tokenise the data with that model's own tokenizer"
            )
    spans = sliding_windows(len(stream), window, stride, len(stream.prefix))
    scores: list[np.ndarray] = []
    with inference(*models):
        for batch in _batches(spans, batch_size):
            rows = [[*stream.prefix, *stream.tokens[begin:end]] for begin, end, _ in batch]
            ids = torch.from_numpy(np.array(rows))
            longest = max(scored for _, _, scored in batch)
            logits = [_logits(model, ids, longest) for model in models]
            sizes = [str(model_logits.shape[-1]) for model_logits in logits]
            if len(set(sizes)) > 1:
                raise AbreastError(
                    f"the models have vocabularies of different size ({' and '.join(sizes)}), so "
                    "their token probabilities cannot be compared; compare models with one "
                    "tokenizer"
                )
            batch_scores = token_scores(logits[0], ids[:, -longest:], *logits[1:])
            for column, name in enumerate(names):
                if not np.isfinite(batch_scores[..., column]).all():
                    raise AbreastError(
                        f"{name} gives logits that are not finite (NaN or infinite); load it in "
                        "bfloat16 or float32, or check how its weights were made"
                    )
            for row, (_, _, scored) in zip(batch_scores, batch, strict=True):
                scores.append(row[len(row) - scored :])
            if progress is not None:
                progress(len(scores), len(spans))
    return np.concatenate(scores), np.array([scored for _, _, scored in spans])


def _batches(
    spans: list[tuple[int, int, int]], batch_size: int
) -> Iterator[list[tuple[int, int, int]]]:
    """Consecutive windows of one length; only the last can be shorter, and then goes alone."""
    for _, equal in groupby(spans, key=lambda span: span[1] - span[0]):
        run = list(equal)
        for start in range(0, len(run), batch_size):
            yield run[start : start + batch_size]


def _logits(model: PreTrainedModel, ids: torch.Tensor, scored: int) -> torch.Tensor:
    """Logits that predict the last `scored` tokens of each row, shape [batch, scored, vocab]."""
    # Overlapping windows score only some of their positions, and the head is a large part of the
    # work where the vocabulary is large.
    options: dict[str, Any] = {"use_cache": False, **keeps(model, scored + 1)}
    logits: torch.Tensor = model(input_ids=ids.to(device_of(model)), **options).logits
    return logits[:, -scored - 1 : -1]


def _prompt(tokenizer: Any, tokens: Any, prompt_tokens: int) -> list[int]:
    """The first tokens of a text, from its second line on if that is long enough."""
    text = tokenizer.decode(tokens[: 3 * prompt_tokens], skip_special_tokens=True)
    _, _, rest = text.partition("\n")
    ids = list(tokenizer(rest.lstrip("\n"), add_special_tokens=False)["input_ids"])
    if len(ids) < prompt_tokens:
        return [int(token) for token in tokens[:prompt_tokens]]
    return ids[:prompt_tokens]


def _continue(model: PreTrainedModel, ids: list[int], new_tokens: int) -> list[int]:
    prompt = torch.tensor([ids], device=device_of(model))
    generate: Any = model.generate
    text = generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,  # one row needs no padding; without it transformers warns
    )
    written: list[int] = text[0, len(ids) :].tolist()
    return written
