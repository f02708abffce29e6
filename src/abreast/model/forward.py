"""Arguments and results of a forward pass, whose names differ by model and version."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

CACHES = ("cache", "past_key_values", "layer_past")  # the first since transformers 5.24


@cache  # asked for every member and token
def parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a function's parameters."""
    return tuple(inspect.signature(forward).parameters)


def keeps(model: Any, which: int | torch.Tensor) -> dict[str, Any]:
    """Arguments of a forward pass that make it compute only some logits.

    which: so many positions at the end, or indices [positions] into every sequence. Empty for a
    model class that knows no `logits_to_keep`.
    """
    known = inspect.signature(model.forward).parameters
    return {"logits_to_keep": which} if "logits_to_keep" in known else {}


def cache_name(model: Any) -> str:
    """What the argument of a forward pass is called that takes a cache."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def cache_of(output: Any) -> Any:
    """The cache that a forward pass returned."""
    return output.cache if hasattr(output, "cache") else output.past_key_values


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """The cache that a layer was handed, None without."""
    return next((arguments[name] for name in CACHES if name in arguments), None)
