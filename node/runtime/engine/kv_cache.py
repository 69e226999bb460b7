"""Keys and values of the running sequences, under one budget that is counted to the byte.

A sequence's whole room is reserved when it is submitted, so a stream that was accepted never fails for memory. On a CPU
the pages behind a reservation become real only as tokens fill them. Rooms come in blocks of 16 tokens; a paged cache for
batched decoding can take over behind `append`, which is all that the models see.
"""

from __future__ import annotations

import torch
from torch import Tensor

from node.runtime.engine.errors import CacheFull, IntegrityError

BLOCK_TOKENS = 16


class SequenceCache:
    """Room for one sequence. `length` tokens are filled."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys = keys
        """[layers, kv_heads, capacity, head_dim]"""
        self.values = values
        self.length = 0

    @property
    def capacity(self) -> int:
        """Tokens that fit."""
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store [kv_heads, tokens, head_dim] after what is filled; return everything up to there, same layout.

        `length` moves only by `advance`, once every layer has appended.
        """
        end = self.length + keys.shape[1]
        self.keys[layer, :, self.length : end] = keys
        self.values[layer, :, self.length : end] = values
        return self.keys[layer, :, :end], self.values[layer, :, :end]

    def advance(self, tokens: int) -> None:
        self.length += tokens


class CachePool:
    """Hands out rooms and knows how many bytes they hold together."""

    def __init__(
        self, layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device, budget: int
    ) -> None:
        """`budget`: bytes of all rooms together."""
        self._shape = (layers, kv_heads, head_dim)
        self._dtype = dtype
        self._device = device
        self._live: list[SequenceCache] = []
        self.budget = budget
        self.used = 0
        """Bytes of the rooms in use."""
        self.bytes_per_token = 2 * layers * kv_heads * head_dim * dtype.itemsize

    def bytes_for(self, tokens: int) -> int:
        """What a room for that many tokens costs, whole blocks counted."""
        return -(-tokens // BLOCK_TOKENS) * BLOCK_TOKENS * self.bytes_per_token

    def allocate(self, tokens: int) -> SequenceCache:
        """A room for `tokens` tokens. Raises `CacheFull`."""
        wanted = self.bytes_for(tokens)
        if self.used + wanted > self.budget:
            raise CacheFull(f"{tokens} tokens need {wanted} bytes of KV cache; {self.budget - self.used} are free")
        layers, kv_heads, head_dim = self._shape
        shape = (layers, kv_heads, wanted // self.bytes_per_token, head_dim)
        try:
            keys, values = (torch.empty(shape, dtype=self._dtype, device=self._device) for _ in range(2))
        except RuntimeError as error:  # torch.OutOfMemoryError on a GPU, plain RuntimeError on a CPU
            raise CacheFull(f"the machine has no {wanted} bytes left: {error}"[:300]) from None
        cache = SequenceCache(keys, values)
        self._live.append(cache)
        self.used += wanted
        return cache

    def release(self, cache: SequenceCache) -> None:
        self._live = [live for live in self._live if live is not cache]
        self.used -= cache.nbytes

    def check_integrity(self) -> None:
        """Raises `IntegrityError` unless the rooms in use add up to `used`, within the budget."""
        held = sum(cache.nbytes for cache in self._live)
        if held != self.used or not 0 <= self.used <= self.budget:
            raise IntegrityError(f"KV cache: rooms hold {held} bytes, the books say {self.used} of {self.budget}")
        for cache in self._live:
            if not 0 <= cache.length <= cache.capacity:
                raise IntegrityError(f"KV cache: {cache.length} tokens in a room for {cache.capacity}")
