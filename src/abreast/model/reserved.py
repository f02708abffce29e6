"""A KV cache that is written in place; transformers' own is copied whole for every token."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


class ReservedLayer(DynamicLayer):
    """One layer's keys and values [batch, heads, tokens, head_dim], in memory for `room` tokens.

    More than that is copied as transformers does. Whatever else it does to a cache leaves keys and
    values in other memory; the next token then reserves anew.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.reserved: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        new = key_states, value_states
        held = (self.keys, self.values) if self.is_initialized and self.keys.numel() else None
        start = held[0].shape[-2] if held else 0
        end = start + key_states.shape[-2]
        if end > self.room:
            keys, values = super().update(*new, *args, **kwargs)
            return keys, values
        reserved = self.reserved if held and self._is_view(held) else None
        if reserved is None:
            if not self.is_initialized:
                self.lazy_initialization(*new)
            keys, values = (x.new_empty((*x.shape[:2], self.room, x.shape[-1])) for x in new)
            self.reserved = reserved = keys, values
            for room, old in zip(reserved, held or (), strict=False):
                room[:, :, :start] = old
        for room, states in zip(reserved, new, strict=True):
            room[:, :, start:end] = states
        self.keys, self.values = (room[:, :, :end] for room in reserved)
        return self.keys, self.values

    def _is_view(self, held: tuple[torch.Tensor, torch.Tensor]) -> bool:
        """Whether these are the beginnings of what is reserved."""
        return self.reserved is not None and all(
            one.data_ptr() == room.data_ptr() and one.stride() == room.stride()
            for one, room in zip(held, self.reserved, strict=True)
        )


def reserve(cache: Any, room: int) -> None:
    """Let a cache of transformers grow in place up to `room` tokens, where its layers are plain."""
    layers = getattr(cache, "layers", [])
    for index, layer in enumerate(layers):
        if type(layer) is DynamicLayer:
            layers[index] = reserved = ReservedLayer(room)
            if layer.is_initialized:
                reserved.update(layer.keys, layer.values)


def keep_rows(cache: Any, rows: torch.Tensor) -> bool:
    """Leave only these rows of a cache; False, and unchanged, for one that holds other state.

    rows: on the CPU, as layers may lie on several devices.
    """
    known = (ReservedLayer, DynamicSlidingWindowLayer)
    if not all(type(layer) in known for layer in getattr(cache, "layers", [None])):
        return False
    cache.batch_select_indices(rows)
    return True
