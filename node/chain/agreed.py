"""The JSON-RPC methods as a quorum of nodes answers them: for everything that decides about money.

Rules:
- State is read at a block named by its hash, so that nodes at different heights can be compared; "latest" means the newest block
  that a quorum has. With one node both are what they are in `Eth`.
- The agreed head is fresh or it is an error: when no quorum stands within `max_behind` blocks, a node lags or invents blocks, and
  nobody can say which.
- What nodes may honestly differ in is taken the careful way: a receipt counts when a quorum has it, a count of transactions is
  what a quorum says or, of all, the most that a quorum reaches, a revert is believed when a quorum says so, and one node that
  knows a transaction is enough to know that it is out.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import trio

from node.chain.endpoints import Endpoints, Node, NoQuorum, shown
from node.chain.eth import Eth
from node.chain.rpc import Reverted
from node.chain.values import Header, Receipt
from node.errors import ChainError
from protocol.ids import Address

log = logging.getLogger(__name__)
FORKS: Final = 4
"""Blocks below the newest common height at which nodes may still honestly stand on different branches."""
CATCHING_UP_S: Final = 10.0
"""How long a node may honestly take to have a block that a quorum has."""
MAX_GAS: Final = 1 << 24
"""No transaction may use more (EIP-7825): a node that estimates more is wrong."""


@dataclass(frozen=True, slots=True)
class _Revert:
    """A contract's no as an answer that can be compared."""

    data: bytes


class AgreedEth(Eth):
    """`Eth` over several nodes. Raises `NoQuorum` besides what `Eth` raises."""

    def __init__(self, nodes: Endpoints) -> None:
        super().__init__(nodes)
        self.nodes = nodes
        self._floor = 0
        self._floor_until = float("-inf")

    def expect(self, number: int) -> None:
        """State is not read below this block for a while: another quorum may have a node in it that does not have it yet."""
        if number >= self._floor:
            self._floor, self._floor_until = number, trio.current_time() + CATCHING_UP_S

    async def sight(self) -> Header:
        """The head to read state at: one that has our own last transaction, unless the chain got shorter."""
        while True:
            head = await self.head()
            if head.number >= self._floor or trio.current_time() >= self._floor_until:
                return head
            await trio.sleep(0.1)

    async def header(self, block: int | bytes | str = "latest") -> Header | None:
        if block == "latest":
            return await self.head()
        return await self.nodes.agreed(lambda node: Eth(node).header(block), f"block {shown(block)}")

    async def head(self) -> Header:
        """The newest block that a quorum has."""
        seen: Mapping[int, Header] = {}

        def judge(answers: Mapping[int, Header]) -> int | None:
            nonlocal seen
            seen = dict(answers)
            return self._common_height([header.number for header in answers.values()])

        height = await self.nodes.gather(_latest, judge, "the latest block")
        for index, header in seen.items():
            distance = header.number - height
            if abs(distance) > self.nodes.rules.max_behind:
                side = "ahead of" if distance > 0 else "behind"
                self.nodes.set_aside(index, f"is {abs(distance)} blocks {side} the others")
        there = {index: header for index, header in seen.items() if header.number == height}
        alike, count = Counter(there.values()).most_common(1)[0]
        if count < self.nodes.quorum:
            return await self._common_block(height)
        self.nodes.blame({i: header for i, header in there.items() if header != alike}, f"block {height}", alike)
        return alike

    def _common_height(self, numbers: Sequence[int]) -> int | None:
        """The highest number that a quorum reaches, if a quorum stands no further than `max_behind` from it."""
        if len(numbers) < self.nodes.quorum:
            return None
        height = sorted(numbers, reverse=True)[self.nodes.quorum - 1]
        near = sum(height <= number <= height + self.nodes.rules.max_behind for number in numbers)
        return height if near >= self.nodes.quorum else None

    async def _common_block(self, height: int) -> Header:
        """The block at this height, or the nearest below it on which the nodes' branches meet."""
        lowest = max(0, height - FORKS)
        for number in range(height, lowest - 1, -1):
            try:
                found = await self.header(number)
            except NoQuorum as error:
                if number == lowest:
                    raise
                log.info("nodes stand on different branches: %s", error)
                continue
            if found is not None:
                return found
        raise NoQuorum(f"blocks {lowest} to {height}: no {self.nodes.quorum} endpoints have one of them")

    async def nonce(self, account: Address, tag: str = "latest") -> int:
        """What a quorum counts alike; where none does, the most that a quorum of all nodes reaches."""

        def judge(counts: Mapping[int, int]) -> tuple[int] | None:
            number, alike = Counter(counts.values()).most_common(1)[0]
            if alike >= self.nodes.quorum:
                return (number,)
            everybody = len(counts) == len(self.nodes.nodes)
            return (sorted(counts.values(), reverse=True)[self.nodes.quorum - 1],) if everybody else None

        found = await self.nodes.gather(lambda node: Eth(node).nonce(account, tag), judge, f"nonce of {account}")
        return found[0]

    async def balance(self, account: Address, block: str | bytes = "latest") -> int:
        if block == "latest":  # for gas and for people: a hint
            return await super().balance(account)
        return await self.nodes.agreed(
            lambda node: Eth(node).balance(account, block), f"balance of {account} at block {shown(block)}"
        )

    async def code(self, account: Address) -> bytes:
        return await self.nodes.agreed(lambda node: Eth(node).code(account), f"code at {account}")

    async def eth_call(
        self,
        to: Address | None,
        data: bytes,
        *,
        sender: Address | None = None,
        value: int = 0,
        block: str | bytes = "latest",
    ) -> bytes:
        compared = len(self.nodes.nodes) > 1
        at = (await self.sight()).hash if block == "latest" and compared else block

        async def ask(node: Node) -> bytes | _Revert:
            try:
                return await Eth(node).eth_call(to, data, sender=sender, value=value, block=at)
            except Reverted as error:
                return _Revert(error.data)

        found = await self.nodes.agreed(ask, f"call of {to} at block {shown(at)}")
        if isinstance(found, _Revert):
            raise Reverted("eth_call", 3, "execution reverted", found.data)
        return found

    async def estimate_gas(self, to: Address | None, data: bytes, *, sender: Address, value: int = 0) -> int:
        async def ask(node: Node) -> int | _Revert:
            try:
                return await Eth(node).estimate_gas(to, data, sender=sender, value=value)
            except Reverted as error:
                return _Revert(error.data)

        def judge(answers: Mapping[int, int | _Revert]) -> int | _Revert | None:
            reverts = [a for a in answers.values() if isinstance(a, _Revert)]
            amounts = [a for a in answers.values() if isinstance(a, int)]
            if len(reverts) >= self.nodes.quorum:
                return reverts[0]
            return max(amounts) if len(amounts) >= self.nodes.quorum else None

        found = await self.nodes.gather(ask, judge, "gas of a transaction")
        if isinstance(found, _Revert):
            raise Reverted("eth_estimateGas", 3, "execution reverted", found.data)
        return min(found, MAX_GAS)

    async def receipt(self, tx: bytes) -> Receipt | None:
        """None as soon as a quorum can not have it any more."""

        def judge(answers: Mapping[int, Receipt | None]) -> tuple[Receipt | None] | None:
            found = Counter(answer for answer in answers.values() if answer is not None)
            if found and found.most_common(1)[0][1] >= self.nodes.quorum:
                return (found.most_common(1)[0][0],)
            without = sum(answer is None for answer in answers.values())
            return (None,) if without > len(self.nodes.nodes) - self.nodes.quorum else None

        verdict = await self.nodes.gather(lambda node: Eth(node).receipt(tx), judge, f"receipt of {shown(tx)}")
        return verdict[0]

    async def knows(self, tx: bytes) -> bool:
        def judge(answers: Mapping[int, bool]) -> bool | None:
            if any(answers.values()):
                return True
            return False if len(answers) == len(self.nodes.nodes) else None

        try:
            return await self.nodes.gather(lambda node: Eth(node).knows(tx), judge, f"transaction {shown(tx)}")
        except NoQuorum:  # some did not answer, nobody knows it
            return False


async def _latest(node: Node) -> Header:
    header = await Eth(node).header("latest")
    if header is None:
        raise ChainError(f"{node.name} has no latest block")
    return header
