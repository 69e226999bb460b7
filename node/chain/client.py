"""`EvmChain`: the Chain port over JSON-RPC, for one account.

Before the first use everything is checked: the node's chain id, that each address holds our code (immutables aside), that
Channels stands on this Vault and these Workers, and that both domains are what signatures are made for. A contract that is
not ours is refused at start, never discovered by losing money.

With several endpoints everything that decides about money is what a quorum of them says (`node.chain.agreed`); events are hints,
and come from any of them.
"""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

import trio

from node.chain.agreed import AgreedEth
from node.chain.artifacts import Contract, contract, decode_log, error_name
from node.chain.deployment import Deployment
from node.chain.endpoints import Endpoints, Node, Rules
from node.chain.eth import Eth
from node.chain.jobs import EvmJobs
from node.chain.pending import History, Journal, no_journal
from node.chain.requesting import Requesting
from node.chain.rpc import Reverted, RpcUnavailable
from node.chain.slashes import EvmSlashes
from node.chain.tx_policy import DEFAULT_POLICY, TxPolicy
from node.chain.txs import TxSender
from node.chain.values import Header, Log
from node.chain.watcher import Watcher
from node.errors import ChainError
from node.ports import (
    ChainEvent,
    ChannelOnChain,
    ClaimEntry,
    Head,
    Signer,
    TokenInfo,
    TxResult,
    VaultOnChain,
    WorkerOnChain,
)
from protocol.ids import ZERO_ADDRESS, Address, ChannelId
from protocol.typed_data import ChannelConfig, Domain

T = TypeVar("T")
_CONTRACTS: Final[Mapping[str, tuple[str, ...]]] = {
    "Vault": (),
    "Workers": ("Vault",),
    "Channels": ("Vault", "Workers"),
    "Jobs": ("Vault", "Workers"),
    "Disputes": ("Vault", "Workers", "Jobs", "Channels"),
    "Committee": ("Vault", "Jobs", "Disputes"),
    "Attestations": (),
}
"""What a deployment has, in the order in which faults are told, and what each stands on; who stands on the Vault is a module."""
PAGE: Final = 5_000
"""Blocks that are searched at once for events: what public nodes still answer."""
_HINT = "check the deployment file: it must name Gristmill's contracts on this chain"


def config_tuple(config: ChannelConfig) -> tuple[bytes | int, ...]:
    """A channel config in the order of its Solidity struct."""
    return (
        config.payer,
        config.payer_authorizer,
        config.receiver,
        config.receiver_authorizer,
        config.token,
        config.withdraw_delay,
        config.salt,
    )


async def check_deployment(eth: Eth, deployment: Deployment) -> None:
    """Raises `ChainError` saying which contract is not ours and why."""
    found = await eth.chain_id()
    if found != deployment.chain_id:
        raise ChainError(f"the node is of chain {found}, the deployment of chain {deployment.chain_id}", hint=_HINT)
    names = [name for name in _CONTRACTS if deployment.has(name)]
    wrong: dict[str, str] = {}

    async def check(name: str) -> None:
        fault = await _fault(eth, deployment, name)
        if fault is not None:
            wrong[name] = fault

    async with trio.open_nursery() as nursery:  # two dozen questions: one after the other they would take seconds
        for name in names:
            nursery.start_soon(check, name)
    for name in names:
        if name in wrong:
            raise ChainError(wrong[name], hint=_HINT)


async def _fault(eth: Eth, deployment: Deployment, name: str) -> str | None:
    """Why the contract called `name` is not ours; None when it is."""
    address, ours = deployment.address_of(name), contract(name)
    code = await eth.code(address)
    if not code:
        return f"there is no contract at {address}, where {name} should be"
    if not ours.is_runtime(code):
        return f"the contract at {address} is not our {name}: its code differs"

    async def ask(entry: Contract, at: Address, function: str, *args: object) -> object:
        try:
            return entry.decode(function, await eth.eth_call(at, entry.encode(function, *args)))[0]
        except Reverted as error:
            raise ChainError(f"{entry.name}.{function} at {at} reverts", hint=_HINT) from error

    domain = {"Channels": deployment.domain, "Workers": deployment.workers_domain, "Jobs": deployment.jobs_domain}
    if name in domain and await ask(ours, address, "domainSeparator") != domain[name].separator:
        return f"{name} at {address} has another EIP-712 domain than ours"
    for below in _CONTRACTS[name]:
        if await ask(ours, address, below.lower()) != deployment.address_of(below):
            return f"{name} at {address} stands on another {below.lower()}"
    if _CONTRACTS[name] and await ask(contract("Vault"), deployment.vault, "isModule", address) is not True:
        return f"the Vault at {deployment.vault} does not know these {name}"
    return None


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


class EvmChain:
    """Implements `node.ports.Chain`. Make it with `connect`; `aclose` when done."""

    def __init__(
        self,
        nodes: Endpoints,
        deployment: Deployment,
        sender: TxSender | Requesting,
        *,
        poll: float,
        confirmations: int,
    ) -> None:
        self.nodes = nodes
        self._eth = AgreedEth(nodes)
        self._sender = sender
        self._poll = poll
        self._confirmations = confirmations
        self.deployment = deployment
        self._domain = deployment.domain
        self._workers_domain = deployment.workers_domain
        self._vault = contract("Vault")
        self._channels = contract("Channels")
        self._workers = contract("Workers")
        self._jobs = EvmJobs(self, confirmations=confirmations) if deployment.has("Jobs") else None

    @classmethod
    async def connect(
        cls,
        endpoints: Sequence[str],
        deployment: Deployment,
        signer: Signer,
        *,
        journal: Journal = no_journal,
        history: History = (),
        policy: TxPolicy = DEFAULT_POLICY,
        poll: float = 2.0,
        timeout: float = 20.0,
        rules: Rules | None = None,
    ) -> EvmChain:
        """Check the chain and our contracts, then bring the unfinished transactions of the journal (`history`) to their end.

        `poll` is seconds between looks for new blocks. Raises `ChainError` when no quorum of the nodes is reachable, one is of
        another chain, or the contracts are not ours.
        """
        nodes = Endpoints.over_http(endpoints, chain_id=deployment.chain_id, timeout=timeout, rules=rules)
        try:
            await nodes.meet()
            eth = AgreedEth(nodes)
            await check_deployment(eth, deployment)
            anchor = await eth.header(deployment.block)
            if anchor is None:
                raise ChainError(
                    f"the chain has no block {deployment.block}, where our contracts were made", hint=_HINT
                )
            sender = TxSender(
                eth,
                signer,
                deployment.chain_id,
                anchor=anchor.hash,
                journal=journal,
                error_name=error_name,
                policy=policy,
            )
            await sender.resume(history)
        except BaseException:
            await nodes.aclose()
            raise
        return cls(nodes, deployment, sender, poll=poll, confirmations=policy.confirmations)

    async def aclose(self) -> None:
        await self.nodes.aclose()

    # --------------------------------------------------------------------------------------------------------- looking

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

    @property
    def jobs(self) -> EvmJobs | None:
        return self._jobs

    @property
    def slashes(self) -> EvmSlashes:
        return EvmSlashes(self)

    @property
    def account(self) -> Address:
        return self._sender.account

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

    async def fee(self) -> int:
        return await self._sender.fee()

    # -------------------------------------------------------------------------------------------------------- changing

    def once(self, request: str) -> EvmChain:
        """The same chain, whose transactions are asked for under `request`: whatever is done again under this id is not sent
        again. An empty id is no id. Shares everything; close the original."""
        if not request:
            return self
        twin = copy.copy(self)
        twin._sender = Requesting(self._sender, request)
        return twin

    def has_answered(self, request: str, purpose: str) -> bool:
        """Whether the transaction called `purpose` of this request has its end."""
        return self._sender.has_answered(f"{request}:{purpose}")

    async def catch_up(self) -> None:
        await self._sender.catch_up()

    async def deposit(self, token: Address, amount: int) -> Sequence[TxResult]:
        """Into the vault, for this account. A token needs an approval of exactly `amount` first: two transactions.

        Stops at the first transaction that does not succeed.
        """
        vault = self.deployment.vault
        results = []
        if token != ZERO_ADDRESS:
            data = contract("TestToken").encode("approve", vault, amount)
            results.append(await self._sender.send("approve", token, data))
            if not results[-1].ok:
                return results
        data = self._vault.encode("deposit", token, amount, self.account)
        value = amount if token == ZERO_ADDRESS else 0
        results.append(await self._sender.send("deposit", vault, data, value))
        return results

    async def withdraw(self, token: Address, amount: int, to: Address) -> TxResult:
        data = self._vault.encode("withdraw", token, amount, to)
        return await self._sender.send("withdraw", self.deployment.vault, data)

    async def allocate(self, config: ChannelConfig, allocated: int, valid_before: int, signature: bytes) -> TxResult:
        arguments = (config_tuple(config), allocated, valid_before, signature)
        return await self._change("allocate", "allocate", *arguments, derived=True)

    async def claim(self, entries: Sequence[ClaimEntry]) -> TxResult:
        batch = [(config_tuple(e.config), e.amount, e.cumulative, e.signature) for e in entries]
        return await self._change("claim", "claim", batch, derived=True)

    async def settle(self, receiver: Address, token: Address) -> TxResult:
        return await self._change("settle", "settle", receiver, token, derived=True)

    async def close_channel(
        self,
        config: ChannelConfig,
        final: int,
        voucher: int,
        voucher_signature: bytes,
        close_signature: bytes,
    ) -> TxResult:
        return await self._change(
            "close", "close", config_tuple(config), final, voucher, voucher_signature, close_signature
        )

    async def initiate_withdraw(self, config: ChannelConfig) -> TxResult:
        return await self._change("initiate_withdraw", "initiateWithdraw", config_tuple(config))

    async def finalize_withdraw(self, config: ChannelConfig) -> TxResult:
        return await self._change("finalize_withdraw", "finalizeWithdraw", config_tuple(config))

    async def register_worker(self, hot_key: Address, payout: Address, deadline: int, signature: bytes) -> TxResult:
        data = self._workers.encode("register", hot_key, payout, deadline, signature)
        return await self._sender.send("register", self.deployment.workers, data)

    async def set_payout(self, hot_key: Address, payout: Address) -> TxResult:
        data = self._workers.encode("setPayout", hot_key, payout)
        return await self._sender.send("set_payout", self.deployment.workers, data)

    async def _change(self, purpose: str, function: str, *args: object, derived: bool = False) -> TxResult:
        return await self.change(purpose, "Channels", function, *args, derived=derived)

    async def view(
        self, name: str, function: str, *args: object, block: str | bytes = "latest", at: Address | None = None
    ) -> Any:
        """Ask the contract called `name`, or one that answers like it at another address. Raises `ChainError` when the
        deployment has none or it reverts."""
        address = self.deployment.address_of(name) if at is None else at
        return await self._view(contract(name), address, function, *args, block=block)

    async def change(self, purpose: str, name: str, function: str, *args: object, derived: bool = False) -> TxResult:
        """Send a transaction to the contract called `name`. `derived`: it follows from what the chain shows."""
        data = contract(name).encode(function, *args)
        return await self._sender.send(purpose, self.deployment.address_of(name), data, derived=derived)

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
