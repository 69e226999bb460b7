"""Our contracts on one chain as they are read: views, events, the search for an event.

Rules
- What decides about money is what a quorum of the endpoints says (`node.chain.agreed`). Events are hints, and come from any of
  them; `agreed_logs` is for those that are believed.
- What lets us give more counts when it is confirmed, what lets us give less counts at once (`careful`).
- A token is somebody's program: its answers are bounded before they are shown.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Final, TypeVar

from node.chain.agreed import AgreedEth
from node.chain.artifacts import Contract, contract, decode_log, error_name
from node.chain.deployment import Deployment
from node.chain.endpoints import Endpoints, Node
from node.chain.eth import Eth
from node.chain.rpc import Reverted, RpcUnavailable
from node.chain.values import Header, Log
from node.chain.watcher import Watcher
from node.errors import ChainError
from node.ports import ChainEvent, ChannelOnChain, Head, TokenInfo, VaultOnChain, WorkerOnChain
from protocol.ids import ZERO_ADDRESS, Address, ChannelId
from protocol.typed_data import Domain

T = TypeVar("T")
PAGE: Final = 5_000
"""Blocks that are searched at once for events: what public nodes still answer."""


def careful(now: ChannelOnChain, confirmed: ChannelOnChain) -> ChannelOnChain:
    """One sight of a channel out of two, at the head and below the blocks that may still be undone.

    What lets a worker serve more counts when it is confirmed, what lets it serve less counts at once. A claim is of the first
    kind: what is claimed counts as paid.
    """
    return ChannelOnChain(
        allocated=min(now.allocated, confirmed.allocated),
        claimed=min(now.claimed, confirmed.claimed),
        withdraw_at=now.withdraw_at or confirmed.withdraw_at,
        closed=now.closed or confirmed.closed,
    )


class EvmReader:
    """The reading half of `node.ports.Chain`."""

    def __init__(self, nodes: Endpoints, deployment: Deployment, *, poll: float, confirmations: int) -> None:
        """`poll`: seconds between looks for new blocks."""
        self.nodes = nodes
        self.deployment = deployment
        self._eth = AgreedEth(nodes)
        self._poll = poll
        self._confirmations = confirmations
        self._domain = deployment.domain
        self._workers_domain = deployment.workers_domain
        self._vault = contract("Vault")
        self._channels = contract("Channels")
        self._workers = contract("Workers")

    @property
    def chain_id(self) -> int:
        return self.deployment.chain_id

    @property
    def domain(self) -> Domain:
        return self._domain

    @property
    def workers_domain(self) -> Domain:
        return self._workers_domain

    @property
    def token(self) -> Address:
        return self.deployment.token

    async def head(self) -> Head:
        header = await self._eth.head()
        return Head(header.number, header.hash, header.timestamp)

    async def native_balance(self, account: Address) -> int:
        return await self._eth.balance(account)

    async def token_balance(self, token: Address, account: Address) -> int:
        if token == ZERO_ADDRESS:
            return await self.native_balance(account)
        return int(await self._view(contract("TestToken"), token, "balanceOf", account))

    async def token_info(self, token: Address) -> TokenInfo:
        if token == ZERO_ADDRESS:
            return TokenInfo(token, "coin", 18)
        return TokenInfo(token, await self._symbol(token), await self._decimals(token))

    async def _symbol(self, token: Address) -> str:
        """A token may answer anything, or nothing: only short plain names reach a terminal."""
        try:
            name = str(await self._view(contract("TestToken"), token, "symbol"))
        except RpcUnavailable:
            raise
        except ChainError:
            return "token"
        return name if 1 <= len(name) <= 16 and name.isascii() and name.isprintable() else "token"

    async def _decimals(self, token: Address) -> int:
        try:
            decimals = int(await self._view(contract("TestToken"), token, "decimals"))
        except RpcUnavailable:
            raise
        except ChainError:
            return 0
        return decimals if decimals <= 36 else 0

    async def vault_balance(self, token: Address, account: Address) -> int:
        return int(await self._view(self._vault, self.deployment.vault, "balanceOf", token, account))

    async def vault(self, token: Address) -> VaultOnChain:
        vault, block = self.deployment.vault, (await self._eth.sight()).hash
        if token == ZERO_ADDRESS:
            coins = await self._eth.balance(vault, block)
        else:
            coins = int(await self._view(contract("TestToken"), token, "balanceOf", vault, block=block))
        return VaultOnChain(coins, int(await self._view(self._vault, vault, "liabilities", token, block=block)))

    async def channel(self, channel_id: ChannelId) -> ChannelOnChain:
        if not self._confirmations:
            return await self._channel_at(channel_id, "latest")
        head = await self._eth.sight()
        now = await self._channel_at(channel_id, head.hash)
        deep = head.number - self._confirmations
        if deep < self.deployment.block:
            return careful(now, ChannelOnChain(0, 0, 0, False))  # our contracts are not confirmed themselves
        return careful(now, await self._channel_at(channel_id, await self.block_hash(deep)))

    async def _channel_at(self, channel_id: ChannelId, block: str | bytes) -> ChannelOnChain:
        found = await self._view(self._channels, self.deployment.channels, "channel", channel_id, block=block)
        return ChannelOnChain(*found)

    async def owed(self, receiver: Address, token: Address) -> int:
        return int(await self._view(self._channels, self.deployment.channels, "owed", receiver, token))

    async def payout_of(self, worker: Address) -> Address:
        return Address(await self._view(self._workers, self.deployment.workers, "payoutOf", worker))

    async def worker(self, hot_key: Address) -> WorkerOnChain:
        return WorkerOnChain(*await self._view(self._workers, self.deployment.workers, "worker", hot_key))

    async def _view(
        self, source: Contract, address: Address, function: str, *args: object, block: str | bytes = "latest"
    ) -> Any:
        try:
            data = await self._eth.eth_call(address, source.encode(function, *args), block=block)
        except Reverted as error:
            raise ChainError(f"{source.name}.{function} reverted: {error_name(error.data)}") from error
        return source.decode(function, data)[0]

    # ----------------------------------------------------------------------------------- any contract, any block, events

    async def view(
        self, name: str, function: str, *args: object, block: str | bytes = "latest", at: Address | None = None
    ) -> Any:
        """Ask the contract called `name`, or one that answers like it at another address. Raises `ChainError` when the
        deployment has none or it reverts."""
        address = self.deployment.address_of(name) if at is None else at
        return await self._view(contract(name), address, function, *args, block=block)

    async def block_hash(self, number: int) -> bytes:
        """Raises `ChainError` when there is no such block (any more)."""
        return (await self._header(number)).hash

    async def block_time(self, number: int) -> int:
        """Chain seconds. Raises as `block_hash` does."""
        return (await self._header(number)).timestamp

    async def _header(self, number: int) -> Header:
        header = await self._eth.header(number)
        if header is None:
            raise ChainError(f"block {number} has gone while we looked at it")
        return header

    async def logs(self, name: str, topics: Sequence[bytes], first: int, last: int) -> list[ChainEvent]:
        """Events of the contract called `name` with these first topics, from block `first` to `last`."""
        found = await Eth(self.nodes).logs_between([self.deployment.address_of(name)], first, last, topics)
        return [event for log in found if (event := decode_log(contract(name), log)) is not None]

    async def agreed_logs(self, name: str, topics: Sequence[bytes], first: int, last: int) -> list[ChainEvent]:
        """As `logs`, and a quorum has to give them alike: for what is believed, and not only looked into."""
        address, wanted = self.deployment.address_of(name), tuple(topics)

        async def ask(node: Node) -> tuple[Log, ...]:
            found = await Eth(node).logs_between([address], first, last, wanted)
            return tuple(log for log in found if log.address == address and log.topics[: len(wanted)] == wanted)

        found = await self.nodes.agreed(ask, f"events of {name} in blocks {first} to {last}")
        return [event for log in found if (event := decode_log(contract(name), log)) is not None]

    async def search_back(
        self,
        name: str,
        topics: Sequence[bytes],
        take: Callable[[ChainEvent], T | None],
        *,
        first: int = 0,
        last: int | None = None,
        since: int = 0,
        agreed: bool = False,
    ) -> T | None:
        """The first that `take` makes of such an event, the newest event first; None when it makes nothing of any.

        From block `last`, or the head, down to block `first` or the page with the chain second `since`, and never below the
        deployment. `agreed`: as `agreed_logs`.
        """
        logs = self.agreed_logs if agreed else self.logs
        first, last = max(first, self.deployment.block), (await self.head()).number if last is None else last
        while last >= first:
            start = max(last - PAGE + 1, first)
            for event in reversed(await logs(name, topics, start, last)):
                if (found := take(event)) is not None:
                    return found
            if since and await self.block_time(start) < since:
                break
            last = start - 1
        return None

    def events(self, start: int | None = None) -> AsyncIterator[ChainEvent]:
        return self.watcher(start)

    def watcher(self, start: int | None = None) -> Watcher:
        """As `events`, never from before the deployment; its `head` says how fresh our view is."""
        sources = {
            self.deployment.vault: self._vault,
            self.deployment.workers: self._workers,
            self.deployment.channels: self._channels,
        }
        for name in ("Jobs", "Disputes"):
            if self.deployment.has(name):
                sources[self.deployment.address_of(name)] = contract(name)
        return Watcher(
            Eth(self.nodes),
            sources,
            start=None if start is None else max(start, self.deployment.block),
            poll=self._poll,
            confirmations=self._confirmations,
        )
