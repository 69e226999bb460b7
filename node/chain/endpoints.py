"""Several nodes of one chain, so that none of them has to be trusted.

Rules:
- What decides about money is believed when `quorum` nodes say the same of it: more than half of all, so that no two groups can
  both be believed. Who says otherwise is named, and set aside.
- A node that fails, lags or lies is set aside for a time and asked last. It is asked all the same when the others do not suffice:
  a quorum is counted over answers, not over reputations, so setting a node aside costs safety nothing.
- As few nodes are asked as are needed; one more for each that fails, and for each that is slow.
- A transaction goes to all of them.

`call` and `submit` make this a `Caller` like a single node. What a quorum says is asked through `gather` (`node.chain.agreed`).
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

import trio

from node.chain.rpc import JsonRpc, Reverted, RpcError, RpcUnavailable, WrongChain
from node.errors import ChainError

log = logging.getLogger(__name__)
T = TypeVar("T")
V = TypeVar("V")
SPREAD_S: Final = 2.0
"""Seconds that the other nodes have to take a transaction when one has taken it."""


class Node(Protocol):
    """One node; `node.chain.rpc.JsonRpc` is one."""

    @property
    def name(self) -> str: ...

    async def call(self, method: str, *params: Any) -> Any: ...

    async def submit(self, method: str, *params: Any) -> Any: ...

    async def aclose(self) -> None: ...


class NoQuorum(RpcUnavailable):
    """Too few nodes say the same. Nothing is known, and nothing may be concluded."""


@dataclass(frozen=True, slots=True)
class Rules:
    """How nodes are compared. Times are seconds."""

    quorum: int = 0
    """How many must say the same; 0 = the least that is more than half of all."""
    max_behind: int = 8
    """Blocks that one node's head may be behind another's and still count as the same view."""
    aside_s: float = 60.0
    """How long a node is asked last that failed, lagged or lied."""
    hedge_s: float = 1.0
    """After so long without an answer one more node is asked."""


def majority(nodes: int) -> int:
    return nodes // 2 + 1


class Endpoints:
    """Raises `ChainError` when there is no node, or `quorum` is not more than half of them and at most all."""

    def __init__(self, nodes: Sequence[Node], rules: Rules | None = None) -> None:
        self.nodes = tuple(nodes)
        self.rules = rules or Rules()
        if not nodes:
            raise ChainError("no JSON-RPC endpoint is configured", hint="set chain.rpc_urls to the URL of a node")
        self.quorum = self.rules.quorum or majority(len(nodes))
        if not majority(len(nodes)) <= self.quorum <= len(nodes):
            raise ChainError(
                f"a quorum of {self.quorum} does not fit {len(nodes)} JSON-RPC endpoints",
                hint=f"set chain.rpc_quorum to {majority(len(nodes))} to {len(nodes)}, or to 0",
            )
        self._aside: dict[int, tuple[float, str]] = {}

    @classmethod
    def over_http(
        cls, urls: Sequence[str], *, chain_id: int, timeout: float = 20.0, rules: Rules | None = None
    ) -> Endpoints:
        """The nodes at these URLs. `timeout`: seconds for one exchange with one of them.

        Raises `ChainError` for one that is named twice: it would agree with itself.
        """
        twice = [JsonRpc(url).name for url, count in Counter(urls).items() if count > 1]
        if twice:
            raise ChainError(
                f"JSON-RPC endpoint {twice[0]} is configured twice", hint="name each in chain.rpc_urls once"
            )
        return cls([JsonRpc(url, chain_id=chain_id, timeout=timeout) for url in urls], rules)

    @property
    def aside(self) -> Mapping[str, str]:
        """The nodes that are set aside now, and why."""
        now = trio.current_time()
        return {self.nodes[i].name: why for i, (until, why) in self._aside.items() if until > now}

    def set_aside(self, index: int, why: str) -> None:
        """Ask this node last for a while."""
        node, now = self.nodes[index], trio.current_time()
        if self._aside.get(index, (0.0, ""))[0] <= now:
            log.warning("JSON-RPC endpoint %s: %s", node.name, why)
        self._aside[index] = (now + self.rules.aside_s, why)

    def _order(self) -> list[int]:
        """Indices: those in good standing as configured, then those set aside, longest ago first."""
        now = trio.current_time()
        until = {i: time for i, (time, _) in self._aside.items() if time > now}
        return sorted(range(len(self.nodes)), key=lambda i: (until.get(i, 0.0), i))

    async def meet(self) -> None:
        """Before the first use: every node that answers is one of our chain, and a quorum answers.

        Raises `WrongChain` naming the node: a configuration that mixes chains is mended, not worked around. Raises `NoQuorum`.
        """
        strangers: list[WrongChain] = []

        async def ask(node: Node) -> object:
            try:
                return await node.call("eth_chainId")
            except WrongChain as error:
                strangers.append(error)
                raise

        def everybody(answers: Mapping[int, object]) -> bool | None:
            return True if len(answers) == len(self.nodes) else None

        try:
            await self.gather(ask, everybody, "the chain id")
        except NoQuorum:
            if strangers:
                raise strangers[0] from None
            if len(self.nodes) - len(self.aside) < self.quorum:
                raise

    # ------------------------------------------------------------------------------------------------------ any of them

    async def call(self, method: str, *params: Any) -> Any:
        """An idempotent read of the first node that can answer: for hints, simulations and what decides about no money.

        Raises what the first one said when none can.
        """
        first: ChainError | None = None
        for index in self._order():
            try:
                return await self.nodes[index].call(method, *params)
            except Reverted:
                raise
            except ChainError as error:
                self._failed(index, error)
                # An answer, though an error, says more than silence.
                if first is None or (isinstance(first, RpcUnavailable) and not isinstance(error, RpcUnavailable)):
                    first = error
        raise first or ChainError("no JSON-RPC endpoint is configured")

    def _failed(self, index: int, error: ChainError) -> None:
        if not isinstance(error, RpcError):  # an error that is an answer may be the question's fault
            self.set_aside(index, error.message)

    # ----------------------------------------------------------------------------------------------------- all of them

    async def submit(self, method: str, *params: Any) -> Any:
        """A call with effects, to every node once. It has happened when one of them took it.

        Raises `RpcError` when every one refused it, `RpcUnavailable` when it may have happened.
        """
        results: dict[int, Any] = {}
        refusals: dict[int, RpcError] = {}
        failures: dict[int, ChainError] = {}

        async def one(index: int, scope: trio.CancelScope) -> None:
            try:
                results[index] = await self.nodes[index].submit(method, *params)
                scope.deadline = min(scope.deadline, trio.current_time() + SPREAD_S)
            except RpcError as error:
                refusals[index] = error
            except ChainError as error:
                failures[index] = error
                self._failed(index, error)

        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                for index in range(len(self.nodes)):
                    nursery.start_soon(one, index, scope)
        if results:
            return results[min(results)]
        if failures:
            raise RpcUnavailable("; ".join(str(error) for error in failures.values()))
        raise refusals[min(refusals)]

    async def aclose(self) -> None:
        for node in self.nodes:
            await node.aclose()

    # -------------------------------------------------------------------------------------------------- enough of them

    async def gather(
        self, ask: Callable[[Node], Awaitable[T]], judge: Callable[[Mapping[int, T]], V | None], what: str
    ) -> V:
        """Ask nodes until `judge` makes something of their answers (by index). `judge` sees them after each one.

        Raises `NoQuorum` when all were asked and it makes nothing of them.
        """
        waiting = deque(self._order())
        asked: dict[int, float] = {}
        answers: dict[int, T] = {}
        failures: dict[int, ChainError] = {}
        send, receive = trio.open_memory_channel[int](len(waiting))

        async def one(index: int) -> None:
            try:
                answers[index] = await ask(self.nodes[index])
            except ChainError as error:
                failures[index] = error
                self._failed(index, error)
            send.send_nowait(index)

        async with trio.open_nursery() as nursery:

            def more() -> None:
                if waiting:
                    asked[waiting[0]] = trio.current_time()
                    nursery.start_soon(one, waiting.popleft())

            for _ in range(self.quorum):
                more()
            while len(answers) + len(failures) < len(asked):
                with trio.move_on_after(self.rules.hedge_s if waiting else float("inf")) as patience:
                    index = await receive.receive()
                if patience.cancelled_caught:
                    more()
                    continue
                verdict = judge(answers) if index in answers else None
                if verdict is not None:
                    nursery.cancel_scope.cancel()
                    break
                if index in failures or len(answers) + len(failures) == len(asked):
                    more()
            else:
                verdict = None
        for index, since in asked.items():
            if index not in answers and index not in failures and trio.current_time() - since >= self.rules.hedge_s:
                self.set_aside(index, f"did not answer within {trio.current_time() - since:.1f} s")
        if verdict is None:
            raise self._no_quorum(what, answers, failures)
        return verdict

    async def agreed(self, ask: Callable[[Node], Awaitable[T]], what: str) -> T:
        """What a quorum answers alike. Raises `NoQuorum`."""
        seen: Mapping[int, T] = {}

        def judge(answers: Mapping[int, T]) -> tuple[T] | None:
            nonlocal seen
            seen = dict(answers)
            value, count = Counter(answers.values()).most_common(1)[0]
            return (value,) if count >= self.quorum else None

        (value,) = await self.gather(ask, judge, what)
        self.blame({i: answer for i, answer in seen.items() if answer != value}, what, value)
        return value

    def blame(self, dissent: Mapping[int, Hashable], what: str, value: object) -> None:
        """These nodes said another thing than a quorum."""
        for index, answer in dissent.items():
            self.set_aside(index, f"{what}: says {shown(answer)}, {self.quorum} others say {shown(value)}")

    def _no_quorum(self, what: str, answers: Mapping[int, Any], failures: Mapping[int, ChainError]) -> NoQuorum:
        said = [f"{self.nodes[i].name} says {shown(answer)}" for i, answer in sorted(answers.items())]
        said += [str(error) for _, error in sorted(failures.items())]
        hint = "two endpoints that differ cannot be judged; configure three" if len(self.nodes) == 2 else ""
        return NoQuorum(f"{what}: no {self.quorum} endpoints agree: {'; '.join(said)}", hint=hint)


def shown(value: object) -> str:
    """An answer in a message: short, and never more than a line."""
    text = "0x" + value.hex() if isinstance(value, bytes) else repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
