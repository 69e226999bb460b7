"""Every number that the contracts hold, read at once after each step.

One call of a small hand-made contract asks all the others and returns their answers one after the other, which is what makes
it possible to look at everything after everything. Values are tuples of words, named (kind, key).

What has ended for good is put aside and read again with every 16th reading and at the end: if it changes at all, that is what
must never happen (I6), whenever it is seen.
"""

from __future__ import annotations

from typing import Any

from node.testing.evm import Contract, Evm
from protocol.ids import Address

Name = tuple[str, Any]
Words = tuple[int, ...]

READER = bytes.fromhex(
    "604680600a5f395ff3fe5f805f5b368110600d57505ff35b803561ffff8160501c1690838261ffff8360401c16958693"
    "8260188801833760601c5afa156042576018910101910180916003565b5f80fd"
)
"""solc's output for this Yul, with the optimizer on:

    let q := 0
    for { let p := 0 } lt(p, calldatasize()) {} {
        let head := calldataload(p)              // 20 bytes address, 2 bytes length of the call, 2 bytes of the answer
        let n := and(shr(80, head), 0xffff)
        let m := and(shr(64, head), 0xffff)
        p := add(p, 24)
        calldatacopy(q, p, n)
        if iszero(staticcall(gas(), shr(96, head), q, n, q, m)) { revert(0, 0) }
        p := add(p, n)
        q := add(q, m)
    }
    return(0, q)
"""
FULL_EVERY = 16


class Numbers:
    """What is read, and what was read last."""

    def __init__(self, evm: Evm, sender: Address) -> None:
        self._evm = evm
        self._sender = sender
        self._reader = evm.deploy_code([], READER, sender=sender).address
        self._plans: dict[Name, bytes] = {}
        self._cold: set[Name] = set()
        self._hot: list[Name] = []
        self._calls = b""
        self._readings = 0
        self._raw: dict[Name, bytes] = {}
        self.values: dict[Name, Words] = {}
        self.by_kind: dict[str, dict[Any, Words]] = {}

    def plan(self, kind: str, key: Any, words: int, contract: Contract, data: bytes) -> None:
        """From now on also read this. Until it is read for the first time it counts as zero."""
        name = (kind, key)
        if name in self._plans:
            return
        self._plans[name] = contract.address + len(data).to_bytes(2) + (32 * words).to_bytes(2) + data
        self._raw[name] = bytes(32 * words)
        self._put(name, (0,) * words)
        self._hot.append(name)
        self._calls += self._plans[name]

    def put_aside(self, kind: str, key: Any) -> None:
        """It has ended."""
        name = (kind, key)
        if name in self._plans and name not in self._cold:
            self._cold.add(name)
            self._hot.remove(name)
            self._calls = b"".join(map(self._plans.__getitem__, self._hot))

    def of(self, kind: str) -> dict[Any, Words]:
        return self.by_kind.get(kind, {})

    def peek(self) -> bytes:
        """All numbers as they are now, without taking notice."""
        return self._ask(b"".join(self._plans.values()))

    def read(self, *, full: bool = False) -> dict[Name, tuple[Words, Words]]:
        """What changed since the last reading: name -> (before, now)."""
        self._readings += 1
        if full or self._readings % FULL_EVERY == 0:
            return self._changed(list(self._plans), self.peek())
        return self._changed(self._hot, self._ask(self._calls))

    def _ask(self, calls: bytes) -> bytes:
        return self._evm.transact(self._sender, self._reader, calls)[0]

    def _changed(self, names: list[Name], blob: bytes) -> dict[Name, tuple[Words, Words]]:
        changed, start, raw = {}, 0, self._raw
        for name in names:
            before = raw[name]
            end = start + len(before)
            now = blob[start:end]
            if now != before:
                words = tuple(int.from_bytes(now[i : i + 32]) for i in range(0, len(now), 32))
                changed[name] = (self.values[name], words)
                raw[name] = now
                self._put(name, words)
            start = end
        return changed

    def _put(self, name: Name, words: Words) -> None:
        self.values[name] = words
        self.by_kind.setdefault(name[0], {})[name[1]] = words
