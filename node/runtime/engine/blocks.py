"""Who holds which KV block: counted references, a prefix cache over full blocks, reservations that cannot fail later.

Rules:
- A block is *free* (holds nothing), *cached* (nobody's, but its content can be found again) or *held* (by one or more
  sequences). The three counts always add up to the pool; `check_integrity` recounts them.
- What was handed out is never taken back: a sequence whose whole room was taken at once cannot run out later. Cached
  blocks give way first, the one unused for longest before the others.
- Only full blocks are shared, and only among equal salts. A block's name is the hash of its parent's name and its tokens,
  and the chain begins with the salt, so nobody can probe by timing what a tenant with another salt has asked.

The books know numbers only; the tensors are in the cache that the model writes (`paged.py`).
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Container, Sequence

from node.runtime.engine.errors import CacheFull, IntegrityError

BLOCK_TOKENS = 16


def blocks_for(tokens: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-tokens // BLOCK_TOKENS)


def chain(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The name of a full block: sha256 of its parent's name (the salt, for the first) and its tokens."""
    return hashlib.sha256(parent + array("I", tokens).tobytes()).digest()


def root(salt: bytes) -> bytes:
    """The name before the first block of a tenant's sequences."""
    return hashlib.sha256(b"gristmill prefix" + salt).digest()


class BlockPool:
    """The books of `total` blocks. Block numbers run from 0."""

    def __init__(self, total: int, *, prefix_cache: bool = True) -> None:
        self.total = total
        self.prefix_cache = prefix_cache
        self._free = list(range(total - 1, -1, -1))  # popped from the end: low numbers first, so runs are contiguous
        self._holders = [0] * total
        self._cached: OrderedDict[int, None] = OrderedDict()
        """Blocks without a holder whose content can be found again, the one unused for longest first."""
        self._names: list[bytes | None] = [None] * total
        self._by_name: dict[bytes, int] = {}
        self.queries = 0
        """Tokens that were looked up in the prefix cache."""
        self.hits = 0
        """Tokens of them that were found."""

    @property
    def available(self) -> int:
        """Blocks that can be handed out now."""
        return len(self._free) + len(self._cached)

    @property
    def held(self) -> int:
        return self.total - self.available

    def allocate(self, count: int) -> list[int]:
        """Blocks for one holder. Raises `CacheFull`; nothing has changed then."""
        if count > self.available:
            raise CacheFull(f"{count} blocks of KV cache are needed; {self.available} of {self.total} are free")
        taken = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._cached.popitem(last=False)
                self._forget(block)
            self._holders[block] = 1
            taken.append(block)
        return taken

    def release(self, blocks: Sequence[int]) -> None:
        """One holder lets go of its blocks. Named ones stay findable until their room is needed."""
        for block in reversed(blocks):  # the tail of a chain is of less use than its head, so it goes first
            self._holders[block] -= 1
            if self._holders[block] < 0:
                raise IntegrityError(f"KV block {block} was released by somebody who does not hold it")
            if self._holders[block] == 0:
                if self._names[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None

    def share(self, names: Sequence[bytes], *, again: bool = False) -> list[int]:
        """Hold the longest known beginning of a chain; the blocks, in order. `again`: these names were counted as asked for."""
        found = self._known(names)
        for block in found:
            if self._holders[block] == 0:
                del self._cached[block]
            self._holders[block] += 1
        self.queries += 0 if again else len(names) * BLOCK_TOKENS
        self.hits += len(found) * BLOCK_TOKENS
        return found

    def cost(self, names: Sequence[bytes], count: int) -> int:
        """Of `available`, what `share(names)` and then `allocate` up to `count` blocks would use."""
        known = self._known(names)
        return count - sum(1 for block in known if self._holders[block] > 0)

    def shared(self, names: Sequence[bytes], blocks: Container[int]) -> int:
        """How many of `blocks` a sequence with these names would share."""
        return sum(1 for block in self._known(names) if block in blocks)

    def name(self, block: int, name: bytes) -> None:
        """A held block is full: from now on it can be found. The first block of a name keeps it."""
        if self.prefix_cache and name not in self._by_name and self._names[block] is None:
            self._by_name[name] = block
            self._names[block] = name

    def _known(self, names: Sequence[bytes]) -> list[int]:
        found = []
        for name in names:
            block = self._by_name.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def _forget(self, block: int) -> None:
        name = self._names[block]
        if name is not None:
            del self._by_name[name]
            self._names[block] = None

    def check_integrity(self, tables: Sequence[Sequence[int]]) -> None:
        """Recount everything against the tables of all sequences. Raises `IntegrityError`."""
        holders = [0] * self.total
        for table in tables:
            for block in table:
                holders[block] += 1
        if holders != self._holders:
            wrong = [n for n in range(self.total) if holders[n] != self._holders[n]]
            raise IntegrityError(f"KV blocks {wrong[:8]}: their holders are not what the books say")
        idle = sorted([*self._free, *self._cached])
        if idle != [n for n in range(self.total) if holders[n] == 0]:
            raise IntegrityError("KV blocks: free, cached and held ones do not add up to the pool")
        named = {block for block in range(self.total) if self._names[block] is not None}
        if named != set(self._by_name.values()) or not set(self._cached) <= named or named & set(self._free):
            raise IntegrityError("KV blocks: the prefix cache names blocks that it does not have")
