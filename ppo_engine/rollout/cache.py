"""A key-value cache with room to grow: a new token is written in place; the others are not copied.

Knows transformers' cache layers, and no sampling.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

_ROOM = 64  # tokens a layer makes room for at a time


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]  # transformers' __init_subclass__ has no types
    """Keys and values [B, heads, tokens, width] as views of buffers that are longer."""

    keys: Tensor
    values: Tensor
    _key_buffer: Tensor
    _value_buffer: Tensor

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add tokens; returns all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
            self._key_buffer, self._value_buffer = self.keys, self.values
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        if end > self._key_buffer.shape[-2]:
            self._key_buffer = _with_room(self.keys, end + _ROOM)
            self._value_buffer = _with_room(self.values, end + _ROOM)
        self._key_buffer[..., start:end, :] = key_states
        self._value_buffer[..., start:end, :] = value_states
        self.keys, self.values = self._key_buffer[..., :end, :], self._value_buffer[..., :end, :]
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep some rows, and no room; the next token makes it."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]  # any integer tensor will do
        self._key_buffer, self._value_buffer = self.keys, self.values


def _with_room(states: Tensor, tokens: int) -> Tensor:
    shape = (*states.shape[:-2], tokens, states.shape[-1])
    buffer = torch.empty(shape, dtype=states.dtype, device=states.device)
    buffer[..., : states.shape[-2], :] = states
    return buffer


def growing_cache(config: Any) -> DynamicCache:
    """The cache that a model of this config takes, with its plain layers exchanged for growing ones."""
    cache = DynamicCache(config=config)
    cache.layers = [_growing(layer) for layer in cache.layers]
    return cache


def _growing(layer: Any) -> Any:
    return GrowingLayer() if type(layer) is DynamicLayer else layer  # type: ignore[no-untyped-call]
