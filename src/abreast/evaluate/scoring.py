"""The harness's model class, made to compute only the logits that it reads."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from abreast.model import inference, keeps

Request = tuple[Any, list[int], list[int]]  # texts, token ids of the prompt and of the answer


def score_answers_only(wrapped: Any, batch_size: int) -> None:
    """Leave out the prompts' logits, of which the harness computes all and reads none.

    wrapped: its HFLM, which pads a batch on the right and counts positions from the end, so that
    the last ones of a batch, as many as reach back to the first token of an answer, are enough.
    They are most of the work where the vocabulary is large. A model class that computes no part
    of its logits is left as it is.
    """
    model, score = wrapped.model, wrapped._loglikelihood_tokens
    if not keeps(model, 1):
        return

    def scored(requests: list[Request], **options: Any) -> list[tuple[float, bool]]:
        same: dict[tuple[int, ...], list[int]] = {}  # what the model reads -> requests
        for index, (_, prompt, answer) in enumerate(requests):
            read = tuple(prompt + answer)[:-1][-wrapped.max_length :]
            same.setdefault(read, []).append(index)
        order = sorted(same, key=lambda read: (-len(read), read))
        results = [(0.0, False)] * len(requests)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            needed = max(
                len(batch[0]) - len(read) + max(len(requests[index][2]) for index in same[read])
                for read in batch
            )

            def logits(ids: torch.Tensor, needed: int = needed) -> torch.Tensor:
                with inference(model):
                    return model(ids, **keeps(model, needed)).logits

            wrapped._model_call = logits
            members = list(itertools.chain.from_iterable(same[read] for read in batch))
            part = score([requests[index] for index in members], **options)
            for index, result in zip(members, part, strict=True):
                results[index] = result
        return results

    wrapped._loglikelihood_tokens = scored
